"""What the values of label rasters mean."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ununennium._arguments import integer
from ununennium.data.scene import Scene, Window

_UNKNOWN = np.iinfo(np.int64).min


class Classes:
    """Label values made targets: 0 to K-1 for K classes, and one that counts as none.

    Parameters
    ----------
    classes : mapping of int to str, sequence of str, or None
        Names of label values; of 0, 1, … where only names are given. None leaves values as they are.
    ignore_index : int
        The target of what is unlabelled or ignored. As a label value that is no class it means the same.
    ignore_values : sequence of int
        Label values that count as unlabelled.

    Attributes
    ----------
    names : tuple of str or None
    values : tuple of int or None
        Each class's value in label rasters.

    Raises
    ------
    TypeError
        If a label value or ``ignore_index`` is no integer.
    ValueError
        If a value or a name is there twice, none is, or one value means two things.
    """

    def __init__(
        self, classes: Mapping[int, str] | Sequence[str] | None, ignore_index: int, ignore_values: Sequence[int]
    ) -> None:
        self.ignore_index = integer("ignore_index", ignore_index)
        self.ignored = tuple(integer("a label value in ignore_values", value) for value in ignore_values)
        self.names: tuple[str, ...] | None = None
        self.values: tuple[int, ...] | None = None
        self._tables: dict[np.dtype[Any], NDArray[np.int64]] = {}
        if classes is None:
            return
        if isinstance(classes, str):
            raise ValueError(f"classes must be a mapping of values to names, or a sequence of names, got {classes!r}")
        named = dict(classes) if isinstance(classes, Mapping) else dict(enumerate(classes))
        self.values = tuple(integer("a label value in classes", value) for value in named)
        self.names = tuple(str(name) for name in named.values())
        if not self.values:
            raise ValueError("classes is empty: name each class, or leave classes out to keep label values as they are")
        for what, entries in (("value", self.values), ("name", self.names)):
            if len(set(entries)) < len(entries):
                raise ValueError(f"classes has a {what} twice: {list(entries)}. Give each class one of its own")
        if 0 <= self.ignore_index < len(self.values):
            raise ValueError(
                f"ignore_index={self.ignore_index} is also the target of class {self.names[self.ignore_index]!r}: "
                f"choose one that is not in 0 to {len(self.values) - 1}"
            )
        both = sorted(set(self.values) & set(self.ignored))
        if both:
            raise ValueError(f"label value {both[0]} is a class and in ignore_values: leave it out of one")

    def encode(
        self, labels: NDArray[np.integer[Any]], labelled: NDArray[np.bool_], scene: Scene, window: Window
    ) -> NDArray[np.int64]:
        """Return the targets of a window's labels, int64.

        Raises
        ------
        ValueError
            If a label is none of the classes; the message names file, pixel and value.
        """
        if self.values is None:
            targets = labels.astype(np.int64)
            if self.ignored:
                targets[np.isin(labels, self.ignored)] = self.ignore_index
        elif labels.dtype.itemsize <= 2:
            targets = self._table(labels.dtype)[labels.view(f"u{labels.dtype.itemsize}")]
        else:
            targets = self._find(labels.astype(np.int64))
        targets[~labelled] = self.ignore_index
        if self.values is not None and (targets == _UNKNOWN).any():
            row, col = np.argwhere(targets == _UNKNOWN)[0].tolist()
            value = int(labels[row, col])
            known = ", ".join(str(known) for known in self.values[:20]) + (", …" if len(self.values) > 20 else "")
            raise ValueError(
                f"{scene.label}: the label at row {window.row + row}, column {window.col + col} is {value}, which is "
                f"none of the classes ({known}) (window {tuple(window)}): name it in classes, or ignore it with "
                f"ignore_values [{value}]"
            )
        return targets

    def _table(self, dtype: np.dtype[Any]) -> NDArray[np.int64]:
        """Return the target of every value that a type of one or two bytes can have, by its bits."""
        if dtype not in self._tables:
            every = np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype)
            self._tables[dtype] = self._find(every.astype(np.int64))
        return self._tables[dtype]

    def _find(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        assert self.values is not None
        meaning = dict.fromkeys((self.ignore_index, *self.ignored), self.ignore_index)
        meaning |= {value: index for index, value in enumerate(self.values)}
        known = np.array(sorted(meaning), np.int64)
        targets = np.array([meaning[int(value)] for value in known], np.int64)
        at = np.searchsorted(known, values).clip(max=len(known) - 1)
        return np.where(known[at] == values, targets[at], _UNKNOWN)

    def name_of(self, target: int) -> str:
        """Return a target's name."""
        return str(target) if self.names is None else self.names[target]
