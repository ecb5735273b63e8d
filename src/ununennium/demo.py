"""The demo: a real scene trained, validated on blocks that the training never saw, and mapped.

`run` is the whole of it and reads top to bottom. What it does with the Indian Pines scene it does with any
image and label raster of one grid.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ununennium import plots, prediction
from ununennium.data import Scene, Window
from ununennium.data.chips import draw_below
from ununennium.metrics import AverageAccuracy, CohenKappa, IoU, MetricCollection, OverallAccuracy
from ununennium.metrics.classification import class_figures
from ununennium.models import RasterModel, create_model
from ununennium.training import CheckpointCallback, LRSchedulerCallback, Trainer

IGNORE = 255  # in masks and in the map: no label, no data
FILL = math.nan  # in images: held out, no data
CHIP = 64  # side of a training chip, pixels
TILE, MARGIN = 128, 16  # side of a tile in validation and mapping; its rim that gives context but isn't counted
BATCH_SIZE = 8
MAX_COMPONENTS = 32
BLOCK_SIZES = (64, 32, 16, 8)

INDIAN_PINES = [
    "Alfalfa",
    "Corn-notill",
    "Corn-mintill",
    "Corn",
    "Grass-pasture",
    "Grass-trees",
    "Grass-pasture-mowed",
    "Hay-windrowed",
    "Oats",
    "Soybean-notill",
    "Soybean-mintill",
    "Soybean-clean",
    "Wheat",
    "Woods",
    "Buildings-Grass-Trees-Drives",
    "Stone-Steel-Towers",
]
ATTRIBUTION = """\
Indian Pines: AVIRIS scene of June 12, 1992, Indian Pine Test Site 3, Indiana, with land-cover labels.
Baumgardner, M. F., Biehl, L. L., Landgrebe, D. A. (2015): 220 Band AVIRIS Hyperspectral Image Data Set.
Purdue University Research Repository, doi:10.4231/R7RX991C. Licence: CC BY 3.0.
Changed: 20 water absorption bands left out (by others); written as GeoTIFF, classes counted from 0, here."""


class DemoError(Exception):
    """What was asked can't be done; the message says why, and what to change."""


