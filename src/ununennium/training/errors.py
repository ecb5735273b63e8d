"""Errors that name their cause and the remedy."""

from collections.abc import Iterator

from ununennium._checkpoint_files import CheckpointError as CheckpointError
from ununennium._checkpoint_files import DamagedCheckpointError as DamagedCheckpointError


class BatchError(ValueError):
    """A batch that does not fit the model or the loss."""


class NonFiniteError(FloatingPointError):
    """A loss, gradient or weight that is NaN or infinite.

    Attributes
    ----------
    batches : range or None
        The batches of the running epoch that it may come from, where that is known.
    """

    batches: range | None = None


class DataOrderError(RuntimeError):
    """An order of samples that is not the one the run was left in."""


class Preempted(SystemExit):
    """A run that a signal ended between two steps, its checkpoint written; uncaught it exits with code 143."""


class ProcessError(RuntimeError):
    """Another process of a distributed run that failed or ended."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it came from."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__
