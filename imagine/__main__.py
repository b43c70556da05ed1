"""`python -m imagine` runs the command `imagine`."""

import sys

from imagine.cli import main

if __name__ == "__main__":
    sys.exit(main())
