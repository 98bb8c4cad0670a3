"""From tape to graph: all that is true only while fake tensors are recorded."""
