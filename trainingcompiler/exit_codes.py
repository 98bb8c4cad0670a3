"""Exit codes that mean something to whoever started a worker."""

REQUEUE = 75  # EX_TEMPFAIL: what a worker that was told to stop, and saved, leaves with to be queued again
