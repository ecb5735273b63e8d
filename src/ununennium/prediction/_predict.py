"""A whole scene to a map, tile by tile, in bounded memory."""

import os
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ununennium._arguments import integer
from ununennium.data import Scene, Window
from ununennium.data._files import CACHE_BYTES
from ununennium.models import RasterModel
from ununennium.prediction._ahead import Behind, ahead
from ununennium.prediction._blend import Blend
from ununennium.prediction._group import all_do, all_run, leader_does
from ununennium.prediction._legend import class_values, legend_of
from ununennium.prediction._map import Pixels, aside, commit, make_cog
from ununennium.prediction._model import Network, Output, homes_of, in_use, load_model
from ununennium.prediction._tiles import Tiles, share_of
from ununennium.training.checkpoint.snapshot import unwrapped
from ununennium.training.checks import check_choice, resolve_device
from ununennium.training.distributed import Group, group_on, join
from ununennium.training.errors import NonFiniteError
from ununennium.training.precision import Precision

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Scene

_READ, _WRITTEN = 2, 8  # batches read ahead, and pieces that wait to be written


def predict_scene(
    model: nn.Module | str | os.PathLike[str],
    source: Source,
    destination: str | os.PathLike[str],
    *,
    bands: Sequence[str] | None = None,
    tile: int = 512,
    overlap: int | None = None,
    batch_size: int = 4,
    output: Output = "classes",
    flips: bool = False,
    mixed_precision: bool | Literal["bf16", "fp16"] = False,
    device: str | torch.device | None = None,
    distributed: bool = False,
    overwrite: bool = False,
    averaged: bool | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> Path:
    """Predict a whole scene, and write the map as a Cloud-Optimized GeoTIFF on the scene's grid.

    The scene is predicted in tiles that overlap. Where they do, what they say is averaged, each tile counting less
    towards its edge, so that no seam shows. Memory does not grow with the scene, but for a strip as wide as the scene
    and as high as the overlap. Reading and writing go on while the model computes. The map appears under its name when
    it is whole and on the disk, or not at all.

    Parameters
    ----------
    model : nn.Module or path
        Takes images (B, C, H, W) in the raster's values and gives (B, K, H, W). Or a checkpoint,
        ``checkpoints/best``, of a model that `load_model` can make. Modes and device are its own again afterwards.
    source : path, sequence of paths, or Scene
    destination : path
        Of the map, a GeoTIFF.
    bands : sequence of str, optional
        The source's bands for the model, in the order in which it takes them. By default those that a `RasterModel`
        names; all for other models.
    tile : int, default 512
        Height and width of what the model is given, pixels. A scene that is smaller is filled up to a multiple of 32.
    overlap : int, optional
        The least that neighbouring tiles share, pixels; by default an eighth of ``tile``. What a network says of a
        pixel depends on its surroundings: give twice as much as it needs of them.
    batch_size : int, default 4
        Tiles per forward.
    output : {"classes", "probabilities", "logits"}, default "classes"
        The likeliest class as an integer, the class's value if the model is a `RasterModel`; the probability of each
        class, a band each; or what the model gives as it is, of a regression, say.
    flips : bool, default False
        Whether to average over the image, its mirror images, and the image upside down: four forwards.
    mixed_precision : bool or {"bf16", "fp16"}, default False
        ``True`` is bf16 where the device has it, else fp16.
    device : str or torch.device, optional
        By default where the model is if that is no CPU; else CUDA, MPS or the CPU, whichever is there first.
    distributed : bool, default False
        Share the work with all processes that torchrun started with this one, or that share a process group. All call
        this function alike and see the same files; the map is that of one process, bit for bit on like machines.
    overwrite : bool, default False
        Whether a file at the destination is replaced.
    averaged : bool, optional
        Whether to take a checkpoint's averaged weights, or the raw ones. By default those with which the run was
        validated.
    threads : int, optional
        That decode the source and compress the map; by default as many as PyTorch uses.
    progress : bool, default True
        Show a progress bar, if there is a terminal.

    Returns
    -------
    Path
        The destination.

    Raises
    ------
    FileExistsError
        If there is something at the destination.
    OSError
        If the source can't be read, or the map can't be written. Beside the destination there must be room for the map
        twice, uncompressed.
    TypeError, ValueError
        If an argument is out of range, the source lacks a band, or the model's outputs do not fit the image.
    CheckpointError
        If the checkpoint is damaged, or its model can't be made.
    NonFiniteError
        If the model gives NaN, or for numbers infinity, where there is data.
    ProcessError
        If another process failed.

    Notes
    -----
    Pixels of which a band has no data are given the model's ``fill`` and have no data in the map: 255 or the model's
    ``ignore_index`` among classes (or the largest value that is no class), NaN among numbers. Classes have the
    model's colours in the map's colour table, and their names in tags, ``CLASS_<value>``; overviews hold the most
    frequent class, or the mean.

    A run that is killed leaves a folder ``.<name>.making-…`` beside the destination, which the next one for the same
    destination takes away.
    """
    overlap = tile // 8 if overlap is None and isinstance(tile, int) else overlap
    _check(tile, overlap, batch_size, output, threads)
    if device is None and not distributed and isinstance(model, nn.Module):
        device = next((home for home in homes_of(model) if home.type != "cpu"), None)
    device = resolve_device(join(None, device) if distributed else device)
    group = group_on(device, distributed)
    precision = Precision(mixed_precision, device)
    destination = Path(destination).expanduser()
    threads = threads or torch.get_num_threads()
    with ExitStack() as stack:
        job = all_do(group, lambda: _Job(model, source, bands, destination, overwrite, averaged))
        stack.enter_context(in_use(job.model, device))
        network = Network(job.model, output, flips, precision, job.num_classes)
        rows, columns = (Tiles(length, tile, overlap) for length in job.scene.shape)
        if network.channels is None:
            empty = torch.full((1, len(job.bands), rows.size, columns.size), job.fill, device=device)
            network.channels = all_do(group, lambda: network(empty).shape[1])
        dtype, legend = legend_of(job.inner, output, network.channels, job.scene.crs, job.scene.transform)
        folder = group.of_leader(lambda: stack.enter_context(aside(destination)))
        number = 1 if output == "classes" else network.channels
        pixels = Pixels(folder / "pixels", number, *job.scene.shape, dtype)
        group.of_leader(pixels.make)
        values = np.array(class_values(job.inner, network.channels), dtype) if output == "classes" else None
        with _bar(progress and group.leads, destination) as bar, _gdal(threads):
            painter = _Painter(pixels, rows, columns, values, legend.nodata)
            steps = _rows(job, network, group, painter, batch_size, bar)
            all_run(group, steps, 1 + max(len(share_of(rows, rank, group.size)[1]) for rank in range(group.size)))
            bar.set_postfix_str(f"writing {destination.name}")
            whole = leader_does(group, lambda: make_cog(pixels, legend, destination, threads))
        group.of_leader(lambda: commit(whole, destination))
    return destination


class _Job:
    """What is predicted with what, checked before any work begins."""

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        source: Source,
        bands: Sequence[str] | None,
        destination: Path,
        overwrite: bool,
        averaged: bool | None,
    ) -> None:
        if averaged is not None and isinstance(model, nn.Module):
            raise ValueError("averaged chooses among a checkpoint's weights, and the model is none: leave it out")
        self.scene = source if isinstance(source, Scene) else Scene(source)
        _check_destination(destination, self.scene, overwrite)
        self.model = model if isinstance(model, nn.Module) else load_model(model, averaged=averaged)
        homes_of(self.model)
        self.inner = unwrapped(self.model)
        self.fill, self.num_classes = 0.0, None
        wanted = self.scene.bands
        if isinstance(self.inner, RasterModel):
            wanted, self.fill = self.inner.bands, self.inner.fill
            self.num_classes = None if self.inner.class_names is None else len(self.inner.class_names)
            if bands is not None and len(bands) != len(wanted):
                raise ValueError(
                    f"bands names {len(bands)} bands, {', '.join(bands)}, and the model takes {len(wanted)}, "
                    f"{', '.join(wanted)}: name one of the source for each of these, in this order"
                )
        self.bands = self._places(wanted if bands is None else bands)

    def _places(self, names: Sequence[str]) -> tuple[int, ...]:
        try:
            return self.scene.band_indices(names)
        except ValueError as error:
            raise ValueError(
                f"the model takes the bands {', '.join(names)}, and {self.scene.image[0]} has "
                f"{', '.join(self.scene.bands)} ({error}): say with bands, [B4, B8] for example, which of them the "
                "model is to take, in its order, or name the source's with Scene(path, bands=[…])"
            ) from error


