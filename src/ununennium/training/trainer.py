"""The Trainer: a run from its first batch to its last."""

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ununennium.metrics import Metric, MetricCollection
from ununennium.training import checkpoint, checks
from ununennium.training.batches import split_batch, to_device
from ununennium.training.callbacks.base import Callback, CallbackList
from ununennium.training.callbacks.progress import ProgressCallback
from ununennium.training.default_metrics import default_metrics
from ununennium.training.errors import NonFiniteError
from ununennium.training.explain import explain
from ununennium.training.figures import Figures
from ununennium.training.loading import EpochLoader
from ununennium.training.modes import Modes, modes_restored
from ununennium.training.precision import Precision
from ununennium.training.random_state import RandomState
from ununennium.training.state import TrainState
from ununennium.training.step import BatchResult, Stepper
from ununennium.training.targets import check_targets, compares_numbers
from ununennium.training.windows import loss_setting, target_counter, windows


class Trainer:
    """Train a model, and keep an honest record of it.

    Parameters
    ----------
    model : nn.Module
        Moved to the device, in place. Modules put in eval mode before (a frozen BatchNorm) stay in it.
    optimizer : torch.optim.Optimizer
        Over parameters of the model.
    loss_fn : callable
        ``loss_fn(outputs, targets)`` gives a mean, a scalar. What it is a mean over decides what a batch counts for:
        asked are a method ``target_count(outputs, targets)``, an ``ignore_index`` (with class weights, if there are
        any), else the number of samples.
    train_loader, val_loader : DataLoader or another iterable of batches
        Batches are ``(inputs, targets)`` or mappings with ``image`` and ``mask``, ``label`` or ``target``. Tensors in
        nested containers are moved to the device.
    callbacks : sequence of Callback, optional
        Called in this order; those that save state come last.
    mixed_precision : bool or {"bf16", "fp16"}, default False
        ``True`` is bf16 where the device has it (CPUs included), else fp16 with a loss scaler.
    gradient_accumulation_steps : int, default 1
        Batches per optimizer step. The gradient is that of the one big batch, at a short last window and with uneven
        batches and ignored pixels too.
    gradient_clip_norm : float, optional
        Upper limit of the 2-norm of the whole model's gradient, once per optimizer step.
    distributed : bool or "fsdp", default False
        Not yet built: anything but ``False`` raises `NotImplementedError`.
    device : str or torch.device, optional
        By default CUDA, MPS or the CPU, whichever is there first.
    metrics : sequence of Metric, or mapping of str to Metric, optional
        Computed on training and validation batches. By default IoU and Dice for a model that gives class logits
        (B, C, …) for integer targets, with the classes of the outputs and the ``ignore_index`` of the loss, and none
        for others. ``[]`` is none.
    backend : str, optional
        Of the process group: "nccl" on CUDA, "gloo" elsewhere by default.
    find_unused_params : bool, default False
        Passed to `DistributedDataParallel`.
    seed : int, optional
        What the order of the samples is drawn from, together with the epoch. By default drawn itself; see
        ``trainer.state.seed``.
    progress : bool, default True
        Show a progress bar and a table of epochs.

    Attributes
    ----------
    state : TrainState
        Seed, counters and record of the run.
    epochs : int
        The final epoch count of the running ``fit``.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind or out of range, naming it and what would be right.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[..., Tensor],
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        callbacks: Sequence[Callback] | None = None,
        mixed_precision: bool | Literal["bf16", "fp16"] = False,
        gradient_accumulation_steps: int = 1,
        gradient_clip_norm: float | None = None,
        distributed: bool | Literal["fsdp"] = False,
        device: str | torch.device | None = None,
        *,
        metrics: Sequence[Metric] | Mapping[str, Metric] | None = None,
        backend: str | None = None,
        find_unused_params: bool = False,
        seed: int | None = None,
        progress: bool = True,
    ) -> None:
        checks.check_model_and_loss(model, loss_fn)
        checks.check_optimizer(optimizer, model, loss_fn)
        checks.check_loader("train_loader", train_loader)
        checks.check_integer("gradient_accumulation_steps", gradient_accumulation_steps, minimum=1)
        checks.check_integer("seed", 0 if seed is None else seed, minimum=0)
        checks.check_clip_norm(gradient_clip_norm)
        checks.check_list("callbacks", callbacks)
        checks.check_list("metrics", metrics)
        if val_loader is not None:
            checks.check_loader("val_loader", val_loader)
        elif metrics:
            raise ValueError("metrics need a val_loader: pass one, or leave the metrics out")
        if distributed or backend is not None:
            raise NotImplementedError("distributed training is not built yet: use distributed=False and no backend")
        self.device = checks.resolve_device(device)
        self.model = model.to(self.device)
        self.optimizer = optimizer
        self.loss_fn = loss_fn.to(self.device) if isinstance(loss_fn, nn.Module) else loss_fn
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.gradient_clip_norm = gradient_clip_norm
        self.find_unused_params = find_unused_params
        self.precision = Precision(mixed_precision, self.device)
        self.state = TrainState(seed=secrets.randbits(32) if seed is None else int(seed))
        self.epochs = 0
        given = list(callbacks or ())
        shows = progress and not any(isinstance(callback, ProgressCallback) for callback in given)
        self.callbacks = CallbackList([*given, *([ProgressCallback()] if shows else [])])
        self._train_batches = EpochLoader(train_loader, stream=0)
        self._val_batches = EpochLoader(() if val_loader is None else val_loader, stream=1)
        self._stepper = Stepper(
            self.compute_loss, target_counter(loss_fn), optimizer, self.precision, gradient_clip_norm, self.state
        )
        self._metrics_known = metrics is not None
        self._train_figures, self._val_figures = self._new_figures(metrics or [])
        self._unseen = {True, False}  # whether training, for which no batch has been looked at
        self._stop = self._loaded = False

    def fit(self, epochs: int, start_epoch: int = 0) -> dict[str, list[float]]:
        """Run epochs ``start_epoch`` … ``epochs - 1``, validating after each.

        Parameters
        ----------
        epochs : int
            The final count of epochs, not how many to add.
        start_epoch : int, default 0
            The first epoch's number. After `load`, training goes on where the checkpoint was.

        Returns
        -------
        dict of str to list of float
            One figure per finished epoch: ``train_loss``, ``train_<metric>``, ``val_loss``, ``val_<metric>``.

        Raises
        ------
        NonFiniteError
            If the loss becomes NaN or infinite.
        BatchError
            If a batch does not fit the model or the loss.
        """
        first = checks.first_epoch(epochs, start_epoch, self.state.epoch if self._loaded else None)
        self.epochs, self._stop, self._unseen = epochs, False, {True, False}
        self._check_monitors()
        checks.check_passes("train_loader", self.train_loader, epochs - first)
        checks.check_passes("val_loader", self.val_loader, epochs - first)
        checkpoint.check_memories(self.callbacks.with_memory)
        self._stepper.begin(p for module in self._modules() for p in module.parameters())
        with modes_restored(*self._modules()):
            if not self.model.training:
                self.model.train()
            modes = Modes(*self._modules())
            try:
                for hook in self.callbacks.train_start:
                    hook(self)
                for epoch in range(first, epochs):
                    if self._stop:
                        break
                    self._loaded = False
                    modes.restore()  # whatever a callback did
                    self._fit_epoch(epoch)
            except BaseException as error:
                self.callbacks.end(self, error)
                raise
            self.callbacks.end(self)
        return self.history

    def _fit_epoch(self, epoch: int) -> None:
        self.state.begin_epoch(epoch)
        for hook in self.callbacks.epoch_start:
            hook(self, epoch)
        self._train_figures.reset()
        batches = self._train_batches.epoch(self.state.seed, epoch)
        for loaded, opens, closes in windows(batches, self.gradient_accumulation_steps):
            index = self.state.batch
            for hook in self.callbacks.batch_start:
                hook(self, index)
            try:
                result = self._stepper.train(to_device(loaded.batch, self.device), opens, closes)
                self._observe(result, training=True)
            except Exception as error:
                self._explain(error, loaded.batch, f"epoch {epoch}, batch {index}")
                raise
            if closes:
                self._stepper.step()
            for hook in self.callbacks.batch_end:
                hook(self, index, {"train_loss": result.loss})
            del result  # its outputs need not live through the next forward
            if closes and self._stop:
                break
        logs = self._train_figures.compute()
        bad = self._train_figures.loss.first_not_finite
        if bad is not None:
            raise NonFiniteError(
                f"the loss of epoch {epoch} was not finite from batch {bad} on, which an accelerator tells at the "
                "epoch's end. The weights went with it; no checkpoint was written since."
            )
        if self.val_loader is not None:
            logs |= self.validate()
        self.state.finish_epoch(logs)
        for hook in self.callbacks.epoch_end:
            hook(self, epoch, logs)

    def validate(self) -> dict[str, float]:
        """Run the model over the validation loader; every sample counts once.

        Every module's train or eval mode, and the global random generators, are as before afterwards.

        Returns
        -------
        dict of str to float
            ``val_loss`` and ``val_<metric>``.

        Raises
        ------
        ValueError
            If there is no ``val_loader``.
        """
        if self.val_loader is None:
            raise ValueError("there is nothing to validate on: pass a val_loader to the Trainer")
        self._val_figures.reset()
        with RandomState.capture().put_back(), modes_restored(*self._modules()):
            for module in self._modules():
                module.eval()
            for index, loaded in enumerate(self._val_batches.epoch(self.state.seed, epoch=0)):
                try:
                    result = self._stepper.evaluate(to_device(loaded.batch, self.device))
                    self._observe(result, training=False)
                except Exception as error:
                    self._explain(error, loaded.batch, f"validation batch {index}")
                    raise
        return self._val_figures.compute()

    def compute_loss(self, batch: Any) -> tuple[Tensor, Any, Any]:
        """Return loss, outputs and targets of one batch, in training and in validation.

        Override this for steps that are not ``loss_fn(model(inputs), targets)``: several inputs, several losses,
        self-supervision. Precision, accumulation, metrics go on working.

        Parameters
        ----------
        batch : Any
            What the loader yielded, on the device.

        Returns
        -------
        loss : Tensor
            A mean, 0-dimensional.
        outputs, targets : Any
            What the loss's count of targets and the metrics are given; None for ``targets`` counts samples.
        """
        inputs, targets = split_batch(batch)
        outputs = self.model(inputs)
        return self.loss_fn(outputs, targets), outputs, targets

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint of the whole run: whole or absent.

        Parameters
        ----------
        path : str or Path
            The folder to make; it must not exist.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        FileExistsError
            If there is something at ``path``.
        NonFiniteError
            If a weight is not finite: such a model is not worth keeping, nor worth replacing another.
        TypeError
            If a callback's state is not plain data, naming where.
        """
        contents = checkpoint.gather(self._run())
        checks.check_finite(contents.model)
        checkpoint.write(Path(path), contents)
        return Path(path)

    def load(self, path: str | Path) -> None:
        """Take over a checkpoint, or the one that a link (``best``, ``last``) leads to; the next ``fit`` goes on there.

        A checkpoint from inside an epoch starts that epoch anew.

        Raises
        ------
        CheckpointError
            If it is damaged or of another run, naming the difference; model and optimizer are as they were then.
        """
        checkpoint.restore(checkpoint.read(path), self._run())
        self._loaded = True

    def load_weights(self, path: str | Path) -> None:
        """Take over the model's weights from a checkpoint and nothing else.

        Raises
        ------
        CheckpointError
            If it is damaged or of another model.
        """
        self.model.load_state_dict(checkpoint.matched_weights(checkpoint.read(path), self.model))

    def stop(self) -> None:
        """Ask ``fit`` to end: after the running optimizer step, the epoch is closed with what it has, then no other."""
        self._stop = True

    @property
    def history(self) -> dict[str, list[float]]:
        """The figures by name, one for each finished epoch."""
        return self.state.history()

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch; None if the loader does not tell."""
        try:
            return len(self._train_batches)
        except TypeError:
            return None

    @property
    def gradient_norm(self) -> Tensor | None:
        """2-norm of the last optimizer step's gradient before clipping, on the device; None without clipping."""
        return self._stepper.gradient_norm

    def higher_is_better(self, name: str) -> bool | None:
        """Tell whether more is better for a figure of the logs; None if no metric says so."""
        return self._val_figures.metrics.higher_is_better(name.removeprefix("train_").removeprefix("val_"))

    def _observe(self, result: BatchResult, training: bool) -> None:
        if training in self._unseen:
            self._unseen.remove(training)
            checks.check_loss(result.loss)
            if self._standard_step:
                check_targets(result.outputs, result.targets, self.loss_fn)
            if not self._metrics_known:
                self._metrics_known = True
                metrics: list[Any] = []
                if not compares_numbers(self.loss_fn):
                    ignore_index = loss_setting(self.loss_fn, "ignore_index")
                    metrics = default_metrics(result.outputs, result.targets, ignore_index)
                self._train_figures, self._val_figures = self._new_figures(metrics)
                self._check_monitors()
        (self._train_figures if training else self._val_figures).update(result)

    def _new_figures(self, metrics: Sequence[Metric] | Mapping[str, Metric]) -> tuple[Figures, Figures]:
        """Training and validation have metrics of their own, so that one may run inside the other."""
        train, val = (MetricCollection(metrics).to(self.device) for _ in range(2))
        return Figures("train_", train), Figures("val_", val)

    def _check_monitors(self) -> None:
        names = self._train_figures.names() + (self._val_figures.names() if self.val_loader is not None else [])
        self.callbacks.check_monitors(names, self.val_loader is not None, self._metrics_known)

    def _explain(self, error: Exception, batch: Any, place: str) -> None:
        """Raise a batch's error with its cause if it shows, else note where it happened."""
        cause = None
        if self._standard_step:
            cause = explain(error, batch, self.model, self.loss_fn, self.device)
        (cause or error).add_note(f"This happened in {place}.")
        if cause is not None:
            raise cause from error

    @property
    def _standard_step(self) -> bool:
        """Whether a batch goes through ``loss_fn(model(inputs), targets)``, so that it can be judged by that."""
        return getattr(self.compute_loss, "__func__", None) is Trainer.compute_loss

    def _modules(self) -> list[nn.Module]:
        return [m for m in (self.model, self.loss_fn) if isinstance(m, nn.Module)]

    def _run(self) -> checkpoint.Run:
        memories = self.callbacks.with_memory
        return checkpoint.Run(self.model, self.loss_fn, self.optimizer, self.precision, memories, self.state)
