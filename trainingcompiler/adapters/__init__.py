"""Which framework a script uses, and what adapters do alike: fallback lines, import hooks, the registry of patches."""
