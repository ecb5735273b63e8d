"""Before a run: a learning rate to train at, and a batch that fits the memory. Both leave a Trainer as it was."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from ununennium._arguments import integer
from ununennium.training import checks
from ununennium.training.batches import tensors_in
from ununennium.training.callbacks.base import Callback, CallbackList
from ununennium.training.checkpoint import whole_or_absent
from ununennium.training.distributed import local
from ununennium.training.errors import causes
from ununennium.training.loading import EpochLoader
from ununennium.training.modes import modes_restored
from ununennium.training.random_state import RandomState
from ununennium.training.run_figures import RunFigures
from ununennium.training.state import TrainState

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer


@dataclass(frozen=True)
class LRRange:
    """What a learning-rate range test found.

    Attributes
    ----------
    rates : list of float
        The learning rate of each step, rising.
    losses : list of float
        The loss of each step, before it: over all targets of its batches, in all processes.
    smoothed : list of float
        The same, smoothed exponentially and corrected for the beginning.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    @property
    def suggestion(self) -> float:
        """The rate at which the smoothed loss falls fastest over the logarithm of the rate, before its minimum.

        Smith reads off where the loss begins to fall and where it stops; the steepest descent lies between, and is
        what fastai's ``lr_find`` suggests as "steep". Slopes are over a tenth of the steps, and the first tenth, in
        which little has been smoothed, is left out. NaN if too few steps were finite, or the loss never fell.
        """
        reach, begin = max(len(self.smoothed) // 20, 1), len(self.smoothed) // 10
        places = range(max(begin, reach), self._lowest - reach + 1)
        slopes = [(self.smoothed[i + reach] - self.smoothed[i - reach], i) for i in places]
        if not slopes or min(slopes)[0] >= 0:
            return math.nan
        return self.rates[min(slopes)[1]]

    @property
    def decade_below_minimum(self) -> float:
        """A tenth of the rate with the least smoothed loss (fastai's ``lr_find``, "minimum"); more careful, often."""
        return self.rates[self._lowest] / 10 if self.rates else math.nan

    def plot(self, path: str | Path) -> Path:
        """Draw the losses over the rates to an image file, whose ending says which kind."""
        from matplotlib.figure import Figure

        path = Path(path).expanduser()
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, color="0.75", linewidth=1, label="loss")
        axes.plot(self.rates, self.smoothed, linewidth=2, label="smoothed")
        if not math.isnan(self.suggestion):
            axes.axvline(self.suggestion, color="C1", linestyle="--", label=f"steepest descent: {self.suggestion:.1e}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
        finite = [loss for loss in self.smoothed if math.isfinite(loss)]
        if finite:
            low, high = min(finite), max(finite[0], min(finite))
            axes.set_ylim(low - 0.1 * abs(high - low) - 1e-12, high + 0.5 * abs(high - low) + 1e-12)
        axes.legend()
        with whole_or_absent(path) as aside:
            figure.savefig(aside, dpi=150)
        return path

    @property
    def _lowest(self) -> int:
        return min(range(len(self.smoothed)), key=lambda i: self.smoothed[i], default=0)


def lr_range_test(
    trainer: Trainer,
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    num_steps: int = 100,
    *,
    smoothing: float = 0.98,
    divergence: float = 4.0,
) -> LRRange:
    """Train for some steps at a learning rate that rises exponentially, and see what the loss does.

    The steps are the Trainer's own, with its precision, accumulation and clipping, from the beginning of its data
    order, through more than one epoch if need be; of its callbacks none takes part. It ends early when the smoothed
    loss is ``divergence`` times its least, or not finite. Model, optimizer, loss scaler, random state, counters and
    history are exactly as before afterwards, and so is what ``fit`` then does. Of several processes, all have to call
    this.

    Parameters
    ----------
    trainer : Trainer
    min_lr, max_lr : float, default 1e-7 and 10
        Of the first and the last step. They are of the parameter group with the highest rate; others keep their ratio
        to it.
    num_steps : int, default 100
        Optimizer steps.
    smoothing : float, default 0.98
        Share of the running loss that a step leaves.
    divergence : float, default 4
        The factor at which it ends.

    Returns
    -------
    LRRange
        Rates, losses, a ``suggestion``, and ``plot(path)``.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range, or the loader can be run through only once.

    References
    ----------
    Smith: Cyclical Learning Rates for Training Neural Networks, WACV 2017 (arXiv 1506.01186), section 3.3. The
    exponential ramp, the smoothing and the end at divergence are fastai's (Howard, Gugger: fastai, Information 2020).
    """
    integer("num_steps", num_steps, minimum=2)
    if not 0 < min_lr < max_lr < math.inf:
        raise ValueError(f"min_lr and max_lr must be 0 < min_lr < max_lr, got {min_lr} and {max_lr}")
    if not 0 <= smoothing < 1 or not divergence > 1:
        raise ValueError(
            f"smoothing must be in 0 ≤ smoothing < 1 and divergence above 1, got {smoothing} and {divergence}"
        )
    checks.check_passes("train_loader", trainer.train_loader, 2)
    ramp = _Ramp(min_lr, max_lr, num_steps, smoothing, divergence)
    with as_before(trainer):
        _rehearse(trainer, ramp)
        try:
            trainer.fit(num_steps + 1)
        except FloatingPointError:
            ramp.diverged()
    return LRRange(ramp.rates, ramp.losses, ramp.smoothed)


class _Ramp(Callback):
    """Sets the learning rate before each step, and notes the loss after it."""

    def __init__(self, first: float, last: float, steps: int, smoothing: float, divergence: float) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self._first, self._last, self._steps = first, last, steps
        self._smoothing, self._divergence = smoothing, divergence
        self._mean = 0.0
        self._shares: list[float] = []
        self._done = False
        self._taken = 0

    def on_train_start(self, trainer: Trainer) -> None:
        own = [float(group["lr"]) for group in trainer.optimizer.param_groups]
        highest = max(own)
        self._shares = [rate / highest if highest > 0 else 1.0 for rate in own]

    def on_batch_start(self, trainer: Trainer, batch_idx: int) -> None:
        if trainer.state.open_batches or self._done:
            return
        rate = self._first * (self._last / self._first) ** (self._taken / (self._steps - 1))
        if len(self.rates) == len(self.losses):
            self.rates.append(rate)
        for group, share in zip(trainer.optimizer.param_groups, self._shares, strict=True):
            of_group = rate * share
            group["lr"] = torch.full_like(group["lr"], of_group) if isinstance(group["lr"], Tensor) else of_group

    def on_batch_end(self, trainer: Trainer, batch_idx: int, logs: Mapping[str, Tensor]) -> None:
        if trainer.state.open_batches or self._done:
            return
        figures = trainer._figures.train
        loss = figures.loss.compute(*trainer._over_processes[:1])  # over the targets of the step alone
        figures.reset()
        if trainer.state.optimizer_steps == self._taken and math.isfinite(loss):
            return  # the loss scaler has left the step out: the same rate again
        self._taken += 1
        self.losses.append(loss)
        self._mean = self._smoothing * self._mean + (1 - self._smoothing) * loss
        self.smoothed.append(self._mean / (1 - self._smoothing ** len(self.losses)))
        diverges = not math.isfinite(loss) or self.smoothed[-1] > self._divergence * min(self.smoothed)
        if len(self.losses) == self._steps or diverges:
            self._done = True
            trainer.stop()
            self.diverged()

    def diverged(self) -> None:
        """Leave out what is not finite."""
        while self.losses and not math.isfinite(self.losses[-1]):
            del self.losses[-1], self.smoothed[-1]
        del self.rates[len(self.losses) :]


class Fitting(NamedTuple):
    """A batch that fits the memory.

    Attributes
    ----------
    batch_size : int
        What the loader is to yield.
    gradient_accumulation_steps : int
        So many of them make the global batch.
    """

    batch_size: int
    gradient_accumulation_steps: int


def largest_batch(
    trainer: Trainer | Callable[[int], Trainer],
    *,
    global_batch: int | None = None,
    limit_bytes: int | None = None,
) -> Fitting:
    """Find the largest batch whose training step fits the memory, and the accumulation that keeps the global batch.

    Batch sizes that divide the global batch are tried, doubling until one does not fit, then bisecting: two optimizer
    steps of two batches each, with the Trainer's own precision and clipping, so that gradients and the optimizer's
    state have their place. Memory is given back after each. The Trainer is exactly as before afterwards.

    Parameters
    ----------
    trainer : Trainer, or callable of int
        A Trainer over a `DataLoader` with a dataset that has ``__getitem__``, whose samples are batched anew; its
        callbacks take no part. Or ``trainer(batch_size)`` that makes one, for loaders of another kind: its first
        batches are tried.
    global_batch : int, optional
        Samples of an optimizer step, in this process. By default the loader's batch size times the accumulation; a
        callable needs it.
    limit_bytes : int, optional
        What the step may take, if that is less than there is: on CUDA, of the memory that PyTorch allocates; on a CPU,
        which shows no peak, of what a batch's forward keeps for going backward.

    Returns
    -------
    Fitting
        ``(batch_size, gradient_accumulation_steps)``, whose product is the global batch.

    Raises
    ------
    MemoryError
        If a batch of one sample does not fit.
    TypeError, ValueError
        If there is no loader to batch anew, no global batch, or more than one process: one of several that ran out of
        memory would leave the others waiting.
    """
    made = trainer if not callable(trainer) else None
    if made is not None and global_batch is None:
        size = getattr(made.train_loader, "batch_size", None)
        global_batch = None if size is None else size * made.gradient_accumulation_steps
    if global_batch is None:
        raise ValueError("global_batch is not known of this loader: say how many samples an optimizer step is to see")
    integer("global_batch", global_batch, minimum=1)
    integer("limit_bytes", 1 if limit_bytes is None else limit_bytes, minimum=1)
    if made is not None:
        _check_one_process(made)
        check_rebatchable(made.train_loader)

    def fits(batch_size: int) -> bool:
        if made is None:
            tried = trainer(batch_size)  # type: ignore[operator]
            _check_one_process(tried)
            with RandomState.capture().put_back():
                batches = [loaded.batch for loaded in islice(tried._train_batches.epoch(tried.state.seed, 0), 1)]
            fitting = _fits(tried, batches, limit_bytes)
            del tried, batches
            gc.collect()  # before the next one is made
            return fitting
        with as_before(made):
            return _fits(made, [_batch_of(made.train_loader, batch_size)], limit_bytes)

    sizes = [size for size in range(1, global_batch + 1) if global_batch % size == 0]
    if not fits(1):
        raise MemoryError(
            "a training step with a batch of one sample does not fit the memory: use smaller chips, a smaller model, "
            "or mixed_precision=True"
        )
    good, bad = 0, len(sizes)
    while good + 1 < bad:
        if bad == len(sizes):  # nothing has failed yet: double
            at = max(i for i, size in enumerate(sizes) if size <= max(2 * sizes[good], sizes[good + 1]))
        else:
            at = (good + bad) // 2
        if fits(sizes[at]):
            good = at
        else:
            bad = at
    return Fitting(sizes[good], global_batch // sizes[good])


@contextmanager
def as_before(trainer: Trainer) -> Iterator[None]:
    """Have a Trainer, and all that it trains with, exactly as it is now after a block, whatever the block trains."""
    modules, optimizer, scaler = trainer._modules(), trainer.optimizer, trainer.precision.scaler
    if trainer._group.sharded is not None:
        trainer._group.sharded.state_dict()  # which lets gathered parameters go
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    kept = [(t.grad, t.requires_grad) for t in tensors]
    state = {parameter: _structure(of_parameter) for parameter, of_parameter in optimizer.state.items()}
    groups = [_structure(group) for group in optimizer.param_groups]
    objects = [trainer, trainer.state, trainer.precision, scaler, trainer._stepper]
    attributes = [dict(vars(trainer)), *(_structure(vars(each)) for each in objects[1:])]
    of_optimizer = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    held = {id(t): t for t in (*tensors, *tensors_in(list(state.values())), *tensors_in(vars(scaler)))}
    # On the host, where they take nothing of the memory that a step is tried in.
    values = [local(t.detach()).to("cpu", copy=True) for t in held.values()]
    with ExitStack() as after:
        after.enter_context(RandomState.capture().put_back())
        after.enter_context(modes_restored(*modules))
        try:
            yield
        finally:
            if trainer._group.sharded is not None:
                trainer._group.sharded.state_dict()
            with torch.no_grad():
                for tensor, value in zip(held.values(), values, strict=True):
                    local(tensor.detach()).copy_(value)
            for tensor, (gradient, needs_gradient) in zip(tensors, kept, strict=True):
                tensor.grad = gradient
                if tensor.requires_grad != needs_gradient:
                    tensor.requires_grad_(needs_gradient)
            for group, of_group in zip(optimizer.param_groups, groups, strict=True):
                _set(group, of_group)
            _set(optimizer.state, state)
            _set(vars(optimizer), {**of_optimizer, "state": optimizer.state, "param_groups": optimizer.param_groups})
            for each, of_object in zip(objects, attributes, strict=True):
                _set(vars(each), of_object)


def _rehearse(trainer: Trainer, *callbacks: Callback) -> None:
    """Set a Trainer up, within `as_before`, to begin anew with other callbacks, without validation and metrics."""
    trainer.callbacks = CallbackList(callbacks)
    trainer.val_loader = None
    trainer._figures = RunFigures([], trainer.loss_fn, trainer.device, finite_only=False)
    trainer._begin_anew()
    trainer.state.load_state_dict(vars(TrainState(seed=trainer.state.seed)))


def _fits(trainer: Trainer, batches: list[Any], limit_bytes: int | None) -> bool:
    """Take two steps of two batches each; tell whether they fit."""
    _rehearse(trainer)
    trainer.train_loader = batches * 4
    trainer._train_batches = EpochLoader(trainer.train_loader, 0)
    trainer.gradient_accumulation_steps = 2
    on_cuda = trainer.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(trainer.device)
        torch.cuda.reset_peak_memory_stats(trainer.device)
    kept = _Kept(trainer.model)
    memory_is_short = False
    try:
        with nullcontext() if on_cuda or limit_bytes is None else kept:
            trainer.fit(1)
        peak = torch.cuda.max_memory_allocated(trainer.device) if on_cuda else kept.peak
        return limit_bytes is None or peak <= limit_bytes
    except FloatingPointError:
        return True  # a matter of the weights, of which the memory knows nothing
    except Exception as error:
        memory_is_short = any(map(_is_shortage, causes(error)))
        if not memory_is_short:
            raise
        for each in causes(error):
            traceback.clear_frames(each.__traceback__)  # which hold the tensors of the step
        return False
    finally:
        if memory_is_short or on_cuda:
            for parameter in trainer.model.parameters():
                parameter.grad = None
            gc.collect()
            if on_cuda:
                torch.cuda.empty_cache()


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that forwards keep for going backward, but for the model's own; the most of one batch."""

    def __init__(self, model: nn.Module) -> None:
        self.peak = 0
        self._own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._held: dict[int, int] = {}
        super().__init__(self._pack, self._unpack)
        self._open = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self._open == 0:
            self._held.clear()  # the first of a batch
        self._open = 1
        if storage.data_ptr() not in self._own:
            self._held[storage.data_ptr()] = storage.nbytes()
            self.peak = max(self.peak, sum(self._held.values()))
        return tensor

    def _unpack(self, tensor: Tensor) -> Tensor:
        self._open = 0  # it goes backward
        return tensor


def check_rebatchable(loader: Any) -> None:
    """Raise unless a loader's samples can be put together in batches of another size."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        raise TypeError(
            f"the batches of {type(loader).__name__} can't be made larger or smaller: pass a Trainer over a DataLoader "
            "with a batch_size and a dataset with __getitem__, or a function that makes a Trainer for a batch size"
        )


def _batch_of(loader: Any, batch_size: int) -> Any:
    """Return a batch of so many samples of a loader's dataset, from the first on, in turn if there are fewer."""
    dataset = loader.dataset
    indices = [index % len(dataset) for index in range(batch_size)]
    twin = DataLoader(Subset(dataset, indices), batch_size, collate_fn=loader.collate_fn)
    with RandomState.capture().put_back():
        return next(iter(EpochLoader(twin, 0).epoch(0, 0))).batch


def _check_one_process(trainer: Trainer) -> None:
    if trainer.world_size > 1:
        raise ValueError(
            "the largest batch is looked for in one process: one of several that ran out of memory would leave the "
            "others waiting. What fits one fits each of several alike"
        )


def _is_shortage(error: BaseException) -> bool:
    """Tell whether an error means that memory is short, by whatever name a backend calls it."""
    text = str(error).lower()
    told = any(words in text for words in ("out of memory", "can't allocate memory", "alloc_failed"))
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, RuntimeError) and told)


def _structure(value: Any) -> Any:
    """Copy dicts and lists of plain data; what they hold stays itself."""
    if isinstance(value, dict):
        fresh = value.copy()
        fresh.update((k, _structure(v)) for k, v in value.items())
        return fresh
    return [_structure(v) for v in value] if type(value) is list else value


def _set(target: Any, values: dict[Any, Any]) -> None:
    target.clear()
    target.update(values)
