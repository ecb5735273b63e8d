"""The three public functions: one namespace for registered and built-in models."""

from __future__ import annotations

import difflib
import fnmatch
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ununennium._arguments import integer
from ununennium.models._bands import Unmatched, check_bands, check_unmatched
from ununennium.models._names import normalize
from ununennium.models._weights import Design, is_checkpoint, make_pretrained

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

Factory = TypeVar("Factory", bound="Callable[..., nn.Module]")

_factories: dict[str, Callable[..., nn.Module]] = {}

# All of timm's names that have neither an underscore nor a digit.
_TIMMS_WORDS = {"ecaresnetlight", "nasnetalarge"}

# Arguments of smp and timm for weights, which would have a model download or unpickle behind `weights`.
_WEIGHT_ARGUMENTS = ("checkpoint_path", "encoder_weights", "pretrained")


def create_model(
    name: str,
    in_channels: int,
    num_classes: int,
    weights: str | os.PathLike[str] | None = None,
    bands: Sequence[str] | None = None,
    *,
    unmatched: Unmatched = "raise",
    **kwargs: Any,
) -> nn.Module:
    """Create a model of pixels or of whole images, with pretrained weights mapped by band name.

    Parameters
    ----------
    name
        "<architecture>_<encoder>", such as "unet_resnet50" or "unet_convnext_tiny", for logits
        (B, num_classes, H, W); the bare name of a timm model, such as "resnet50", for logits or values
        (B, num_classes); or a registered name. Architectures and encoders are those of
        segmentation-models-pytorch (smp), and timm models are encoders too. Where both know an encoder, smp's
        is meant; "unet_tu-resnet50" asks for timm's. Case does not matter, nor the choice between hyphen and
        underscore.
    in_channels
        Number of bands of the input.
    num_classes
        Number of classes, or of values for regression: the channels of the output.
    weights
        Pretrained weights. With None the model is initialized at random and nothing is downloaded.

        - A tag that smp or timm knows for the encoder, or "imagenet", for a timm model the first of timm's tags
          that names ImageNet. Its bands are red, green and blue.
        - One of TorchGeo's for the encoder: "SENTINEL2_ALL_MOCO" or "ResNet50_Weights.SENTINEL2_ALL_MOCO".
          Its bands are those that TorchGeo lists.
        - The path of a checkpoint, "checkpoints/best", or of a safetensors file, of the same model or of its
          encoder. Its bands are those of the `RasterModel` that was trained; that model's normalisation is not
          taken over. A head of another number of classes is left out, and starts at random.
    bands
        Names of the input's bands, in its order. Each takes the filters of its namesake in the first layer,
        unchanged, where names are compared without case and leading zeros: B8A is B8a, B02 is B2. For
        Sentinel-2's weights and those of photographs, common names count as Sentinel-2's bands (red is B4, nir
        B8, swir16 B11). Without `bands` the input must have the pretrained bands in their order; only with tags
        of smp and timm, whatever `in_channels`, RGB filters are repeated over the bands in turn and rescaled
        (summed for one band): a starting point, not a match of wavelengths.
    unmatched
        What a band without a namesake does: "raise"; or take the "mean" of all pretrained bands' filters; or
        start at "zero".
    **kwargs
        Passed to the architecture's constructor, such as `decoder_channels`, and to timm. Some timm models
        take one input size only, unless told `img_size=256` or `dynamic_img_size=True`. `activation` and
        `aux_params` change what the model returns.

    Returns
    -------
    nn.Module
        Its attribute `model_config` is plain data, and ``create_model(**model.model_config)`` makes the model
        again, without weights; it is None if an argument is not plain data, such as a class.

    Raises
    ------
    ununennium.training.CheckpointError
        If there is no checkpoint at the path, or it is damaged, sharded over files, or was written by a newer version.
    FileNotFoundError
        If there is no such safetensors file.
    ImportError
        If weights are TorchGeo's, and TorchGeo is not installed.
    TypeError
        If an argument is not of its type.
    ValueError
        If the name or the weights are unknown, if bands have no namesake or are not `in_channels`, if weights
        do not fit the model, or if smp or timm refuses the combination.
    """
    in_channels, num_classes = integer("in_channels", in_channels, 1), integer("num_classes", num_classes, 1)
    if weights is not None and not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"weights must be a name or a path, got {weights!r}.")
    names = None if bands is None else check_bands(bands, in_channels)
    check_unmatched(unmatched)
    design = _find(name)
    if isinstance(design, _Registered) and not is_checkpoint(weights):
        about_bands = {} if weights is None or names is None else {"bands": names, "unmatched": unmatched}
        model = design.make(in_channels, num_classes, weights, **about_bands, **kwargs)
    else:
        if not isinstance(design, _Registered) and (refused := kwargs.keys() & set(_WEIGHT_ARGUMENTS)):
            raise ValueError(f"create_model takes no {', '.join(sorted(refused))}: say it with weights.")
        if weights is None:
            model = design.make(in_channels, num_classes, None, **kwargs)
        else:
            model, kwargs = make_pretrained(design, in_channels, num_classes, weights, names, unmatched, kwargs)
    if not hasattr(type(model), "model_config"):  # such as a RasterModel, which describes itself
        config = {"name": name, "in_channels": in_channels, "num_classes": num_classes, **kwargs}
        model.model_config = _plain(config)  # type: ignore[assignment]  # modules take any attribute
    return model


