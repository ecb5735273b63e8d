"""Pretrained weights: where they come from, and how a model is filled with them, band by band.

Where the input's bands are not the pretrained ones in their order, the filters of the first layer are put in place
by name. What depends on the number of bands, and what on the number of classes, is seen by making the model once more
with one band or one class more, on the meta device, where that costs no memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ununennium._checkpoint_files import AVERAGED, MANIFEST, MODEL, CheckpointError, readable_manifest_of, verified
from ununennium.models._bands import RGB, FilterMap, Unmatched, match_bands

_TORCHGEO_NAME = re.compile(r"(?:(\w+)\.)?([A-Z][A-Z0-9_]*)")

# What a backbone may come without, or have too much: its own head, and the norm before it, which timm's transformers
# have under another name, or not at all, when they pool by averaging or give features.
_HEAD = re.compile(r"(fc|head|norm|fc_norm)\.(weight|bias)")

Fetched = dict[str, Tensor]


class Design(Protocol):
    """What makes a model of one name."""

    @property
    def name(self) -> str:
        """The name for `create_model`."""

    @property
    def encoder(self) -> str:
        """The name of its backbone, as timm and TorchGeo have it."""

    @property
    def prefix(self) -> str:
        """What the names of its backbone begin with in its state dict."""

    def tags(self) -> list[str]:
        """Return the weights that its library knows of."""

    def knows(self, weights: str) -> bool:
        """Return whether its library can load these weights."""

    def make(self, in_channels: int, num_classes: int, weights: str | None, **kwargs: Any) -> nn.Module:
        """Make the model."""


@dataclass(frozen=True)
class Source:
    """Weights that are not fetched yet.

    Attributes
    ----------
    name : str
        For messages.
    fetch : callable
        Returns the tensors by name.
    bands : tuple of str, optional
        The bands they were trained on, if that is known.
    num_bands : int, optional
        How many, if that is known without fetching them.
    sentinel2 : bool
        Whether "red" and the like may be read as names of Sentinel-2's bands.
    whole : bool
        Whether they may be those of a whole model, and not of a backbone only.
    arguments : dict
        What the model has to be made with.
    """

    name: str
    fetch: Callable[[], Fetched]
    bands: tuple[str, ...] | None = None
    num_bands: int | None = None
    sentinel2: bool = False
    whole: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


def make_pretrained(
    design: Design,
    in_channels: int,
    num_classes: int,
    weights: str | os.PathLike[str],
    bands: tuple[str, ...] | None,
    unmatched: Unmatched,
    kwargs: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any]]:
    """Make a model with weights; return it and the arguments that make it without.

    Whatever can be refused is refused before weights are downloaded.

    Raises
    ------
    CheckpointError
        If they are a checkpoint's, and it is not there, damaged, sharded, or of a newer version.
    FileNotFoundError
        If the weights are a safetensors file, and there is none.
    ImportError
        If they are TorchGeo's, and it is not installed.
    ValueError
        If they are unknown, don't fit the model or the bands, or are in no safetensors file.
    """
    if isinstance(weights, str) and design.knows(weights):
        if bands is None:
            return design.make(in_channels, num_classes, weights, **kwargs), kwargs
        source = _of_photographs(design, num_classes, weights, kwargs)
    else:
        source = _find(design, weights)
    filters = _filters(source, bands, in_channels, unmatched)
    kwargs = {**source.arguments, **kwargs}
    model = design.make(in_channels, num_classes, None, **kwargs)

    def names_that_depend_on(more_bands: int, more_classes: int) -> set[str]:
        with torch.device("meta"):
            other = design.make(in_channels + more_bands, num_classes + more_classes, None, **kwargs)
        return _names_that_differ(model.state_dict(), other.state_dict())

    state = _renamed(source, source.fetch(), model, design.prefix, pruned=kwargs.get("encoder_depth", 5) < 5)
    if filters is not None and not filters.changes_nothing:
        _put_filters_in_place(state, model, filters, names_that_depend_on(1, 0), source.name)
    _leave_other_classes_out(state, model, source, names_that_depend_on)
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return model, kwargs


def is_checkpoint(weights: str | os.PathLike[str] | None) -> bool:
    """Return whether weights are a path to a safetensors file or to a checkpoint's folder."""
    if weights is None:
        return False
    if not isinstance(weights, str) or weights.endswith(".safetensors"):
        return True
    return (Path(weights).expanduser() / MANIFEST).is_file()


