"""The captured step as a graph of ATen operators, and passes from nodes to nodes.

No loop and no module; of JAX only which operators are views.
"""
