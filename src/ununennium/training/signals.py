"""Signals that ask a run to leave: taken at once, acted on between two steps."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from ununennium.training.errors import Preempted

_ASKING = ("SIGTERM", "SIGUSR1", "SIGINT")
_AGAIN = 1.0  # seconds: what comes sooner is the same request, sent to the group and passed on by a launcher


class Signals:
    """SIGTERM, SIGUSR1 (what schedulers send before a time limit) and Ctrl-C, within a ``with`` block.

    The first one is remembered until `check`; a second one, a second or more later, does at once what it would have
    done outside the block. Handlers that were there before are put back at the end. Outside the main thread, where
    Python allows no handlers, nothing is changed.

    Attributes
    ----------
    leaving : BaseException or None
        What `check` raised.
    """

    def __init__(self) -> None:
        self.leaving: BaseException | None = None
        self._number = 0
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        self.leaving, self._number = None, 0
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name, None) for name in _ASKING):
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        self._put_back()

    @property
    def pending(self) -> bool:
        """Whether a signal has come that was not acted on."""
        return bool(self._number) and self.leaving is None

    def check(self, elsewhere: bool = False) -> None:
        """Raise what was asked for, here or in another process: KeyboardInterrupt for Ctrl-C, else `Preempted`."""
        if elsewhere and not self._number:
            self._number, self._at = signal.SIGTERM, time.monotonic()
        if self._number and self.leaving is None:
            asked = self._number == signal.SIGINT
            self.leaving = KeyboardInterrupt() if asked else Preempted(128 + signal.SIGTERM)
            raise self.leaving

    def hand_on(self) -> None:
        """Let a handler of the user's own, which was there before, do its part after all was saved."""
        before = self._before.get(self._number)
        self._put_back()
        if self.leaving is not None and callable(before) and before is not signal.default_int_handler:
            before(self._number, None)

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._number:
            self._number, self._at = number, now
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: leaving after this optimizer step; once more to stop at once\n".encode())
        elif now - self._at >= _AGAIN:
            self._put_back()
            os.kill(os.getpid(), number)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
