"""Scenes cut into parts by blocks, so that what a model is judged by is not what it was trained on."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ununennium._arguments import integer
from ununennium.data._assignment import assign
from ununennium.data._classes import Classes
from ununennium.data._lattice import Lattice, check_apart, lattices_of
from ununennium.data._places import Blocks, Places
from ununennium.data._saved import Saved
from ununennium.data._scenes import as_scenes, targets_in
from ununennium.data.scene import Scene


class Region:
    """One part of a split: where chips may lie, to be passed to `Chips`.

    Attributes
    ----------
    name : str
    block, buffer : int
        Pixels.
    """

    def __init__(self, split: "Split", name: str) -> None:
        self.name = name
        self.block: int = split.block
        self.buffer: int = split.buffer
        self._part = list(split).index(name)
        self._lattices = split._lattices

    def __repr__(self) -> str:
        return f"Region({self.name!r}, block={self.block}, buffer={self.buffer})"

    @classmethod
    def load(cls, path: str | os.PathLike[str], name: str) -> "Region":
        """Return a part of the split in a JSON file."""
        return Split.load(path)[name]

    def blocks_of(self, scene: Scene) -> Blocks:
        """Return the blocks that a scene lies in.

        Raises
        ------
        ValueError
            If it lies outside the scenes that were split, or on another grid.
        """
        for lattice, parts in self._lattices:
            offset = lattice.offset(scene)
            if offset is None:
                continue
            row, col = offset
            if row < 0 or col < 0 or row + scene.shape[0] > lattice.shape[0] or col + scene.shape[1] > lattice.shape[1]:
                continue
            # Only the blocks within reach: scenes of one projection may lie far apart.
            top, bottom = _reach(row, scene.shape[0], self.block, self.buffer, parts.shape[0])
            left, right = _reach(col, scene.shape[1], self.block, self.buffer, parts.shape[1])
            near = parts[top:bottom, left:right]
            own = parts[_span(lattice, scene, self.block)]
            if (own < 0).any():
                continue
            return Blocks(near, self._part, self.block, self.buffer, row - top * self.block, col - left * self.block)
        raise ValueError(
            f"{scene} is not among the scenes that were split, nor within them on the same pixel grid: pass to Chips "
            "scenes that were passed to block_split"
        )


class Split(Saved, Mapping[str, Region]):
    """Parts of scenes by name, as `block_split` makes them; keep it with the run by ``save``.

    Attributes
    ----------
    fractions : dict of str to float
        What was asked for.
    block, buffer : int
        Pixels.
    seed : int
    report : dict
        ``report["parts"][name]`` has the part's number of ``blocks``; its ``pixels`` (labelled ones, where there are
        labels) and their ``share`` of all; by class name ``classes`` (pixels) and ``class_shares`` (of the class's
        pixels in all parts; None for a class without any). All this before the buffer is taken off; ``kept`` is the
        share of the part's ground that it leaves.
    """

    _name = "this is no split"

    def __init__(
        self,
        fractions: Mapping[str, float],
        block: int,
        buffer: int,
        seed: int,
        lattices: Sequence[tuple[Lattice, NDArray[np.int16]]],
        report: dict[str, Any],
    ) -> None:
        self.fractions: dict[str, float] = dict(fractions)
        self.block = block
        self.buffer = buffer
        self.seed = seed
        self.report = report
        self._lattices = list(lattices)

    def __getitem__(self, name: str) -> Region:
        if name not in self.fractions:
            raise KeyError(f"the split has no part {name!r}: its parts are {', '.join(self.fractions)}")
        return Region(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.fractions)

    def __len__(self) -> int:
        return len(self.fractions)

    def __str__(self) -> str:
        parts = self.report["parts"]
        names = list(next(iter(parts.values()))["classes"])
        wide = max(map(len, ["pixels", *names]))
        lines = [" " * wide + "".join(f"{name:>22}" for name in parts)]
        lines.append(f"{'blocks':<{wide}}" + "".join(f"{part['blocks']:>22,}" for part in parts.values()))
        lines.append(f"{'kept':<{wide}}" + "".join(f"{part['kept']:>22.1%}" for part in parts.values()))
        rows = [("pixels", [(part["pixels"], part["share"]) for part in parts.values()])]
        rows += [(n, [(part["classes"][n], part["class_shares"][n]) for part in parts.values()]) for n in names]
        for name, entries in rows:
            cells = (
                f"{pixels:,}" + (f"{share:8.1%}" if share is not None else f"{'-':>8}") for pixels, share in entries
            )
            lines.append(f"{name:<{wide}}" + "".join(f"{cell:>22}" for cell in cells))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Split({self.fractions}, block={self.block}, buffer={self.buffer}, seed={self.seed})"

    def _state(self) -> dict[str, Any]:
        lattices = []
        for lattice, parts in self._lattices:
            blocks = {name: np.argwhere(parts == number).tolist() for number, name in enumerate(self)}
            lattices.append(
                {
                    "crs": lattice.crs,
                    "transform": list(lattice.transform),
                    "shape": list(lattice.shape),
                    "image": None if lattice.image is None else list(lattice.image),
                    "blocks": blocks,
                }
            )
        return {
            "fractions": self.fractions,
            "block": self.block,
            "buffer": self.buffer,
            "seed": self.seed,
            "report": self.report,
            "grids": lattices,
        }

    @classmethod
    def _of_state(cls, state: Mapping[str, Any]) -> Self:
        lattices = []
        for each in state["grids"]:
            image = None if each["image"] is None else tuple(each["image"])
            height, width = each["shape"]
            lattice = Lattice(each["crs"], tuple(each["transform"]), (height, width), image)
            parts = np.full(_num_blocks((height, width), state["block"]), -1, np.int16)
            for number, name in enumerate(state["fractions"]):
                places = np.array(each["blocks"][name], np.int64).reshape(-1, 2)
                parts[places[:, 0], places[:, 1]] = number
            lattices.append((lattice, parts))
        return cls(state["fractions"], state["block"], state["buffer"], state["seed"], lattices, state["report"])


def block_split(
    scenes: Scene | Sequence[Scene],
    fractions: Mapping[str, float],
    block: int,
    buffer: int = 0,
    seed: int = 0,
    *,
    classes: Mapping[int, str] | Sequence[str] | None = None,
    ignore_index: int = 255,
    ignore_values: Sequence[int] = (),
    bands: Sequence[str | int] | None = None,
    allow_overlap: bool = False,
) -> Split:
    """Cut scenes into parts by blocks, every class shared out as the parts are, as far as it can be.

    A chip is of a part if every block that it touches is, and if it stays ``buffer`` pixels away from the blocks of
    parts that come later in ``fractions``. So any two chips of different parts have at least ``buffer`` pixels between
    them in rows or in columns, and the last part loses nothing. Scenes on one pixel grid, such as several dates of one
    place or neighbouring tiles, share their blocks: the same ground is in one part at all dates. The distance between
    scenes on different grids is not looked at, but they must not overlap.

    Parameters
    ----------
    scenes : Scene or sequence of Scene
    fractions : mapping of str to float
        Share of each part; they sum to 1. ``{"train": 0.7, "val": 0.15, "test": 0.15}``.
    block : int
        Side of a block, pixels; a remainder is added to the last. At least the size of chips. The larger it is
        against the distance over which the ground is alike, the more the parts differ as new places would; the smaller,
        the better classes can be balanced.
    buffer : int, default 0
        Pixels between chips of different parts. It is taken off the edges of blocks of earlier parts: with blocks of
        less than some buffers little of the first part is left, as the report's ``kept`` says.
    seed : int, default 0
        Equal calls with equal seeds give equal splits.
    classes, ignore_index, ignore_values
        What label values mean, as for `Chips`.
    bands : sequence of str or int, optional
        Bands in which a pixel must have data to be counted; all by default.
    allow_overlap : bool, default False
        Take scenes that overlap on different grids.

    Returns
    -------
    Split
        Mapping of names to regions; ``print(split)`` shows what each part holds.

    Raises
    ------
    TypeError
        If ``block``, ``buffer``, ``seed``, ``ignore_index`` or a label value is no integer.
    ValueError
        If fractions do not sum to 1, there are fewer blocks than parts, some scenes have labels and others do not, a
        label is none of the classes, or scenes overlap on different grids.

    Notes
    -----
    Why not at random: where chips overlap, nearly all pixels of those drawn for validation lie in a training chip too,
    and where they do not, nearly all still touch one. What they tell is how well the training pixels were learnt.
    Split by blocks, no pixel is in both. ``examples/random_split.py`` prints the shares for the Indian Pines scene.

    Examples
    --------
    >>> split = block_split(scenes, {"train": 0.7, "val": 0.15, "test": 0.15}, block=512, buffer=64)  # doctest: +SKIP
    >>> train = Chips(scenes, 128, region=split["train"], length=1000)  # doctest: +SKIP
    """
    scenes = as_scenes(scenes)
    shares = _checked_fractions(fractions)
    block, buffer, seed = integer("block", block, 1), integer("buffer", buffer, 0), integer("seed", seed, 0)
    groups = lattices_of(scenes)
    if not allow_overlap:
        check_apart(groups)
    meaning = Classes(classes, ignore_index, ignore_values)
    tables = [_table_of_blocks(lattice, members, block) for lattice, members in groups]
    blocks = sum(int((table >= 0).sum()) for table in tables)
    if blocks < len(shares):
        raise ValueError(
            f"there are {blocks} blocks of {block} x {block} pixels for {len(shares)} parts, so that "
            f"{list(fractions)[blocks]!r} would be empty: choose smaller blocks, or fewer parts"
        )
    pixels, by_target = _count(groups, tables, block, meaning, bands)
    if not pixels.any():
        raise ValueError(
            f"no pixel of {scenes[0]}{' and the others' if len(scenes) > 1 else ''} has data and a label: see that the "
            "files' nodata values, ignore_index and ignore_values are right"
        )
    given = assign(np.stack([pixels, *by_target.values()], axis=1), shares, seed)
    for table, start in zip(tables, _starts(tables), strict=True):
        present = table >= 0
        table[present] = given[start : start + int(present.sum())]
    targets = sorted(by_target) if meaning.values is None else range(len(meaning.values))
    absent = np.zeros_like(pixels)
    classes_found = {meaning.name_of(target): by_target.get(target, absent) for target in targets if scenes[0].label}
    split = Split(
        {name: float(share) for name, share in fractions.items()},
        block,
        buffer,
        seed,
        [(lattice, table) for (lattice, _), table in zip(groups, tables, strict=True)],
        _report(list(fractions), given, pixels, classes_found),
    )
    for name, region in split.items():
        split.report["parts"][name]["kept"] = _kept(region, scenes)
    return split


def _kept(region: Region, scenes: Sequence[Scene]) -> float:
    """Return which share of a part's pixels the buffer leaves: a pixel is a window of one."""
    left, own = 0, 0
    for scene in scenes:
        blocks = region.blocks_of(scene)
        left += Places(scene.shape, (1, 1), blocks).count
        own += Places(scene.shape, (1, 1), blocks.without_buffer()).count
    return left / own


