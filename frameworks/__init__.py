"""Adapters, one for each framework: none imports another one's, but for what is built on another framework."""
