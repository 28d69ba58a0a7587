"""What a prompt from outside may hold at all, before anybody asks what it means."""

from __future__ import annotations

from typing import Any

from zeroseg.errors import ZeroSegError

LARGEST = 2**53
"""Beyond it float64 tells whole numbers no longer apart; no image has as many pixels."""


def check_values(value: Any, name: str = "prompt") -> None:
    """Refuse numbers and texts that no array and no tokenizer can take.

    Args:
        value: a prompt as read from JSON: dictionaries, lists, texts, numbers.
        name: what the message calls it.

    Raises:
        ZeroSegError: a whole number is beyond ``LARGEST``, or a text is no valid Unicode.
    """
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ZeroSegError(f"{name}: a number of {value.bit_length() * 3 // 10 + 1} digits is beyond all images")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ZeroSegError(f"{name}: the text is no valid Unicode")
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in inner:
        check_values(item, str(key) if isinstance(value, dict) else name)
