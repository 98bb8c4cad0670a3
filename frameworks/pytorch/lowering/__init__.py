"""From graph to a function on JAX arrays, and its cache key. Pure."""