def _find(design: Design, weights: str | os.PathLike[str]) -> Source:
    if is_checkpoint(weights):
        return _of_checkpoint(Path(weights).expanduser())
    name = str(weights)
    if (called := _TORCHGEO_NAME.fullmatch(name)) and not os.path.exists(name):
        return _of_torchgeo(design, *called.groups())
    if "/" in name or os.path.exists(name):
        return _of_checkpoint(Path(name).expanduser())
    known = ", ".join(design.tags()) or "none"
    raise ValueError(
        f"Unknown weights {name!r} for the encoder {design.encoder!r}; known: {known}. Weights may also be one of "
        'TorchGeo\'s by name, such as "SENTINEL2_ALL_MOCO", or the path of a checkpoint or a safetensors file.'
    )


def _of_photographs(design: Design, num_classes: int, weights: str, kwargs: dict[str, Any]) -> Source:
    """Return weights of smp or timm, which are all of red, green and blue."""

    def fetch() -> Fetched:
        state = design.make(3, num_classes, weights, **kwargs).state_dict()
        return {name.removeprefix(design.prefix): state[name] for name in state if name.startswith(design.prefix)}

    return Source(weights, fetch, bands=RGB, num_bands=3, sentinel2=True, whole=True)


def _of_torchgeo(design: Design, enum_name: str | None, weight_name: str) -> Source:
    try:
        import torchgeo.models as zoo
    except ImportError as error:
        raise ImportError(
            f'{weight_name} is looked for among TorchGeo\'s weights, which need: pip install "ununennium[torchgeo]" '
            f"(the cause: {error})"
        ) from error
    from ununennium.models import _timm

    def enum_of(model: str) -> Any:
        try:
            return zoo.get_model_weights(model)
        except KeyError:  # some of its models have no weights
            return None

    enums = {model: enum for model in zoo.list_models() if (enum := enum_of(model)) is not None}
    usable = [model for model in enums if _timm.find(model) is not None]
    enum = enums[design.encoder] if design.encoder in usable else None
    if enum_name is not None and (enum is None or enum_name != enum.__name__):
        owners = [model for model in usable if enums[model].__name__ == enum_name]
        raise ValueError(
            f"{enum_name}.{weight_name} can't be loaded into {design.encoder}"
            + (f"; it is for {owners[0]}." if owners else f". TorchGeo has weights for: {', '.join(usable)}.")
        )
    if enum is None:
        raise ValueError(f"TorchGeo has no weights for {design.encoder}; it has some for: {', '.join(usable)}.")
    if weight_name not in enum.__members__:
        known = ", ".join(enum.__members__)
        raise ValueError(f"TorchGeo has no {weight_name} for {design.encoder}; it has: {known}.")
    weight = enum[weight_name]
    bands = weight.meta.get("bands")
    return Source(
        str(weight),
        lambda: dict(weight.get_state_dict(map_location="cpu", progress=True, weights_only=True)),
        bands=None if bands is None else tuple(bands),
        num_bands=weight.meta["in_chans"],
        sentinel2=weight_name.startswith("SENTINEL2"),
        arguments={key: weight.meta[key] for key in ("img_size",) if key in weight.meta},
    )


def _of_checkpoint(path: Path) -> Source:
    """Return the model of one of this library's checkpoints, or of a safetensors file from anywhere."""
    is_file = path.suffix == ".safetensors"
    folder = path.parent if is_file else path
    if is_file and not (path.name in (MODEL, AVERAGED) and (folder / MANIFEST).is_file()):
        return _of_file(path)
    manifest = readable_manifest_of(folder)
    name = path.name if is_file else AVERAGED if manifest.get("averaged", {}).get("default") else MODEL
    files = manifest["files"]
    if name not in files:
        stem, _, ending = name.partition(".")
        shards = sorted(file for file in files if file.startswith(f"{stem}.") and file.endswith(f".{ending}"))
        raise CheckpointError(
            f"{path} is sharded over processes ({', '.join(shards)}): make one file of it with "
            'ununennium.training.export_weights(checkpoint, "model.safetensors"), and name that'
            if shards
            else f"{path} is no file of the checkpoint {folder}: name the checkpoint"
        )
    file = folder / name
    return _source_of(str(path), lambda: _tensors_of(file, verified(file, files[name])), manifest.get("model"))


def _of_file(file: Path) -> Source:
    """Return what a safetensors file holds that belongs to no checkpoint."""
    import safetensors

    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    try:
        with safetensors.safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("model", "null"))
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} can't be read as a safetensors file: {error}") from error
    return _source_of(str(file), lambda: _tensors_of(file, file.read_bytes()), about)


def _source_of(name: str, fetch: Callable[[], Fetched], about: Any) -> Source:
    """Return a source of weights, given the `model_config` of what was trained, if that is known."""
    bands = about.get("bands") if isinstance(about, Mapping) else None
    return Source(
        name,
        fetch,
        bands=None if bands is None else tuple(bands),
        num_bands=None if bands is None else len(bands),
        whole=True,
    )


