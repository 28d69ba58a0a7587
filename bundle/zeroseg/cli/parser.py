"""How the scripts end: what the user can mend is one line and exit code 2. Imports nothing that takes time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from zeroseg.errors import ZeroSegError


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line, and shows the text of its script as it was written."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise ZeroSegError(f"{message}; --help explains the options")


def end(program: Callable[[], int], interrupted: str = "interrupted") -> NoReturn:
    """Run a program and leave the process with its exit code.

    Args:
        program: returns the code; an error the user can mend becomes 2, Ctrl-C 130.
        interrupted: what to say after Ctrl-C.
    """
    try:
        code = program()
    except ZeroSegError as error:
        print(f"zeroseg: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"zeroseg: {interrupted}", file=sys.stderr)
        code = 130
    raise SystemExit(code)
