"""Which framework a script uses, and what both adapters do alike."""
