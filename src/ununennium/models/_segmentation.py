"""What segmentation-models-pytorch (smp) and timm can build, and the building of it.

An encoder is written as smp writes it: "resnet50" for one of smp's own, "tu-convnext_tiny" for one of timm's.
"""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import segmentation_models_pytorch as smp
import timm
from segmentation_models_pytorch.encoders._base import EncoderMixin

from ununennium.models import _timm
from ununennium.models._names import normalize

if TYPE_CHECKING:
    from torch import nn

# Families are timm's modules. No timm interface tells without building a model whether its features form a
# pyramid and whether its strides can be dilated; both are the same throughout a family.
_DILATABLE = """
    byobnet convnext cspnet cspnext efficientnet hardcorenas inception_next mobilenetv3 mobilevit nfnet regnet
    res2net resnest resnet resnetv2 rexnet sknet xception_aligned
"""
_PYRAMIDS = f"""
    {_DILATABLE}
    byoanet coat cpubone davit densenet dla dpn edgenext efficientformer efficientformer_v2 efficientvit_mit
    fasternet fastvit focalnet gcvit ghostnet hgnet hiera hieradet_sam2 hrnet iformer inception_resnet_v2
    inception_v3 inception_v4 lcnetv2 lowformer mambaout maxxvit metaformer mobilenetv5 mvitv2 nasnet nextvit
    pnasnet pvt_v2 rdnet repghost repvit selecsls senet starnet swiftformer swin_transformer
    swin_transformer_v2 swin_transformer_v2_cr tiny_vit tresnet twins vgg vovnet xception
"""
_PLAIN_TRANSFORMERS = """
    beit deit eva naflexvit tnt vision_transformer vision_transformer_hybrid vision_transformer_relpos
    vision_transformer_sam
"""

# The spellings of smp's own encoders, normalized. They win over timm's of the same name.
_OWN_ENCODERS = {normalize(encoder): encoder for encoder in smp.encoders.get_encoder_names()}


@dataclass(frozen=True)
class PixelModel:
    """An architecture of smp's with an encoder: logits (B, num_classes, H, W) for images (B, in_channels, H, W)."""

    architecture: str
    encoder_name: str

    @property
    def name(self) -> str:
        """The name for `create_model`."""
        return f"{self.architecture}_{_shorten(self.encoder_name)}"

    @property
    def encoder(self) -> str:
        """What TorchGeo may have weights for."""
        return self.encoder_name.removeprefix("tu-")

    @property
    def prefix(self) -> str:
        """Of the names of its pretrained part, the encoder, in its state dict."""
        return "encoder.model." if self._is_timms else "encoder."

    @property
    def _is_timms(self) -> bool:
        return self.encoder_name.startswith("tu-")

    def tags(self) -> list[str]:
        """Return the weights that smp or timm knows of for the encoder."""
        if self._is_timms:
            return _timm.tags(self.encoder)
        return list(smp.encoders.encoders[self.encoder_name]["pretrained_settings"])

    def knows(self, weights: str) -> bool:
        """Return whether smp can load these weights."""
        return _timm.with_tag(self.encoder, weights) is not None if self._is_timms else weights in self.tags()

    def make(self, in_channels: int, num_classes: int, weights: str | None, **kwargs: Any) -> nn.Module:
        """Make the model, with weights that `knows` knows of, or none.

        Raises
        ------
        ValueError
            If smp or timm refuses; it names the model and the cause.
        """
        model_class = smp.MODEL_ARCHITECTURES_MAPPING[self.architecture]
        takes = inspect.signature(model_class).parameters
        if not self._is_timms and (unknown := kwargs.keys() - takes):  # smp would ignore them
            raise ValueError(f"{self.name} takes no {', '.join(sorted(unknown))}; smp's arguments: {', '.join(takes)}.")
        encoder, encoder_weights = self.encoder_name, cast("str | bool | None", weights)
        if weights is not None and self._is_timms:  # timm's tags belong in the name
            encoder, encoder_weights = f"tu-{_timm.with_tag(self.encoder, weights)}", True
        try:
            model: nn.Module = model_class(
                encoder_name=encoder,
                encoder_weights=encoder_weights,
                in_channels=in_channels,
                classes=num_classes,
                **kwargs,
            )
        except OSError:  # a download that failed says nothing about the model
            raise
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f'{self.name} can\'t be built; list_models("{self.architecture}_*") shows the encoders that suit '
                f"{self.architecture}. The cause: {type(error).__name__}: {error}"
            ) from error
        return model


