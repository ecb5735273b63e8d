"""The Trainer: a run from its first batch to its last."""

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ununennium._arguments import integer
from ununennium.metrics import Metric, MetricCollection
from ununennium.training import checkpoint, checks
from ununennium.training.batches import split_batch
from ununennium.training.callbacks.base import Callback, CallbackList
from ununennium.training.callbacks.progress import ProgressCallback
from ununennium.training.distributed import group_on, join
from ununennium.training.errors import CheckpointError, DamagedCheckpointError, NonFiniteError
from ununennium.training.explain import explain
from ununennium.training.levers import Levers, fuse
from ununennium.training.loading import EpochLoader, LoadedBatch
from ununennium.training.modes import Modes, modes_restored
from ununennium.training.nonfinite import check_finite, name_samples
from ununennium.training.precision import Precision
from ununennium.training.random_state import RandomState, mixed
from ununennium.training.run_checkpoints import RunCheckpoints, check_memories, load_weights
from ununennium.training.run_figures import RunFigures
from ununennium.training.signals import Signals
from ununennium.training.speed import Speed, Stopwatch
from ununennium.training.state import TrainState
from ununennium.training.step import BatchResult, Stepper
from ununennium.training.targets import check_targets
from ununennium.training.transfer import Transfer
from ununennium.training.votes import Votes
from ununennium.training.windows import loss_options, loss_setting, target_counter, windows


