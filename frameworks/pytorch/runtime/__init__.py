"""Runs programs: found at the end of a path of the recording, their arguments bound, their results stored."""
