"""Freeing a model part by part."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ununennium.training.callbacks.base import Callback
from ununennium.training.checkpoint.snapshot import canonical, unwrapped
from ununennium.training.errors import CheckpointError

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer


class GradualUnfreeze(Callback):
    """Keep parts of the model frozen, and free each at its epoch.

    Frozen parameters get no gradient and no step; no weight decay moves them. BatchNorm in frozen parts is in eval
    mode: its statistics stay what they were trained to be.

    Parameters
    ----------
    schedule : mapping of int to str or sequence of str
        The epoch, counted from 0, at which parts are freed, by the names that ``model.named_modules()`` gives, or of
        parameters: ``{2: "encoder.layer4", 5: "encoder"}``. Of a part inside another, its own epoch counts.

    Raises
    ------
    TypeError, ValueError
        If ``schedule`` is no mapping, an epoch no integer above 0, a part no name, or named twice.

    Notes
    -----
    The optimizer holds all parameters from the beginning, each in the group, and at the learning rate, that it was
    made with. What was frozen before ``fit`` stays frozen. A schedule that frees the last layers first is that of
    Howard, Ruder: Universal Language Model Fine-tuning for Text Classification, ACL 2018 (arXiv 1801.06146).
    """

    def __init__(self, schedule: Mapping[int, str | Sequence[str]]) -> None:
        if not isinstance(schedule, Mapping):
            raise TypeError(f'schedule maps epochs to parts of the model, as {{5: "encoder"}} does, got {schedule!r}')
        self.epochs: dict[str, int] = {}  # at which each part is freed
        for epoch, parts in schedule.items():
            if isinstance(epoch, bool) or not isinstance(epoch, int):
                raise TypeError(f"schedule maps epochs, integers above 0, to parts of the model, got {epoch!r}")
            if epoch < 1:
                raise ValueError(f"a part is freed at an epoch above 0, got {epoch}: what is free at once is left out")
            named = [parts] if isinstance(parts, str) else parts
            if not isinstance(named, Sequence) or not all(isinstance(part, str) for part in named):
                raise TypeError(f"schedule names the parts that are freed at epoch {epoch}, got {parts!r}")
            for part in named:
                if part in self.epochs:
                    raise ValueError(f"{part!r} is freed at epoch {self.epochs[part]} and at {epoch}: name it once")
                self.epochs[part] = epoch
        if not self.epochs:
            raise ValueError('schedule names no part: {5: "encoder"} frees the encoder at epoch 5')
        self._held: set[str] | None = None  # parameters that were free, and are frozen until their epoch

    def on_train_start(self, trainer: Trainer) -> None:
        """Freeze; raise for parts that the model does not have, and for what no optimizer would ever step."""
        inner = unwrapped(trainer.model)
        parameters = {canonical(name): p for name, p in inner.named_parameters()}
        modules = {canonical(name): m for name, m in inner.named_modules() if name}
        for part in self.epochs:
            if part not in modules and part not in parameters:
                close = difflib.get_close_matches(part, [*modules, *parameters], n=3)
                raise ValueError(
                    f"the model has no part {part!r}: is one of {', '.join(map(repr, close))} meant?"
                    if close
                    else f"the model has no part {part!r}; its parts are {', '.join(dict(inner.named_children()))}"
                )
        named = {name: p for name, p in parameters.items() if self._epoch_of(name) is not None}
        optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        if self._held is None:
            self._held = {name for name, p in named.items() if p.requires_grad}
        lost = [name for name in sorted(self._held) if id(parameters[name]) not in optimized]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise ValueError(
                f"the optimizer does not hold {lost[0]!r}{more}, which would never be trained, freed or not: make it "
                "from all of model.parameters()"
            )
        self._set(trainer, trainer.state.epoch)
        if not any(p.requires_grad for group in trainer.optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"in epoch {trainer.state.epoch} nothing would be trained: the schedule freezes all that the optimizer "
                "holds. Leave the part out that is to be trained first (a decoder, a head)"
            )

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Free what is due, and keep what is frozen as it is."""
        self._set(trainer, epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule, and which parameters it is about."""
        return {"epochs": dict(self.epochs), "held": None if self._held is None else sorted(self._held)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        if state["epochs"] != self.epochs:
            raise CheckpointError(
                f"the checkpoint's GradualUnfreeze freed parts at {state['epochs']}, this one at {self.epochs}: make "
                "it with the same schedule, or take the weights alone with Trainer.load_weights"
            )
        self._held = None if state["held"] is None else set(state["held"])

    def _set(self, trainer: Trainer, epoch: int) -> None:
        inner = unwrapped(trainer.model)
        for name, parameter in inner.named_parameters():
            if canonical(name) in (self._held or ()):
                freed = self._epoch_of(canonical(name))
                parameter.requires_grad_(freed is None or freed <= epoch)
        for name, module in inner.named_modules():
            freed = self._epoch_of(canonical(name))
            if freed is not None and freed > epoch and isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()

    def _epoch_of(self, name: str) -> int | None:
        """Return when a parameter or module is freed: by the innermost part that holds it; None if none does."""
        while name and name not in self.epochs:
            name = name.rpartition(".")[0]
        return self.epochs.get(name)
