"""A network together with what it takes to feed it a raster and to read its answer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ununennium._arguments import integer
from ununennium.models._registry import create_model
from ununennium.palette import palette, rgb


class RasterModel(nn.Module):
    """A network that takes a raster's own values, and knows its bands and classes.

    What it knows is in every checkpoint of a run that trains it, so that `predict_scene` needs nothing but the
    checkpoint.

    Parameters
    ----------
    network : nn.Module
        Takes normalised bands (B, C, H, W) in float32.
    bands : sequence of str
        Names of the C bands, in the order in which the network takes them.
    mean, std : sequence of float, optional
        Of each band, in the raster's values: the network is given ``(value - mean) / std``. Both or neither; without
        them it is given the values as they are.
    fill : float, default 0
        Value that pixels without data are given before they come here.
    class_names : sequence of str, optional
        One name a class; None for a model that gives no classes.
    class_values : sequence of int, optional
        Each class's value in label rasters and maps; 0, 1, … by default.
    colors : sequence of str, optional
        Each class's colour, "#rrggbb"; a palette for the colour-blind by default.
    ignore_index : int, default 255
        The target that counts as none.

    Attributes
    ----------
    mean, std : Tensor
        Buffers (C,).

    Raises
    ------
    ValueError
        If the lengths do not fit each other, a band or a class value is there twice, or a std is not positive.
    TypeError
        If bands or class_names is one string, or a class value or ignore_index is no integer.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        bands: Sequence[str],
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        *,
        fill: float = 0.0,
        class_names: Sequence[str] | None = None,
        class_values: Sequence[int] | None = None,
        colors: Sequence[str] | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        for what, names in (("bands", bands), ("class_names", class_names)):
            if isinstance(names, str):  # whose letters would be taken for names
                raise TypeError(f"{what} must be a sequence of names, got {names!r}")
        self.network = network
        self.bands: tuple[str, ...] = tuple(bands)
        self.fill: float = float(fill)
        self.class_names: tuple[str, ...] | None = None if class_names is None else tuple(class_names)
        num_classes = 0 if self.class_names is None else len(self.class_names)
        codes = range(num_classes) if class_values is None else class_values
        self.class_values: tuple[int, ...] = tuple(integer("a value in class_values", code) for code in codes)
        self.colors: tuple[str, ...] = tuple(palette(num_classes)) if colors is None else tuple(colors)
        self.ignore_index: int = integer("ignore_index", ignore_index)
        if len(set(self.bands)) < len(self.bands) or not self.bands:
            raise ValueError(f"bands must name each band once, and at least one, got {list(self.bands)}")
        for what, entries in (("class_values", self.class_values), ("colors", self.colors)):
            if len(entries) != num_classes:
                raise ValueError(f"{what} has {len(entries)} entries for {num_classes} class_names: give one for each")
        if len(set(self.class_values)) < num_classes:
            raise ValueError(f"class_values must be another for each class, got {list(self.class_values)}")
        for color in self.colors:
            rgb(color)
        if (mean is None) != (std is None):
            raise ValueError(f"{'std' if std is None else 'mean'} is missing: give both mean and std, or neither")
        for what, given, neutral in (("mean", mean, 0.0), ("std", std, 1.0)):
            values = torch.full((len(self.bands),), neutral) if given is None else torch.as_tensor(given)
            if values.shape != (len(self.bands),):
                raise ValueError(
                    f"{what} has shape {tuple(values.shape)} for {len(self.bands)} bands: give one for each"
                )
            sound = values.isfinite() & ((values > 0) if what == "std" else True)
            if not sound.all():
                wrong = {band: float(v) for band, v, fine in zip(self.bands, values, sound, strict=True) if not fine}
                raise ValueError(
                    f"{what} must be finite{' and positive' if what == 'std' else ''}, but is {wrong}: leave out bands "
                    "that have no data or one value everywhere"
                )
            self.register_buffer(what, values.to(torch.float32, copy=True))

    def forward(self, images: Tensor) -> Any:
        """Return what the network makes of images (B, C, H, W) in the raster's values, of any type.

        Raises
        ------
        ValueError
            If there are not as many channels as bands; one channel would be spread over all of them.
        """
        if images.ndim != 4 or images.shape[1] != len(self.bands):
            raise ValueError(
                f"images must be (B, {len(self.bands)}, H, W) for the bands {', '.join(self.bands)}, "
                f"got {tuple(images.shape)}: give a batch of chips with these bands, in this order"
            )
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        return self.network((images.to(mean.dtype) - mean) / std)

    @property
    def model_config(self) -> dict[str, Any]:
        """What `from_config` makes the model of, plain data; its weights, mean and std are in its state dict."""
        network = getattr(self.network, "model_config", None)
        return {
            "network": copy.deepcopy(network),
            "bands": list(self.bands),
            "fill": self.fill,
            "class_names": None if self.class_names is None else list(self.class_names),
            "class_values": list(self.class_values),
            "colors": list(self.colors),
            "ignore_index": self.ignore_index,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], network: nn.Module | None = None) -> Self:
        """Make the model that a configuration describes, with weights that are yet to be loaded.

        Parameters
        ----------
        config : mapping
            What ``model_config`` gave.
        network : nn.Module, optional
            The network, if `create_model` can't make it.

        Raises
        ------
        ValueError
            If the network is none of `create_model`'s and not given.
        """
        settings = dict(config)
        made_by = settings.pop("network")
        if network is None:
            if made_by is None:
                raise ValueError(
                    "the network was not made by create_model, so it can't be made anew from a checkpoint: pass it, or "
                    "register what makes it with register_model and make it with create_model"
                )
            network = create_model(**made_by)
        return cls(network, **settings)
