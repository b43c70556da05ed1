"""What a training run needs around its step: checkpoints, optimisers, averages, reports and validation pictures."""
