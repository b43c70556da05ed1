"""The trainer (`python -m train`): a run is an ordered list of stages; each trains one task for a number of images."""
