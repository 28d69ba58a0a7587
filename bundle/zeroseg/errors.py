"""Errors a user can mend: the message says what is wrong and what to do."""


class ZeroSegError(ValueError):
    """An input, prompt or setting the user can correct; exit code 2 on the command line, HTTP 422 from a server."""


class WeightsError(ZeroSegError):
    """Weights are missing, incomplete, of a refused format, or do not match their SHA-256; HTTP 503 from a server."""
