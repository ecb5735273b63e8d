"""What the end of a run by a loss that is not finite says: since when, and of which samples."""

from collections.abc import Callable

from ununennium.training.errors import NonFiniteError
from ununennium.training.figures import RunningMean
from ununennium.training.loading import EpochLoader
from ununennium.training.state import TrainState


def check_finite(loss: RunningMean, epoch: int, weights_are_finite: Callable[[], bool]) -> None:
    """Raise for an epoch in which a loss was not finite, which an accelerator tells at its end."""
    bad = loss.first_not_finite
    if bad is None:
        return
    if weights_are_finite():
        rest = (
            "The weights are finite, as the loss scaler left that step out: look at that batch for NaN or infinite "
            'inputs, or use mixed_precision="bf16"'
        )
    else:
        rest = (
            "The weights went with it, and no checkpoint was written since: lower the learning rate or set "
            'gradient_clip_norm, and go on from the last with fit(..., resume="auto")'
        )
    error = NonFiniteError(
        f"the loss of epoch {epoch} was not finite from batch {bad} on, which an accelerator tells at the epoch's end. "
        f'{rest}. on_nonfinite="skip" leaves such steps out, and counts them.'
    )
    error.batches = range(bad, bad + 1)
    raise error


def name_samples(error: NonFiniteError, loss: RunningMean, batches: EpochLoader, state: TrainState) -> None:
    """Add to an error what the sampler gave for the batches that it names, or else for the first bad one."""
    if error.batches is None:  # from the copy that was to be saved
        loss.compute()
        bad = loss.first_not_finite
        error.batches = None if bad is None else range(bad, bad + 1)
    if error.batches:
        samples = batches.indices(state.seed, state.epoch, error.batches)
        listed = "; ".join(f"batch {number}: {indices!r:.200}" for number, indices in samples.items())
        error.args = (f"{error} Samples of that step, by their indices: {listed or 'not known of this loader'}.",)
