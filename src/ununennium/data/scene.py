"""One scene: a raster of bands, or several on one grid, and the labels that belong to it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ununennium._arguments import integer
from ununennium._band_names import same_band
from ununennium.data._files import Grid, open_raster, version_of

if TYPE_CHECKING:
    from rasterio import Affine
    from rasterio.crs import CRS

_BAND_IN_FILE_NAME = re.compile(r"(?:^|[_.\-])(B\d{1,2}[A-Z]?)(?=[_.\-]|$)", re.IGNORECASE)
_SAME_GRID = 0.01  # of a pixel
_STRIP = (256, 4096)  # rows and columns read at once where a whole scene is gone through


class Window(NamedTuple):
    """A rectangle of pixels; it may reach beyond the raster.

    Attributes
    ----------
    row, col : int
        Its first row and column.
    height, width : int
        Pixels.
    """

    row: int
    col: int
    height: int
    width: int


class Scene:
    """An image of one or several georeferenced rasters, and optionally a raster of labels, read in windows.

    Files are stacked in the order given. The finest of them sets the grid, and files on other grids (Sentinel-2's
    bands of 20 and 60 m, another projection) are resampled to it as they are read. Files are opened when they are first
    read, once a thread and process, and kept open, 128 at most; a scene can be pickled and passed to workers.

    Parameters
    ----------
    image : path or sequence of paths
        GeoTIFF, JPEG 2000, VRT, or whatever else rasterio reads. Alpha bands are taken as masks, not as bands.
    label : path, optional
        Raster with one band of integers, read on the image's grid by nearest neighbour.
    bands : sequence of str, optional
        One name a band. By default the rasters' band descriptions; for files of one band, a name found in the file's
        (``…_B8A_20m.jp2``); else "B1", "B2", ….
    resampling : str, default "bilinear"
        How image files on another grid are resampled, a name in `rasterio.enums.Resampling`.

    Attributes
    ----------
    bands : tuple of str
    shape : tuple of 2 ints
        Height and width, pixels.
    crs : rasterio.crs.CRS or None
    transform : rasterio.Affine
        From (column, row) to coordinates.
    dtype : numpy.dtype
        The type that holds every file's values.
    nodata : float or None
        The nodata value that those files have in common that have one.
    image : tuple of str
    label : str or None

    Raises
    ------
    FileNotFoundError, OSError
        If a file is missing, or is no raster.
    ValueError
        If files do not fit each other, or the label is none; the message names the file.

    Notes
    -----
    GDAL's cache of decoded blocks, by default 5 % of the machine's memory *in every worker*, is bounded to 256 MiB a
    process, unless the environment's ``GDAL_CACHEMAX`` or a `rasterio.Env` around the first read says otherwise.

    Labels that are polygons are burnt into a raster on the image's grid with `rasterio.features.rasterize`::

        with rasterio.open("image.tif") as image:
            burnt = rasterize(zip(polygons, values), image.shape, fill=255, transform=image.transform, dtype="uint8")
            with rasterio.open("label.tif", "w", **image.profile | dict(count=1, dtype="uint8", nodata=255)) as label:
                label.write(burnt, 1)
    """

    def __init__(
        self,
        image: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        label: str | os.PathLike[str] | None = None,
        *,
        bands: Sequence[str] | None = None,
        resampling: str = "bilinear",
    ) -> None:
        paths = [image] if isinstance(image, (str, os.PathLike)) else list(image)
        if not paths:
            raise ValueError("image names no file: a scene needs one, or several for its bands")
        self.image: tuple[str, ...] = tuple(os.path.expanduser(path) for path in paths)
        self.label: str | None = None if label is None else os.path.expanduser(label)
        _check_resampling(resampling)
        files = [_File(path) for path in self.image]
        finest = _finest(files)
        self.shape: tuple[int, int] = finest.shape
        self.crs: CRS | None = finest.crs
        self.transform: Affine = finest.transform
        for file in files:
            file.put_on(finest, resampling)
        self.dtype: np.dtype[Any] = np.result_type(*(file.dtype for file in files))
        values = {file.nodata for file in files if file.nodata is not None}
        self.nodata: float | None = values.pop() if len(values) == 1 else None
        self._files = files
        self._places = [(file, number) for file in files for number in file.numbers]
        self.bands: tuple[str, ...] = _names(files) if bands is None else tuple(bands)
        self._check_bands(given=bands is not None)
        self._index = {same_band(name): index for index, name in enumerate(self.bands)}
        self._label_file = None if self.label is None else _label_file(self.label, finest)

    def __repr__(self) -> str:
        name = self.image[0] if len(self.image) == 1 else f"{self.image[0]} and {len(self.image) - 1} more"
        height, width = self.shape
        return f"Scene({name}: {len(self._places)} bands, {height} x {width}, {self.dtype})"

    def _check_bands(self, given: bool) -> None:
        if len(self.bands) != len(self._places):
            raise ValueError(f"{self}: bands has {len(self.bands)} names, {list(self.bands)}: name each band once")
        keys = [same_band(name) for name in self.bands]
        twice = sorted({name for name, key in zip(self.bands, keys, strict=True) if keys.count(key) > 1})
        if twice:
            remedy = ": give each a name of its own" + ("" if given else ", bands=[…]")
            raise ValueError(f"{self}: more than one band is called {' or '.join(map(repr, twice))}{remedy}")

    def band_indices(self, bands: Sequence[str | int] | None = None) -> tuple[int, ...]:
        """Return the places of bands, from 0.

        Parameters
        ----------
        bands : sequence of str or int, optional
            Names, whatever their case and zeros ("B02" is "b2"), or places; all by default.

        Raises
        ------
        TypeError
            If one is neither a name nor an integer.
        ValueError
            If there is no such band; the message lists those there are.
        """
        if bands is None:
            return tuple(range(len(self.bands)))
        if isinstance(bands, str):
            raise ValueError(f"bands must be a sequence of names, got {bands!r}: write [{bands!r}]")
        indices = []
        for band in bands:
            known = self._index.get(same_band(band)) if isinstance(band, str) else integer("a band's place", band)
            if known is None or not 0 <= known < len(self.bands):
                raise ValueError(f"{self} has no band {band!r}; its bands are {', '.join(self.bands)}")
            indices.append(known)
        return tuple(indices)

    def read(self, window: Window, bands: Sequence[int] | None = None) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
        """Read a window of the image.

        Parameters
        ----------
        window : Window
        bands : sequence of int, optional
            Places of the bands, as `band_indices` gives them; all by default.

        Returns
        -------
        image : ndarray (C, height, width)
            Of the scene's dtype; 0 outside the raster.
        valid : ndarray of bool (height, width)
            Where every band that was read has data, by the file's nodata value, mask or alpha band, and is finite.

        Raises
        ------
        OSError
            If the file is damaged there.
        """
        chosen = range(len(self._places)) if bands is None else bands
        inside, spot = self._clip(window)
        if inside != window:
            image = np.zeros((len(chosen), window.height, window.width), self.dtype)
            valid = np.zeros((window.height, window.width), np.bool_)
            if inside.height > 0 and inside.width > 0:
                image[:, spot[0], spot[1]], valid[spot] = self.read(inside, bands)
            return image, valid
        image = np.empty((len(chosen), window.height, window.width), self.dtype)
        valid = np.ones((window.height, window.width), np.bool_)
        start = 0
        while start < len(chosen):
            file, _ = self._places[chosen[start]]
            stop = start + 1
            while stop < len(chosen) and self._places[chosen[stop]][0] is file:
                stop += 1
            numbers = [self._places[chosen[place]][1] for place in range(start, stop)]
            file.read(window, numbers, image[start:stop], valid)
            start = stop
        return image, valid

    def read_label(self, window: Window) -> tuple[NDArray[np.integer[Any]], NDArray[np.bool_]]:
        """Read a window of the label raster.

        Returns
        -------
        labels : ndarray of int (height, width)
            Of the label file's type; 0 outside the raster.
        labelled : ndarray of bool (height, width)
            Where the label file has data.

        Raises
        ------
        ValueError
            If the scene has no label.
        OSError
            If the file is damaged there.
        """
        file = self._label_file
        if file is None:
            raise ValueError(f"{self} has no label: make it with Scene(image, label)")
        labels = np.zeros((window.height, window.width), file.dtype)
        labelled = np.zeros(labels.shape, np.bool_)
        inside, spot = self._clip(window)
        if inside.height > 0 and inside.width > 0:
            values = np.empty((1, inside.height, inside.width), file.dtype)
            known = np.ones((inside.height, inside.width), np.bool_)
            file.read(inside, file.numbers, values, known)
            labels[spot], labelled[spot] = values[0], known
        return labels, labelled

    @property
    def _is_complete(self) -> bool:
        """Whether every pixel of the image is known to have data."""
        return all(file.is_complete for file in self._files)

    def _strips(self) -> Iterator[Window]:
        """Cut the raster into windows that suit how its files are stored, of some megabytes each."""
        block = max(file.block_height for file in self._files)
        rows = block * -(-_STRIP[0] // block) if block <= 4 * _STRIP[0] else _STRIP[0]
        for row in range(0, self.shape[0], rows):
            for col in range(0, self.shape[1], _STRIP[1]):
                yield Window(row, col, min(rows, self.shape[0] - row), min(_STRIP[1], self.shape[1] - col))

    def _clip(self, window: Window) -> tuple[Window, tuple[slice, slice]]:
        """Return the part of a window inside the raster, and where it lies in the window."""
        row, col, height, width = window
        if row >= 0 and col >= 0 and row + height <= self.shape[0] and col + width <= self.shape[1]:
            return window, (slice(None), slice(None))
        top, left = max(row, 0), max(col, 0)
        bottom, right = min(row + height, self.shape[0]), min(col + width, self.shape[1])
        inside = Window(top, left, max(bottom - top, 0), max(right - left, 0))
        return inside, (slice(top - row, bottom - row), slice(left - col, right - col))


class _File:
    """One raster file: what it is, and how its windows are read on the scene's grid."""

    def __init__(self, path: str) -> None:
        self._version = version_of(path)
        dataset = open_raster(path, version=self._version)
        self.path, self.count = path, int(dataset.count)
        self.shape = (int(dataset.height), int(dataset.width))
        self.crs: Any = dataset.crs or None
        self.transform = dataset.transform
        interpretations = [interpretation.name for interpretation in dataset.colorinterp]
        self.numbers = [n for n in dataset.indexes if interpretations[n - 1] != "alpha"]
        self._alpha = interpretations.index("alpha") + 1 if "alpha" in interpretations else None
        if not self.numbers:
            raise ValueError(
                f"{path} has no band but alpha, which says where there is data: name a raster with an image"
            )
        dtypes = {dataset.dtypes[n - 1] for n in self.numbers}
        self.dtype = np.result_type(*map(np.dtype, dtypes))
        if self.dtype.kind not in "uif":
            raise ValueError(f"{path} holds values of type {self.dtype}: convert it to integers or real numbers")
        self.descriptions = [dataset.descriptions[n - 1] for n in self.numbers]
        self.nodata = next(
            (dataset.nodatavals[n - 1] for n in self.numbers if dataset.nodatavals[n - 1] is not None), None
        )
        self.block_height = int(dataset.block_shapes[0][0])
        self.grid: Grid | None = None
        self._nodata = {n: _typed(dataset.nodatavals[n - 1], np.dtype(dataset.dtypes[n - 1])) for n in self.numbers}
        self._masked = {n: _has_mask([flag.name for flag in dataset.mask_flag_enums[n - 1]]) for n in self.numbers}

    @property
    def is_complete(self) -> bool:
        """Whether every pixel is known to have data."""
        plain = self.grid is None and self._alpha is None and self.dtype.kind != "f" and not any(self._masked.values())
        return plain and all(nodata is None for nodata in self._nodata.values())

    def put_on(self, target: _File, resampling: str) -> None:
        """Have the file read on another's grid."""
        if self._is_on(target):
            return
        for file in (self, target):
            if file.crs is None:
                other = target if file is self else self
                raise ValueError(
                    f"{file.path} has no coordinate reference system and lies on another grid than {other.path} "
                    f"({_describe(file)}; {_describe(other)}): give it one, as in `rio edit-info --crs EPSG:32633 "
                    f"--transform … {file.path}`"
                )
        if not self._reaches(target):
            raise ValueError(f"{self.path} does not overlap {target.path}: name rasters of one place")
        transform = tuple(target.transform)[:6]
        fills = self._nodata[self.numbers[0]] is not None or (self.nodata is not None and self.dtype.kind == "f")
        self.grid = Grid(target.crs.to_wkt(), transform, *target.shape, resampling, alpha=not fills)
        self._masked = dict.fromkeys(self.numbers, False)
        if not fills and self._alpha is None:
            self._alpha = self.count + 1

    def read(self, window: Window, numbers: list[int], out: NDArray[Any], valid: NDArray[np.bool_]) -> None:
        """Read bands into an array (C, height, width), and clear ``valid`` where one of them has no data."""
        dataset = open_raster(self.path, self.grid, self._version)
        row, col, height, width = window
        place = ((row, row + height), (col, col + width))
        try:
            dataset.read(numbers, window=place, out=out)
            if self._alpha is not None:
                valid &= dataset.read(self._alpha, window=place) > 0
            elif any(self._masked[number] for number in numbers):
                valid &= (dataset.read_masks(numbers, window=place) > 0).all(axis=0)
        except Exception as error:
            if not _is_of_rasterio(error):
                raise
            raise OSError(
                f"{self.path}: rows {row} to {row + height}, columns {col} to {col + width} can't be read: {error}. If "
                "the file is damaged, copy it anew or leave it out"
            ) from error
        for values, number in zip(out, numbers, strict=True):
            nodata = self._nodata[number]
            if nodata is not None:
                valid &= values != nodata
            if values.dtype.kind == "f":
                valid &= np.isfinite(values)

    def _is_on(self, other: _File) -> bool:
        if self.shape != other.shape or bool(self.crs != other.crs):
            return False
        corners = [(0, 0), (other.shape[1], 0), (0, other.shape[0])]
        apart = [_apply(~other.transform, _apply(self.transform, corner)) for corner in corners]
        return bool(max(map(math.dist, apart, corners)) < _SAME_GRID)

    def _reaches(self, other: _File) -> bool:
        from rasterio.warp import transform_bounds

        bounds = _bounds(self)
        if self.crs != other.crs:
            bounds = transform_bounds(self.crs, other.crs, *bounds)
        left, bottom, right, top = bounds
        corners = [
            _apply(~other.transform, corner) for corner in ((left, top), (right, top), (left, bottom), (right, bottom))
        ]
        cols, rows = zip(*corners, strict=True)
        height, width = other.shape
        return bool(max(cols) > 0 and min(cols) < width and max(rows) > 0 and min(rows) < height)


