"""A batch forward and back, an optimizer step, an evaluated batch."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ununennium.training.errors import NonFiniteError
from ununennium.training.precision import Precision
from ununennium.training.state import TrainState
from ununennium.training.windows import Count

ComputeLoss = Callable[[Any], tuple[Tensor, Any, Any]]


class BatchResult(NamedTuple):
    """What one batch gave.

    Attributes
    ----------
    loss : Tensor
        The mean, 0-dimensional, detached, on the device.
    num_targets : Tensor or int
        What it is a mean over.
    outputs, targets : Any
        What the metrics compare.
    """

    loss: Tensor
    num_targets: Tensor | int
    outputs: Any
    targets: Any


class Stepper:
    """Turns batches into optimizer steps.

    A window's gradient is the sum of each batch's mean times its count over the window's total count: the gradient
    of the one big batch. The total shows only at the end, so batches are weighted by their count in units of the
    size of the window's first batch, and the sum is divided once, before clipping.

    Parameters
    ----------
    compute_loss : callable
        ``compute_loss(batch) -> loss, outputs, targets``.
    count : callable
        ``count(outputs, targets, batch)``: what the loss averages over.
    optimizer : torch.optim.Optimizer
        Steps once a window.
    precision : Precision
        Autocast, scaling, and whether a step happened.
    clip_norm : float or None
        Upper limit of the 2-norm of the whole gradient.
    state : TrainState
        Its counters advance with the batches and steps.
    skips : bool, default False
        Leave out a step whose loss or gradient is not finite, instead of raising. On an accelerator, the host then
        waits for the device once a window.

    Attributes
    ----------
    gradient_norm : Tensor or None
        2-norm of the last window's gradient before clipping, on the device; None without clipping.
    looks : bool
        Whether losses are looked at before the optimizer steps: on a CPU, where looking waits for nothing.
    """

    def __init__(
        self,
        compute_loss: ComputeLoss,
        count: Count,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        clip_norm: float | None,
        state: TrainState,
        skips: bool = False,
    ) -> None:
        self.gradient_norm: Tensor | None = None
        self.looks = False
        self._compute_loss = compute_loss
        self._count = count
        self._optimizer = optimizer
        self._precision = precision
        self._clip_norm = clip_norm
        self._state = state
        self._skips = skips
        self._parameters: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._before: list[Tensor] = []
        self._others: list[Tensor] = []
        self._window: list[tuple[Tensor, Tensor | int]] = []
        self._unit = 1
        self._total: Tensor | float = 0.0

    def begin(self, parameters: Iterable[Tensor], buffers: Iterable[Tensor] = ()) -> None:
        """Take note of all parameters, a learning loss's too: cleared before a window, clipped after it.

        Buffers, which a forward may change (BatchNorm's statistics), are put back when a step is skipped.
        """
        optimized = [p for group in self._optimizer.param_groups for p in group["params"]]
        known = {id(p) for p in optimized}
        self._others = [p for p in dict.fromkeys(parameters) if id(p) not in known]
        self._parameters = optimized + self._others
        self.looks = all(p.device.type == "cpu" for p in self._parameters)
        self._buffers = list(buffers) if self._skips else []

    def train(self, batch: Any, opens: bool, closes: bool) -> BatchResult:
        """Run one batch, already on the device, forward and back; ``opens`` and ``closes`` say where in its window.

        The optimizer steps in `step`, when the window is closed.
        """
        if opens:
            self._window.clear()
            self._total = 0.0
            for parameter in self._parameters:
                parameter.grad = None
            if self._buffers:
                self._before = [buffer.clone() for buffer in self._buffers]
        with self._precision.autocast():
            loss, outputs, targets = self._compute_loss(batch)
        count = self._count(outputs, targets, batch)
        if self.looks and not count:
            self._add_nothing()
        else:
            if not self.looks:
                _block_empty(outputs, count)
            if opens and closes:
                self._precision.scale(loss).backward()
            else:
                if opens:
                    self._unit = max(targets.numel(), 1) if isinstance(targets, Tensor) else 1
                share = _exact(count, loss.device) / self._unit
                self._total = self._total + share
                self._precision.scale(loss).backward(share.to(loss.dtype))
        loss = loss.detach()
        self._window.append((loss, count))
        self._state.batch += 1
        self._state.open_batches += 1
        return BatchResult(loss, count, outputs.detach() if isinstance(outputs, Tensor) else outputs, targets)

    def step(self) -> None:
        """Close the window: divide, unscale, clip, step.

        Raises
        ------
        NonFiniteError
            If a loss of the window or the gradient's norm is not finite; the weights are as they were. On an
            accelerator, where looking would make the device wait, the end of the epoch tells.
        """
        self._state.open_batches = 0
        bad = self._bad_loss() if self.looks or self._skips else None
        if bad is None:
            bad = self._bad_gradient()
        if bad is not None:
            self._pass_over(bad)
        elif self._precision.step(self._optimizer):
            self._state.optimizer_steps += 1
        else:
            self._state.skipped_steps += 1

    @torch.no_grad()
    def evaluate(self, batch: Any) -> BatchResult:
        """Run one batch, already on the device, forward."""
        with self._precision.autocast():
            loss, outputs, targets = self._compute_loss(batch)
        return BatchResult(loss, self._count(outputs, targets, batch), outputs, targets)

    def _add_nothing(self) -> None:
        """Take a batch that holds no target for what it is: a gradient of zero, whatever the loss makes of it."""
        for parameter in self._parameters:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _bad_loss(self) -> NonFiniteError | None:
        for place, (loss, count) in enumerate(self._window):
            if not math.isfinite(loss) and count != 0:  # a mean over nothing is NaN, and nothing
                return self._complaint("the loss", loss, place)
        return None

    def _bad_gradient(self) -> NonFiniteError | None:
        """Divide, unscale and clip the gradient; tell whether its norm, if anybody asks for it, is not finite."""
        if isinstance(self._total, Tensor):
            torch._foreach_mul_(self._gradients(), torch.where(self._total > 0, 1 / self._total, 0))
        self._precision.unscale(self._optimizer, self._others)
        if self._clip_norm is not None:
            self.gradient_norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        elif self._skips:
            self.gradient_norm = torch.nn.utils.get_total_norm(self._gradients())
        if self._precision.scales or self.gradient_norm is None or not (self.looks or self._skips):
            return None  # an overflow of fp16 is the loss scaler's business
        if math.isfinite(self.gradient_norm):
            return None
        return self._complaint("the norm of the gradient", self.gradient_norm, len(self._window) - 1)

    def _pass_over(self, bad: NonFiniteError) -> None:
        """Raise, or leave the step out and the model as it was before its window."""
        if not self._skips or not self._weights_are_finite():
            raise bad
        with torch.no_grad():
            for buffer, before in zip(self._buffers, self._before, strict=True):
                buffer.copy_(before)
        self._state.nonfinite_steps += 1

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def _weights_are_finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self._parameters)

    def _complaint(self, what: str, value: Tensor, place: int) -> NonFiniteError:
        size = len(self._window)
        first = self._state.batch - size
        if self._weights_are_finite():
            cause = (
                "The weights are as they were before this step. Look at that batch for NaN or infinite inputs (nodata "
                "that was not masked, a division by zero in an index); if the data are sound, lower the learning rate "
                'or set gradient_clip_norm. on_nonfinite="skip" leaves such steps out, and counts them.'
            )
            batches = range(first, first + size)
        else:
            cause = (
                "The weights were not finite before this step, so an earlier step had a gradient that was not: set "
                "gradient_clip_norm, which looks at every gradient, and take the last checkpoint's weights."
            )
            batches = range(max(first - size, 0), first)
        error = NonFiniteError(
            f"{what} is {float(value)} at optimizer step {self._state.optimizer_steps} (epoch {self._state.epoch}, "
            f"batch {first + place}). {cause}"
        )
        error.batches = batches
        return error


def _block_empty(outputs: Any, count: Tensor | int) -> None:
    """Let no gradient into the model if the batch holds no target, without waiting to know whether it does."""
    if isinstance(count, Tensor) and isinstance(outputs, Tensor) and outputs.requires_grad:
        outputs.register_hook(lambda gradient: torch.where(count > 0, gradient, 0))


def _exact(count: Tensor | int, device: torch.device) -> Tensor:
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if isinstance(count, Tensor):
        return count.to(device=device, dtype=dtype)
    return torch.full((), count, dtype=dtype, device=device)  # a copy from the host would wait
