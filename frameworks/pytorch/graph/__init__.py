"""The captured step as a graph of ATen operators, and passes from nodes to nodes. No JAX, no loop, no module."""
