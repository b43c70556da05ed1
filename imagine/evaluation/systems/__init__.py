"""What can be evaluated: one interface for pipelines, other methods, and folders of finished pictures."""
