"""A run made of a configuration: chips of scenes, a model that knows its bands and classes, and its Trainer."""

import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

from ununennium.data import BandStatistics, Chips, Scene, Split, band_statistics, block_split
from ununennium.data.chips import draw_below
from ununennium.models import RasterModel, create_model
from ununennium.training import (
    Callback,
    CheckpointCallback,
    EarlyStoppingCallback,
    LRSchedulerCallback,
    PreviewCallback,
    ReportCallback,
    Trainer,
)
from ununennium.training.checkpoint import whole_or_absent
from ununennium.training.checks import resolve_device
from ununennium.training.distributed import Group, group_on, join
from ununennium.training.loading import EpochLoader

if TYPE_CHECKING:  # jsonargparse makes them as it is imported, which no type checker can follow
    NonNegativeInt: TypeAlias = int
    PositiveInt: TypeAlias = int
else:
    from jsonargparse.typing import NonNegativeInt, PositiveInt

Schedule = Literal["constant", "cosine", "one_cycle"]


@dataclass
class SceneFiles:
    """The files of a scene.

    Parameters
    ----------
    image : str or list of str
        A raster, or several: one file a band, say.
    label : str, optional
        The raster of its labels.
    bands : list of str, optional
        Names of the bands; by default those in the files.
    """

    image: str | list[str]
    label: str | None = None
    bands: list[str] | None = None

    def open(self) -> Scene:
        """Return the scene."""
        return Scene(self.image, self.label, bands=self.bands)


@dataclass
class SplitSettings:
    """How scenes are split into blocks for training and validation.

    Parameters
    ----------
    fractions : dict of str to float
        Shares of the area; "train" and "val", and others that are kept out of both.
    block : int
        Side of a block, pixels.
    buffer : int
        Least distance of a training chip from one of another part, pixels.
    """

    fractions: dict[str, float] = field(default_factory=lambda: {"train": 0.7, "val": 0.3})
    block: int = 512
    buffer: int = 0


@dataclass
class ChipSettings:
    """Chips of scenes, for training and for validation.

    Parameters
    ----------
    scenes : list of SceneFiles
        Scenes with labels.
    val_scenes : list of SceneFiles, optional
        Scenes to validate on; without them ``scenes`` are split into blocks.
    split : SplitSettings
        How, if there are no ``val_scenes``.
    bands : list of str, optional
        The bands to use, by name, in this order; all by default.
    classes : dict of int to str, or list of str
        The class of each label value; names alone stand for the values 0, 1, ….
    ignore_index : int
        What stands for no label and no data in masks.
    ignore_values : list of int
        Label values that are no class.
    fill : float
        Value of pixels without data.
    chip_size : int
        Side of a chip, pixels.
    batch_size : int
        Chips in a batch of one process.
    chips_per_epoch : int, optional
        Chips drawn at random places in an epoch; by default those of a grid.
    stride : int, optional
        Of the grid of training chips, pixels; the chip's side by default.
    min_valid : float
        Least share of labelled pixels in a training chip.
    focus : float
        Share of the random chips that are laid on a pixel of a class drawn at random, so that rare ones are seen.
    flips : bool
        Flip and turn training chips at random.
    normalize : bool
        Subtract each band's mean and divide by its standard deviation, both of the training area.
    num_workers : int
        Processes that load chips.
    seed : int
        Of the split.
    """

    scenes: list[SceneFiles]
    val_scenes: list[SceneFiles] | None = None
    split: SplitSettings = field(default_factory=SplitSettings)
    bands: list[str] | None = None
    classes: dict[int, str] | list[str] = field(default_factory=list)
    ignore_index: int = 255
    ignore_values: list[int] = field(default_factory=list)
    fill: float = 0.0
    chip_size: PositiveInt = 256
    batch_size: PositiveInt = 8
    chips_per_epoch: PositiveInt | None = None
    stride: PositiveInt | None = None
    min_valid: float = 0.0
    focus: float = 0.0
    flips: bool = True
    normalize: bool = True
    num_workers: NonNegativeInt = 0
    seed: int = 0


