"""The network of a prediction: where it comes from, and what a batch of tiles becomes in it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ununennium.models import RasterModel, create_model
from ununennium.training.batches import describe
from ununennium.training.checkpoint import chosen, load_weights, matched_weights, read
from ununennium.training.errors import CheckpointError
from ununennium.training.modes import modes_restored
from ununennium.training.precision import Precision

Output = Literal["classes", "probabilities", "logits"]

_FLIPS = ([3], [2], [2, 3])


def load_model(
    checkpoint: str | os.PathLike[str], network: nn.Module | None = None, *, averaged: bool | None = None
) -> nn.Module:
    """Make the model of a checkpoint anew, with its weights.

    Parameters
    ----------
    checkpoint : path
        A checkpoint, or a link to one: ``checkpoints/best``.
    network : nn.Module, optional
        What the weights are loaded into, for a model that `create_model` can't make. If the checkpoint is of a
        `RasterModel`, its network; else the model itself.
    averaged : bool, optional
        Whether to take averaged weights, or the raw ones. By default those with which the run was validated.

    Returns
    -------
    nn.Module
        On the CPU, in eval mode.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, if it is damaged, does not tell how its model is made, or holds no averaged weights
        and they are asked for.
    ValueError
        If its model can't be made without ``network``.
    """
    path = Path(checkpoint)
    contents = chosen(read(path), averaged)
    config = contents.info.get("model")
    if config is None and network is None:
        raise CheckpointError(
            f"{path} does not tell how its model is made: make the network yourself and pass it in Python, "
            "load_model(checkpoint, network), or train a RasterModel or a model of create_model, whose checkpoints do"
        )
    settings = dict(config or {})
    model: nn.Module
    if "network" in settings:
        model = RasterModel.from_config(settings, network)
    else:
        model = create_model(**settings) if network is None else network
    load_weights(model, matched_weights(contents, model))
    return model.cpu().eval()


@contextmanager
def in_use(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a model in eval mode on a device, without gradients; modes and device are its own again afterwards."""
    homes = homes_of(model)
    with torch.no_grad(), modes_restored(model):  # not inference_mode: what a model keeps of it can't be trained with
        model.eval()
        try:
            if homes != {device}:
                model.to(device)
            yield
        finally:
            for home in homes - {device}:
                model.to(home)


def homes_of(model: nn.Module) -> set[torch.device]:
    """Return the devices on which a model's parameters and buffers are.

    Raises
    ------
    ValueError
        If it is spread over several.
    """
    homes = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    if len(homes) > 1:
        raise ValueError(
            f"the model is spread over {', '.join(sorted(map(str, homes)))}: move it to one device with model.to(…)"
        )
    return homes


class Network:
    """Batches of tiles to what is blended of them: probabilities of classes, or outputs as they are.

    Parameters
    ----------
    model : nn.Module
        In eval mode, on the device.
    output : {"classes", "probabilities", "logits"}
    flips : bool
        Whether to average over the image and its three flips.
    precision : Precision
        Of the forward.
    num_classes : int, optional
        What the model must give, if that is known.
    """

    def __init__(
        self, model: nn.Module, output: Output, flips: bool, precision: Precision, num_classes: int | None
    ) -> None:
        self._model, self._precision = model, precision
        self._classes = output != "logits"
        self._flips = _FLIPS if flips else ()
        self._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.channels = num_classes

    def __call__(self, images: Tensor) -> Tensor:
        """Return (B, K, H, W) in float32 for images (B, C, H, W) in the raster's values.

        Raises
        ------
        TypeError, ValueError
            If the model gives anything but a tensor of a value per pixel, or too few or many for its classes.
        """
        images = images.to(self._dtype)
        total = self._values(images)
        for dims in self._flips:
            total = total + self._values(images.flip(dims)).flip(dims)
        return total / (1 + len(self._flips)) if self._flips else total

    def _values(self, images: Tensor) -> Tensor:
        with self._precision.autocast():
            outputs = self._model(images)
        values = self._checked(outputs, images).to(torch.float32)
        return values.softmax(1) if self._classes else values

    def _checked(self, outputs: Any, images: Tensor) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the model gives {describe(outputs)}, and a map needs one tensor (B, classes, H, W): wrap the model "
                "in a module that returns that tensor"
            )
        batch, _, height, width = images.shape
        outputs = outputs[:, None] if outputs.ndim == 3 else outputs
        if outputs.ndim != 4 or outputs.shape[0] != batch or outputs.shape[2:] != images.shape[2:]:
            raise ValueError(
                f"for images {tuple(images.shape)} the model gives {tuple(outputs.shape)}, and a map needs a value for "
                f"each pixel, ({batch}, classes, {height}, {width}): scale the outputs up inside the model"
            )
        channels = outputs.shape[1]
        if self._classes and channels == 1:
            raise ValueError(
                'the model gives one value a pixel, and classes need one for each class: use output="logits" for the '
                "value itself"
            )
        if self.channels is not None and channels != self.channels:
            raise ValueError(
                f"the model gives {channels} values a pixel, and has {self.channels} class_names: name as many classes "
                "as its network gives"
            )
        checked: Tensor = outputs
        return checked
