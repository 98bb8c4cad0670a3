"""Which worker this is, where the others are, and how a worker ends. No compiler."""
