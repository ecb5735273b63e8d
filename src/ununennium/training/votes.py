"""What processes decide together: to leave, to stop, and what time it is."""

import time
from collections.abc import Sequence

from ununennium.training.distributed import Group
from ununennium.training.signals import Signals
from ununennium.training.state import TrainState


class Votes:
    """Whether a run leaves or stops: of several processes all do, after the same optimizer step, or none.

    A process casts its wishes with a window's last batch, in the one sum that a window needs anyhow, and hears all
    of them when the window is closed; what it wants after that waits for the next. One alone decides for itself.

    Parameters
    ----------
    group : Group
        The processes that train together.
    signals : Signals
        What asks to leave.
    state : TrainState
        Its ``stopping`` asks to stop.

    Attributes
    ----------
    clock : float
        Seconds that all processes read alike, as of the last optimizer step.
    """

    def __init__(self, group: Group, signals: Signals, state: TrainState) -> None:
        self.clock: float = group.of_leader(time.monotonic)
        self._group = group
        self._signals = signals
        self._state = state
        self._leaving = self._stopping = False  # what several have agreed on

    def begin_epoch(self) -> None:
        """Forget what was agreed on before."""
        self._leaving = self._stopping = False

    def cast(self) -> Sequence[float]:
        """Return what is voted on with a window: whether to leave, whether to stop, and the time by process 0."""
        if self._group.size == 1:
            return ()
        leaving, stopping = float(self._signals.pending), float(self._state.stopping)
        return leaving, stopping, time.monotonic() if self._group.leads else 0.0

    def hear(self, sums: Sequence[float]) -> None:
        """Learn what was agreed on, from the sums of what all have cast; empty if there are none yet."""
        if self._group.size == 1:
            self.clock = time.monotonic()
        elif sums:
            leaving, stopping, self.clock = sums
            self._leaving, self._stopping = leaving > 0, stopping > 0
            self._state.stopping |= self._stopping  # for the checkpoint of this step

    @property
    def stopping(self) -> bool:
        """Whether the running epoch is to be closed with what it has."""
        return self._state.stopping if self._group.size == 1 else self._stopping

    def leave(self) -> None:
        """Leave between two steps, if that is agreed on."""
        if self._group.size == 1 or self._leaving:
            self._signals.check(self._leaving)

    def between_epochs(self) -> None:
        """Ask all at once where there is no window to vote with: stop if one wants to, leave if one wants to."""
        self._state.stopping = self._group.any(self._state.stopping)
        if self._group.any(self._signals.pending):
            self._signals.check(elsewhere=True)
