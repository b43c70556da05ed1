"""Exit codes of a worker's process."""

WRONG_INPUT = 2  # the settings are wrong, so starting it again is of no use
DEVICE_LOST = 75  # start another one
