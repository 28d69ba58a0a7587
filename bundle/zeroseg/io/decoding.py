"""Whatever a parser raises on a damaged file becomes one line for the user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zeroseg.errors import MemoryShortage, ZeroSegError, is_out_of_memory


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turn whatever a parser raises on a damaged file into one line for the user."""
    try:
        yield
    except ZeroSegError as error:
        raise ZeroSegError(one_line(error)) from error.__cause__
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryShortage(f"{path}: not enough memory to read it; crop or downsample it first") from error
        raise ZeroSegError(
            one_line(
                f"{path}: cannot be read, it is truncated, damaged or not an image ({_brief(error)}); export it again"
            )
        ) from error


def one_line(message: object) -> str:
    """A message as one line: what a damaged header puts into it may hold line breaks and control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in str(message))


def _brief(error: Exception) -> str:
    """The line of an error's text that names the cause, at most 120 characters; ITK (RuntimeError) puts it last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[-1 if isinstance(error, RuntimeError) else 0] if lines else type(error).__name__
    return re.sub(r"^ITK ERROR: \w+\(0x\w+\): ", "", line)[:120]
