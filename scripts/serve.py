#!/usr/bin/env python
"""``zeroseg serve``, for those who know it by this name: python scripts/serve.py --help"""

import sys

from zeroseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
