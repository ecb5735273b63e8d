"""How names of models are compared."""

from __future__ import annotations


def normalize(name: str) -> str:
    """Return the form in which names are compared."""
    return name.lower().replace("-", "_")
