"""Estimate the memory, arithmetic and time of inference and training before any download."""
