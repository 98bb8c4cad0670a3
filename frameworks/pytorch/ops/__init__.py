"""Our own `torch.library` operators, with their eager implementations."""
