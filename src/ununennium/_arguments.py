"""What several parts ask of their arguments."""

from numbers import Integral
from typing import Any


def integer(name: str, value: Any, minimum: int | None = None) -> int:
    """Return an argument as an int; NumPy's integers are some, bools and floats are none.

    Raises
    ------
    TypeError
        If it is no integer.
    ValueError
        If it is below ``minimum``.
    """
    least = "" if minimum is None else f" of at least {minimum}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer{least}, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)
