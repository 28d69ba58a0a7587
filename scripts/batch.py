#!/usr/bin/env python
"""``zeroseg batch``, for those who know it by this name: python scripts/batch.py --help"""

import sys

from zeroseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["batch", *sys.argv[1:]]))
