"""Pictures of what the model predicts, the same samples after every epoch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from ununennium._arguments import integer
from ununennium.palette import rgb as rgb_of
from ununennium.training.batches import to_device
from ununennium.training.callbacks._picture import Shown, channels_of, dataset_of, look_up, titles_of
from ununennium.training.callbacks.base import Callback
from ununennium.training.checkpoint import whole_or_absent
from ununennium.training.distributed import is_sharded
from ununennium.training.loading import EpochLoader

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer

_STREAM = 2  # of the randomness of samples that are looked at: neither training's nor validation's
_FILES = "preview-epoch-*.png"


class PreviewCallback(Callback):
    """Draw samples of the validation data with what is predicted of them: ``preview-epoch-0003.png``.

    Of a segmentation these are image, target, prediction and errors, with a legend; of a regression, values and their
    difference, with colour bars; of scenes, the image with its class or value. The title of a row is the sample's
    place and CRS where the batch tells it (`ununennium.data.Chips`, TorchGeo). Every callback with a method
    ``log_image(trainer, name, image)`` is given the picture, too.

    The samples are the same after every epoch, spread evenly over the validation loader's order; of a loader over an
    iterable dataset they are those of its first batch, read once. Predictions are those of validation: its mode,
    weights, precision and ``val_transform``. The run is the same, to the bit, as without previews.

    Parameters
    ----------
    path : str or Path
        The folder of the pictures.
    every_n_epochs : int, default 1
        Draw after every so many epochs, and after the last.
    samples : int or sequence, default 4
        How many, or which, as the validation loader's sampler names them: indices of its dataset.
    bands : sequence of str, optional
        Names of the image's channels; by default the model's (`ununennium.models.RasterModel`) or the dataset's.
    rgb : sequence of str or int, optional
        The three bands to show as red, green and blue, or the one to show in grey, by name or number of the channel.
        By default those that `ununennium.plots.rgb_bands` finds by name.
    class_names : sequence of str, optional
        Of the classes; by default those of model, dataset or metrics.
    colors : sequence of str, optional
        Of the classes; by default the model's, or a palette for the colour-blind.

    Attributes
    ----------
    latest : tuple of (int, bytes), or None
        The last picture, as PNG, and how many epochs were finished then.
    skipped : str or None
        Why there are no pictures.
    per_pixel : bool or None
        Whether the model gives something for every pixel; None while that is not known.

    Raises
    ------
    TypeError, ValueError
        For a number that is no integer above 0, and what is no colour; when training starts, for bands in ``rgb`` that
        there are not.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every_n_epochs: int = 1,
        samples: int | Sequence[Any] = 4,
        bands: Sequence[str] | None = None,
        rgb: Sequence[str | int] | None = None,
        class_names: Sequence[str] | None = None,
        colors: Sequence[str] | None = None,
    ) -> None:
        integer("every_n_epochs", every_n_epochs, minimum=1)
        if not isinstance(samples, Sequence):
            integer("samples", samples, minimum=1)
        if rgb is not None and (isinstance(rgb, str) or len(rgb) not in (1, 3)):
            raise ValueError(f"rgb must name three bands, or one for a grey picture, got {rgb!r}")
        if isinstance(samples, Sequence) and not samples:
            raise ValueError("samples is empty: give a number, or indices of the validation dataset")
        for color in colors or ():
            rgb_of(color)
        self.path: Path = Path(path).expanduser().absolute()
        self.every_n_epochs = every_n_epochs
        self.samples = samples
        self.bands: tuple[str, ...] | None = None if bands is None else tuple(bands)
        self.rgb: tuple[str | int, ...] | None = None if rgb is None else tuple(rgb)
        self.class_names: tuple[str, ...] | None = None if class_names is None else tuple(class_names)
        self.colors: tuple[str, ...] | None = None if colors is None else tuple(colors)
        self.latest: tuple[int, bytes] | None = None
        self.skipped: str | None = None
        self.per_pixel: bool | None = None
        self._source: EpochLoader | None = None
        self._titles: list[str] = []
        self._kept: Any = None  # the first batch of an iterable

    def on_train_start(self, trainer: Trainer) -> None:
        """See that the bands are there and that the folder can be written to; of a resumed run find the last picture.

        The folder is made.
        """
        self.latest = self.skipped = self._source = self._kept = None
        if trainer.val_loader is None:
            self._skip(trainer, "there is no val_loader")
        elif isinstance(trainer.val_loader, Iterator):
            self._skip(trainer, "the val_loader can be run through only once")
        bands = self._look_up("bands", trainer)
        if bands is not None:
            channels_of(self.rgb, bands, len(bands))
        if trainer.rank == 0 and self.skipped is None:
            self.path.mkdir(parents=True, exist_ok=True)
            files = sorted(self.path.glob(_FILES)) if trainer.resumes else []
            numbers = [(int(m[1]), file) for file in files if (m := re.search(r"(\d+)\.png$", file.name))]
            past = [(number, file) for number, file in numbers if number <= trainer.state.epoch]
            if past:
                number, file = max(past)
                self.latest = number, file.read_bytes()

    def on_epoch_end(self, trainer: Trainer, epoch: int, logs: dict[str, float]) -> None:
        """Draw, if it is time to."""
        finished = epoch + 1
        if self.skipped is not None or (finished % self.every_n_epochs and finished != trainer.epochs):
            return
        sharded = any(is_sharded(p) for p in trainer.model.parameters())  # whose forward is a matter of all processes
        with trainer.evaluating():
            if trainer.rank and not sharded:
                return
            loaded = self._load(trainer)
            batch, result = trainer.evaluate(loaded)
        if trainer.rank:
            return
        shown = Shown.of(batch, result.outputs, result.targets, trainer.loss_fn)
        if isinstance(shown, str):
            self._skip(trainer, shown)
            return
        self.per_pixel = shown.per_pixel
        pixels = shown.draw(
            titles_of(loaded, self._titles, dataset_of(trainer.val_loader)),
            finished,
            bands=self._look_up("bands", trainer),
            rgb=self.rgb,
            names=self._look_up("class_names", trainer),
            colors=self.colors or getattr(trainer.model, "colors", None),
            fill=self._look_up("fill", trainer) or 0.0,
            most=self.samples if isinstance(self.samples, int) else len(self.samples),
        )
        self._keep(trainer, finished, pixels)

    def _keep(self, trainer: Trainer, finished: int, pixels: Any) -> None:
        from ununennium.plots import png

        data = png(pixels)
        with whole_or_absent(self.path / f"preview-epoch-{finished:04}.png") as aside:
            aside.write_bytes(data)
        self.latest = finished, data
        for callback in trainer.callbacks.callbacks:
            if callable(log_image := getattr(callback, "log_image", None)):
                log_image(trainer, "preview", pixels)

    def _load(self, trainer: Trainer) -> Any:
        """Return the batch that is looked at; the global generators are the caller's to put back."""
        if self._kept is not None:
            return self._kept
        loader, seed = trainer.val_loader, trainer.state.seed
        if self._source is None:
            self._source, self._titles = self._choose(loader, seed)
        with closing(self._source.epoch(seed, 0)) as batches:  # type: ignore[type-var]  # it is a generator
            batch = next(batches).batch
        self._source.end_workers()
        if not self._titles:
            self._kept = to_device(batch, torch.device("cpu"))
        return batch

    def _choose(self, loader: Any, seed: int) -> tuple[EpochLoader, list[str]]:
        """Return what gives one batch of the samples, and their names; of iterables it is what they give first."""
        order = EpochLoader(loader, _STREAM)
        try:
            drawn = EpochLoader(loader, 1).indices(seed, 0, range(len(order)))  # as validation goes through them
        except TypeError:  # its length is not known
            drawn = {}
        if not drawn:
            return order, []
        chosen = self.samples
        if loader.batch_sampler is None:  # the dataset gives batches, or the model takes samples as they are
            chosen = list(drawn.values())[:1] if isinstance(chosen, int) else list(chosen)[:1]
            one = DataLoader(loader.dataset, batch_size=None, sampler=chosen, collate_fn=loader.collate_fn)
        else:
            if isinstance(chosen, int):
                every = [index for batch in drawn.values() for index in batch]
                count = min(chosen, len(every))
                chosen = [every[(2 * place + 1) * len(every) // (2 * count)] for place in range(count)]
            one = DataLoader(loader.dataset, batch_sampler=[list(chosen)], collate_fn=loader.collate_fn)
        return EpochLoader(one, _STREAM), [f"sample {i}" if isinstance(i, int) else "" for i in chosen]

    def _look_up(self, what: str, trainer: Trainer) -> Any:
        own = getattr(self, what, None)
        return look_up(what, trainer) if own is None else own

    def _skip(self, trainer: Trainer, reason: str) -> None:
        self.skipped = reason
        if trainer.rank == 0:
            print(f"no previews: {reason}", flush=True)
