"""Stochastic weight averaging."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, get_swa_multi_avg_fn, update_bn

from ununennium._arguments import integer
from ununennium.training.callbacks.averaging import WeightAverage
from ununennium.training.distributed import local
from ununennium.training.random_state import RandomState

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer


class SWACallback(WeightAverage):
    """Average the weights of the last epochs, trained at a high learning rate; the run ends with that average.

    From epoch ``start_epoch`` on the learning rate goes to ``swa_lr`` and stays there, whatever other schedulers say,
    and the weights at the end of each epoch go into a plain mean. At the end of the last epoch the model's BatchNorm
    statistics for the mean are computed in one more pass over the training data, in the order of that epoch. When
    ``fit`` returns, the model holds the mean; a later ``fit`` that goes on does so with the raw weights.

    Parameters
    ----------
    swa_lr : float or list of float
        The learning rate of the averaged epochs; of each parameter group, if a list.
    start_epoch : int
        The first averaged epoch, counted from 0; about three quarters of the run are usual.
    anneal_epochs : int, default 10
        Epochs in which the rate goes from what it was to ``swa_lr``; 0 is at once.
    anneal_strategy : {"cos", "linear"}, default "cos"
        How it does.
    update_statistics : bool, default True
        Compute the BatchNorm statistics for the mean. Without it they are those of the last epoch.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind or out of range.

    Notes
    -----
    During the run validation is of the raw weights, and so are its figures, and ``best``. Checkpoints hold both, and
    give the raw ones unless asked for the others, as in ``load_model("checkpoints/last", averaged=True)``; a checkpoint
    inside the run has no BatchNorm statistics of the mean yet. `Trainer.validate` after ``fit`` judges the mean. Of
    several processes, the statistics are over process 0's share of each batch, as those of training are.

    Built on `torch.optim.swa_utils`: ``SWALR``, ``get_swa_multi_avg_fn``, ``update_bn``.

    References
    ----------
    Izmailov et al.: Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018 (arXiv 1803.05407).
    """

    blends_buffers: ClassVar[bool] = False

    def __init__(
        self,
        swa_lr: float | list[float],
        start_epoch: int,
        *,
        anneal_epochs: int = 10,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        update_statistics: bool = True,
    ) -> None:
        rates = swa_lr if isinstance(swa_lr, list) else [swa_lr]
        if not rates or any(isinstance(rate, bool) or not rate > 0 for rate in rates):
            raise ValueError(f"swa_lr must be above 0, got {swa_lr!r}")
        for name, value in {"start_epoch": start_epoch, "anneal_epochs": anneal_epochs}.items():
            integer(name, value, minimum=0)
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(f'anneal_strategy must be "cos" or "linear", got {anneal_strategy!r}')
        super().__init__()
        self.swa_lr = swa_lr
        self.start_epoch = start_epoch
        self.anneal_epochs = anneal_epochs
        self.anneal_strategy: Literal["cos", "linear"] = anneal_strategy
        self.update_statistics = update_statistics
        self._schedule: SWALR | None = None
        self._steps, self._rates = 0, list[float]()  # of the schedule, and what it says
        self._has_statistics = False
        self._handled: BaseException | None = None  # what the caller of fit was about when it began

    def settings(self) -> dict[str, Any]:
        """Return what a run that goes on must have in common with the one that was left."""
        return {
            "swa_lr": self.swa_lr,
            "start_epoch": self.start_epoch,
            "anneal_epochs": self.anneal_epochs,
            "anneal_strategy": self.anneal_strategy,
            "update_statistics": self.update_statistics,
        }

    def on_train_start(self, trainer: Trainer) -> None:
        """Go on where the run was left, with the raw weights."""
        groups = len(trainer.optimizer.param_groups)
        if isinstance(self.swa_lr, list) and len(self.swa_lr) != groups:
            raise ValueError(
                f"swa_lr has {len(self.swa_lr)} rates, and the optimizer {groups} parameter groups: give one rate for "
                "all, or one for each"
            )
        if self.start_epoch >= trainer.epochs:
            raise ValueError(
                f"start_epoch={self.start_epoch} leaves no epoch of {trainer.epochs} to average: start earlier, at "
                f"{trainer.epochs * 3 // 4}, say"
            )
        super().on_train_start(trainer)
        self._schedule = None
        self._handled = sys.exception()

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Take the learning rate over in the first averaged epoch."""
        super().on_epoch_start(trainer, epoch)
        if epoch < self.start_epoch:
            return
        self._has_statistics = False
        self._take_over(trainer)

    def on_batch_start(self, trainer: Trainer, batch_idx: int) -> None:
        """Hold the learning rate, whatever other schedulers did."""
        if self._schedule is not None:
            self._hold(trainer)

    def on_epoch_end(self, trainer: Trainer, epoch: int, logs: dict[str, float]) -> None:
        """Average the weights, move the learning rate on, and after the last epoch compute the statistics."""
        if epoch < self.start_epoch:
            return
        self._take_over(trainer)
        self._begin(trainer)
        blend = get_swa_multi_avg_fn()
        self._average(lambda averages, live: blend(averages, live, self.num_averaged))
        assert self._schedule is not None
        self._hold(trainer)
        if trainer.state.optimizer_steps:  # in this process or in one before it, of which the optimizer can't know
            trainer.optimizer._opt_called = True  # type: ignore[attr-defined]
        self._schedule.step()
        self._note(trainer)
        if epoch + 1 == trainer.epochs:
            self._compute_statistics(trainer, epoch)

    def on_train_end(self, trainer: Trainer) -> None:
        """Leave the mean in the model, if the run ended as it should."""
        self._schedule = None
        if sys.exception() is not self._handled or not self.num_averaged:
            return
        if self._read:
            self._bind(trainer)
        if not self._has_statistics:  # somebody asked for the end
            self._compute_statistics(trainer, trainer.state.epoch - 1)
        if not self._raw:
            self._apply(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the mean, and where the learning rate is."""
        own = {"steps": self._steps, "rates": list(self._rates), "has_statistics": self._has_statistics}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        super().load_state_dict(state)
        self._schedule = None
        self._steps, self._rates = state["steps"], list(state["rates"])
        self._has_statistics = state["has_statistics"]

    def reset(self) -> None:
        """Forget the mean."""
        super().reset()
        self._steps, self._rates, self._has_statistics = 0, [], False

    def _take_over(self, trainer: Trainer) -> None:
        """Make the schedule over the learning rates as they are, or as it was left."""
        if self._schedule is not None:
            return
        steps, rates = self._steps, list(self._rates)
        optimizer = trainer.optimizer
        if steps:
            self._hold(trainer)
        self._schedule = SWALR(optimizer, self.swa_lr, self.anneal_epochs, self.anneal_strategy)  # type: ignore[arg-type]
        if steps:
            self._schedule._step_count, self._schedule.last_epoch = steps, steps - 1
            self._rates = rates
            self._hold(trainer)
        else:
            self._note(trainer)

    def _note(self, trainer: Trainer) -> None:
        assert self._schedule is not None
        self._steps = self._schedule._step_count
        self._rates = [float(group["lr"]) for group in trainer.optimizer.param_groups]

    def _hold(self, trainer: Trainer) -> None:
        for group, rate in zip(trainer.optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _compute_statistics(self, trainer: Trainer, epoch: int) -> None:
        """Compute the BatchNorm statistics for the mean; the run goes on as if it had not been done."""
        self._has_statistics = True
        trained = [m for m in trainer.model.modules() if _keeps_statistics(m) and m.training]
        if not (self.update_statistics and trained):
            return
        modules = [m for m in (trainer.model, trainer.loss_fn) if isinstance(m, nn.Module)]
        buffers = [buffer for module in modules for buffer in module.buffers()]
        before = [buffer.clone() for buffer in buffers]
        with RandomState.capture().put_back(), torch.no_grad(), self.applied(trainer):
            update_bn(((batch,) for batch in trainer.training_batches(epoch)), _Forward(trainer, trained))
            own = {id(buffer) for module in trained for buffer in module.buffers()}
            pairs = [(self._averages[n], tensor) for n, tensor in self._live.items() if id(tensor) in own]
            for average, tensor in pairs:
                local(average).copy_(local(tensor))
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        trainer.broadcast(self._buffers)


class _Forward(nn.Module):
    """The model as `update_bn` runs it: the forward is the Trainer's, the statistics those of the modules given."""

    def __init__(self, trainer: Trainer, trained: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(trained)
        self._trainer = trainer

    def forward(self, batch: Any) -> None:
        with self._trainer.precision.autocast():
            self._trainer.compute_loss(batch)


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
