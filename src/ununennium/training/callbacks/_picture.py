"""From a batch and what a model says of it to a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from ununennium._band_names import same_band
from ununennium.training.batches import describe, split_batch
from ununennium.training.targets import BINARY, PROBABILITIES, is_one_of
from ununennium.training.windows import loss_setting

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer

_MOST = 512  # pixels of a chip's side that are shown
_SURE = 0.995  # of a class: no percentage is written


@dataclass
class Shown:
    """A batch of images and what is to be shown with them, on the host.

    Attributes
    ----------
    images : ndarray
        (B, C, H, W).
    targets, predictions : ndarray
        Class numbers or values, (B, H, W) or (B,); of several labels at once (B, K), 0 or 1.
    compared : ndarray of bool
        Where a target is one.
    num_classes : int
        0 for values.
    shares : ndarray, optional
        How likely the predicted class of a scene is (B,).
    """

    images: NDArray[Any]
    targets: NDArray[Any]
    predictions: NDArray[Any]
    compared: NDArray[np.bool_]
    num_classes: int
    shares: NDArray[Any] | None = None

    @property
    def per_pixel(self) -> bool:
        """Whether every pixel has a target."""
        return self.targets.ndim == 3

    @classmethod
    def of(cls, batch: Any, outputs: Any, targets: Any, loss_fn: Any) -> Shown | str:
        """Return what can be shown of a batch, or why nothing can.

        Parameters
        ----------
        batch : Any
            As the step took it.
        outputs, targets : Any
            As the step returned them; of several tensors the first is meant.
        loss_fn : callable
            Its ``ignore_index`` is no target, and a binary cross-entropy makes numbers classes.
        """
        try:
            inputs: Any = split_batch(batch)[0]
        except TypeError:
            inputs = batch
        images = _first(inputs, lambda tensor: tensor.ndim == 4)
        if images is None:
            return f"there is no image (B, C, H, W) in {describe(batch)}"
        said, truth = (_first(value, lambda tensor: tensor.ndim > 0) for value in (outputs, targets))
        if said is None or truth is None or said.shape[:1] != truth.shape[:1]:
            return f"outputs are {describe(outputs)} and targets {describe(targets)}"
        said, truth = said.detach().float().cpu(), truth.detach().cpu()
        if is_one_of(loss_fn, PROBABILITIES):
            said = said.logit()
        binary = is_one_of(loss_fn, BINARY)
        ignored = loss_setting(loss_fn, "ignore_index")
        if said.ndim > 1 and said.shape[1] == 1:
            truth = truth[:, 0] if truth.shape == said.shape else truth
            said = said if not (truth.is_floating_point() and not binary) else said[:, 0]
        shown = _host(images)
        if binary and said.ndim == 2 and truth.shape == said.shape:  # several labels at once
            return cls(shown, truth.numpy(), (said > 0).numpy(), np.ones(truth.shape, np.bool_), said.shape[1])
        if truth.is_floating_point() and not binary:
            if truth.shape != said.shape or said.ndim not in (1, 3):
                return f"outputs are {describe(outputs)} and targets {describe(targets)}"
            values = truth.float().numpy()
            compared = np.isfinite(values)
            if ignored is not None:
                compared &= values != ignored
            return cls(shown, values, said.numpy(), compared, 0)
        classes = (said.shape[1] if said.ndim in (2, 4) else 1) if _are_scores(said, truth) else 0
        if not classes or truth.ndim not in (1, 3):
            return f"outputs are {describe(outputs)} and targets {describe(targets)}"
        if classes == 1:
            scores = said if said.shape == truth.shape else said[:, 0]
            likely, shares = (scores > 0).long(), torch.maximum(scores.sigmoid(), (-scores).sigmoid())
        else:
            shares, likely = said.softmax(1).max(1)
        labels = truth.long()
        compared = ((labels >= 0) & (labels < max(classes, 2))).numpy()
        if isinstance(ignored, int):
            compared &= (labels != ignored).numpy()
        return cls(
            shown, labels.numpy(), likely.numpy(), compared, max(classes, 2),
            shares.numpy() if truth.ndim == 1 else None,
        )  # fmt: skip

    def draw(
        self,
        titles: Sequence[str],
        finished: int,
        *,
        bands: Sequence[str] | None,
        rgb: Sequence[str | int] | None,
        names: Sequence[str] | None,
        colors: Sequence[str] | None,
        fill: float,
        most: int,
    ) -> NDArray[np.uint8]:
        """Draw the first ``most`` samples, as they are after so many finished epochs.

        Parameters
        ----------
        titles : sequence of str
            Of the samples.
        bands, rgb, names, colors
            As `PreviewCallback` takes them; what does not fit the number of channels or classes is left out.
        fill : float
            What images hold where there is no data.
        """
        from ununennium import plots

        channels = channels_of(rgb, bands, self.images.shape[1])
        listed = _listed(channels, bands if bands is not None and len(bands) == self.images.shape[1] else None)
        valid = np.isfinite(self.images).all(1) & ~(self.images == fill).all(1)
        examples = []
        for number in range(min(most, len(self.images))):
            step = max(1, -(-max(self.images.shape[2:]) // _MOST))
            image, has_data = self.images[number][:, ::step, ::step], valid[number][::step, ::step]
            picture = plots.composite(image, channels, has_data)
            title = titles[number] if number < len(titles) else ""
            if not self.per_pixel:
                examples.append(plots.Example(picture, *(np.empty(0),) * 2, np.empty(0, np.bool_), title=title))
                continue
            target, prediction, compared = (
                a[number][::step, ::step] for a in (self.targets, self.predictions, self.compared)
            )
            masked = has_data if has_data.shape == target.shape else None
            examples.append(plots.Example(picture, target, prediction, compared, masked, title))
        if names is None or len(names) != self.num_classes:
            names = [f"class {number}" for number in range(self.num_classes)]
        if not self.per_pixel:
            captions, right = zip(*(self._caption(n, names) for n in range(len(examples))), strict=True)
            return plots.draw_scenes([e.picture for e in examples], captions, right, [e.title for e in examples])
        if self.num_classes == 0:
            return plots.draw_values(examples)
        heads = f"Image ({listed})", "Target", f"Prediction, epoch {finished}", "Errors"
        fitting = colors if colors is not None and len(colors) == self.num_classes else None
        return plots.draw_classes(examples, names, fitting, titles=heads)

    def _caption(self, number: int, names: Sequence[str]) -> tuple[str, bool | None]:
        """Return what is predicted of a scene and, where that is wrong, what is true; and whether it is right."""
        said, truth = self.predictions[number], self.targets[number]
        if self.num_classes == 0:
            true = f"true {truth:.4g}" if self.compared[number] else "no target"
            return f"{said:.4g}\n{true}", None
        if self.targets.ndim == 2:
            chosen, true = (
                ", ".join(names[k] for k in np.flatnonzero(a).tolist()) or "none" for a in (said, truth > 0.5)
            )
            return (chosen, True) if chosen == true else (f"{chosen}\ntrue: {true}", False)
        share = 1.0 if self.shares is None else float(self.shares[number])
        chosen = names[said] + (f" ({share:.0%})" if share < _SURE else "")
        if not self.compared[number]:
            return f"{chosen}\nno label", None
        return (chosen, True) if said == truth else (f"{chosen}\ntrue: {names[truth]}", False)


def _listed(channels: Sequence[int], bands: Sequence[str] | None) -> str:
    """Name the channels of a picture, briefly."""
    if bands is None:
        return f"channel{'s' * (len(channels) > 1)} {', '.join(map(str, channels))}"
    names = [bands[channel] for channel in channels]
    firsts = [name.split()[0] if name.strip() else name for name in names]
    if len(", ".join(names)) <= 20 or len(set(firsts)) < len(names):
        return ", ".join(names)
    return ", ".join(firsts) + (" nm" if all(name.split()[1:] == ["nm"] for name in names) else "")


def _are_scores(outputs: Tensor, targets: Tensor) -> bool:
    """Tell whether outputs are scores of classes for targets that are classes."""
    if outputs.ndim == targets.ndim:  # a single logit each
        return outputs.shape == targets.shape
    return outputs.ndim == targets.ndim + 1 and targets.shape == (outputs.shape[0], *outputs.shape[2:])


def channels_of(rgb: Sequence[str | int] | None, bands: Sequence[str] | None, count: int) -> list[int]:
    """Return the channels of a picture: those asked for, or those that the bands' names say.

    Raises
    ------
    ValueError
        For a band or channel that there is not, naming those that there are.
    """
    from ununennium.plots import rgb_bands

    known = list(bands) if bands is not None and len(bands) == count else None
    if rgb is None:
        return rgb_bands(known or [""] * count)
    found = []
    alike = [same_band(name) for name in known or ()]
    for band in rgb:
        if isinstance(band, str) and same_band(band) in alike:
            found.append(alike.index(same_band(band)))
        elif isinstance(band, int) and 0 <= band < count:
            found.append(band)
        else:
            have = f"the bands are {', '.join(known)}" if known else f"there are {count} channels without names"
            raise ValueError(f"rgb has {band!r}, but {have}: name one of these")
    return found


def dataset_of(loader: Any) -> Any:
    """Return the dataset behind a loader, without subsets; of several the first."""
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, (Subset, ConcatDataset)):
        dataset = dataset.dataset if isinstance(dataset, Subset) else dataset.datasets[0]
    return dataset


def look_up(what: str, trainer: Trainer) -> Any:
    """Return what model, validation data or metrics know of the data (bands, class_names, colors, fill), else None."""
    for owner in (trainer.model, dataset_of(trainer.val_loader), trainer.val_metrics):
        known = getattr(owner, what, None)
        if known is not None and not callable(known) and not isinstance(known, Tensor):
            return known
    return None


def titles_of(batch: Any, names: Sequence[str], dataset: Any) -> list[str]:
    """Return a title for each sample of a loaded batch: its name, its CRS and its bounds, as far as they are known."""
    place = batch if isinstance(batch, Mapping) else {}
    bounds, crs = place.get("bounds"), place.get("crs", getattr(dataset, "crs", None))
    count = len(names) or (len(bounds) if isinstance(bounds, (Tensor, Sequence)) else 0)
    titles = []
    for number in range(count):
        system = crs[number] if isinstance(crs, (list, tuple)) and number < len(crs) else crs
        window, scenes = place.get("window"), getattr(dataset, "scenes", None)
        if system is None and isinstance(window, Tensor) and scenes is not None:
            system = scenes[int(window[number, 0])].crs
        box = _box(bounds[number]) if isinstance(bounds, (Tensor, Sequence)) and number < len(bounds) else None
        parts = [names[number] if names else "", _name_of_crs(system), "" if box is None else _extent(*box)]
        titles.append("   ".join(part for part in parts if part))
    return titles


def _box(bounds: Any) -> tuple[float, float, float, float] | None:
    """Return left, bottom, right and top of bounds as `Chips` or a release of TorchGeo gives them."""
    if isinstance(bounds, Tensor):
        numbers = bounds.flatten().tolist()
        order = {4: (0, 1, 2, 3), 9: (0, 3, 1, 4)}.get(len(numbers))
        return None if order is None else tuple(float(numbers[place]) for place in order)  # type: ignore[return-value]
    if hasattr(bounds, "minx"):
        return float(bounds.minx), float(bounds.miny), float(bounds.maxx), float(bounds.maxy)
    if isinstance(bounds, Sequence) and len(bounds) >= 2 and all(isinstance(part, slice) for part in bounds[:2]):
        x, y = bounds[:2]
        return float(x.start), float(y.start), float(x.stop), float(y.stop)
    return None


def _extent(left: float, bottom: float, right: float, top: float) -> str:
    span = min(abs(right - left), abs(top - bottom))
    digits = 0 if span >= 50 or not span > 0 else max(0, 2 - math.floor(math.log10(span) + 1e-6))
    x, y = (f"{low:,.{digits}f} … {high:,.{digits}f}" for low, high in ((left, right), (bottom, top)))
    return f"x {x}   y {y}"


def _name_of_crs(crs: Any) -> str:
    if callable(known := getattr(crs, "to_epsg", None)) and (number := known()):
        return f"EPSG:{number}"
    text = "" if crs is None else str(crs)
    named = re.match(r'\s*\w+\["([^"]*)"', text)  # WKT
    return named[1] if named else text if len(text) <= 40 else f"{text[:39]}…"


def _host(images: Tensor) -> NDArray[Any]:
    images = images.detach()
    if images.is_floating_point():
        images = images.float()
    numbers: NDArray[Any] = images.cpu().numpy()
    return numbers


def _first(value: Any, fits: Callable[[Tensor], bool]) -> Tensor | None:
    """Return the first tensor of a kind in nested containers."""
    if isinstance(value, Tensor):
        return value if fits(value) else None
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for found in (_first(item, fits) for item in items) if found is not None), None)