def _tensors_of(file: Path, data: bytes) -> Fetched:
    import safetensors
    import safetensors.torch

    try:
        return dict(safetensors.torch.load(data))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} can't be read as a safetensors file: {error}") from error


def _filters(source: Source, bands: tuple[str, ...] | None, in_channels: int, unmatched: Unmatched) -> FilterMap | None:
    """Return what each band takes from the first layer; None if it is taken over as it is."""
    if source.bands is not None:
        return match_bands(bands, in_channels, source.name, source.bands, unmatched, sentinel2=source.sentinel2)
    if bands is not None:
        raise ValueError(
            f"{source.name} does not say which bands it was trained on, so none can be found by name: leave bands out, "
            "and give the model the same bands in the same order."
        )
    if source.num_bands not in (None, in_channels):
        raise ValueError(
            f"{source.name} has filters for {source.num_bands} bands and does not say for which, so it can't be used "
            f"with in_channels={in_channels}: only with {source.num_bands}."
        )
    return None


def _renamed(source: Source, given: Fetched, model: nn.Module, prefix: str, *, pruned: bool) -> Fetched:
    """Return the tensors under the model's names.

    They are the whole model's, or those of the network in a `RasterModel`, or a backbone's, with or without a head.

    Raises
    ------
    ValueError
        If names are missing or left over.
    """
    own = model.state_dict()
    within = {name.removeprefix("network."): given[name] for name in given if name.startswith("network.")}
    is_raster = bool(within) and given.keys() - {f"network.{name}" for name in within} <= {"mean", "std"}
    if source.whole:
        if given.keys() == own.keys():
            return given
        if is_raster and within.keys() == own.keys():
            return within

    expected = {name for name in own if name.startswith(prefix)}
    backbone = {f"{prefix}{name}": tensor for name, tensor in given.items()}
    heads = {name for name in expected | backbone.keys() if _HEAD.fullmatch(name.removeprefix(prefix))}
    missing = expected - backbone.keys() - heads
    left_over = backbone.keys() - expected - heads
    if pruned:  # an encoder of less than full depth may lack the stages that it has no use for
        stages = {_stage(name, prefix) for name in expected}
        left_over = {name for name in left_over if _stage(name, prefix) in stages}
    if not missing and not left_over:
        head_of_its_own = {name for name in heads if name.removeprefix(prefix).startswith(("fc.", "head."))}
        return {name: t for name, t in backbone.items() if name in expected and name not in head_of_its_own}

    if source.whole:  # then it is more likely another model's than another backbone's
        candidates = within if is_raster else given
        missing, left_over = own.keys() - candidates.keys(), candidates.keys() - own.keys()
    raise ValueError(
        f"{source.name} does not fit the model. Missing in it: {_some(missing)}. Unknown to the model: "
        f"{_some(left_over)}. Create the model by the name and with the arguments that it was trained with."
    )


def _put_filters_in_place(
    state: Fetched, model: nn.Module, filters: FilterMap, depend_on_bands: set[str], source: str
) -> None:
    own = model.state_dict()
    names = depend_on_bands & state.keys()
    for name in names:
        given, made = state[name], own[name]
        one_filter_a_band = given.ndim > 1 and given.shape[1] == filters.num_source
        if not one_filter_a_band or made.shape[1] != len(filters.places):
            raise ValueError(
                f"{source}: filters can't be put in place by band, because {name} has the shape {tuple(given.shape)}, "
                f"and not {filters.num_source} bands in its second dimension. Use an encoder whose first layer is a "
                "convolution over the bands, or leave bands out."
            )
        state[name] = filters(given)
    if not names:
        raise ValueError(f"{source}: filters can't be put in place by band, because it has no layer that takes bands.")


def _leave_other_classes_out(
    state: Fetched, model: nn.Module, source: Source, names_that_depend_on: Callable[[int, int], set[str]]
) -> None:
    """Take the head of other classes away: the model keeps its own, as it was initialised."""
    own = model.state_dict()
    differ = _names_that_differ(state, own)
    if differ and source.whole:
        depend_on_classes = names_that_depend_on(0, 1)
        if differ & depend_on_classes:
            for name in depend_on_classes & state.keys():
                del state[name]
        differ -= depend_on_classes
    if not differ:
        return
    shapes = ", ".join(f"{n} {tuple(state[n].shape)}, not {tuple(own[n].shape)}" for n in sorted(differ)[:3])
    bands = differ <= names_that_depend_on(1, 0)
    raise ValueError(
        f"{source.name} does not fit the model: {shapes}. "
        + (
            "It has another number of bands and does not say which, so in_channels has to be the same."
            if bands
            else "Create the model with the arguments that it was trained with."
        )
    )


def _names_that_differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    return {name for name in one.keys() & other.keys() if one[name].shape != other[name].shape}


def _stage(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).partition(".")[0]


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "") if ordered else "none"
