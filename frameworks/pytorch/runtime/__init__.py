"""Runs programs: found by signature, their arguments bound, their results stored."""
