"""What a stage can train: one task per network, and the auxiliary losses."""
