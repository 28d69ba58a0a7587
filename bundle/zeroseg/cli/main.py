"""Finds the command, reads its options and ends with its exit code.

A command is a module of this package with a docstring (its help), ``add_arguments(parser)`` and ``run(args)``, which returns the
exit code; ``COMMANDS`` names it. The modules import what takes time only inside ``run``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from zeroseg import __version__
from zeroseg.cli.parser import Parser, guarded

COMMANDS = {
    "segment": "images: masks by a rule, clicks, a box or words",
    "tumor": "volumes: tumours by words, with the evidence",
    "learn": "from a few images and their masks, for --learned of segment",
    "batch": "a cohort, on several processes or a cluster, taken up again where it ended",
    "rerun": "the cases of a manifest again, compared bit for bit",
    "serve": "OHIF and 3D Slicer, through MONAI Label",
    "evaluate": "measure masks against the truth",
    "completion": "print what makes a shell complete these commands",
}
"""Command -> what its line in ``zeroseg --help`` says."""

DESCRIPTION = """Zero-shot segmentation of biomedical images with frozen diffusion models. Research use only.

    zeroseg segment IMAGES --output-dir OUT
    zeroseg segment cell.png --output-dir OUT --points 60,60
    zeroseg COMMAND --help

Options may be written with - or _ (--output-dir, --output_dir). Exit code 2: something the user can mend, said in one line.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: without the program's name; None: the process's own.

    Returns:
        the exit code: 0, or 2 when something the user can mend went wrong; 130 after Ctrl-C; see the commands for others.
    """
    # OpenMP reads it when torch is imported. Threads that spin while they wait for each other take the core from the one they
    # wait for: beside another job on the same cores an inference takes four times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    given = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: run(given))


def run(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code.

    Raises:
        ZeroSegError: an option is missing, unknown or of a wrong value, or the command says what else is to be mended.
    """
    args = build_parser(argv).parse_args(argv)
    return args.run(args)


def build_parser(argv: Sequence[str] = (), whole: bool = False) -> Parser:
    """The parser: with the options of the command that ``argv`` names, or ``whole``, with those of all."""
    parser = Parser(prog="zeroseg", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"zeroseg {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for name, summary in COMMANDS.items():
        if whole or name in argv[:1]:
            module = _module(name, argv)
            command = commands.add_parser(name, help=summary, description=module.__doc__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
        else:
            commands.add_parser(name, help=summary)
    return parser


def _module(name: str, argv: Sequence[str]) -> ModuleType:
    """The module of a command; what ``--inferer tumor`` evaluates has options of its own."""
    if name == "evaluate":
        from zeroseg.cli.evaluate import asked_inferer

        name = "evaluate_tumor" if asked_inferer(argv[1:]) == "tumor" else name
    return import_module(f"zeroseg.cli.{name}")
