"""What timm can build: models of whole images, for classes or for values, and the weights it knows of.

A model is written as timm writes it, without a tag: "resnet50", not "resnet50.a1_in1k".
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import timm

from ununennium.models._names import normalize

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ImageModel:
    """A timm model with a head: logits or values (B, num_classes) for images (B, in_channels, H, W)."""

    name: str

    prefix = ""  # of the names of its pretrained part in its state dict

    @property
    def encoder(self) -> str:
        """What TorchGeo may have weights for."""
        return self.name

    def tags(self) -> list[str]:
        """Return the weights that timm knows of."""
        return tags(self.name)

    def knows(self, weights: str) -> bool:
        """Return whether timm can load these weights."""
        return with_tag(self.name, weights) is not None

    def make(self, in_channels: int, num_classes: int, weights: str | None, **kwargs: Any) -> nn.Module:
        """Make the model, with weights that `knows` knows of, or none; timm's refusal becomes a ValueError."""
        name = self.name if weights is None else with_tag(self.name, weights) or self.name
        try:
            model: nn.Module = timm.create_model(
                name, pretrained=weights is not None, in_chans=in_channels, num_classes=num_classes, **kwargs
            )
        except OSError:  # a download that failed says nothing about the model
            raise
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.name} can't be built with these arguments. The cause: {type(error).__name__}: {error}"
            ) from error
        return model


def find(name: str) -> ImageModel | None:
    """Return the timm model that a name in any spelling means, None if it means nothing."""
    model = by_spelling().get(normalize(name))
    return None if model is None else ImageModel(model)


def names() -> list[str]:
    """Return the names of all models."""
    return list(timm.list_models())


def by_spelling() -> dict[str, str]:
    """Return timm's name for each name in the form in which names are compared."""
    return {normalize(model): model for model in timm.list_models()}


def suggest(name: str) -> tuple[list[str], str] | None:
    """Return the models perhaps meant by an unknown name, likeliest first, and a pattern that lists more."""
    known = by_spelling()
    nearest = [known[spelling] for spelling in difflib.get_close_matches(normalize(name), known)]
    if not nearest:
        return None
    return nearest, f"{re.split('[^a-z]', nearest[0])[0]}*"


def tags(model: str) -> list[str]:
    """Return the tags of a model's weights, timm's default first."""
    default = timm.get_pretrained_cfg_value(model, "tag")
    known = [pretrained.partition(".")[2] for pretrained in timm.list_pretrained(model)]
    return sorted(known, key=lambda tag: tag != default)


def with_tag(model: str, weights: str) -> str | None:
    """Return timm's name for a model with weights; "imagenet" is its first tag that names ImageNet."""
    known = tags(model)
    if weights == "imagenet" and "imagenet" not in known:
        known = [tag for tag in known if re.search(r"in\d+k", tag)]
        return f"{model}.{known[0]}" if known else None
    return f"{model}.{weights}" if weights in known else None
