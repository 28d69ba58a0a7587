#!/usr/bin/env python
"""``zeroseg evaluate``, for those who know it by this name: python scripts/evaluate.py --help"""

import sys

from zeroseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
