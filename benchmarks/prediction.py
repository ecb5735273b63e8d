"""A whole scene to a map: peak memory of two scene sizes, and tiles a second against the model alone.

Each memory figure is of a process of its own, which predicts a scene of 12 bands of uint16 to
ten classes with a pointwise model. The other comparison is of one thread.
Needs 5 GB in the folder for temporary files.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin
from torch import nn

from _timing import Row, interleaved, main
from ununennium.models import RasterModel, create_model
from ununennium.prediction import predict_scene

PART = "prediction"
BANDS, CLASSES, TILE, BATCH = 12, 10, 512, 4
SIDES, MOST_MB, MOST_GROWTH = (5490, 10980), 2000, 10
TILES, ROUNDS, LEAST_RATE = 4, 5, 0.9


def write_scene(path: Path, side: int) -> None:
    generator = np.random.default_rng(0)
    block = generator.integers(1, 4000, (BANDS, TILE, TILE), dtype=np.uint16)
    profile = {
        "driver": "GTiff", "width": side, "height": side, "count": BANDS, "dtype": "uint16", "nodata": 0,
        "crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 10, 10), "tiled": True, "blockxsize": TILE,
        "blockysize": TILE, "compress": "deflate", "zlevel": 1, "predictor": 2,
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as scene:
        for _, window in scene.block_windows(1):
            scene.write(block[:, : window.height, : window.width], window=window)


def megabytes(side: int, folder: Path) -> float:
    """Return the peak resident size of a process that predicts a scene."""
    scene = folder / f"{side}.tif"
    write_scene(scene, side)
    command = [sys.executable, __file__, str(scene), str(folder / f"{side} map.tif")]
    peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    scene.unlink()
    return peak


def predict_alone(scene: str, destination: str) -> None:
    torch.set_num_threads(1)
    predict_scene(nn.Conv2d(BANDS, CLASSES, 1), scene, destination, tile=TILE, batch_size=BATCH, device="cpu")
    status = Path("/proc/self/status").read_text()  # the peak that getrusage tells is the starting process's, if higher
    print(int(status.split("VmHWM:")[1].split()[0]) / 1e3)


def rates(folder: Path) -> list[Row]:
    """Compare tiles a second of the model on batches that are ready with those of a whole scene from file to file."""
    scene = folder / "scene.tif"
    write_scene(scene, TILE + (TILES - 1) * (TILE - 64))
    torch.manual_seed(0)
    names = {"bands": [f"B{i}" for i in range(1, BANDS + 1)], "class_names": [f"class {i}" for i in range(CLASSES)]}
    network = create_model("unet_resnet18", BANDS, CLASSES)
    model = RasterModel(network, mean=[2000] * BANDS, std=[1000] * BANDS, **names).eval()
    ready = torch.randint(1, 4000, (BATCH, BANDS, TILE, TILE)).float()

    @torch.no_grad()
    def alone() -> None:
        for _ in range(TILES):
            model(ready)

    def whole() -> None:
        options = {"tile": TILE, "batch_size": BATCH, "device": "cpu", "overwrite": True, "progress": False}
        predict_scene(model, scene, folder / "map.tif", **options)

    peer, own = "the model alone", "from file to file"
    timings = interleaved({peer: alone, own: whole}, ROUNDS, warmup=0)
    rate = {peer: TILES * BATCH / timings[peer].minimum, own: TILES * TILES / timings[own].minimum}
    return [
        Row(PART, peer, rate[peer], "tiles/s", None, None, None, timings[peer].spread, True),
        Row(PART, own, rate[own], "tiles/s", peer, rate[own] / rate[peer], LEAST_RATE, timings[own].spread, True),
    ]


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        rows = rates(Path(folder))
        peaks = [megabytes(side, Path(folder)) for side in SIDES]
    for side, peak in zip(SIDES, peaks, strict=True):
        rows.append(Row(PART, f"peak memory of {side:,} x {side:,}", peak, "MB", None, None, MOST_MB, None))
    growth = "growth of peak memory with four times the area"
    return [*rows, Row(PART, growth, (peaks[1] / peaks[0] - 1) * 100, "%", None, None, MOST_GROWTH, None)]


if __name__ == "__main__":
    predict_alone(*sys.argv[1:]) if Path(sys.argv[-1]).suffix == ".tif" else main(PART, measure, threads=1)