def find(name: str) -> PixelModel | None:
    """Return the model that a name in any spelling means, None if it means nothing."""
    architecture, _, spelling = normalize(name).partition("_")
    encoder = _OWN_ENCODERS.get(spelling)
    if encoder is None and (model := _timm.by_spelling().get(spelling.removeprefix("tu_"))):
        encoder = f"tu-{model}"
    return PixelModel(architecture, encoder) if encoder and architecture in smp.MODEL_ARCHITECTURES_MAPPING else None


def names() -> list[str]:
    """Return the names of all combinations that are expected to build, in their shortest spelling."""
    return [
        f"{architecture}_{_shorten(encoder)}"
        for architecture in smp.MODEL_ARCHITECTURES_MAPPING
        for encoder in _usable_encoders(architecture)
    ]


def suggest(name: str) -> tuple[list[str], str]:
    """Return the names perhaps meant by an unknown one, likeliest first, and a pattern that lists more."""
    architectures = smp.MODEL_ARCHITECTURES_MAPPING
    first, _, rest = normalize(name).partition("_")
    before_last, _, last = normalize(name).rpartition("_")
    if first not in architectures and last in architectures:  # swapped, as in "resnet50_unet"
        first, rest = last, before_last
    likely = [first] if first in architectures else difflib.get_close_matches(first, architectures)
    suggestions = []
    for architecture in likely:
        if rest:
            usable = [_shorten(encoder) for encoder in _usable_encoders(architecture)]
            encoders = difflib.get_close_matches(rest, usable)
        else:
            default = inspect.signature(architectures[architecture]).parameters["encoder_name"].default
            encoders = [_shorten(default.partition(".")[0])]
        suggestions += [f"{architecture}_{encoder}" for encoder in encoders]
    return suggestions, f"{likely[0]}_*" if likely else "*"


def _shorten(encoder: str) -> str:
    short = encoder.removeprefix("tu-")
    return encoder if normalize(short) in _OWN_ENCODERS else short


def _usable_encoders(architecture: str) -> list[str]:
    """Return the encoders an architecture can use with its default arguments.

    Not among them, though accepted by `find`: smp's own "timm-" encoders, which smp deprecates.
    """
    if architecture == "dpt":
        # DPT scales its features by powers of two, which a patch of 14 pixels does not allow.
        models = timm.list_models(module=_PLAIN_TRANSFORMERS.split(), exclude_filters="*patch14*")
        return [f"tu-{model}" for model in models]
    own = [encoder for encoder in smp.encoders.get_encoder_names() if not encoder.startswith("timm-")]
    families = _PYRAMIDS
    if "encoder_output_stride" in inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[architecture]).parameters:
        own = [encoder for encoder in own if _can_dilate(encoder)]
        families = _DILATABLE
    if architecture in {"linknet", "unetplusplus"}:
        own = [encoder for encoder in own if not encoder.startswith("mit_b")]  # refused by their constructors
    return own + [f"tu-{model}" for model in timm.list_models(module=families.split())]


def _can_dilate(own_encoder: str) -> bool:
    # The base class dilates the strides; an encoder that can't overrides the method with one that raises.
    encoder_class = smp.encoders.encoders[own_encoder]["encoder"]
    return bool(encoder_class.make_dilated is EncoderMixin.make_dilated)
