"""The same step without running it: described devices, other batch sizes, the memory of eager."""
