"""Chips: windows of scenes, as samples for training."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ununennium._arguments import integer
from ununennium.data._classes import Classes
from ununennium.data._focus import ClassPixels
from ununennium.data._places import Places, paint
from ununennium.data._scenes import as_scenes, targets_in
from ununennium.data.scene import Scene, Window
from ununennium.data.split import Region

Sample = dict[str, Any]

_TRIES = 20  # random windows looked at for one with enough valid pixels


class Chips(Dataset[Sample]):
    """Windows of one or many scenes, on a grid or at random, as a map-style dataset.

    A sample is a dict of tensors, with the keys that TorchGeo uses: ``image`` (C, height, width) in the raster's own
    type, ``mask`` (height, width) int64 if scenes have labels, ``transform`` (6) float64, the affine coefficients
    a … f of the chip, ``bounds`` (4) float64, its left, bottom, right and top coordinates; and ``window`` (5) int64,
    the place of its scene in ``scenes``, and its row, column, height and width there.

    A pixel is valid where every band that is read has data. Any other, and what lies beyond the scene, is given
    ``fill`` in all bands and ``ignore_index`` in the mask.

    Parameters
    ----------
    scenes : Scene or sequence of Scene
    size : int or pair of ints
        Height and width of a chip, pixels.
    bands : sequence of str or int, optional
        Found by name in each scene. By default all of the first scene.
    stride : int or pair of ints, optional
        Chips lie on a grid with this distance, by default their size. The last of each row and column ends at the
        scene's edge, so that every pixel is in a chip. In a region the grid starts anew in each block.
    length : int, optional
        Chips lie at random instead, uniformly over all positions, and an epoch has so many. They are drawn when they
        are read, from PyTorch's global generator: under `ununennium.training.Trainer` a chip is a function of seed,
        epoch and its place in the order, and another one in the next epoch.
    region : Region, optional
        A part of a split; by default scenes as a whole.
    classes : mapping of int to str, or sequence of str, optional
        Names of label values (of 0, 1, … where only names are given); targets are 0 … K-1 in this order. By default
        targets are label values as they are.
    ignore_index : int, default 255
        Target of pixels that are unlabelled, ignored or not valid. A label value that equals it, and is no class, is
        taken as unlabelled.
    ignore_values : sequence of int
        Label values that count as unlabelled.
    fill : float, default 0
        Value of pixels that are not valid, in the raster's type.
    min_valid : float, default 0
        Share of a chip's pixels, from 0 to 1, that must be valid, and labelled if there are labels. Chips of a grid
        that have less are left out, for which all are read once when the dataset is made; random ones are drawn anew,
        and after 20 tries the best of them is taken.
    focus : float, default 0
        Share of random chips, from 0 to 1, that are drawn for a class: first a class, each as likely, then one of its
        pixels, then a position, among those at which the chip contains the pixel. Rare classes are so seen more often
        than they are met. Labels are read once when the dataset is made, and 10,000 pixels of each class kept.
    focus_classes : sequence of str or int, optional
        Names or label values of the classes to be drawn; by default all that there are.
    once : bool, default False
        Of a pixel that several chips of the grid hold, the first alone has the target, the others ``ignore_index``: for
        validation, whose figures then count each pixel once.
    transform : callable, optional
        Given each sample; what it returns is the sample.

    Attributes
    ----------
    scenes : tuple of Scene
    size : tuple of 2 ints
    bands : tuple of str
    class_names : tuple of str or None
    class_values : tuple of int or None
    num_classes : int or None
    ignore_index : int
    fill : float
    dtype : numpy.dtype
        Of images.
    windows : list of (int, Window), or None
        Scene and window of each chip of a grid; None for random ones.

    Raises
    ------
    TypeError
        If a size, ``length``, ``ignore_index`` or a label value is no integer.
    ValueError
        For arguments that do not fit each other or the scenes, and if no chip is left; when a chip is read, for a
        label that is none of the classes, naming file, pixel and value.

    Notes
    -----
    Images keep the raster's type and become float32 where the model is, which `ununennium.models.RasterModel` does.
    A loader gives more chips so than when uint16 becomes float32 on read (``benchmarks/chips.py`` prints how many), and
    each takes half the room on its way to the device.
    """

    def __init__(
        self,
        scenes: Scene | Sequence[Scene],
        size: int | tuple[int, int],
        *,
        bands: Sequence[str | int] | None = None,
        stride: int | tuple[int, int] | None = None,
        length: int | None = None,
        region: Region | None = None,
        classes: Mapping[int, str] | Sequence[str] | None = None,
        ignore_index: int = 255,
        ignore_values: Sequence[int] = (),
        fill: float = 0,
        min_valid: float = 0.0,
        focus: float = 0.0,
        focus_classes: Sequence[str | int] | None = None,
        once: bool = False,
        transform: Callable[[Sample], Any] | None = None,
    ) -> None:
        self.scenes: tuple[Scene, ...] = as_scenes(scenes)
        self.size: tuple[int, int] = _pair("size", size)
        self._classes = Classes(classes, ignore_index, ignore_values)
        self.region = region
        self.transform = transform
        self.ignore_index: int = self._classes.ignore_index
        self.min_valid: float = _share("min_valid", min_valid)
        self.focus: float = _share("focus", focus)
        first = self.scenes[0]
        self.bands: tuple[str, ...] = tuple(first.bands[index] for index in first.band_indices(bands))
        self._bands = [scene.band_indices(self.bands) for scene in self.scenes]
        self.dtype: np.dtype[Any] = np.result_type(*(scene.dtype for scene in self.scenes))
        self.fill: float = _checked_fill(fill, self.dtype)
        self.class_names: tuple[str, ...] | None = self._classes.names
        self.class_values: tuple[int, ...] | None = self._classes.values
        self.num_classes: int | None = None if self.class_values is None else len(self.class_values)
        if length is not None and stride is not None:
            raise ValueError("give stride, for chips on a grid, or length, for chips at random, not both")
        if region is not None and max(self.size) > region.block:
            raise ValueError(
                f"chips of {self.size[0]} x {self.size[1]} pixels are larger than the split's blocks of "
                f"{region.block} x {region.block} pixels: split with a block of {max(self.size)} or more"
            )
        self._places = [
            Places(scene.shape, self.size, None if region is None else region.blocks_of(scene)) for scene in self.scenes
        ]
        self._grid: NDArray[np.int32] | None = None
        self._counted: dict[int, list[tuple[slice, slice]]] = {}
        if length is None:
            if focus or focus_classes is not None:
                raise ValueError("focus is for chips at random: give their number with length=…")
            self._length = self._lay_grid(_pair("stride", size if stride is None else stride))
            self._counted = _overlaps(self._grid, self.size) if once else {}
        else:
            if once:
                raise ValueError(
                    "once is for chips on a grid, and random ones overlap as they fall: leave once or length out"
                )
            self._length = integer("length", length, 1)
        self._cumulated = np.cumsum([places.count for places in self._places])
        if self._cumulated[-1] == 0 or self._length == 0:
            raise self._nothing_left()
        self._pixels = self._find_pixels(focus_classes) if focus else {}
        self._focused = sorted(self._pixels)

    def _lay_grid(self, stride: tuple[int, int]) -> int:
        positions = []
        for number, places in enumerate(self._places):
            grid = places.grid(stride)
            if self.min_valid > 0:
                kept = [
                    self._read(number, Window(place[0], place[1], *self.size))[2] >= self.min_valid
                    for place in grid.tolist()
                ]
                grid = grid[np.array(kept, np.bool_)]
            positions.append(np.column_stack([np.full(len(grid), number), grid]))
        self._grid = np.concatenate(positions).astype(np.int32)
        return len(self._grid)

    def _nothing_left(self) -> ValueError:
        size = f"{self.size[0]} x {self.size[1]}"
        if self._cumulated[-1] == 0:
            assert self.region is not None
            return ValueError(
                f"no chip of {size} pixels fits into part {self.region.name!r} of the split (block "
                f"{self.region.block}, buffer {self.region.buffer}): split with larger blocks or a smaller buffer"
            )
        where = "" if self.region is None else f" in part {self.region.name!r}"
        if self.min_valid > 0:
            return ValueError(
                f"no chip of {size} pixels{where} is valid in a share of {self.min_valid:g} of its pixels: lower "
                "min_valid, or see that nodata and ignored values are right"
            )
        return ValueError(
            f"no chip of {size} pixels on a grid fits{where}: draw chips at random with length=…, or split with larger "
            "blocks or a smaller buffer"
        )

    def _find_pixels(self, wanted: Sequence[str | int] | None) -> dict[int, NDArray[np.int64]]:
        if self.scenes[0].label is None:
            raise ValueError("focus needs scenes with labels: make them with Scene(image, label)")
        targets = None if wanted is None else {self._target_of(each): each for each in wanted}
        found = ClassPixels(self._targets(), self._classes, None if targets is None else list(targets)).pixels
        for target, given in (targets or {}).items():
            if target not in found:
                raise ValueError(f"no chip can have a pixel of class {given!r}: leave it out of focus_classes")
        if not found:
            raise ValueError(
                "no chip can have a labelled pixel, so that there is no class to focus on: leave focus out"
            )
        return found

    def _target_of(self, wanted: str | int) -> int:
        if isinstance(wanted, str):
            if self.class_names is not None and wanted in self.class_names:
                return self.class_names.index(wanted)
        elif self.class_values is None:
            return integer("a label value in focus_classes", wanted)
        elif wanted in self.class_values:
            return self.class_values.index(wanted)
        known = "none are named" if self.class_names is None else f"there are {', '.join(self.class_names)}"
        raise ValueError(f"focus_classes has {wanted!r}, which is no class: {known}")

    def _targets(self) -> Iterator[tuple[int, Window, NDArray[np.int64]]]:
        """Yield the targets of all scenes, where chips may lie."""
        for number, scene in enumerate(self.scenes):
            for window, targets in targets_in(scene, self._classes, self._bands[number]):
                covered = self._covered(number, window)
                if covered is not None:
                    targets[~covered] = self.ignore_index
                yield number, window, targets

    def _covered(self, number: int, window: Window) -> NDArray[np.bool_] | None:
        """Return which pixels of a window are in any chip; None if all are."""
        if self._grid is None:
            return self._places[number].covered(window)
        mask = np.zeros((window.height, window.width), np.bool_)
        rows, cols = self._grid[self._grid[:, 0] == number, 1:].astype(np.int64).T - [[window.row], [window.col]]
        paint(mask, rows, rows + self.size[0], cols, cols + self.size[1])
        return mask

    @property
    def windows(self) -> list[tuple[int, Window]] | None:
        """Scene and window of each chip of a grid; None for random ones."""
        if self._grid is None:
            return None
        return [(number, Window(row, col, *self.size)) for number, row, col in self._grid.tolist()]

    def __repr__(self) -> str:
        where = "" if self.region is None else f" in part {self.region.name!r}"
        how = "at random" if self._grid is None else "on a grid"
        height, width = self.size
        return f"Chips({self._length} of {height} x {width} {how}{where}, {len(self.bands)} bands, {self.dtype})"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if not -self._length <= index < self._length:
            raise IndexError(
                f"there is no chip {index}: the {self._length} chips have the indices 0 to {self._length - 1}"
            )
        if self._grid is not None:
            number, row, col = self._grid[index].tolist()
            window = Window(row, col, *self.size)
            image, mask, _ = self._read(number, window)
            if mask is not None:
                for place in self._counted.get(index % self._length, ()):
                    mask[place] = self.ignore_index
        else:
            number, window, image, mask = self._draw()
        sample = self._sample(number, window, image, mask)
        return sample if self.transform is None else self.transform(sample)

    def _draw(self) -> tuple[int, Window, NDArray[Any], NDArray[np.int64] | None]:
        """Read a random chip: the first with enough valid pixels, or the best of some tries."""
        best: tuple[float, Any] = (-1.0, None)
        for _ in range(_TRIES):
            number, window = self._draw_window()
            image, mask, share = self._read(number, window)
            if share > best[0]:
                best = share, (number, window, image, mask)
            if share >= self.min_valid:
                break
        drawn: tuple[int, Window, NDArray[Any], NDArray[np.int64] | None] = best[1]
        return drawn

    def _draw_window(self) -> tuple[int, Window]:
        if self.focus and float(torch.rand(())) < self.focus:
            pixels = self._pixels[self._focused[draw_below(len(self._focused))]]
            number, row, col = pixels[draw_below(len(pixels))].tolist()
            around = self._places[number].around(row, col)
            row, col = around.at(draw_below(around.count))
            return number, Window(row, col, *self.size)
        place = draw_below(int(self._cumulated[-1]))
        number = int(np.searchsorted(self._cumulated, place, side="right"))
        place -= int(self._cumulated[number - 1]) if number else 0
        row, col = self._places[number].at(place)
        return number, Window(row, col, *self.size)

    def _read(self, number: int, window: Window) -> tuple[NDArray[Any], NDArray[np.int64] | None, float]:
        """Return image and targets of a window, and the share of its pixels that are valid and labelled."""
        scene = self.scenes[number]
        image, valid = scene.read(window, self._bands[number])
        gaps = ~valid
        has_gaps = bool(gaps.any())
        image = image.astype(self.dtype, copy=False)
        if has_gaps:
            image[:, gaps] = self.fill
        if scene.label is None:
            return image, None, float(valid.mean()) if self.min_valid else 1.0
        mask = self._classes.encode(*scene.read_label(window), scene, window)
        if has_gaps:
            mask[gaps] = self.ignore_index
        return image, mask, float((mask != self.ignore_index).mean()) if self.min_valid else 1.0

    def _sample(self, number: int, window: Window, image: NDArray[Any], mask: NDArray[np.int64] | None) -> Sample:
        a, b, c, d, e, f = tuple(self.scenes[number].transform)[:6]
        row, col, height, width = window
        c, f = c + a * col + b * row, f + d * col + e * row
        xs, ys = (c, c + a * width, c + b * height), (f, f + d * width, f + e * height)
        far_x, far_y = xs[1] + xs[2] - c, ys[1] + ys[2] - f
        sample: Sample = {
            "image": torch.from_numpy(image),
            "transform": torch.tensor((a, b, c, d, e, f), dtype=torch.float64),
            "bounds": torch.tensor(
                (min(*xs, far_x), min(*ys, far_y), max(*xs, far_x), max(*ys, far_y)), dtype=torch.float64
            ),
            "window": torch.tensor((number, *window)),
        }
        if mask is not None:
            sample["mask"] = torch.from_numpy(mask)
        return sample


def _overlaps(grid: NDArray[np.int32] | None, size: tuple[int, int]) -> dict[int, list[tuple[slice, slice]]]:
    """Return, for the chips of a grid that earlier ones overlap, the places in them that those hold."""
    height, width = size
    cells: dict[tuple[int, int, int], list[tuple[int, int]]] = {}  # of a chip's size, so that only neighbours are near
    found: dict[int, list[tuple[slice, slice]]] = {}
    for index, (number, row, col) in enumerate([] if grid is None else grid.tolist()):
        at = row // height, col // width
        for down, right in itertools.product((-1, 0, 1), repeat=2):
            for other_row, other_col in cells.get((number, at[0] + down, at[1] + right), ()):
                top, left = other_row - row, other_col - col
                if abs(top) < height and abs(left) < width:
                    rows = slice(max(top, 0), min(top + height, height))
                    found.setdefault(index, []).append((rows, slice(max(left, 0), min(left + width, width))))
        cells.setdefault((number, *at), []).append((row, col))
    return found


def draw_below(count: int) -> int:
    """Draw a whole number from 0 to count - 1 from PyTorch's global generator."""
    return int(torch.randint(count, ()))


def _pair(what: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Iterable) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{what} must be a number of pixels, or a pair of them, got {value!r}")
    return integer(what, pair[0], 1), integer(what, pair[1], 1)


def _share(what: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{what} must be a share, from 0 to 1, got {value!r}")
    return float(value)


def _checked_fill(fill: float, dtype: np.dtype[Any]) -> float:
    if dtype.kind in "ui":
        limits = np.iinfo(dtype)
        if not (float(fill).is_integer() and limits.min <= fill <= limits.max):
            raise ValueError(f"fill={fill!r} is no value of the rasters' type, {dtype}: choose one that is")
    return float(fill)
