"""A map in the making: pixels in a plain file, then a Cloud-Optimized GeoTIFF under its own name in one step."""

import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ununennium.data._files import CACHE_BYTES
from ununennium.training.checkpoint.format import flush

_BLOCK = 512
_ENVI_TYPES = {"uint8": 1, "uint16": 12, "float32": 4}


class Legend(NamedTuple):
    """What a map says of itself.

    Attributes
    ----------
    crs, transform
        Of the source.
    nodata : float
    colors : dict of int to (red, green, blue), or None
        By value.
    names : dict of int to str
        Of classes, by value.
    descriptions : tuple of str
        Of the bands, if they have any.
    """

    crs: Any
    transform: Any
    nodata: float
    colors: dict[int, tuple[int, int, int]] | None
    names: dict[int, str]
    descriptions: tuple[str, ...]


class Pixels:
    """The pixels of a map that is not finished, in a file that several processes may write to.

    They are not given to GDAL as they come, since it tells nobody when closing a file on a full disk fails.

    Parameters
    ----------
    path : Path
        The file: band after band, row after row. Its room on the disk is taken when it is made.
    bands, height, width : int
    dtype : numpy.dtype
        uint8, uint16 or float32.
    """

    def __init__(self, path: Path, bands: int, height: int, width: int, dtype: np.dtype[Any]) -> None:
        self.path, self.bands, self.height, self.width, self.dtype = path, bands, height, width, dtype
        self._descriptor: int | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.bands * self.height * self.width * self.dtype.itemsize

    def make(self) -> None:
        """Make the file, with all its room.

        Raises
        ------
        OSError
            If the disk lacks it; a map may take as much again.
        """
        free = shutil.disk_usage(self.path.parent).free
        if free < 2 * self.size:
            raise _full(self.path.parent, f"{2 * self.size / 1e6:.0f} MB are needed, and {free / 1e6:.0f} MB are free")
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, self.size)
            else:
                os.ftruncate(descriptor, self.size)
        except OSError as error:
            raise _with_remedy(error, self.path.parent) from error
        finally:
            os.close(descriptor)
        self.path.with_suffix(".hdr").write_text(
            f"ENVI\nsamples = {self.width}\nlines = {self.height}\nbands = {self.bands}\nheader offset = 0\n"
            f"file type = ENVI Standard\ndata type = {_ENVI_TYPES[self.dtype.name]}\ninterleave = bsq\nbyte order = 0\n"
        )

    def write(self, row: int, column: int, values: NDArray[Any]) -> None:
        """Write a rectangle (bands, height, width) whose upper left pixel is given."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY)
        lines = np.ascontiguousarray(values, self.dtype.newbyteorder("<"))
        if lines.shape[2] == self.width:  # then they are one piece of the file
            lines = lines.reshape(self.bands, 1, -1)
        for band, of_band in enumerate(lines):
            start = (band * self.height + row) * self.width + column
            for index, line in enumerate(of_band):
                self._write((start + index * self.width) * self.dtype.itemsize, memoryview(line).cast("B"))

    def _write(self, offset: int, line: memoryview) -> None:
        assert self._descriptor is not None
        try:
            while line:
                written = os.pwrite(self._descriptor, line, offset)
                offset, line = offset + written, line[written:]
        except OSError as error:
            raise _with_remedy(error, self.path.parent) from error

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def aside(destination: Path) -> Iterator[Path]:
    """Make a folder beside a map for what it is made of, and take it away afterwards.

    What runs for the same map that were killed have left there is taken away, too.

    Raises
    ------
    OSError
        If the folder of the destination can't be written to.
    """
    import fcntl

    destination = destination.absolute()  # wherever the process goes meanwhile
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        for left in destination.parent.iterdir():
            if re.fullmatch(rf"{re.escape(f'.{destination.name}')}\.making-[0-9a-f]{{8}}", left.name):
                _delete_if_left(left)
        folder = destination.with_name(f".{destination.name}.making-{secrets.token_hex(4)}")
        folder.mkdir()
    except OSError as error:
        raise _with_remedy(error, destination.parent) from error
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: its leftovers stay
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def make_cog(pixels: Pixels, legend: Legend, destination: Path, threads: int) -> Path:
    """Make a Cloud-Optimized GeoTIFF of pixels, beside them, and see that it is whole and on the disk.

    Parameters
    ----------
    pixels : Pixels
        All of them written.
    legend : Legend
    destination : Path
        Of the map, which errors name.
    threads : int
        That compress.

    Returns
    -------
    Path
        Of the GeoTIFF.

    Raises
    ------
    OSError
        If it can't be written.
    """
    whole = pixels.path.with_name("map.tif")
    try:
        _write_cog(pixels, legend, whole, threads)
        _check_blocks(whole)
        flush(whole)
    except Exception as error:  # rasterio's are OSErrors at times, and at times not
        if not type(error).__module__.startswith("rasterio"):
            raise
        free = shutil.disk_usage(pixels.path.parent).free
        raise OSError(
            f"{destination} could not be written ({error}): see that its disk has room, {free / 1e6:.0f} MB are free, "
            "and may hold files as large as the map"
        ) from error
    return whole


def commit(whole: Path, destination: Path) -> None:
    """Put a map in its place, in one step; what was there is replaced."""
    os.replace(whole, destination)
    flush(destination.absolute().parent)


def _write_cog(pixels: Pixels, legend: Legend, path: Path, threads: int) -> None:
    import rasterio
    from rasterio.shutil import copy

    with (
        _without_georeference(),
        rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES),
        rasterio.open(pixels.path, "r+", driver="ENVI") as source,
    ):
        if legend.crs is not None:
            source.crs = legend.crs
        source.transform = legend.transform
        source.nodata = legend.nodata
        if legend.colors is not None:
            source.write_colormap(1, {value: (*color, 255) for value, color in legend.colors.items()})
        source.update_tags(1, **{f"CLASS_{value}": name for value, name in legend.names.items()})
        for number, description in enumerate(legend.descriptions, 1):
            source.set_band_description(number, description)
        copy(
            source,
            path,
            driver="COG",
            compress="DEFLATE",
            predictor="YES",
            blocksize=_BLOCK,
            overview_resampling="AVERAGE" if pixels.dtype.kind == "f" else "MODE",
            bigtiff="IF_SAFER",
            num_threads=threads,
        )


@contextmanager
def _without_georeference() -> Iterator[None]:
    """Take it that a map may have none: whoever predicts a source without has been told by the source."""
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def _check_blocks(path: Path) -> None:
    """Raise unless every block of a GeoTIFF is inside its file: GDAL keeps errors in closing a file to itself."""
    import rasterio

    size = os.path.getsize(path)
    with _without_georeference():
        levels: list[dict[str, int]] = [{}]
        with rasterio.open(path) as whole:
            levels += [{"overview_level": level} for level in range(len(whole.overviews(1)))]
        for level in levels:
            with rasterio.open(path, **level) as image:
                for (row, column), _ in image.block_windows(1):
                    offset, length = (
                        int(image.get_tag_item(f"BLOCK_{what}_{column}_{row}", "TIFF", bidx=1) or 0)
                        for what in ("OFFSET", "SIZE")
                    )
                    if not 0 < offset < offset + length <= size:
                        raise _full(path.parent, f"a block of the map, row {row} and column {column}, is not on it")


def _delete_if_left(folder: Path) -> None:
    """Delete the folder of a run that has ended: one that goes on holds a lock on it."""
    import fcntl

    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(descriptor)


class _FullError(OSError):
    """A disk without room, with the remedy in its message."""


def _full(folder: Path, why: str) -> OSError:
    return _FullError(
        ENOSPC, f"the disk has no room for the map ({why}): make room, or choose another place", str(folder)
    )


def _with_remedy(error: OSError, folder: Path) -> OSError:
    """Return what an error of the system means for a map."""
    full = error.errno in (ENOSPC, EDQUOT, EFBIG) and not isinstance(error, _FullError)
    return _full(folder, error.strerror or "it is full") if full else error
