"""Errors a user can mend: the message says what is wrong and what to do."""


class ZeroSegError(ValueError):
    """An input, prompt or setting the user can correct; exit code 2 on the command line, HTTP 422 from a server."""


class WeightsError(ZeroSegError):
    """Weights are missing, incomplete, of a refused format, or do not match their SHA-256; HTTP 503 from a server."""


class MemoryShortage(ZeroSegError):
    """This machine has not enough memory for what was asked; HTTP 503 from a server."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: Python, numpy, torch on CPU and GPU, oneDNN and ITK each say it
    in their own way."""
    said = str(error).lower()
    phrases = (
        "out of memory",
        "can't allocate memory",
        "cannot allocate memory",
        "bad_alloc",
        "failed to allocate",
        "storage size calculation overflowed",
    )
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(p in said for p in phrases))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that says something (one that ends in a colon only announces the next),
    or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]) if lines else type(error).__name__
