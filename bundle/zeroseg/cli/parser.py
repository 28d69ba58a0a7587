"""One way to read options and to end: what the user can mend is one line and exit code 2. Imports nothing that takes time."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from zeroseg.errors import ZeroSegError


class Parser(argparse.ArgumentParser):
    """Shows its description as it was written, takes ``--some_option`` for ``--some-option``, never guesses at shortened
    options, and raises its errors."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        # A value such as -600,1500 is no option either.
        self._negative_number_matcher = re.compile(r"^-\.?\d")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        return super().parse_known_args([*map(hyphens, given[:end]), *given[end:]], namespace)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            ZeroSegError: always.
        """
        raise ZeroSegError(f"{message}; --help explains the options")


def hyphens(word: str) -> str:
    """``--some_option=a_b`` -> ``--some-option=a_b``; what is no option stays."""
    if not word.startswith("--"):
        return word
    name, separator, value = word.partition("=")
    return name.replace("_", "-") + separator + value


def guarded(program: Callable[[], int]) -> int:
    """Run a program and return its exit code; what the user can mend is one line on stderr and 2, Ctrl-C is 130."""
    try:
        return program()
    except ZeroSegError as error:
        print(f"zeroseg: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"zeroseg: {interrupt or 'interrupted'}", file=sys.stderr)
        return 130