def run(
    image: str | Path | None = None,
    label: str | Path | None = None,
    output: str | Path = "runs/demo",
    *,
    epochs: int = 15,
    batches: int = 16,
    block: int | None = None,
    model: str = "unet_resnet18",
    classes: str | Sequence[str] | Mapping[str, str] | None = None,
    ignore_index: int = IGNORE,
    seed: int = 0,
) -> dict[str, float]:
    """Train on one scene, validate on blocks held out of it, and write its map.

    Parameters
    ----------
    image, label : str or Path, optional
        Rasters of the same grid: bands, and one band of integer classes. By default the Indian Pines scene,
        which is written to the output folder first. The scene has to fit in memory.
    output : str or Path, default "runs/demo"
        A new or empty folder, or that of an earlier demo, whose results are replaced.
    epochs, batches : int
        Number of epochs, and of batches (of 8 chips of 64 × 64 pixels) in each.
    block : int, optional
        Side, in pixels, of the blocks that are held out; see `choose_block` for the default.
    model : str, default "unet_resnet18"
        A name for `create_model`.
    classes : str, sequence of str or mapping of str to str, optional
        Class names: a JSON file or names separated by commas; or a list or a mapping from label value to name.
    ignore_index : int, default 255
        Label value without a class, beside the label raster's own nodata value.
    seed : int, default 0
        Of weights, order and augmentation.

    Returns
    -------
    dict of str to float
        ``overall_accuracy``, ``kappa``, ``mean_recall`` and ``mean_iou`` of the map on the validation blocks.

    Raises
    ------
    DemoError
        If the scene or an argument won't do.
    """
    started = time.perf_counter()
    folder = make_folder(Path(output).expanduser())
    if image is None and label is None:
        image, label = write_indian_pines(folder)
        classes = INDIAN_PINES if classes is None else classes
    if image is None or label is None:
        raise DemoError("an image needs its labels and labels their image: give both, or neither for Indian Pines")
    scene = read_scene(Path(image).expanduser(), Path(label).expanduser(), classes, ignore_index)
    block = block or choose_block(scene.labels)
    held_out = hold_out(scene.labels, block)
    bands = scene.source.bands
    print(f"{image}: {' x '.join(map(str, held_out.shape))} pixels, {len(bands)} bands")
    print_split(scene, held_out, block)

    torch.manual_seed(seed)
    whitening = Whitening.fit(scene, scene.valid & ~held_out)
    try:
        network = make_network(model, whitening, len(scene.names))
    except ValueError as error:
        raise DemoError(str(error)) from error
    whole = RasterModel(
        network, bands, fill=FILL, class_names=scene.names, class_values=scene.values, ignore_index=IGNORE
    )
    settings: dict[str, Any] = {
        "model": model,
        "bands": len(bands),
        "components": len(whitening.matrix),
        "classes": scene.names,
        "values": scene.values,
        "image": str(image),
        "label": str(label),
        "block": block,
        "seed": seed,
    }
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # an earlier demo's
    (folder / "run.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")

    optimizer = torch.optim.AdamW(whole.parameters(), lr=2e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=epochs * batches)
    metrics = {
        "iou": IoU(len(scene.names), ignore_index=IGNORE),
        "class_iou": IoU(len(scene.names), ignore_index=IGNORE, average="none", class_names=scene.names),
    }
    trainer = Trainer(
        whole,
        optimizer,
        nn.CrossEntropyLoss(ignore_index=IGNORE),
        DataLoader(Chips(scene, held_out, length=batches * BATCH_SIZE), batch_size=BATCH_SIZE, shuffle=True),
        DataLoader(Tiles(scene, held_out), batch_size=BATCH_SIZE // 4),
        callbacks=[
            LRSchedulerCallback(scheduler, step_on="batch"),
            CheckpointCallback(folder / "checkpoints", monitor="val_iou"),
        ],
        gradient_clip_norm=1.0,
        metrics=metrics,
        seed=seed,
    )
    history = trainer.fit(epochs)

    trainer.load_weights(folder / "checkpoints" / "best")
    prediction.predict_scene(whole, scene.source, folder / "map.tif", tile=TILE, overlap=TILE // 2, overwrite=True)
    with rasterio.open(folder / "map.tif") as target:
        predicted = class_numbers(target.read(1), scene.valid, scene.values)
    figures, per_class = assess(scene, held_out, predicted)
    (folder / "run.json").write_text(json.dumps(settings | {"figures": figures}, indent=1), encoding="utf-8")
    best = int(np.nanargmax(history["val_iou"])) + 1
    shown = {name: figures for name, figures in history.items() if "/" not in name}
    (folder / "curves.png").write_bytes(plots.png(plots.draw_curves(shown, best=best)))
    draw_map(folder / "map.png", scene, held_out, predicted)

    print_figures(scene, held_out, figures, per_class)
    print_results(folder, time.perf_counter() - started)
    return figures


def load_model(folder: str | Path, checkpoint: str = "best") -> nn.Module:
    """Load a model that the demo trained.

    Parameters
    ----------
    folder : str or Path
        The demo's output folder.
    checkpoint : str, default "best"
        Which one: "best", "last", or a checkpoint's name.

    Returns
    -------
    nn.Module
        On the CPU, in eval mode. Takes the raster's own values (B, bands, H, W) in float32, gives class logits
        (B, classes, H, W). Pixels without data are NaN. Height and width are what the network takes: multiples of 32
        for most.
    """
    settings = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
    bands, components = settings["bands"], settings["components"]
    whitening = Whitening(torch.zeros(bands), torch.zeros(components, bands))
    network = make_network(settings["model"], whitening, len(settings["classes"]))
    return prediction.load_model(Path(folder) / "checkpoints" / checkpoint, network)


# ---- the scene ---------------------------------------------------------------------------------------------------


@dataclass
class LabelledScene:
    """An image and its labels on one grid, in memory.

    Attributes
    ----------
    source : Scene
        Of the image.
    image : ndarray
        Bands (C, H, W) as the raster has them.
    valid : ndarray of bool
        Where every band has data (H, W).
    labels : ndarray of uint8
        Class numbers 0 … K-1 (H, W), `IGNORE` where there is no label or no data.
    values, names : list
        Each class's value in the label raster, and its name.
    """

    source: Scene
    image: NDArray[Any]
    valid: NDArray[np.bool_]
    labels: NDArray[np.uint8]
    values: list[int]
    names: list[str]

    def cut(self, seen: NDArray[np.bool_], row: int, col: int, size: int) -> Tensor:
        """Return a square of the image in float32, `FILL` wherever it is not seen or not scene."""
        pixels = cut(self.image, row, col, size, 0).astype(np.float32)
        pixels[:, ~cut(seen, row, col, size, False)] = FILL
        return torch.from_numpy(pixels)


def cut(array: NDArray[Any], row: int, col: int, size: int, fill: Any) -> NDArray[Any]:
    """Return a square of the last two dimensions, filled up where it reaches beyond them."""
    height, width = array.shape[-2:]
    top, left, bottom, right = max(row, 0), max(col, 0), min(row + size, height), min(col + size, width)
    square = np.full((*array.shape[:-2], size, size), fill, dtype=array.dtype)
    square[..., top - row : bottom - row, left - col : right - col] = array[..., top:bottom, left:right]
    return square


def make_folder(folder: Path) -> Path:
    """Make the output folder, unless it is there with other files than a demo's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise DemoError(f"{folder} can't be the output folder: {error.strerror}") from error
    if names and names.isdisjoint({"run.json", "ATTRIBUTION.txt"}):
        raise DemoError(f"{folder} holds other files than a demo's: choose a new --output folder")
    return folder


def write_indian_pines(folder: Path) -> tuple[Path, Path]:
    """Write the Indian Pines scene as GeoTIFFs and return the paths of image and labels.

    It comes without a georeference. The grid is given a local one in metres, which is true to scale and claims no
    place on Earth.
    """
    try:
        from tensorly.datasets import load_indian_pines
    except ImportError as error:
        raise DemoError('the Indian Pines scene comes with tensorly: pip install "ununennium[demo]"') from error
    print(ATTRIBUTION + "\n")
    (folder / "ATTRIBUTION.txt").write_text(ATTRIBUTION + "\n", encoding="utf-8")
    bunch = load_indian_pines()
    cube = np.asarray(bunch.tensor).astype(np.uint16).transpose(2, 0, 1)
    labels, wavelengths = np.asarray(bunch.ticks[0]).astype(np.int64), bunch.ticks[1]
    profile = {
        "driver": "GTiff",
        "height": cube.shape[1],
        "width": cube.shape[2],
        "crs": 'LOCAL_CS["Indian Pines, local grid",UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]',
        "transform": rasterio.Affine(20.0, 0.0, 0.0, 0.0, -20.0, 20.0 * cube.shape[1]),
        "compress": "deflate",
    }
    with rasterio.open(folder / "image.tif", "w", count=len(cube), dtype="uint16", **profile) as target:
        target.write(cube)
        target.descriptions = [f"{wavelength} nm" for wavelength in wavelengths]
        target.update_tags(TIFFTAG_COPYRIGHT=ATTRIBUTION)
    with rasterio.open(folder / "label.tif", "w", count=1, dtype="uint8", nodata=IGNORE, **profile) as target:
        target.write(np.where(labels == 0, IGNORE, labels - 1).astype(np.uint8), 1)
        target.update_tags(TIFFTAG_COPYRIGHT=ATTRIBUTION, **{str(i): name for i, name in enumerate(INDIAN_PINES)})
    return folder / "image.tif", folder / "label.tif"


def read_scene(
    image_path: Path,
    label_path: Path,
    classes: str | Sequence[str] | Mapping[str, str] | None = None,
    ignore_index: int = IGNORE,
) -> LabelledScene:
    """Read an image and its labels; values of the label raster become class numbers in their order.

    Raises
    ------
    DemoError
        If a file can't be read, the grids differ, or the labels are not classes.
    """
    for path in (image_path, label_path):
        if not path.is_file():
            raise DemoError(f"there is no file {path}")
    try:
        image, label = Scene(image_path), Scene(label_path)
        check_grid(image, label)
        if len(label.bands) != 1:
            raise DemoError(f"{label_path} has {len(label.bands)} bands; labels are one band of integers: take it out")
        whole = Window(0, 0, *image.shape)
        bands, valid = image.read(whole)
        (raw,), labelled = label.read(whole)
    except (OSError, ValueError) as error:
        raise DemoError(f"not a raster that can be read: {error}") from error
    labelled &= (raw != ignore_index) & valid
    if not np.issubdtype(raw.dtype, np.integer):
        raise DemoError(f"{label_path} holds {raw.dtype}; classes are integers: convert it, for example to uint8")
    if min(raw.shape) < CHIP:
        raise DemoError(
            f"the scene has {raw.shape[0]} x {raw.shape[1]} pixels, but a chip {CHIP} x {CHIP}: take a larger one"
        )
    values = np.unique(raw[labelled]).tolist()
    if len(values) < 2:
        found = f"only the class {values[0]}" if values else "no class at all"
        raise DemoError(f"{label_path} holds {found} where the image has data; label two classes or more")
    if values[0] < 0 or values[-1] >= IGNORE:
        raise DemoError(
            f"{label_path} holds labels from {values[0]} to {values[-1]}; classes lie in 0 … {IGNORE - 1}. "
            "If one of the values means that there is no label, name it with --ignore-index"
        )
    labels = class_numbers(raw, labelled, values)
    return LabelledScene(image, bands, valid, labels, values, class_names(values, classes))


def check_grid(image: Scene, label: Scene) -> None:
    """Raise if two rasters differ in size or coordinate system, or lie a thousandth of a pixel apart."""
    grids = [(raster.shape, raster.crs, raster.transform) for raster in (image, label)]
    for what, ours, theirs in zip(("size", "coordinate system", "transform"), *grids, strict=True):
        pixel = math.hypot(image.transform.a, image.transform.d)
        if ours != theirs and not (what == "transform" and np.allclose(ours, theirs, rtol=0, atol=1e-3 * pixel)):
            ours, theirs = (value[:6] if what == "transform" else value for value in (ours, theirs))
            raise DemoError(
                f"image and labels are not on one grid: {what} {ours} of {image.image[0]}, {theirs} of "
                f"{label.image[0]}. Warp the labels to the image's grid, for example with rio warp --like"
            )


def class_numbers(raw: NDArray[Any], known: NDArray[np.bool_], values: Sequence[int]) -> NDArray[np.uint8]:
    """Return the number of the class whose value a pixel has, where that is known, and `IGNORE` elsewhere."""
    numbers = np.full(raw.shape, IGNORE, dtype=np.uint8)
    numbers[known] = np.searchsorted(values, raw[known])
    return numbers


def class_names(values: Sequence[int], classes: str | Sequence[str] | Mapping[str, str] | None) -> list[str]:
    """Return a name for each label value.

    A list names the values 0, 1, 2 …, or, when it is too short for that, the values that occur, in their order.
    JSON may hold the names under "classes".
    """
    source = "classes"
    if isinstance(classes, str):
        source = classes
        if classes.endswith(".json"):
            try:
                classes = json.loads(Path(classes).expanduser().read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DemoError(f"class names can't be read from {source}: {error}") from error
            classes = classes.get("classes", classes) if isinstance(classes, Mapping) else classes
        else:
            classes = [name.strip() for name in classes.split(",")]
    if classes is None:
        return [f"class {value}" for value in values]
    if not isinstance(classes, Mapping | list | tuple):
        raise DemoError(f"{source} holds no list of class names, and no mapping from label values to them")
    if isinstance(classes, Mapping):
        names = {int(value): str(name) for value, name in classes.items() if str(value).isdigit()}
    else:
        numbers = range(len(classes)) if values[-1] < len(classes) or len(classes) != len(values) else values
        names = dict(zip(numbers, map(str, classes), strict=True))
    if unnamed := [value for value in values if value not in names]:
        raise DemoError(f"{source} has no name for the label values {unnamed}: it names {sorted(names)}")
    chosen = [names[value] for value in values]
    if len(set(chosen)) < len(chosen):
        raise DemoError(f"{source} gives one name to two classes: {chosen}. Give each a name of its own")
    return chosen


# ---- the split ---------------------------------------------------------------------------------------------------


def hold_out(labels: NDArray[np.uint8], block: int) -> NDArray[np.bool_]:
    """Return which pixels are held out for validation: the blocks whose row and column add up to a multiple of three.

    Raises
    ------
    DemoError
        If no labelled pixel is left on one side.
    """
    held_out = _blocks(labels.shape, block)
    for side, name in ((~held_out, "training"), (held_out, "validation")):
        if (labels[side] == IGNORE).all():
            raise DemoError(f"with blocks of {block} pixels no {name} block has a label: choose another --block")
    return held_out


def choose_block(labels: NDArray[np.uint8]) -> int:
    """Return the largest block size, six blocks across at least, at which the most classes lie on both sides."""

    def on_both_sides(block: int) -> int:
        held_out = _blocks(labels.shape, block)
        return len(np.intersect1d(labels[held_out], labels[~held_out]))

    sizes = [block for block in BLOCK_SIZES if 6 * block <= min(labels.shape)]
    return max(sizes, key=on_both_sides)  # the first of equals


def _blocks(shape: tuple[int, ...], block: int) -> NDArray[np.bool_]:
    rows, cols = np.indices(shape) // block
    held_out: NDArray[np.bool_] = (rows + cols) % 3 == 0
    return held_out


# ---- what the model sees -----------------------------------------------------------------------------------------


class Whitening(nn.Module):
    """Turn bands into uncorrelated components of unit variance (PCA whitening), with some noise in training.

    Neighbouring bands say nearly the same, which makes for slow training, and they come in any unit; components do
    not. Part of the model, so that its weights are all that is needed to use it. `FILL` becomes what the mean becomes:
    zero.

    Parameters
    ----------
    mean : Tensor
        Of each band (C,).
    matrix : Tensor
        Components from bands (K, C).
    noise : float, default 0.3
        Standard deviation of what is added in training, in those of the components.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, mean: Tensor, matrix: Tensor, noise: float = 0.3) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("matrix", matrix)
        self.noise = noise

    @classmethod
    def fit(cls, scene: LabelledScene, seen: NDArray[np.bool_]) -> Whitening:
        """Whiten by the pixels that the training sees (by a regular sample of them, if there are very many)."""
        places = np.flatnonzero(seen)
        places = places[:: len(places) // 200_000 + 1]
        pixels = scene.image.reshape(len(scene.image), -1)[:, places].astype(np.float64)
        mean, spread = pixels.mean(1), pixels.std(1)
        spread[spread == 0] = 1
        standard = (pixels - mean[:, None]) / spread[:, None]
        variances, vectors = np.linalg.eigh(standard @ standard.T / len(places))
        kept = np.flatnonzero(variances > 1e-6 * max(variances[-1], 1e-6))[::-1][:MAX_COMPONENTS]
        if not len(kept):
            raise DemoError(
                "the image has the same value everywhere in the training blocks: choose another image or --block"
            )
        matrix = (vectors[:, kept] / np.sqrt(variances[kept]) / spread[:, None]).T
        return cls(torch.tensor(mean, dtype=torch.float32), torch.tensor(matrix, dtype=torch.float32))

    def forward(self, image: Tensor) -> Tensor:
        """Return components (B, K, H, W) of bands (B, C, H, W)."""
        centred = (image - self.mean[:, None, None]).masked_fill_(image.isnan().any(1, keepdim=True), 0)
        components = F.conv2d(centred, self.matrix[:, :, None, None])
        return components + self.noise * torch.randn_like(components) if self.training else components


def make_network(name: str, whitening: Whitening, num_classes: int) -> nn.Module:
    """Return what the demo trains, for the raster's own values: whitening, and a model of `create_model` behind it."""
    return nn.Sequential(whitening, create_model(name, in_channels=len(whitening.matrix), num_classes=num_classes))


class Chips(Dataset[dict[str, Tensor]]):
    """Random chips for training, turned and mirrored; held-out blocks are blank in them and have no label.

    Each chip is laid around a pixel of a class drawn at random, so that rare classes are seen as often as common ones.
    """

    def __init__(self, scene: LabelledScene, held_out: NDArray[np.bool_], length: int) -> None:
        self.scene = scene
        self.length = length
        self.seen: NDArray[np.bool_] = scene.valid & ~held_out
        self.labels: NDArray[np.uint8] = np.where(held_out, IGNORE, scene.labels)
        places = (np.argwhere(self.labels == number) for number in range(len(scene.names)))
        self.places: list[NDArray[np.intp]] = [pixels for pixels in places if len(pixels)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels = self.places[draw_below(len(self.places))]
        pixel = pixels[draw_below(len(pixels))]
        row, col = (
            min(max(int(place) - draw_below(CHIP), 0), length - CHIP)
            for place, length in zip(pixel, self.labels.shape, strict=True)
        )
        image = self.scene.cut(self.seen, row, col, CHIP)
        mask = torch.from_numpy(cut(self.labels, row, col, CHIP, IGNORE).astype(np.int64))
        turns, mirrored = draw_below(4), draw_below(2)
        image, mask = image.rot90(turns, (-2, -1)), mask.rot90(turns, (-2, -1))
        if mirrored:
            image, mask = image.flip(-1), mask.flip(-1)
        return {"image": image.contiguous(), "mask": mask.contiguous()}


class Tiles(Dataset[dict[str, Tensor]]):
    """Tiles for validation: the whole image to look at, and every held-out label in exactly one tile."""

    def __init__(self, scene: LabelledScene, held_out: NDArray[np.bool_]) -> None:
        self.scene = scene
        self.labels: NDArray[np.uint8] = np.where(held_out, scene.labels, IGNORE)
        self.core = TILE - 2 * MARGIN
        height, width = self.labels.shape
        corners = ((row, col) for row in range(0, height, self.core) for col in range(0, width, self.core))
        self.corners: list[tuple[int, int]] = [(r, c) for r, c in corners if (self._core_labels(r, c) != IGNORE).any()]

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, col = self.corners[index]
        image = self.scene.cut(self.scene.valid, row - MARGIN, col - MARGIN, TILE)
        mask = torch.from_numpy(self._core_labels(row, col).astype(np.int64))
        return {"image": image, "mask": F.pad(mask, (MARGIN,) * 4, value=IGNORE)}

    def _core_labels(self, row: int, col: int) -> NDArray[np.uint8]:
        return cut(self.labels, row, col, self.core, IGNORE)


# ---- the map and its figures -------------------------------------------------------------------------------------


def assess(
    scene: LabelledScene, held_out: NDArray[np.bool_], predicted: NDArray[np.uint8]
) -> tuple[dict[str, float], NDArray[np.float64]]:
    """Compare map and labels on the validation blocks.

    Returns
    -------
    figures : dict of str to float
        Overall accuracy; Cohen's kappa; recall averaged over the classes that have validation pixels; IoU averaged
        over the classes that occur there in labels or map.
    per_class : ndarray
        IoU and recall of each class (K, 2); NaN where there is none.
    """
    num_classes = len(scene.names)
    metrics = MetricCollection(
        {
            "overall_accuracy": OverallAccuracy(num_classes, ignore_index=IGNORE),
            "kappa": CohenKappa(num_classes, ignore_index=IGNORE),
            "mean_recall": AverageAccuracy(num_classes, ignore_index=IGNORE),
            "mean_iou": IoU(num_classes, ignore_index=IGNORE),
        }
    )
    metrics.update(torch.from_numpy(predicted[held_out]).long(), torch.from_numpy(scene.labels[held_out]).long())
    assert metrics.confusion is not None
    each = class_figures(metrics.confusion)
    recalls = each["recall"].where(each["support"] > 0, math.nan)  # a class that is only predicted has none
    return metrics.compute(), torch.stack([each["iou"], recalls], dim=1).numpy()


# ---- what is printed ---------------------------------------------------------------------------------------------


def print_split(scene: LabelledScene, held_out: NDArray[np.bool_], block: int) -> None:
    """Print how the scene is split, and each class's labelled pixels on both sides."""
    longest = max(map(len, scene.names))
    print(f"validation: every third {block} x {block} block, {held_out.mean():.0%} of the scene, blank in training\n")
    print(f"{'labelled pixels':{longest}}    training  validation")
    for name, (training, validation) in zip(scene.names, _counts(scene, held_out), strict=True):
        missing = "training" if not training else "validation" if not validation else ""
        note = f"   none for {missing}" if missing else ""
        print(f"{name:{longest}}  {training:10}  {validation:10}{note}")
    print()


def print_figures(
    scene: LabelledScene, held_out: NDArray[np.bool_], figures: Mapping[str, float], per_class: NDArray[np.float64]
) -> None:
    """Print the figures of the map, per class and in all."""
    longest = max(map(len, scene.names))
    print("\nthe best epoch's map on the validation blocks, in percent (they chose the epoch: a touch optimistic)\n")
    print(f"{'':{longest}}     pixels     IoU  recall")
    for name, (_, pixels), pair in zip(scene.names, _counts(scene, held_out), per_class, strict=True):
        cells = ["-" if np.isnan(figure) else f"{100 * figure:.1f}" for figure in pair]
        print(f"{name:{longest}}  {pixels:9} {cells[0]:>7} {cells[1]:>7}")
    print(
        "\n"
        + "   ".join(
            f"{name.replace('_', ' ').replace('iou', 'IoU')} {100 * figure:.2f}" for name, figure in figures.items()
        )
    )


def print_results(folder: Path, seconds: float) -> None:
    """Print where everything is, and how to load it."""
    print(f"\nfinished in {seconds:.0f} s; in {folder}:")
    for name, what in (
        ("map.tif", "the predicted map"),
        ("map.png", "image, labels, map and errors"),
        ("curves.png", "loss and IoU by epoch"),
        ("checkpoints/best", "the best epoch's weights and training state"),
        ("checkpoints/last", "the last epoch's"),
    ):
        print(f"  {name:18}{what}")
    print("\nthe model in Python, from the raster's values (B, bands, H, W) to class logits:")
    print(f"  from ununennium.demo import load_model; model = load_model({str(folder)!r})")


def _counts(scene: LabelledScene, held_out: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Labelled pixels of each class in training and in validation (K, 2)."""
    sides = (scene.labels[~held_out], scene.labels[held_out])
    return np.stack([np.bincount(side, minlength=256)[: len(scene.names)] for side in sides], axis=1)


# ---- pictures ----------------------------------------------------------------------------------------------------


def draw_map(path: Path, scene: LabelledScene, held_out: NDArray[np.bool_], predicted: NDArray[np.uint8]) -> None:
    """Draw image, labels, map, and where the map is right and wrong on the validation blocks."""
    channels = plots.rgb_bands(scene.source.bands)
    whole = plots.Example(
        plots.composite(scene.image, channels, scene.valid),
        scene.labels,
        predicted,
        scene.labels != IGNORE,
        scene.valid,
        judged=held_out,
    )
    titles = (
        f"Image (bands {', '.join(str(channel + 1) for channel in channels)})",
        "Labels",
        "Map",
        "Map on the validation blocks",
    )
    path.write_bytes(
        plots.png(
            plots.draw_classes([whole], scene.names, titles=titles, unlabelled="no label, or trained on", side=3.6)
        )
    )
