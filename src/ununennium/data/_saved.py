"""What is kept with a run, as a JSON file."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from ununennium._checkpoint_files import whole_or_absent

_FORMAT = 1


class Saved(ABC):
    """Something that can be written as JSON and made anew of it."""

    _name: ClassVar[str]  # as in "this is no split"

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Return what JSON has to hold."""

    @classmethod
    @abstractmethod
    def _of_state(cls, state: Mapping[str, Any]) -> Self:
        """Return what ``_state`` described."""

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps({"format": _FORMAT, **self._state()}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return what ``to_json`` wrote.

        Raises
        ------
        ValueError
            If the text is nothing of the kind.
        """
        try:
            read = json.loads(text)
            if read["format"] != _FORMAT:
                raise ValueError(f"its format is {read['format']}, and this version reads {_FORMAT}")
            return cls._of_state(read)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{cls._name} that {cls.__name__}.to_json wrote: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a JSON file, whole or not at all; its folder is made if need be.

        Raises
        ------
        OSError
            If it can't be written; what was there before stays.
        """
        with whole_or_absent(Path(path)) as aside:
            aside.write_text(self.to_json(), encoding="utf-8")

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
