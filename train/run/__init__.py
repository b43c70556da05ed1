"""Parts of a training run around its step: checkpoints, optimisers, weight averages, reports, validation pictures."""