class _Batch(NamedTuple):
    """Neighbouring tiles of a row.

    Attributes
    ----------
    row : int
    columns : range
    images : Tensor or None
        Those that have data, float32 (B, C, H, W) in the raster's values.
    valid : list of ndarray of bool (H, W), or None
        Where each tile has data; None for one that has none.
    """

    row: int
    columns: range
    images: Tensor | None
    valid: list[NDArray[np.bool_] | None]


class _Reader:
    """Reads batches of tiles."""

    def __init__(self, job: _Job, rows: Tiles, columns: Tiles, pinned: bool) -> None:
        self._job, self._rows, self._columns, self._pinned = job, rows, columns, pinned

    def __call__(self, place: tuple[int, range]) -> _Batch:
        """Read some tiles of a row."""
        (row, columns), job = place, self._job
        size = self._rows.size, self._columns.size
        images = np.empty((len(columns), len(job.bands), *size), np.float32)
        valid: list[NDArray[np.bool_] | None] = []
        filled = 0
        for column in columns:
            window = Window(self._rows.starts[row], self._columns.starts[column], *size)
            image, has_data = job.scene.read(window, job.bands)
            valid.append(has_data if has_data.any() else None)
            if valid[-1] is not None:
                images[filled] = image
                np.copyto(images[filled], job.fill, where=~has_data)
                filled += 1
        tensor = torch.from_numpy(images[:filled])
        return _Batch(row, columns, (tensor.pin_memory() if self._pinned else tensor) if filled else None, valid)


