"""A batch forward and back, an optimizer step, an evaluated batch."""

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ununennium.training.batches import tensors_in
from ununennium.training.distributed import Group, local, reader, whole
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
    num_targets : Tensor or float
        What it is a mean over.
    outputs, targets : Any
        What the metrics compare.
    """

    loss: Tensor
    num_targets: Tensor | float
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
    group : Group
        The processes that train together.
    window : int
        Batches of a full window.
    skips : bool, default False
        Leave out a step whose loss or gradient is not finite, instead of raising. On an accelerator, the host then
        waits for the device once a window.
    by_outputs : bool, default False
        Whether the loss sees nothing but the model's outputs, and learns nothing itself, so that no gradient reaches a
        parameter but through them.

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
        group: Group,
        window: int,
        skips: bool = False,
        by_outputs: bool = False,
    ) -> None:
        self.gradient_norm: Tensor | None = None
        self.looks: bool = False
        self._compute_loss = compute_loss
        self._count = count
        self._optimizer = optimizer
        self._precision = precision
        self._clip_norm = clip_norm
        self._state = state
        self._group = group
        self._size = window
        self._skips = skips
        self._by_outputs = by_outputs
        self._forward: Any = compute_loss
        self._reduced: list[bool] | None = None
        self._parameters: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._before: list[Tensor] = []
        self._others: list[Tensor] = []
        self._window: list[tuple[Tensor, Tensor | float]] = []
        self._votes: Callable[[], Tensor] | None = None
        self._heard: Callable[[], list[float]] | None = None
        self._one = torch.ones(())
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

    def wrap(self, modules: Sequence[nn.Module], find_unused: bool) -> None:
        """Have the gradient of these modules reduced over all processes at the end of a window."""
        self._heard = None
        needed = [p.requires_grad for module in modules for p in module.parameters()]
        if needed != self._reduced:  # at the beginning, and when a callback has frozen or freed some
            self._reduced = needed
            self._forward = self._group.wrap(self._compute_loss, modules, find_unused)

    def unwrap(self) -> None:
        """Let go of what reduces gradients, which would keep a process group and its threads longer than its user."""
        self._forward, self._reduced = self._compute_loss, None
        if self._group.size > 1:
            gc.collect()  # DistributedDataParallel is part of a cycle

    def train(
        self, batch: Any, opens: bool, closes: bool, counts: bool = True, wishes: Callable[[], Sequence[float]] = tuple
    ) -> BatchResult:
        """Run one batch, already on the device, forward and back; the optimizer steps in `step`.

        Parameters
        ----------
        batch : Any
            What the loader gave, on the device.
        opens, closes : bool
            Whether it is the first and the last of its window.
        counts : bool, default True
            Without it the batch has no effect, but takes part in what the processes do together.
        wishes : callable
            ``wishes()`` gives numbers to be summed over the processes with the last batch, in the one vote that a
            window needs anyhow: cast before going backward, it is there when the gradient is.
        """
        with nullcontext() if closes else self._group.gathering(self._forward):
            if opens:
                self._open()
            with self._precision.autocast():
                mean, outputs, targets = self._forward(batch)
            count = self._count(outputs, targets, batch) if counts else 0
            if self.looks and isinstance(count, Tensor):
                count = count.item()
            loss = mean.detach()
            self._window.append((loss, count))
            alone = self._group.size == 1
            if alone and self.looks and not count:
                self._add_nothing()
            else:
                if alone and opens and closes:
                    weight = self._one_like(mean)
                else:
                    if opens:
                        self._unit = self._unit_of(targets)
                    share = _exact(count, loss.device) / self._unit
                    self._total = self._total + share
                    if closes and not alone:
                        self._votes = self._group.start_sum([self._total, self._has_bad_loss()], wishes())
                    weight = share.to(loss.dtype)
                with nullcontext() if alone and self.looks else self._nothing_from_empty(outputs, count):
                    self._precision.scale(mean).backward(weight)
            self._group.given.clear()
        self._state.batch += 1
        self._state.open_batches += 1
        return BatchResult(loss, count, outputs.detach() if isinstance(outputs, Tensor) else outputs, targets)

    def _open(self) -> None:
        """Begin a window."""
        self._window.clear()
        self._total = 0.0
        for parameter in self._parameters:
            parameter.grad = None
        if self._group.sharded is not None:
            self._group.broadcast(self._group.sharded.buffers())  # as DDP does by itself
        if self._buffers:
            self._before = [buffer.clone() for buffer in self._buffers]

    def _one_like(self, mean: Tensor) -> Tensor:
        """Return a 1 to go backward from, the same each time: given none, PyTorch makes one."""
        if self._one.dtype != mean.dtype or self._one.device != mean.device:
            self._one = torch.ones_like(mean, requires_grad=False)
        return self._one

    @contextmanager
    def _nothing_from_empty(self, outputs: Any, count: Tensor | float) -> Iterator[None]:
        """Let no gradient in while a batch goes backward that holds no target, without waiting to know whether it does.

        Its share is 0, and 0 times what its loss makes of 0 / 0 is NaN. Where the loss sees nothing but the outputs of
        the model, that is stopped there; else at each parameter.
        """
        if not isinstance(count, Tensor) and count:
            yield
            return
        empty = count == 0

        def stop(gradient: Tensor) -> Tensor:
            return torch.where(empty, 0, gradient) if isinstance(empty, Tensor) else torch.zeros_like(gradient)

        if self._group.sharded is not None:  # its parameters are others while it computes
            held = [*self._group.given, *tensors_in(outputs)]
        elif self._by_outputs and isinstance(outputs, Tensor):
            held = [outputs]
        else:
            held = self._parameters
        handles = [tensor.register_hook(stop) for tensor in held if tensor.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _unit_of(self, targets: Any) -> int:
        unit = max(targets.numel(), 1) if isinstance(targets, Tensor) else 1
        if self._group.size == 1:
            return unit
        if not self._state.unit:  # the same in all processes, once for the run; a full window without nodata totals 1
            self._state.unit = max(self._group.gather(unit)) * self._size
        return self._state.unit

    def step(self) -> Sequence[float]:
        """Close the window: divide by what all processes counted, unscale, clip, step.

        Returns
        -------
        sequence of float
            The sums of the wishes over the processes, of the window before this one where the device must not be
            waited for; empty if there are none yet.

        Raises
        ------
        NonFiniteError
            If a loss of the window or the gradient's norm is not finite; the weights are as they were. On an
            accelerator, where looking would make the device wait, the end of the epoch tells.
        """
        self._state.open_batches = 0
        bad = self._bad_loss() if self._tells_losses else None
        heard: Sequence[float] = ()
        if self._votes is not None:
            num_bad, *heard = self._hear(self._votes()) or [0.0]
            self._votes = None
            if num_bad and bad is None:
                bad = NonFiniteError("the loss of another process was not finite: what it wrote names step and samples")
        if bad is None:
            bad = self._bad_gradient()
        if bad is not None:
            self._pass_over(bad)
        elif self._precision.step(self._optimizer):
            self._state.optimizer_steps += 1
        else:
            self._state.skipped_steps += 1
        return heard

    def _hear(self, votes: Tensor) -> list[float]:
        """Take over the count of all processes, and return the other sums, once they can be read without waiting."""
        self._total = votes[0] / self._group.size  # by which the reduction of the gradient has divided it already
        if self._tells_losses:
            return list(votes[1:].tolist())
        before, self._heard = self._heard, reader(votes[1:])
        return before() if before is not None else []

    @torch.no_grad()
    def evaluate(self, batch: Any) -> BatchResult:
        """Run one batch, already on the device, forward."""
        with self._precision.autocast():
            loss, outputs, targets = self._compute_loss(batch)
        return BatchResult(loss, self._count(outputs, targets, batch), outputs, targets)

    @property
    def loss(self) -> Tensor:
        """Mean of the last window's loss over its targets, of this process, on the device; NaN over none."""
        losses = [loss for loss, _ in self._window]
        if len(losses) == 1:
            return losses[0]
        counts = torch.stack([_exact(count, losses[0].device) for _, count in self._window])
        means = torch.stack(losses).to(counts.dtype)
        return torch.where(counts > 0, means * counts, 0).sum() / counts.sum()

    def _add_nothing(self) -> None:
        """Take a batch that holds no target for what it is: a gradient of zero, whatever the loss makes of it."""
        for parameter in self._parameters:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @property
    def _tells_losses(self) -> bool:
        """Whether a loss or gradient that is not finite is told before the step, if need be by waiting for it."""
        return self.looks or self._skips

    def _has_bad_loss(self) -> Tensor | float:
        """Tell, without waiting, what `_bad_loss` tells."""
        if not self._tells_losses:
            return 0.0
        return torch.stack([~loss.isfinite() & (count != 0) for loss, count in self._window]).any()

    def _bad_loss(self) -> NonFiniteError | None:
        for place, (loss, count) in enumerate(self._window):
            if not math.isfinite(loss) and count != 0:  # a mean over nothing is NaN, and nothing
                return self._complaint("the loss", loss, place)
        return None

    def _bad_gradient(self) -> NonFiniteError | None:
        """Divide, unscale and clip the gradient; tell whether its norm, if anybody asks for it, is not finite."""
        if isinstance(self._total, Tensor) and not (self.looks and self._total == 1):
            torch._foreach_mul_([local(g) for g in self._gradients()], torch.where(self._total > 0, 1 / self._total, 0))
        self._precision.unscale(self._optimizer, self._others)
        if self._clip_norm is not None:
            self.gradient_norm = whole(torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm))
        elif self._skips:
            self.gradient_norm = whole(torch.nn.utils.get_total_norm(self._gradients()))
        if self._precision.scales or self.gradient_norm is None or not self._tells_losses:
            return None  # an overflow of fp16 is the loss scaler's business
        if math.isfinite(self.gradient_norm):
            return None
        return self._complaint("the norm of the gradient", self.gradient_norm, len(self._window) - 1)

    def _pass_over(self, bad: NonFiniteError) -> None:
        """Raise, or leave the step out and the model as it was before its window."""
        if not self._skips or not self.weights_are_finite():
            raise bad
        with torch.no_grad():
            for buffer, before in zip(self._buffers, self._before, strict=True):
                buffer.copy_(before)
        self._state.nonfinite_steps += 1

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def weights_are_finite(self) -> bool:
        """Tell whether every weight that this process holds is finite, once the device has finished."""
        return all(bool(local(p.detach()).isfinite().all()) for p in self._parameters)

    def _complaint(self, what: str, value: Tensor, place: int) -> NonFiniteError:
        size = len(self._window)
        first = self._state.batch - size
        if self.weights_are_finite():
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


def _exact(count: Tensor | float, device: torch.device) -> Tensor:
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if isinstance(count, Tensor):
        return count.to(device=device, dtype=dtype)
    return torch.full((), count, dtype=dtype, device=device)  # a copy from the host would wait
