"""Everything that the project adds to a denoiser: parallel attention, projections and the adapter object."""
