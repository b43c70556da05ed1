"""`python -m train.methods METHOD --photos PHOTO... --output DIR`: learn a person, draw one, or measure a method.

Exit codes: 0 done; 1 an error of the program; 2 the input is wrong; 3 stopped cleanly before the end, and the same
command carries on.
"""

import sys

from train.methods.command import main

if __name__ == "__main__":
    sys.exit(main())
