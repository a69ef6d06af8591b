"""Exact references, peaks of memory, and the protocol of an evaluation."""
