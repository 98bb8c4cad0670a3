"""Launchers start worker processes and set their environment; they import neither a framework's adapter nor JAX."""
