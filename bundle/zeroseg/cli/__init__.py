"""``zeroseg COMMAND``: the command line. Nothing heavy is imported before a command has read its options."""

from zeroseg.cli.main import main

__all__ = ["main"]
