"""Compares one run of a program with torch: the numeric sentinel, and what `check` says."""