def _finest(files: list[_File]) -> _File:
    """Return the file with the smallest pixels, the first among equals."""
    reference = next((file.crs for file in files if file.crs is not None), None)
    if reference is None or len(files) == 1:
        return files[0]
    sizes = [math.prod(_pixel_size(file, reference)) for file in files]
    return next(file for file, size in zip(files, sizes, strict=True) if size < min(sizes) * (1 + 1e-6))


def _pixel_size(file: _File, crs: Any) -> tuple[float, float]:
    """Return the size of a file's pixels along columns and rows, in the units of a reference system; at its centre."""
    from rasterio.warp import transform

    height, width = file.shape
    col, row = width / 2, height / 2
    points = [_apply(file.transform, point) for point in ((col, row), (col + 1, row), (col, row + 1))]
    if file.crs is not None and file.crs != crs:
        points = list(zip(*transform(file.crs, crs, *zip(*points, strict=True)), strict=True))
    return math.dist(points[0], points[1]), math.dist(points[0], points[2])


def _apply(transform: Any, point: tuple[Any, Any]) -> tuple[Any, Any]:
    """Transform a point, or arrays of them; affine's own operator is another in each of its major versions."""
    x, y = point
    return transform.a * x + transform.b * y + transform.c, transform.d * x + transform.e * y + transform.f


