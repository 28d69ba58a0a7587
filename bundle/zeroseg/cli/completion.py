"""Print a script that makes a shell complete the commands and options of zeroseg.

zeroseg completion bash >> ~/.bashrc
zeroseg completion zsh > ~/.zfunc/_zeroseg
"""

from __future__ import annotations

import argparse

from zeroseg.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])


def run(args: argparse.Namespace) -> int:
    import shtab

    from zeroseg.cli.main import build_parser

    print(shtab.complete(build_parser(whole=True), shell=args.shell))
    return 0
