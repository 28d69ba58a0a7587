#!/usr/bin/env python
"""``zeroseg rerun``, for those who know it by this name: python scripts/rerun.py --help"""

import sys

from zeroseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["rerun", *sys.argv[1:]]))