def _table_of_blocks(lattice: Lattice, members: Sequence[Scene], block: int) -> NDArray[np.int16]:
    """Return 0 for each block that a scene lies in, and -1 for others."""
    table = np.full(_num_blocks(lattice.shape, block), -1, np.int16)
    for scene in members:
        rows, cols = _span(lattice, scene, block)
        table[rows, cols] = 0
    return table


def _count(
    groups: Sequence[tuple[Lattice, Sequence[Scene]]],
    tables: Sequence[NDArray[np.int16]],
    block: int,
    meaning: Classes,
    bands: Sequence[str | int] | None,
) -> tuple[NDArray[np.int64], dict[int, NDArray[np.int64]]]:
    """Return each block's pixels, of all that count and by target."""
    total = sum(int((table >= 0).sum()) for table in tables)
    pixels = np.zeros(total, np.int64)
    by_target: dict[int, NDArray[np.int64]] = {}
    for (lattice, members), table, start in zip(groups, tables, _starts(tables), strict=True):
        numbers = start + np.cumsum(table >= 0).reshape(table.shape) - 1
        for scene in members:
            row, col = _offset(lattice, scene)
            for window, targets in targets_in(scene, meaning, scene.band_indices(bands)):
                rows = _block_numbers(row + window.row, window.height, block, table.shape[0])
                cols = _block_numbers(col + window.col, window.width, block, table.shape[1])
                near = numbers[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
                places = near[rows[:, None] - rows[0], cols - cols[0]]
                counted = targets != meaning.ignore_index
                pixels += np.bincount(places[counted], minlength=total)
                for target in np.unique(targets[counted]).tolist() if scene.label is not None else ():
                    held = np.bincount(places[targets == target], minlength=total)
                    by_target[target] = by_target.get(target, 0) + held
    return pixels, by_target


def _starts(tables: Sequence[NDArray[np.int16]]) -> list[int]:
    """Return how many blocks come before those of each table."""
    return [0, *np.cumsum([(table >= 0).sum() for table in tables[:-1]], dtype=np.int64).tolist()]


def _offset(lattice: Lattice, scene: Scene) -> tuple[int, int]:
    offset = lattice.offset(scene)
    assert offset is not None
    return offset


def _span(lattice: Lattice, scene: Scene, block: int) -> tuple[slice, slice]:
    """Return the rows and columns of the blocks that a scene lies in."""
    rows, cols = (
        slice(_block(start, block, count), _block(start + extent - 1, block, count) + 1)
        for start, extent, count in zip(
            _offset(lattice, scene), scene.shape, _num_blocks(lattice.shape, block), strict=True
        )
    )
    return rows, cols


def _report(
    names: list[str], given: NDArray[np.int16], pixels: NDArray[np.int64], classes: dict[str, NDArray[Any]]
) -> dict[str, Any]:
    def share(of: NDArray[Any], own: NDArray[np.bool_]) -> float | None:
        return float(of[own].sum() / of.sum()) if of.any() else None

    parts = {}
    for number, name in enumerate(names):
        own = given == number
        parts[name] = {
            "blocks": int(own.sum()),
            "pixels": int(pixels[own].sum()),
            "share": share(pixels, own),
            "classes": {label: int(counts[own].sum()) for label, counts in classes.items()},
            "class_shares": {label: share(counts, own) for label, counts in classes.items()},
        }
    return {"parts": parts}


def _checked_fractions(fractions: Mapping[str, float]) -> NDArray[np.float64]:
    shares = np.array([float(share) for share in fractions.values()], np.float64)
    if len(shares) == 0 or not (shares > 0).all() or not math.isclose(shares.sum(), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"fractions must be positive and sum to 1, got {dict(fractions)} (sum {shares.sum():g}): for a part that "
            "is not used, name one more"
        )
    shares /= shares.sum()
    return shares


def _num_blocks(shape: tuple[int, int], block: int) -> tuple[int, int]:
    """Return rows and columns of blocks; what is left over belongs to the last of each."""
    return max(shape[0] // block, 1), max(shape[1] // block, 1)


def _block(pixel: int, block: int, count: int) -> int:
    return min(pixel // block, count - 1)


def _reach(start: int, extent: int, block: int, buffer: int, count: int) -> tuple[int, int]:
    """Return the first block, and the one after the last, within a distance of a stretch of pixels."""
    first = max(_block(max(start - buffer, 0), block, count), 0)
    return first, _block(start + extent - 1 + buffer, block, count) + 1


def _block_numbers(start: int, extent: int, block: int, count: int) -> NDArray[np.int64]:
    return np.minimum(np.arange(start, start + extent) // block, count - 1)
