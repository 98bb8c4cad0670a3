"""What the loop has asked for: calls, deferred tensors, and the recording that they are compared with.

Decides nothing, and runs nothing of itself: `replay` runs an entry for whoever runs a tape.
"""