def list_models(pattern: str = "*") -> list[str]:
    """List the names, sorted, that `create_model` accepts and that match a shell pattern such as "unet_*".

    A name with an architecture, "unet_resnet50", is a model of pixels; a bare one, "resnet50", is a timm model
    of whole images. Each architecture is listed with encoders of kinds that it can use. This is decided by
    families, without building the models; `create_model` also tries what is not listed, such as a timm family
    that is newer than this library.

    Parameters
    ----------
    pattern : str, default "*"
        In which ``*`` stands for any characters, ``?`` for one, ``[…]`` for one of several; case does not matter.

    Returns
    -------
    list of str
        Names, the ones of `register_model` among them.
    """
    from ununennium.models import _segmentation, _timm

    names = {*_factories, *_segmentation.names(), *_timm.names()}
    return sorted(name for name in names if fnmatch.fnmatchcase(name.lower(), pattern.lower()))


@overload
def register_model(name: str, factory: Factory, *, overwrite: bool = False) -> Factory: ...
@overload
def register_model(name: str, factory: None = None, *, overwrite: bool = False) -> Callable[[Factory], Factory]: ...
def register_model(
    name: str, factory: Factory | None = None, *, overwrite: bool = False
) -> Factory | Callable[[Factory], Factory]:
    """Make a model available by name; without a factory, return a decorator for one.

    Parameters
    ----------
    name
        The name for `create_model`. Case does not matter, nor hyphen or underscore.
    factory
        Called as `factory(in_channels=..., num_classes=..., weights=..., **kwargs)`; returns the module. `bands` and
        `unmatched` are given to it only with weights. A checkpoint is loaded into what it makes with `weights=None`,
        for which it may be called once more on the meta device.
    overwrite
        Whether the name may replace a registered model or hide a built-in one.

    Raises
    ------
    ValueError
        If the name is taken and `overwrite` is not set, or if it is empty.
    """
    if factory is None:
        return lambda decorated: register_model(name, decorated, overwrite=overwrite)
    if not name.strip():
        raise ValueError(f"A model needs a name to be registered under, got {name!r}.")
    registered = _find_registered(name)
    if not overwrite and (registered is not None or _is_built_in(name)):
        raise ValueError(f"The model name {name!r} is taken; pass overwrite=True to replace it.")
    if registered is not None:
        del _factories[registered]
    _factories[name] = factory
    return factory


@dataclass(frozen=True)
class _Registered:
    """A model that a registered factory makes."""

    name: str
    encoder = prefix = ""

    def tags(self) -> list[str]:
        return []

    def knows(self, weights: str) -> bool:
        return False

    def make(self, in_channels: int, num_classes: int, weights: Any, **kwargs: Any) -> nn.Module:
        return _factories[self.name](in_channels=in_channels, num_classes=num_classes, weights=weights, **kwargs)


def _find(name: str) -> Design:
    if (registered := _find_registered(name)) is not None:
        return _Registered(registered)

    from ununennium.models import _segmentation, _timm  # imports smp and timm, which takes seconds

    design = _segmentation.find(name) or _timm.find(name)
    if design is None:
        nearest, pattern = _segmentation.suggest(name)
        if not nearest and (of_images := _timm.suggest(name)):
            nearest, pattern = of_images
        nearest += difflib.get_close_matches(name, _factories)
        raise ValueError(
            f"Unknown model {name!r}; the nearest known: {', '.join(nearest) or 'none'}. "
            f'list_models("{pattern}") shows all.'
        )
    return design


def _find_registered(name: str) -> str | None:
    return next((known for known in _factories if normalize(known) == normalize(name)), None)


def _is_built_in(name: str) -> bool:
    spelling = normalize(name)
    if "_" not in spelling and not any(c.isdigit() for c in spelling) and spelling not in _TIMMS_WORDS:
        return False  # so smp and timm need not be imported to ask them
    from ununennium.models import _segmentation, _timm

    return (_segmentation.find(name) or _timm.find(name)) is not None


def _plain(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return a copy of JSON data, with lists for tuples; None if it is not all of JSON's types."""
    try:
        return {key: _plain_value(value) for key, value in config.items()}
    except TypeError:
        return None


def _plain_value(value: Any) -> Any:
    if value is None or type(value) in (str, bool, int) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) in (list, tuple):
        return [_plain_value(entry) for entry in value]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain_value(entry) for key, entry in value.items()}
    raise TypeError(f"{value!r} is not plain data")
