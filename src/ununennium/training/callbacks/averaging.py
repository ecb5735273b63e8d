"""Averages of the weights over a run: what those of every kind have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ununennium.training.callbacks.base import Callback
from ununennium.training.checkpoint.shards import sharded_as
from ununennium.training.checkpoint.snapshot import canonical, unwrapped
from ununennium.training.distributed import is_sharded, local
from ununennium.training.errors import CheckpointError

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer

_LOW = (torch.float16, torch.bfloat16)  # that lose what an average adds at a time, and are averaged in float32
_BLENDED = (*_LOW, torch.float32, torch.float64, torch.complex64, torch.complex128)

Blend = Callable[[list[Tensor], list[Tensor]], None]


class WeightAverage(Callback):
    """Base class of callbacks that keep an average of the weights beside those that are trained.

    Averaged is what the model's ``state_dict`` holds, each tensor once, by canonical name; sharded tensors are averaged
    shard by shard, and float16 and bfloat16 in float32. Integers, and buffers that hold infinite values (attention
    masks), are copied from the model. Checkpoints keep the averages in a file of their own beside the raw weights.

    Attributes
    ----------
    num_averaged : int
        How many times weights have gone into the average.
    """

    averages_weights: ClassVar[bool] = True
    blends_buffers: ClassVar[bool] = True  # else they are copied

    def __init__(self) -> None:
        self.num_averaged: int = 0
        self._averages: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] = {}  # while the model has the averages
        self._read: dict[str, Tensor] = {}  # from a checkpoint, until a model is seen
        self._as_they_are: set[str] | None = None  # names of what is copied
        self._live: dict[str, Tensor] = {}
        self._blended: list[tuple[list[Tensor], list[Tensor]]] = []
        self._copied: list[tuple[list[Tensor], list[Tensor]]] = []
        self._buffers: list[Tensor] = []

    def settings(self) -> dict[str, Any]:
        """Return what a run that goes on must have in common with the one that was left."""
        raise NotImplementedError

    @property
    def is_default(self) -> bool:
        """Whether the averages are what is meant by the weights of a checkpoint that is made now."""
        return bool(self._raw)

    @property
    def broadcast_tensors(self) -> Sequence[Tensor]:
        """The averages of buffers, which each process has of its own."""
        return self._buffers

    def on_train_start(self, trainer: Trainer) -> None:
        """Take up the averages where they were left."""
        others = [c for c in trainer.callbacks.callbacks if isinstance(c, WeightAverage) and c is not self]
        if others:
            raise ValueError(
                f"{type(self).__name__} and {type(others[0]).__name__} would each put its averages in the model's "
                "place: pass one of them"
            )
        self._put_back()
        self._bind(trainer)

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Look at the model anew, which a callback may have changed."""
        self._bind(trainer)

    def reset(self) -> None:
        """Forget the averages: the model was given other weights."""
        self.num_averaged = 0
        self._averages, self._raw, self._read, self._as_they_are = {}, {}, {}, None
        self._live, self._blended, self._copied, self._buffers = {}, [], [], []

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, by canonical name; under "model" the raw weights, while the model has the averages."""
        return {
            **self.settings(),
            "num_averaged": self.num_averaged,
            "copied": None if self._as_they_are is None else sorted(self._as_they_are),
            "default": self.is_default,
            "averaged": dict(self._read or self._averages),
            "model": dict(self._raw),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        for name, value in self.settings().items():
            if name in state and state[name] != value:
                raise CheckpointError(
                    f"the checkpoint's {type(self).__name__} had {name}={state[name]!r}, this one has {value!r}: make "
                    "it with the same, or take the weights alone with Trainer.load_weights"
                )
        self.reset()
        self.num_averaged = state["num_averaged"]
        self._as_they_are = None if state["copied"] is None else set(state["copied"])
        self._read = dict(state["averaged"])

    @contextmanager
    def applied(self, trainer: Trainer) -> Iterator[None]:
        """Have the model's tensors hold the averages, in place, for a block; without effect inside another one."""
        if self._read:
            self._bind(trainer)
        if self._raw or not self._averages:
            yield
            return
        self._apply(trainer)
        try:
            yield
        finally:
            _tensors(trainer.model)  # gathers of sharded weights are over
            self._put_back()

    @torch.no_grad()
    def _apply(self, trainer: Trainer) -> None:
        self._bind(trainer)
        self._raw = _by_identity(self._live, lambda _, tensor: tensor.detach().clone())
        for name, tensor in self._live.items():
            local(tensor.detach()).copy_(local(self._averages[name]))

    @torch.no_grad()
    def _put_back(self) -> None:
        for name, tensor in self._raw.items():
            local(self._live[name].detach()).copy_(local(tensor))
        self._raw = {}

    def _begin(self, trainer: Trainer) -> None:
        """Begin with the weights as they are."""
        if not self._averages and not self._read:
            self._averages = _by_identity(_tensors(trainer.model), lambda _, tensor: _wide(tensor.detach()).clone())
            self._bind(trainer)

    def _bind(self, trainer: Trainer) -> None:
        """Pair the averages with the model's tensors as they are now."""
        self._live = live = _tensors(trainer.model)
        if self._read:
            _check_same(self._read, live)
            read = self._read
            self._averages = _by_identity(live, lambda name, tensor: _laid_out(read[name], tensor))
            self._read = {}
        if not self._averages:
            return
        _check_same(self._averages, live)
        inner = unwrapped(trainer.model)
        buffers = {canonical(name) for name, _ in inner.named_buffers(remove_duplicate=False)}
        if self._as_they_are is None:
            self._as_they_are = {name for name in live if self._stays(live[name], name in buffers)}
        blended: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        copied: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        once = {id(tensor): name for name, tensor in reversed(live.items())}
        for name in once.values():
            average, tensor = local(self._averages[name]), live[name]
            held = local(tensor.detach()) if is_sharded(tensor) else tensor  # a parameter's data may be replaced
            of_kind = copied if name in self._as_they_are else blended
            pair = of_kind.setdefault((average.device, average.dtype, held.dtype), ([], []))
            pair[0].append(average)
            pair[1].append(held)
        self._blended, self._copied = list(blended.values()), list(copied.values())
        self._buffers = [local(self._averages[name]) for name in once.values() if name in buffers]

    def _stays(self, tensor: Tensor, buffer: bool) -> bool:
        held = local(tensor.detach())
        if held.dtype not in _BLENDED or (buffer and not self.blends_buffers):
            return True
        return buffer and not bool(held.isfinite().all())  # the difference of two infinities is NaN

    @torch.no_grad()
    def _average(self, blend: Blend) -> None:
        """Take the model's tensors as they are into the average; no device is waited for."""
        for averages, live in self._blended:
            low = live[0].dtype != averages[0].dtype
            blend(averages, [tensor.to(averages[0].dtype) for tensor in live] if low else live)
        for averages, live in self._copied:
            torch._foreach_copy_(averages, live)
        self.num_averaged += 1


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's ``state_dict`` themselves, by canonical name."""
    state = unwrapped(model).state_dict(keep_vars=True)
    return {canonical(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _by_identity(tensors: Mapping[str, Tensor], make: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """Return something for each tensor, and the same where it has two names."""
    made: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in made:
            made[id(tensor)] = make(name, tensor)
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.dtype in _LOW else tensor


def _laid_out(read: Tensor, tensor: Tensor) -> Tensor:
    """Return what a checkpoint held of an average, sharded and laid out in memory as the tensor that it is of."""
    if is_sharded(tensor):
        return sharded_as(tensor, read)
    return torch.empty_like(tensor.detach(), dtype=read.dtype).copy_(read)


def _check_same(averages: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Raise unless averages are of this model."""
    for name in sorted(averages.keys() | live.keys()):
        there, here = (tensors[name].shape if name in tensors else None for tensors in (averages, live))
        if there != here:
            raise CheckpointError(
                f"the averaged weights are of another model: {name} has shape {there and tuple(there)} in them and "
                f"{here and tuple(here)} in the model. Weights alone are taken over with Trainer.load_weights, which "
                "starts the average anew"
            )
