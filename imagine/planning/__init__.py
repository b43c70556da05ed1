"""Estimate memory, arithmetic and time of inference and training before anything is downloaded."""