class Trainer:
    """Train a model, and keep an honest record of it.

    Parameters
    ----------
    model : nn.Module
        Moved to the device, in place. Modules put in eval mode before (a frozen BatchNorm) stay in it.
    optimizer : torch.optim.Optimizer
        Over parameters of the model. Adam, AdamW and SGD that were given neither ``fused`` nor ``foreach`` step in one
        fused kernel, unless the model is sharded.
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
        Train in all processes that torchrun started with this one, or that share a process group made before. The
        loaders' batch size is what one process takes: the global batch is that times their number, and holds the same
        samples in the same order whatever their number. "fsdp" shards the model's parameters, gradients and optimizer
        state over the processes (FSDP2) and points the optimizer at the shards; the optimizer must not have stepped.
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
        What the order of the samples is drawn from, together with the epoch. By default drawn itself; it is shown, and
        in ``trainer.state.seed``.
    on_nonfinite : {"raise", "skip"}, default "raise"
        What to do when loss or gradient is NaN or infinite: end the run, naming step and samples, or leave the step
        out, with the model as it was before it, and count it in ``nonfinite_steps`` of the logs. For that every
        gradient is looked at, and an accelerator waited for once a step. An overflow in fp16 is neither: the loss
        scaler leaves such steps out by itself.
    sync_batchnorm : bool, default False
        Let BatchNorm compute its statistics over all processes (CUDA only). By default each uses its own share of a
        batch, and the running statistics are those of process 0.
    train_transform, val_transform : callable, optional
        ``transform(batch)`` returns the batch to use, called once a batch on the device: augmentation and
        normalisation of whole batches, such as Kornia's. What the training one draws from the global generators goes
        on exactly when a run is resumed.
    channels_last : bool, optional
        Keep the model's convolution weights, and with them what it computes, with the channels last in memory, which
        convolutions are quickest on. By default where the model has 2-D convolutions and can work on that (a first
        batch tells; sharded models can't). The numbers are the same up to rounding, but dropout draws other masks.
    compile : bool or mapping, default False
        Compile the model, in place, with `torch.nn.Module.compile`, the loss if it is a module with a ``compile`` of
        its own (`DiceLoss`), and the counting of confusion matrices. A mapping holds the model's arguments. It takes
        from seconds to minutes at the first batch; if it fails, a warning says why and the model is run as it is.
    progress : bool, default True
        Show a progress bar and a table of epochs.
    config : mapping, optional
        Plain data to be kept in the manifest of every checkpoint: the configuration that the run was made of. What the
        model can be made of anew (``model_config``, which a `RasterModel` and `create_model`'s models have) is kept
        without being asked for.

    Attributes
    ----------
    state : TrainState
        Seed, counters and record of the run.
    epochs : int
        The final epoch count of the running ``fit``.
    rank, world_size : int
        Number of this process, and how many there are. Process 0 prints and writes.
    speed : Speed or None
        How fast the training pass of the last finished epoch went; of a resumed epoch, its rest.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind or out of range, naming it and what would be right.
    RuntimeError
        For ``distributed`` in a process that torchrun did not start.
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
        on_nonfinite: Literal["raise", "skip"] = "raise",
        sync_batchnorm: bool = False,
        train_transform: Callable[[Any], Any] | None = None,
        val_transform: Callable[[Any], Any] | None = None,
        channels_last: bool | None = None,
        compile: bool | Mapping[str, Any] = False,  # noqa: A002 - as torch calls it
        progress: bool = True,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        checks.check_model_and_loss(model, loss_fn)
        checks.check_optimizer(optimizer, model, loss_fn)
        checks.check_loader("train_loader", train_loader)
        integer("gradient_accumulation_steps", gradient_accumulation_steps, minimum=1)
        checks.check_seed(seed)
        checks.check_clip_norm(gradient_clip_norm)
        checks.check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        checks.check_list("callbacks", callbacks)
        checks.check_list("metrics", metrics)
        checks.check_compile(compile, channels_last)
        checks.check_transform("train_transform", train_transform)
        checks.check_transform("val_transform", val_transform)
        if val_loader is not None:
            checks.check_loader("val_loader", val_loader)
        elif metrics:
            raise ValueError("metrics need a val_loader: pass one, or leave the metrics out")
        checks.check_distributed(distributed, backend, sync_batchnorm)
        self.device: torch.device = checks.resolve_device(join(backend, device) if distributed else device)
        self._group = group_on(self.device, bool(distributed))
        self.rank: int = self._group.rank
        self.world_size: int = self._group.size
        if sync_batchnorm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model: nn.Module = model.to(self.device)
        self.optimizer = optimizer
        moved = loss_fn.to(self.device) if isinstance(loss_fn, nn.Module) else loss_fn
        self.loss_fn: nn.Module | Callable[..., Tensor] = moved
        self._loss_options = loss_options(loss_fn)  # as given: a callback may change them, a checkpoint too
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.gradient_clip_norm = gradient_clip_norm
        self.find_unused_params = find_unused_params
        self.on_nonfinite = on_nonfinite
        self.train_transform = train_transform
        self.val_transform = val_transform
        self.config: dict[str, Any] | None = None if config is None else checks.plain_mapping("config", config)
        self.precision: Precision = Precision(mixed_precision, self.device)
        self.state: TrainState = self._group.of_leader(
            lambda: TrainState(seed=secrets.randbits(32) if seed is None else int(seed))
        )
        self.epochs: int = 0
        given = [c for c in callbacks or () if self._group.leads or not isinstance(c, ProgressCallback)]
        shows = progress and self._group.leads and not any(isinstance(c, ProgressCallback) for c in given)
        self.callbacks: CallbackList = CallbackList([*given, *([ProgressCallback()] if shows else [])])
        share = self.rank, self.world_size
        pins = self.device.type == "cuda"
        self._train_batches = EpochLoader(train_loader, 0, *share, pins=pins)
        sharded = distributed == "fsdp"  # whose forward is a matter of all, validation included
        self._val_batches = EpochLoader(() if val_loader is None else val_loader, 1, *share, pads=sharded, pins=pins)
        if not sharded:  # PyTorch has not shown every fused kernel how to step on shards
            fuse(optimizer, self.model)
        else:
            checks.check_sharding(loss_fn, self.precision.scales, channels_last)
            self._group.shard(self.model, optimizer, self.precision.dtype)
        self._levers = Levers(self.model, self.loss_fn, False if sharded else channels_last, compile)
        skips = on_nonfinite == "skip"
        learns = isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.parameters())
        self._stepper = Stepper(
            self.compute_loss, target_counter(loss_fn), optimizer, self.precision, gradient_clip_norm, self.state,
            self._group, gradient_accumulation_steps, skips=skips, by_outputs=self._standard_step and not learns,
        )  # fmt: skip
        self._figures = RunFigures(metrics, loss_fn, self.device, finite_only=skips, compiles=compile is not False)
        self._unseen = {True, False}  # whether training, for which no batch has been looked at
        self._begin_anew()
        self._stopwatch = Stopwatch(self.device)
        self._transfer = Transfer(self.device)
        self.speed: Speed | None = None
        self._leavable = False  # whether a signal may end the validation that is under way

    def _begin_anew(self) -> None:
        """Forget what was loaded, asked for and agreed on."""
        self._checkpoints = RunCheckpoints(self._group)
        self._signals = Signals()
        self._votes = Votes(self._group, self._signals, self.state)

    def fit(self, epochs: int, start_epoch: int = 0, *, resume: str | Path | None = None) -> dict[str, list[float]]:
        """Run epochs ``start_epoch`` … ``epochs - 1``, validating after each.

        SIGTERM, SIGUSR1 and Ctrl-C end the run after the optimizer step that is under way (of several processes, all
        after the next one, if one of them was going backward), or at once in a validation, and the callbacks that save
        write a checkpoint from which ``resume`` goes on; a second one stops at once.

        Parameters
        ----------
        epochs : int
            The final count of epochs, not how many to add.
        start_epoch : int, default 0
            The first epoch's number. After `load`, training goes on where the checkpoint was.
        resume : str or Path, optional
            A checkpoint, or a link to one, to go on from. "auto" takes the newest valid one in the folder of the
            `CheckpointCallback` and starts anew if there is none, so that one command line serves every start.

        Returns
        -------
        dict of str to list of float
            One figure per finished epoch: ``train_loss``, ``train_<metric>``, ``val_loss``, ``val_<metric>``.

        Raises
        ------
        TypeError, ValueError
            Before the first step: for epochs out of range, a monitor that is not in the logs, a callback's memory that
            is no plain data.
        NonFiniteError
            If loss or gradient becomes NaN or infinite.
        FloatingPointError
            If gradients overflow in fp16 at every scale.
        BatchError
            If a batch does not fit the model or the loss.
        CheckpointError
            If there is nothing valid to resume from, if that is of another run, or if a checkpoint can't be written.
        DataOrderError
            If the order of samples is another than the one that was left.
        ProcessError
            If other processes were lost, or were given other things or another order.
        Preempted
            After SIGTERM or SIGUSR1, saved; a `SystemExit` of code 143.
        KeyboardInterrupt
            After Ctrl-C, saved.
        """
        if resume is not None:
            self._resume(resume)
        inside = self.resumes and self.state.inside_epoch
        first = checks.first_epoch(epochs, start_epoch, self.state.epoch if self.resumes else None)
        self.epochs, self._unseen = epochs, {True, False}
        self.state.stopping &= self.resumes
        self._check_monitors()
        checks.check_passes("train_loader", self.train_loader, epochs - first)
        checks.check_passes("val_loader", self.val_loader, epochs - first)
        check_memories(self.callbacks, self._figures, self.config)
        self._check_processes()
        modules = nn.ModuleList(self._modules())
        self._stepper.begin(modules.parameters(), modules.buffers())
        with self._signals, modes_restored(*self._modules()), ExitStack() as ending:
            for loader in (self._train_batches, self._val_batches):
                ending.callback(loader.end_workers)
            if not self.model.training:
                self.model.train()
            modes = Modes(*self._modules())
            try:
                for hook in self.callbacks.train_start:
                    hook(self)
                entry = self._checkpoints.entry
                if entry is not None and entry.random is not None:
                    entry.random.restore()
                elif self.rank:  # a script seeds all processes alike: dropout must not be
                    RandomState.seeded(mixed(self.state.seed, self.state.optimizer_steps, self.rank)).restore()
                for epoch in range(first, epochs):
                    if self.state.stopping and not inside:
                        break
                    modes.restore()  # whatever a callback did
                    self._fit_epoch(epoch, inside)
                    inside = False
                    self._votes.stop_together()
                    self._votes.leave_together()
                self._checkpoints.writer.wait()
                self._votes.leave_together()
            except BaseException as error:
                lost = self._group.lost(error)
                self._leave(lost or error)
                if lost is not None:
                    raise lost from error
                raise
            self._checkpoints.writer.release()
            self._stepper.unwrap()
            self.callbacks.end(self)
            self._signals.check()
        return self.history

    def _fit_epoch(self, epoch: int, inside: bool) -> None:
        entry, self._checkpoints.entry = self._checkpoints.entry, None
        self._votes.begin_epoch()
        self._leavable = False
        if not inside:
            self.state.begin_epoch(epoch)
            self._figures.train.reset()
        with RandomState.capture().put_back() if inside else nullcontext():  # what they drew, they drew before
            for hook in self.callbacks.epoch_start:
                hook(self, epoch)
        self._stepper.wrap(self._modules(), self.find_unused_params)
        self._stopwatch.restart()
        batches: Iterable[LoadedBatch] = ()
        if not (self.state.validating or (inside and self.state.stopping)):
            at = self.state.batch, self.state.digest, entry.loader if entry is not None else None
            batches = self._train_batches.epoch(self.state.seed, epoch, *at)
        for loaded, opens, closes in windows(self._stopwatch.timed(batches), self.gradient_accumulation_steps):
            index = self.state.batch
            for hook in self.callbacks.batch_start:
                hook(self, index)
            batch = None
            self._votes.order = loaded.digest
            try:
                if True in self._unseen:
                    self._group.check_alike({"the order of the samples": loaded.digest})
                batch = self._prepare(loaded.batch, True)
                train = self._levers.guarded(self._stepper.train) if True in self._unseen else self._stepper.train
                result = train(batch, opens, closes, loaded.counts, self._votes.cast)
                self._observe(result, True, loaded.counts)
            except Exception as error:
                if self._group.lost(error) is None:
                    self._explain(error, batch, f"epoch {epoch}, batch {index}")
                raise
            self.state.digest = loaded.digest
            if closes:
                self.state.validating = self.state.open_batches < self.gradient_accumulation_steps  # the end cuts short
                self._votes.hear(self._stepper.step())
            for hook in self.callbacks.batch_end:
                hook(self, index, {"train_loss": result.loss})
            del result, batch  # they need not live through the next forward
            if closes:
                self._checkpoints.writer.check()
                self._votes.leave()
                if self._votes.stopping:
                    break
        self.state.validating = True
        logs = self._figures.train.compute(*self._over_processes)
        self.speed = Speed.together(self._group.gather(self._stopwatch.read()))
        if self.on_nonfinite == "raise":
            check_finite(self._figures.train.loss, epoch, self._stepper.weights_are_finite)
        self.broadcast(b for module in self._modules() for b in module.buffers())
        self.broadcast(b for callback in self.callbacks.callbacks for b in callback.broadcast_tensors)
        if self.val_loader is not None:
            self._leavable = self.world_size == 1
            logs |= self.validate()
            self._leavable = False
        if self.on_nonfinite == "skip":
            logs["nonfinite_steps"] = float(self.state.nonfinite_steps)
        self.state.finish_epoch(logs)
        for hook in self.callbacks.epoch_end:
            hook(self, epoch, logs)
            checks.make_floats(logs)  # whatever numbers a callback has added

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
        self._figures.val.reset()
        with self.evaluating():
            for index, loaded in enumerate(self._val_batches.epoch(self.state.seed, epoch=0)):
                batch = None
                try:
                    batch = self._prepare(loaded.batch, False)
                    evaluate = self._stepper.evaluate
                    result = (self._levers.guarded(evaluate) if False in self._unseen else evaluate)(batch)
                    self._observe(result, False, loaded.counts)
                except Exception as error:
                    self._explain(error, batch, f"validation batch {index}")
                    raise
                if self._leavable:
                    self._signals.check()
        self._figures.agree(self._group.gather)
        return self._figures.val.compute(*self._over_processes)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Have model and loss as `validate` has them, for a block of one's own.

        They are in eval mode, with the weights that callbacks would have evaluated (`Callback.evaluation`: averaged
        ones), without gradients. Afterwards every module's mode, the weights, and the global random generators are as
        before.
        """
        with ExitStack() as after:
            after.enter_context(RandomState.capture().put_back())
            after.enter_context(modes_restored(*self._modules()))
            after.enter_context(torch.no_grad())
            for context in self.callbacks.evaluation:
                after.enter_context(context(self))
            for module in self._modules():
                module.eval()
            yield

    def evaluate(self, batch: Any) -> tuple[Any, BatchResult]:
        """Run a batch of a loader forward as `validate` does; inside `evaluating`, and counted nowhere.

        Returns
        -------
        batch : Any
            What the step took: on the device, after ``val_transform``.
        result : BatchResult
            Loss, outputs and targets.
        """
        batch = self._prepare(batch, False)
        return batch, self._stepper.evaluate(batch)

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

    def save(self, path: str | Path, *, wait: bool = True, done: checkpoint.Done | None = None) -> Path:
        """Write a checkpoint of the whole run: whole or absent.

        It holds the moment of the call, whatever the run does while it is written. Of several processes all have to
        call this, and process 0 writes. From a hook, call it in a callback with ``saves_state``, which comes after
        those whose memory it saves: before a scheduler's turn, it would save the schedule of the step before.

        Parameters
        ----------
        path : str or Path
            The folder to make; it must not exist.
        wait : bool, default True
            Return when it is on disk. With ``False`` return when everything is copied, to one buffer that ``fit``
            keeps and that an earlier write has first to leave; an error of the writing is raised after the next
            optimizer step, or at the end of ``fit``.
        done : callable, optional
            Called by the writing thread with None when the checkpoint is committed, or with the error.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        FileExistsError
            If there is something at ``path``.
        NonFiniteError
            If a parameter is not finite: such a model is not worth keeping, nor worth replacing another.
        CheckpointError
            If it can't be written.
        TypeError
            If a callback's state is not plain data, naming where.
        ValueError
            Between the batches of one optimizer step, whose gradients no checkpoint holds.
        """
        if self.state.open_batches:
            raise ValueError(
                f"{self.state.open_batches} batches have gone into gradients that no optimizer step has used yet, and "
                "a checkpoint does not hold gradients: save where trainer.state.open_batches is 0"
            )
        return self._checkpoints.save(path, self._run(), wait, done)

    def prepare_save(self) -> None:
        """Have the memory ready that ``save(…, wait=False)`` needs, so that none of them has to wait for it."""
        self._checkpoints.reserve(self._run())

    def load(self, path: str | Path) -> None:
        """Take over a checkpoint, or the one that a link (``best``, ``last``) leads to; the next ``fit`` goes on there.

        Raises
        ------
        CheckpointError
            If it is damaged or of another run, naming the difference; model and optimizer are as they were then.
        """
        self._figures = self._checkpoints.load(path, self._run, self._figures)

    def load_weights(self, path: str | Path, *, averaged: bool | None = None) -> None:
        """Take over the model's weights from a checkpoint and nothing else; averages of a callback begin anew with it.

        Parameters
        ----------
        path : str or Path
            A checkpoint, or a link to one.
        averaged : bool, optional
            Whether to take averaged weights, or the raw ones. By default those with which the run was validated.

        Raises
        ------
        CheckpointError
            If it is damaged or of another model, or holds no averaged weights and they are asked for.
        """
        load_weights(path, self.model, self.callbacks.callbacks, averaged)

    def training_batches(self, epoch: int) -> Iterator[Any]:
        """Yield the training batches of an epoch, on the device, between two epochs and for what trains nothing."""
        for loaded in self._train_batches.epoch(self.state.seed, epoch):
            yield self._prepare(loaded.batch, True)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have in process 0. Of several processes all have to call this."""
        self._group.broadcast(tensors)

    def stop(self) -> None:
        """Ask ``fit`` to end: after the running optimizer step, the epoch is closed with what it has, then no other.

        A run that was stopped stays so when it is resumed; ``trainer.state.stopping = False`` after `load` lets it go
        on.
        """
        self.state.stopping = True

    @property
    def history(self) -> dict[str, list[float]]:
        """The figures by name, one for each finished epoch."""
        return self.state.history()

    @property
    def resumes(self) -> bool:
        """Whether a checkpoint was loaded, from which the ``fit`` that begins goes on."""
        return self._checkpoints.entry is not None

    @property
    def clock(self) -> float:
        """Seconds that all processes read alike, as of the last optimizer step."""
        return self._votes.clock

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch; None if the loader does not tell."""
        try:
            return len(self._train_batches)
        except TypeError:
            return None

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What the run is set up with, as plain data, for those who write it down."""
        model, optimizer = self.model, self.optimizer
        return {
            "model": getattr(model, "model_config", None) or type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "optimizer": type(optimizer).__name__,
            "lr": [float(group["lr"]) for group in optimizer.param_groups],
            "weight_decay": [float(group.get("weight_decay", 0)) for group in optimizer.param_groups],
            **self._settings(),
            "epochs": self.epochs,
            "seed": self.state.seed,
            "processes": self.world_size,
            "device": str(self.device),
            "torch": torch.__version__,
            "config": self.config,
        }

    @property
    def train_metrics(self) -> MetricCollection:
        """The metrics of the training pass, of this process, so far or of the last one."""
        return self._figures.train.metrics

    @property
    def val_metrics(self) -> MetricCollection:
        """The metrics of the last validation, of all processes."""
        return self._figures.val.metrics

    @property
    def running_speed(self) -> Speed:
        """How fast the running training pass has gone so far, of this process."""
        return self._stopwatch.read()

    @property
    def step_loss(self) -> Tensor:
        """Loss of the last optimizer step's batches, over all their targets, of this process, on the device."""
        return self._stepper.loss

    @property
    def gradient_norm(self) -> Tensor | None:
        """2-norm of the last optimizer step's gradient before clipping, on the device; None without clipping."""
        return self._stepper.gradient_norm

    def higher_is_better(self, name: str) -> bool | None:
        """Tell whether more is better for a figure of the logs; None if no metric says so."""
        return self._figures.higher_is_better(name)

    @property
    def _over_processes(self) -> tuple[Any, ...]:
        return (self._group.gather, self._group.sum) if self.world_size > 1 else ()

    def _check_processes(self) -> None:
        """Raise where processes that train together can't, or were given different things."""
        if self.world_size == 1:
            return
        for figures in (self._figures.train, self._figures.val):
            figures.metrics.check_reducible()
        own = {
            **self._settings(),
            **self._splits(),
            "seed": self.state.seed,
            "epochs": self.epochs,
            "state": self.state.optimizer_steps,
        }
        own["callbacks that save"] = [type(c).__name__ for c in self.callbacks.savers]
        self._group.check_alike(own)

    def _observe(self, result: BatchResult, training: bool, counts: bool = True) -> None:
        if training in self._unseen:
            self._unseen.remove(training)
            checks.check_loss(result.loss)
            if self._standard_step:
                check_targets(result.outputs, result.targets, self.loss_fn)
            if not self._figures.known:
                self._figures.settle(result)
                self._check_monitors()
        if counts:
            (self._figures.train if training else self._figures.val).update(result)

    def _check_monitors(self) -> None:
        validates = self.val_loader is not None
        figures = self._figures
        self.callbacks.check_monitors(
            figures.names(validates), lambda name: figures.may_give(name, validates), validates, figures.known
        )

    def _resume(self, source: str | Path) -> None:
        path = self._checkpoints.newest(self.callbacks) if source == "auto" else source
        if path is not None:
            try:
                self.load(path)
            except CheckpointError as error:
                if not isinstance(error, DamagedCheckpointError):  # which names it
                    error.add_note(f"The checkpoint is {path}.")
                raise

    def _leave(self, error: BaseException) -> None:
        """Close a run that an error ends, or a signal, after which the run is saved first."""
        signalled = error is self._signals.leaving
        if isinstance(error, NonFiniteError):
            name_samples(error, self._figures.train.loss, self._train_batches, self.state)
        failures: list[Exception] = []
        saves = [partial(c.save, self) for c in self.callbacks.savers if signalled]
        patience = math.inf if signalled or self.world_size == 1 else 10.0
        last: list[Callable[[], Any]] = [*saves, partial(self._checkpoints.writer.wait, patience)]
        if signalled:  # launchers end all when the first has left
            last.append(partial(self._group.any, False))
        for save in last:
            try:
                save()
            except Exception as failure:
                failures.append(failure)
        self._checkpoints.writer.release()
        self._stepper.unwrap()
        self.callbacks.end(self, failures[0] if signalled and failures else error)
        if signalled and failures:
            raise failures[0] from error
        for missed in failures:
            error.add_note(f"Then a checkpoint could not be written: {missed}")
        self._signals.hand_on()

    def _prepare(self, batch: Any, training: bool) -> Any:
        """Return what a loader gave as the step takes it."""
        transform = self.train_transform if training else self.val_transform
        batch = self._transfer(batch)
        return batch if transform is None else transform(batch)

    def _explain(self, error: Exception, batch: Any, place: str) -> None:
        """Raise a batch's error with its cause if it shows, else note where it happened."""
        cause = None
        if self._standard_step and batch is not None:  # None: its transform failed, which shows by itself
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
        inside = self.state.inside_epoch
        about = {"model": getattr(self.model, "model_config", None), "config": self.config}
        return checkpoint.Run(
            self.model,
            self.loss_fn,
            self.optimizer,
            self.precision,
            self.callbacks.with_memory,
            self.state,
            settings={**self._settings(), **self._splits()},
            figures=self._figures.state_dict() if inside else None,
            loader=self._train_batches.state_dict() if inside else None,
            about={k: v for k, v in about.items() if v is not None},
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "loss_fn": getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__),
            "ignore_index": loss_setting(self.loss_fn, "ignore_index"),
            "loss_options": self._loss_options,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "gradient_clip_norm": self.gradient_clip_norm,
            "mixed_precision": self.precision.name,
            "train_loader": self._train_batches.describe(),
            "val_loader": self._val_batches.describe(),
        }

    def _splits(self) -> dict[str, str]:
        """Return which samples the loaders take of their datasets, by a name that tells how it may be amiss."""
        of = {"training": self._train_batches.split, "validation": self._val_batches.split}
        return {f"the {k} split (random_split needs a seeded generator)": v for k, v in of.items() if v is not None}