class SceneData:
    """The chips that `ChipSettings` ask for, and their loaders.

    Parameters
    ----------
    settings : ChipSettings

    Attributes
    ----------
    settings : ChipSettings
        As they were given.
    split : Split or None
        Where training and validation lie in the scenes; None if validation has scenes of its own.
    train, val : Chips

    Raises
    ------
    ValueError
        If a setting is missing or does not fit the others or the files; the message names its key.
    """

    def __init__(self, settings: ChipSettings) -> None:
        self.settings: ChipSettings = settings
        if not settings.classes:
            raise ValueError("data.classes is missing: name the classes, as {1: forest, 2: water} or as a list")
        for name, given in (("scenes", settings.scenes), ("val_scenes", settings.val_scenes or [])):
            unlabelled = [str(number) for number, files in enumerate(given) if files.label is None]
            if unlabelled:
                raise ValueError(
                    f"data.{name} has no label for scene {', '.join(unlabelled)}: give label: FILE for each"
                )
        if not settings.scenes:
            raise ValueError("data.scenes is empty: name a scene, as {image: FILE, label: FILE}")
        if settings.stride is not None and settings.chips_per_epoch is not None:
            raise ValueError("data.stride is for chips on a grid: leave it or data.chips_per_epoch out")
        training = [_opened(files, f"data.scenes[{n}]") for n, files in enumerate(settings.scenes)]
        validation = [_opened(files, f"data.val_scenes[{n}]") for n, files in enumerate(settings.val_scenes or ())]
        with _about("data.bands"):
            training[0].band_indices(settings.bands)
        common: dict[str, Any] = {
            "classes": settings.classes, "ignore_index": settings.ignore_index, "ignore_values": settings.ignore_values,
        }  # fmt: skip
        self.split: Split | None = None
        if settings.focus and settings.chips_per_epoch is None:
            raise ValueError("data.focus is for random chips: set data.chips_per_epoch, their number in an epoch")
        if not settings.val_scenes:
            how = settings.split
            missing = {"train", "val"} - how.fractions.keys()
            if missing:
                raise ValueError(
                    f"data.split.fractions has no {' and no '.join(sorted(missing))}: give shares for train and val"
                )
            with _about("data.split"):
                self.split = block_split(
                    training, how.fractions, how.block, buffer=how.buffer, seed=settings.seed, **common
                )
        regions = (None, None) if self.split is None else (self.split["train"], self.split["val"])
        common["fill"] = settings.fill
        with _about("data"):
            self.train: Chips = Chips(
                training, settings.chip_size, bands=settings.bands, region=regions[0], length=settings.chips_per_epoch,
                stride=settings.stride, min_valid=settings.min_valid, focus=settings.focus,
                transform=flip if settings.flips else None, **common,
            )  # fmt: skip
            self.val: Chips = Chips(  # its bands by name, whatever their order in the files
                validation or training, settings.chip_size, bands=self.train.bands, region=regions[1], once=True,
                **common,
            )  # fmt: skip
        workers = settings.num_workers
        self._loading: dict[str, Any] = {
            "batch_size": settings.batch_size, "num_workers": workers, "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }  # fmt: skip

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of training chips."""
        return DataLoader(self.train, shuffle=True, **self._loading)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of validation chips."""
        return DataLoader(self.val, **self._loading)

    def around(self, network: nn.Module, statistics: BandStatistics | None) -> RasterModel:
        """Return a model that takes the chips as they are, and knows their bands and classes."""
        return RasterModel(
            network, self.train.bands,
            None if statistics is None else statistics.mean, None if statistics is None else statistics.std,
            fill=self.train.fill, class_names=self.train.class_names, class_values=self.train.class_values,
            ignore_index=self.train.ignore_index,
        )  # fmt: skip


def _opened(files: SceneFiles, key: str) -> Scene:
    with _about(key):
        return files.open()


@contextmanager
def _about(key: str) -> Iterator[None]:
    """Name the key of the configuration that an error is about."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def flip(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a chip flipped and turned at random, one of the eight ways; its place on the ground is left out."""
    way = draw_below(8)
    turned: dict[str, Any] = {}
    for name in ("image", "mask"):
        if name in sample:
            given = sample[name]
            chip = given.view(_SIGNED.get(given.dtype, given.dtype))  # torch 2.11 can't flip uint16 and wider
            chip = chip.flip(-1) if way & 4 else chip
            turned[name] = torch.rot90(chip, way & 3, (-2, -1)).contiguous().view(given.dtype)
    return turned


class DataModule(Protocol):
    """What gives loaders, a TorchGeo or Lightning datamodule for example."""

    def train_dataloader(self) -> Any:
        """Return the loader to train with."""

    def val_dataloader(self) -> Any:
        """Return the loader to validate with."""


@dataclass
class ModelSettings:
    """A model that `create_model` makes.

    Parameters
    ----------
    name : str
        Such as unet_resnet50; list_models() shows all.
    weights : str, optional
        Pretrained weights; their filters are given to the bands by name.
    unmatched : str
        What to do with a band that the weights do not know: "raise", "mean" or "zero".
    arguments : dict, optional
        Further arguments of the model.
    in_channels : int, optional
        Needed with a datamodule; scenes tell by themselves.
    num_classes : int, optional
        Needed with a datamodule; the classes of scenes tell by themselves.
    """

    name: str = "unet_resnet18"
    weights: str | None = None
    unmatched: Literal["raise", "mean", "zero"] = "raise"
    arguments: dict[str, Any] | None = None
    in_channels: PositiveInt | None = None
    num_classes: PositiveInt | None = None


@dataclass
class Run:
    """The parts of a run, made of a configuration.

    Attributes
    ----------
    trainer : Trainer
        Ready to fit.
    data : SceneData or DataModule
        Where its loaders come from.
    folder : Path
        Where everything is written.
    """

    trainer: Trainer
    data: SceneData | DataModule
    folder: Path


def build(settings: Any, config: Mapping[str, Any], *, trains: bool = True) -> Run:
    """Make a run of a configuration.

    Parameters
    ----------
    settings : jsonargparse.Namespace
        What the parser of ``ununennium fit`` instantiated.
    config : mapping
        The same as plain data, kept with the run.
    trains : bool, default True
        Make a folder for the run, and measure the statistics of its bands. Without, weights are to be loaded.

    Raises
    ------
    ValueError, TypeError, OSError
        For what won't do, naming it and what would.
    """
    folder = Path(settings.output).expanduser()
    options = dict(vars(settings.trainer))
    epochs = options.pop("epochs")
    if options["distributed"] == "auto":
        options["distributed"] = "RANK" in os.environ
    device = join(options["backend"], options["device"]) if options["distributed"] else options["device"]
    group = group_on(resolve_device(device), bool(options["distributed"]))
    if trains:
        group.of_leader(lambda: check_config(folder, config))
    torch.manual_seed(settings.seed)
    if (settings.data is None) == (settings.datamodule is None):
        both = "both are given" if settings.data is not None else "neither is given"
        raise ValueError(f"give either data, with its scenes, or a datamodule: {both}")
    data: SceneData | DataModule = SceneData(settings.data) if settings.data is not None else settings.datamodule
    transforms: dict[str, Any] = {} if isinstance(data, SceneData) else batch_transforms(data, group)
    measured = None
    if isinstance(data, SceneData) and data.settings.normalize and trains:
        measured = group.of_leader(lambda: band_statistics(data.train))
    model = _model(settings, data, measured, trains)
    loss_fn = settings.loss
    optimizer = settings.optimizer([*model.parameters(), *loss_fn.parameters()])
    train_loader, val_loader = data.train_dataloader(), data.val_dataloader()
    steps = _steps(train_loader, epochs, options["gradient_accumulation_steps"], group)
    callbacks = [
        *_schedulers(settings, optimizer, steps),
        *(settings.callbacks or []),
        *([EarlyStoppingCallback(**vars(settings.early_stop))] if settings.early_stopping else []),
        *(_pictures(settings, folder, group) if trains and settings.report else []),
        CheckpointCallback(folder / "checkpoints", **vars(settings.checkpoint)),
    ]
    trainer = Trainer(
        model, optimizer, loss_fn, train_loader, val_loader, callbacks, seed=settings.seed, config=config,
        metrics=settings.metrics, **transforms, **options,
    )  # fmt: skip
    if trains:
        group.of_leader(lambda: keep(folder, config, data, measured))
    return Run(trainer, data, folder)


def _model(settings: Any, data: SceneData | DataModule, measured: BandStatistics | None, pretrained: bool) -> nn.Module:
    chosen = settings.model
    in_channels, num_classes, bands = chosen.in_channels, chosen.num_classes, None
    weights = chosen.weights if pretrained else None
    if isinstance(data, SceneData):
        if in_channels is not None or num_classes is not None:
            raise ValueError("model.in_channels and model.num_classes are told by data: leave them out")
        in_channels, num_classes = len(data.train.bands), len(data.train.class_names or ())
        bands = list(data.train.bands) if weights else None
    network: nn.Module
    if settings.network is not None:
        idle = [f"model.{name}" for name, value in vars(chosen).items() if value != getattr(ModelSettings, name)]
        if idle:
            raise ValueError(f"{' and '.join(idle)} beside a network of your own, used as it is: leave one out")
        network = settings.network
    elif in_channels is None or num_classes is None:
        raise ValueError("with a datamodule, give model.in_channels and model.num_classes, or a network")
    else:
        network = create_model(
            chosen.name, in_channels, num_classes, weights, bands, unmatched=chosen.unmatched,
            **(chosen.arguments or {}),
        )  # fmt: skip
    return data.around(network, measured) if isinstance(data, SceneData) else network


def _steps(loader: Any, epochs: int, accumulation: int, group: Group) -> int | None:
    """Return the optimizer steps of a whole run, if the loader tells its length."""
    try:
        batches = len(EpochLoader(loader, 0, group.rank, group.size))
    except TypeError:
        return None
    return max(math.ceil(batches / accumulation) * epochs, 1)


def _schedulers(settings: Any, optimizer: torch.optim.Optimizer, steps: int | None) -> list[Callback]:
    if settings.scheduler is not None:
        if settings.schedule != "constant":
            raise ValueError('give a scheduler or a schedule: with a scheduler of your own, set schedule to "constant"')
        return [LRSchedulerCallback(settings.scheduler(optimizer), step_on=settings.step_on)]
    if settings.step_on != "epoch":
        raise ValueError(
            f"step_on={settings.step_on!r} is for a scheduler of your own, and schedule {settings.schedule!r} has its "
            "own pace: name a scheduler, or leave step_on out"
        )
    if settings.schedule == "constant":
        return []
    if steps is None:
        raise ValueError(f"schedule {settings.schedule!r} needs a loader that tells its length: set it to constant")
    scheduler: Any
    if settings.schedule == "one_cycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return [LRSchedulerCallback(scheduler, step_on="batch")]


def _pictures(settings: Any, folder: Path, group: Group) -> list[Callback]:
    """Return what draws previews and writes the report."""
    command = f"ununennium fit --config {shlex.quote(str(folder / 'config.yaml'))}"
    if group.size > 1:
        command = f"torchrun --nproc_per_node={group.size} -m {command}"
    previews = PreviewCallback(folder / "previews", **vars(settings.preview))
    return [previews, ReportCallback(folder / "report.html", resume_command=command)]


def batch_transforms(datamodule: Any, group: Group) -> dict[str, Callable[[Any], Any]]:
    """Set up a Lightning datamodule and return what its hooks do to batches, as a Trainer takes it."""
    if hasattr(datamodule, "prepare_data"):
        group.of_leader(datamodule.prepare_data)  # which may download
    if hasattr(datamodule, "setup"):
        datamodule.setup("fit")
    if not hasattr(datamodule, "on_after_batch_transfer"):
        return {}

    def transform(training: bool) -> Callable[[Any], Any]:
        def apply(batch: Any) -> Any:
            datamodule.trainer = _Stage(training)
            try:
                return datamodule.on_after_batch_transfer(batch, 0)
            finally:
                datamodule.trainer = None

        return apply

    return {"train_transform": transform(True), "val_transform": transform(False)}


class _Stage:
    """What a datamodule's hooks ask their trainer."""

    def __init__(self, training: bool) -> None:
        self.training, self.validating = training, not training
        self.sanity_checking = self.testing = self.predicting = False


_FREE = {
    "trainer.progress", "trainer.device", "trainer.distributed", "data.num_workers", "data.batch_size", "output",
    "report",
}  # fmt: skip


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise if a folder holds checkpoints of a run of another configuration, naming what differs.

    The batch size of one process may change with their number: the Trainer compares the global batch.
    """
    path = folder / "config.yaml"
    if not path.exists() or not any(folder.glob("checkpoints/step-*")):
        return
    there, here = _flat(yaml.safe_load(path.read_text(encoding="utf-8"))), _flat(config)
    free = _FREE | ({"trainer.epochs"} if config.get("schedule") == "constant" else set())
    differing = (k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
    names = sorted(k for k in differing if k not in free and not k.startswith("preview."))
    if names:
        differs = "; ".join(f"{name} was {there.get(name)!r} and is {here.get(name)!r}" for name in names[:3])
        why = " (a schedule other than constant spans the epochs)" if names == ["trainer.epochs"] else ""
        raise ValueError(
            f"{folder} holds a run of another configuration ({differs}){why}: choose another output folder"
        )


def keep(folder: Path, config: Mapping[str, Any], data: Any, measured: BandStatistics | None) -> None:
    """Keep with a run what it is made of: its configuration, its split, the statistics of its bands."""
    texts = {"config.yaml": yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)}
    if measured is not None:
        texts["statistics.json"] = measured.to_json()
    if getattr(data, "split", None) is not None:
        texts["split.json"] = data.split.to_json()
    for name, text in texts.items():
        with whole_or_absent(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")


def _flat(config: Any, at: str = "") -> dict[str, Any]:
    """Return what a configuration says, by path; of classes, whose order counts, as pairs."""
    if at == "data.classes." and isinstance(config, Mapping):
        return {"data.classes": [[str(value), name] for value, name in config.items()]}
    if not isinstance(config, Mapping):
        return {at.removesuffix("."): config}
    return {k: v for name, value in config.items() for k, v in _flat(value, f"{at}{name}.").items()}


__all__ = [
    "ChipSettings",
    "DataModule",
    "ModelSettings",
    "Run",
    "SceneData",
    "SceneFiles",
    "Schedule",
    "SplitSettings",
    "build",
]
