"""The three public functions: one namespace for registered and built-in models."""

from __future__ import annotations

import difflib
import fnmatch
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

Factory = TypeVar("Factory", bound="Callable[..., nn.Module]")

_factories: dict[str, Callable[..., nn.Module]] = {}


def create_model(name: str, in_channels: int, num_classes: int, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """Create a segmentation model whose output is logits of shape (B, num_classes, H, W).

    Parameters
    ----------
    name
        "<architecture>_<encoder>", such as "unet_resnet50" or "unet_convnext_tiny", or a registered name.
        Architectures and encoders are those of segmentation-models-pytorch (smp), and timm models are
        encoders too. Where both know an encoder, smp's is meant; "unet_tu-resnet50" asks for timm's.
        Case does not matter, nor the choice between hyphen and underscore.
    in_channels
        Number of bands of the input.
    num_classes
        Number of classes, the channels of the output.
    weights
        Pretrained encoder weights to download: a tag that smp or timm knows for the encoder. For a timm
        encoder "imagenet" is the first of timm's tags that names ImageNet. With None the encoder is
        initialized at random and nothing is downloaded. When `in_channels` is not 3, the pretrained RGB
        filters of the first layer are repeated over the bands in turn (summed for one band), whatever
        the band order: they are a starting point, not a match of wavelengths.
    **kwargs
        Passed to the architecture's constructor, such as `decoder_channels`, and to timm encoders. Some
        timm encoders take one input size only, unless told `img_size=256` or `dynamic_img_size=True`.
        `activation` and `aux_params` change what the model returns.

    Raises
    ------
    TypeError
        If `in_channels` or `num_classes` is not an int.
    ValueError
        If one of them is less than 1, if the name or the weights are unknown, or if smp or timm refuses
        the combination.
    """
    _check_count("in_channels", in_channels)
    _check_count("num_classes", num_classes)
    if (registered := _find_registered(name)) is not None:
        return _factories[registered](in_channels=in_channels, num_classes=num_classes, weights=weights, **kwargs)

    from ununennium.models import _segmentation  # imports smp and timm, which takes seconds

    model = _segmentation.find(name)
    if model is None:
        nearest, pattern = _segmentation.suggest(name)
        nearest += difflib.get_close_matches(name, _factories)
        raise ValueError(
            f"Unknown model {name!r}; the nearest known: {', '.join(nearest) or 'none'}. "
            f'list_models("{pattern}") shows all.'
        )
    return _segmentation.build(*model, in_channels, num_classes, weights, **kwargs)


def list_models(pattern: str = "*") -> list[str]:
    """List the names, sorted, that `create_model` accepts and that match a shell pattern such as "unet_*".

    Each built-in name has an encoder of a kind that the architecture can use. This is decided by families,
    without building the models; `create_model` also tries what is not listed, such as a timm family that
    is newer than this library.
    """
    from ununennium.models import _segmentation

    names = {*_factories, *_segmentation.names()}
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
        Called as `factory(in_channels=..., num_classes=..., weights=..., **kwargs)`; returns the module.
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


def normalize(name: str) -> str:
    """Return the form in which names are compared."""
    return name.lower().replace("-", "_")


def _find_registered(name: str) -> str | None:
    return next((known for known in _factories if normalize(known) == normalize(name)), None)


def _is_built_in(name: str) -> bool:
    if "_" not in normalize(name):
        return False  # without an encoder it can't be, so smp need not be imported to ask it
    from ununennium.models import _segmentation

    return _segmentation.find(name) is not None


def _check_count(argument: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be an int, got {value!r}.")
    if value < 1:
        raise ValueError(f"{argument} must be at least 1, got {value}.")
