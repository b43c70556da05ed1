"""The trainer: an ordered list of stages, each a task trained for a number of images (`python -m train`)."""
