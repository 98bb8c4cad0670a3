"""Our own `torch.library` operators, with their eager implementations.

Those that talk to other workers are in `session.ddp`.
"""
