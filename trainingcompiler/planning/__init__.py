"""Which batch, and what changes with it. Compiles; runs nothing."""
