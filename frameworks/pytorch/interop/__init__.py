"""Small questions to torch, and values of torch as values of JAX. Imports no other room of this adapter."""
