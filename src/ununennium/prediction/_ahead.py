"""Work done in another thread, ahead of or behind the one that computes, and bounded."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(work: Callable[[T], R], items: Iterable[T], depth: int) -> Generator[R]:
    """Yield what ``work`` makes of items, in order, while another thread makes the next ``depth``.

    An error in the thread is raised where its result would have come. Whoever leaves early should close the iterator:
    the thread ends with the item that it is at.
    """
    waiting: deque[Future[R]] = deque()
    thread = ThreadPoolExecutor(1, thread_name_prefix="ununennium-read")
    try:
        for item in items:
            waiting.append(thread.submit(work, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


class Behind(Generic[T]):
    """Calls ``work`` in another thread on what it is given, in order; at most ``depth`` wait.

    An error in the thread is raised by the next call, or on leaving.
    """

    def __init__(self, work: Callable[[T], None], depth: int) -> None:
        self._work, self._depth = work, depth
        self._waiting: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ununennium-write")

    def __call__(self, item: T) -> None:
        """Hand something over; wait if too much waits already."""
        while self._waiting and (len(self._waiting) >= self._depth or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._work, item))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            while kind is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._thread.shutdown(cancel_futures=True)
