"""What is kept with a run, as a JSON file."""

import os
from abc import ABC, abstractmethod
from typing import Self


class Saved(ABC):
    """Something that can be written as JSON and made anew of it."""

    @abstractmethod
    def to_json(self) -> str:
        """Return it as JSON."""

    @classmethod
    @abstractmethod
    def from_json(cls, text: str) -> Self:
        """Return what ``to_json`` wrote."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a JSON file."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return what is in a JSON file.

        Raises
        ------
        OSError, ValueError
            If it can't be read, or holds something else.
        """
        with open(path, encoding="utf-8") as file:
            return cls.from_json(file.read())