def _bounds(file: _File) -> tuple[float, float, float, float]:
    height, width = file.shape
    corners = [_apply(file.transform, corner) for corner in ((0, 0), (width, 0), (0, height), (width, height))]
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _label_file(path: str, target: _File) -> _File:
    file = _File(path)
    if len(file.numbers) != 1:
        raise ValueError(
            f"{path} has {len(file.numbers)} bands: a label raster has one, each pixel's class: take that out of it"
        )
    if file.dtype.kind == "f":
        raise ValueError(
            f"{path} holds values of type {file.dtype}: a label raster holds integers, each a class: convert it"
        )
    file.put_on(target, "nearest")
    return file


def _names(files: list[_File]) -> tuple[str, ...]:
    """Return the names that files give to their bands, and numbers where they give none."""
    described = [file.descriptions for file in files]
    if len(files) > 1 and all(len(each) == 1 for each in described) and len({each[0] for each in described}) == 1:
        described = [[None] for _ in files]  # "Reflectance" in each is no name
    names: list[str] = []
    for file, descriptions in zip(files, described, strict=True):
        in_file_name = _BAND_IN_FILE_NAME.findall(os.path.splitext(os.path.basename(file.path))[0])
        if all(descriptions) and len({same_band(str(name)) for name in descriptions}) == len(descriptions):
            names += [str(description) for description in descriptions]
        elif len(descriptions) == 1 and in_file_name:
            names.append(in_file_name[-1].upper())
        else:
            names += [f"B{len(names) + place}" for place in range(1, len(descriptions) + 1)]
    return tuple(names)


def _typed(nodata: float | None, dtype: np.dtype[Any]) -> Any:
    """Return a nodata value as it is stored; None for one that no pixel can have."""
    if nodata is None or math.isnan(nodata):
        return None  # NaN is no data anyhow
    if dtype.kind == "f":
        return dtype.type(nodata)
    limits = np.iinfo(dtype)
    return dtype.type(int(nodata)) if float(nodata).is_integer() and limits.min <= nodata <= limits.max else None


def _has_mask(flags: list[str]) -> bool:
    return "all_valid" not in flags and flags != ["nodata"]


def _is_of_rasterio(error: Exception) -> bool:
    return type(error).__module__.startswith("rasterio")


def _describe(file: _File) -> str:
    width, height = _pixel_size(file, file.crs)
    return f"{file.shape[0]} x {file.shape[1]} pixels of {width:g} x {height:g} from {_apply(file.transform, (0, 0))}"


def _check_resampling(name: str) -> None:
    from rasterio.enums import Resampling

    names = [each.name for each in Resampling if each.name != "gauss"]
    if name not in names:
        raise ValueError(f"resampling must be one of {', '.join(names)}, got {name!r}")