class _Piece(NamedTuple):
    """A part of the map that a tile has finished.

    Attributes
    ----------
    row, column : int
        Of the tile.
    values : Tensor or None
        (K, height, width), or numbers of classes (1, height, width); None if the tile has no data.
    valid : ndarray of bool or None
        Where the tile has data.
    """

    row: int
    column: int
    values: Tensor | None
    valid: NDArray[np.bool_] | None


class _Painter:
    """Writes pieces of the map."""

    def __init__(self, pixels: Pixels, rows: Tiles, columns: Tiles, values: NDArray[Any] | None, nodata: float) -> None:
        self.rows, self.columns = rows, columns
        self._pixels, self._nodata = pixels, nodata
        self._values = None if values is None else np.append(values, values[:1])  # the last one is for no class

    def encode(self, row: int, column: int, blended: Tensor | None, valid: NDArray[np.bool_] | None) -> _Piece:
        """Return a piece of what a tile has finished, as small as it can be."""
        if blended is None or self._values is None:
            return _Piece(row, column, blended, valid)
        best = blended.max(0, keepdim=True)  # much faster than argmax
        numbers = best.indices.masked_fill_(best.values.isnan(), len(blended))
        return _Piece(row, column, numbers.to(torch.uint8 if len(blended) < 256 else torch.int32), valid)

    def __call__(self, piece: _Piece) -> None:
        """Write a piece.

        Raises
        ------
        NonFiniteError
            If a pixel with data has no finite value.
        """
        (top, bottom), (left, right) = self.rows.finished(piece.row), self.columns.finished(piece.column)
        shape = self._pixels.bands, bottom - top, right - left
        painted = np.full(shape, self._nodata, self._pixels.dtype)
        if piece.values is not None and piece.valid is not None:
            valid = piece.valid[: shape[1], : shape[2]]
            values = piece.values.cpu().numpy()
            lost = ~np.isfinite(values) if self._values is None else values == len(self._values) - 1
            lost = lost.any(axis=0) & valid
            if lost.any():
                row, column = np.argwhere(lost)[0]
                raise NonFiniteError(
                    f"the model gives no finite value at row {top + row}, column {left + column} of the scene, which "
                    "has data there: see that its weights are finite and the source's values are those it was trained "
                    "on, and set mixed_precision to bf16 or false if it is fp16 that overflows"
                )
            np.copyto(painted, values if self._values is None else self._values[values], where=valid)
        self._pixels.write(top, left, painted)

    def close(self) -> None:
        """Let go of the file."""
        self._pixels.close()


