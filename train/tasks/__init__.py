"""The tasks that a stage can train, one per network, and their auxiliary losses."""
