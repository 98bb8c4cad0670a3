"""Decides: what is recorded, when the tape runs, who runs it, and what is left to torch. Knows torch's loops."""