def _rows(job: _Job, network: Network, group: Group, painter: _Painter, batch_size: int, bar: Any) -> Generator[None]:
    """Predict this process's share of the scene, a tile row at each step."""
    rows, columns = painter.rows, painter.columns
    finished, computed = share_of(rows, group.rank, group.size)
    in_row = [range(first, min(first + batch_size, len(columns))) for first in range(0, len(columns), batch_size)]
    read = _Reader(job, rows, columns, pinned=group.device.type == "cuda")
    blend = Blend(rows, columns, computed.start, group.device)
    bar.reset(len(computed) * len(columns))
    with (
        closing(painter),
        closing(ahead(read, ((row, some) for row in computed for some in in_row), _READ)) as batches,
        Behind(painter, _WRITTEN) as paint,
    ):
        for _ in computed:
            for batch in islice(batches, len(in_row)):
                outputs = iter(
                    () if batch.images is None else network(batch.images.to(group.device, non_blocking=True))
                )
                for column, valid in zip(batch.columns, batch.valid, strict=True):
                    blended = blend.add(batch.row, column, None if valid is None else next(outputs))
                    if batch.row in finished:
                        paint(painter.encode(batch.row, column, blended, valid))
                bar.update(len(batch.columns))
            yield


def _bar(shown: bool, destination: Path) -> Any:
    from tqdm.auto import tqdm  # imported where it is used: importing this package stays quick

    return tqdm(total=0, desc=destination.name, unit="tile", disable=None if shown else True, dynamic_ncols=True)


def _gdal(threads: int) -> Any:
    """Return a context in which GDAL decodes with so many threads, and holds no more than it has to."""
    import rasterio

    return rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES, GDAL_NUM_THREADS=threads)


def _check(tile: int, overlap: int, batch_size: int, output: str, threads: int | None) -> None:
    check_choice("output", output, ("classes", "probabilities", "logits"))
    integer("tile", tile, minimum=1)
    integer("overlap", overlap, minimum=0)
    integer("batch_size", batch_size, minimum=1)
    integer("threads", 1 if threads is None else threads, minimum=1)
    if overlap >= tile:
        raise ValueError(f"overlap={overlap} must be less than tile={tile}: leave it out for an eighth of it")


def _check_destination(destination: Path, scene: Scene, overwrite: bool) -> None:
    if destination.is_dir():
        raise IsADirectoryError(f"{destination} is a folder: name a file in it, {destination / 'map.tif'}")
    if not destination.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{destination} exists already: choose another name, or replace it (overwrite)")
    for path in scene.image:
        if os.path.exists(path) and os.path.samefile(path, destination):
            raise ValueError(f"{destination} is the source itself: give the map a name of its own")
