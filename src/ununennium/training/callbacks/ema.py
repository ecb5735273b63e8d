"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ununennium._arguments import integer
from ununennium.training.callbacks.averaging import WeightAverage

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer


class EMACallback(WeightAverage):
    """Keep an exponential moving average of the weights, and validate with it.

    After each optimizer step that really happened, ``average = decay · average + (1 - decay) · weights``, begun with
    the weights that the run began with. The model itself is trained on, and left, with the raw weights.

    Parameters
    ----------
    decay : float, default 0.999
        Share of the average that a step leaves. It spans about ``1 / (1 - decay)`` steps.
    warmup : int, default 10
        So that the random beginning is soon forgotten, the decay after n steps is at most
        ``(1 + n) / (warmup + n)``; 0 is none.
    evaluate : bool, default True
        Validate with the averages: ``val_*`` figures, what monitors them, and ``best`` are of the averaged model. With
        ``False`` they are of the raw one.

    Raises
    ------
    TypeError, ValueError
        If ``decay`` is not in 0 ≤ decay < 1, or ``warmup`` no integer of at least 0.

    Notes
    -----
    A checkpoint holds both: ``model.safetensors`` is the raw weights, with which the run goes on, and
    ``averaged.safetensors`` the averages, complete. `load_model`, `predict_scene`, `export_weights`, `create_model`
    and `Trainer.load_weights` take those with which the run was validated, or the others on demand
    (``averaged=True``, ``False``). `Trainer.evaluating` is a block with the averages in the model.

    The buffers, such as BatchNorm's statistics, are averaged like the parameters, and integers copied, as in timm's
    ``ModelEmaV3`` and PyTorch's ``AveragedModel(use_buffers=True)``: statistics of raw weights would not fit the
    averages. The warm-up is that of TensorFlow's ``tf.train.ExponentialMovingAverage(num_updates)``. Parameters in
    bfloat16 or float16, which can't hold so small a change, are averaged in float32.

    References
    ----------
    Polyak, Juditsky: Acceleration of Stochastic Approximation by Averaging, SIAM J. Control Optim. 30 (1992).
    """

    def __init__(self, decay: float = 0.999, warmup: int = 10, *, evaluate: bool = True) -> None:
        if isinstance(decay, bool) or not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay!r}")
        super().__init__()
        self.decay: float = float(decay)
        self.warmup: int = integer("warmup", warmup, minimum=0)
        self.evaluate = evaluate
        self._optimizer_steps = 0

    def settings(self) -> dict[str, Any]:
        """Return what a run that goes on must have in common with the one that was left."""
        return {"decay": self.decay, "warmup": self.warmup, "evaluate": self.evaluate}

    @property
    def is_default(self) -> bool:
        """Whether validation is with the averages."""
        return self.evaluate

    def on_train_start(self, trainer: Trainer) -> None:
        """Begin with the weights as they are, or go on."""
        super().on_train_start(trainer)
        self._begin(trainer)
        self._optimizer_steps = trainer.state.optimizer_steps

    def on_batch_end(self, trainer: Trainer, batch_idx: int, logs: Mapping[str, Tensor]) -> None:
        """Average if an optimizer step happened in this batch."""
        if trainer.state.optimizer_steps != self._optimizer_steps:
            self._optimizer_steps = trainer.state.optimizer_steps
            blend = get_ema_multi_avg_fn(self.decay_now)
            self._average(lambda averages, live: blend(averages, live, self.num_averaged))

    @property
    def decay_now(self) -> float:
        """The decay of the next step."""
        steps = self.num_averaged
        return min(self.decay, (1 + steps) / (self.warmup + steps)) if self.warmup else self.decay

    def evaluation(self, trainer: Trainer) -> AbstractContextManager[Any]:
        """Return the context in which the model has the averages."""
        return self.applied(trainer) if self.evaluate else nullcontext()
