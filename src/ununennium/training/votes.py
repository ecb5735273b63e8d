"""What processes decide together: to leave, to stop, and what time it is."""

import time
from collections.abc import Sequence

from ununennium.training.distributed import Group
from ununennium.training.errors import ProcessError
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
    order : str
        Digest of the order of samples up to the batch that is going forward, compared with each vote.
    """

    def __init__(self, group: Group, signals: Signals, state: TrainState) -> None:
        self.clock: float = group.of_leader(time.monotonic)
        self.order: str = ""
        self._group = group
        self._signals = signals
        self._state = state
        self._leaving = self._stopping = False  # what several have agreed on

    def begin_epoch(self) -> None:
        """Forget what was agreed on before."""
        self._leaving = self._stopping = False

    def cast(self) -> Sequence[float]:
        """Return what is voted on with a window: to leave, to stop, the time by process 0, and the order of samples."""
        if self._group.size == 1:
            return ()
        leaving, stopping = float(self._signals.pending), float(self._state.stopping)
        order = float(int(self.order[:4] or "0", 16))  # 16 bits of it, whose squares add up exactly
        return leaving, stopping, time.monotonic() if self._group.leads else 0.0, order, order**2

    def hear(self, sums: Sequence[float]) -> None:
        """Learn what was agreed on, from the sums of what all have cast; empty if there are none yet.

        Raises
        ------
        ProcessError
            If the processes draw different orders.
        """
        if self._group.size == 1:
            self.clock = time.monotonic()
        elif sums:
            leaving, stopping, self.clock, orders, squares = sums
            if self._group.size * squares != orders**2:  # equal only if all are
                raise ProcessError(
                    "the processes draw different orders of the samples, so that some are trained twice and others "
                    "never: the sampler, or what it is made of, has to be the same in all of them, with a seed that "
                    "does not depend on the process; the Trainer shares the batches out by itself"
                )
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

    def stop_together(self) -> None:
        """Ask all at once, where there is no window to vote with: stop if one wants to."""
        self._state.stopping = self._group.any(self._state.stopping)

    def leave_together(self) -> None:
        """Ask all at once, where there is no window to vote with: leave if one wants to."""
        if self._group.any(self._signals.pending):
            self._signals.check(elsewhere=True)
