"""``python -m zeroseg``."""

import sys

from zeroseg.cli import main

if __name__ == "__main__":
    sys.exit(main())
