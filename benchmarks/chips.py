"""Chips a second of `Chips` against TorchGeo's `RasterDataset` with `RandomGeoSampler`, on the same files.

A scene of twelve bands of 2048² pixels, uint16 in a tiled GeoTIFF, as it is and deflated, and
its labels; chips of 128², random windows, batches of 16, plain data loaders whose workers persist, one thread.
Before they are timed, what both read is compared.
"""

import multiprocessing
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from torch.utils.data import DataLoader

from _timing import Row, interleaved, main
from ununennium.data import Chips, Scene, Window

PART = "chips"
SIDE, BANDS, CHIP, BATCH, CHIPS, ROUNDS, LIMIT = 2048, 12, 128, 16, 1024, 3, 3.0


def write(folder: Path, compress: str | None) -> tuple[Path, Path]:
    """Write a scene as smooth as real ones, so that it deflates as they do."""
    draws = np.random.default_rng(0)
    smooth = np.kron(draws.integers(500, 4000, (SIDE // 64, SIDE // 64)), np.ones((64, 64), np.int64))
    profile = {
        "driver": "GTiff",
        "width": SIDE,
        "height": SIDE,
        "crs": "EPSG:32633",
        "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000),
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": compress,
    }
    folder.mkdir()
    image, label = folder / "image.tif", folder / "label.tif"
    with rasterio.open(image, "w", count=BANDS, dtype="uint16", **profile) as file:
        for band in range(1, BANDS + 1):
            file.write((smooth + draws.integers(0, 200, (SIDE, SIDE))).astype(np.uint16), band)
    with rasterio.open(label, "w", count=1, dtype="uint8", **profile) as file:
        file.write((smooth % 10).astype(np.uint8), 1)
    return image, label


def ours(image: Path, label: Path, workers: int) -> DataLoader:
    chips = Chips(Scene(image, label), CHIP, length=CHIPS, classes=[f"class {number}" for number in range(10)])
    return DataLoader(chips, BATCH, num_workers=workers, persistent_workers=workers > 0)


def as_float(image: Path, label: Path, workers: int) -> DataLoader:
    loader = ours(image, label, workers)
    loader.dataset.transform = to_float
    return loader


def to_float(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "image": sample["image"].float()}


def torchgeo(image: Path, label: Path, workers: int) -> DataLoader:
    from torchgeo.datasets import RasterDataset, stack_samples
    from torchgeo.samplers import RandomGeoSampler

    class Image(RasterDataset):
        filename_glob = image.name

    class Label(RasterDataset):
        filename_glob = label.name
        is_image = False

    both = Image(image.parent) & Label(label.parent)
    sampler = RandomGeoSampler(both, CHIP, CHIPS)
    options = {"collate_fn": stack_samples, "num_workers": workers, "persistent_workers": workers > 0}
    return DataLoader(both, BATCH, sampler=sampler, **options)


def check(image: Path, label: Path) -> None:
    """Compare what both read."""
    loader = torchgeo(image, label, 0)
    for query in list(loader.sampler)[:4]:
        sample = loader.dataset[query]
        x, y = query[0], query[1]
        col, row = round((x.start - 500_000) / 10), round((5_000_000 - y.stop) / 10)
        values, _ = Scene(image, label).read(Window(row, col, CHIP, CHIP))
        # Its windows begin between pixels, ours do not: the same values, but for the rows and columns at an edge.
        inner = np.abs(sample["image"].numpy()[:, 1:-1, 1:-1] - values[:, 1:-1, 1:-1].astype(np.float32))
        assert sample["image"].shape == values.shape, (sample["image"].shape, values.shape)
        assert np.median(inner) <= 200, np.median(inner)


def epoch(loader: DataLoader) -> None:
    seen = sum(len(batch["image"]) for batch in loader)
    assert seen == CHIPS, seen


def measure() -> list[Row]:
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method("fork", force=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, compress in (("as they are", None), ("deflated", "deflate")):
            image, label = write(Path(folder) / name.replace(" ", "-"), compress)
            check(image, label)
            for workers in (0, 2):
                loaders = {
                    f"{title}, {name}, {workers} workers": make(image, label, workers)
                    for title, make in (("TorchGeo", torchgeo), ("Chips", ours), ("Chips as float32", as_float))
                }
                # The first round, which does not count, starts workers and opens files, which then stay.
                timings = interleaved({title: partial(epoch, loader) for title, loader in loaders.items()}, ROUNDS)
                peer, own, _ = loaders
                for title, timing in timings.items():
                    rate, ratio = CHIPS / timing.minimum, timings[peer].minimum / timing.minimum
                    compared = None if title == peer else (peer, ratio, LIMIT if title == own else None)
                    rows.append(Row(PART, title, rate, "chips/s", *(compared or (None,) * 3), timing.spread, True))
    return rows


if __name__ == "__main__":
    main(PART, measure, threads=1)
