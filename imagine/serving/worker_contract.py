"""What the server and its worker processes agree on: exit codes, and the variable that numbers the workers."""

WRONG_INPUT = 2  # the settings are wrong, so starting it again is of no use
DEVICE_LOST = 75  # start another one
WORKER_NUMBER = "IMAGINE_WORKER_NUMBER"  # from 0; worker N takes GPU N of those that it sees
