"""Processes that fail together, and none of which waits for one that is gone."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from ununennium.training.distributed import Group
from ununennium.training.errors import ProcessError

T = TypeVar("T")

_SECONDS = 5.0  # between two signs of life of process 0: far below the limit of any backend


def all_do(group: Group, make: Callable[[], T]) -> T:
    """Return what this process makes; if that fails in one, an error is raised in all."""
    made, failure = [], None
    try:
        made.append(make())
    except Exception as error:
        failure = error
    _fail_together(group, failure)
    return made[0]


def all_run(group: Group, steps: Generator[None], rounds: int) -> None:
    """Take a process's steps to their end, so many rounds at most; if one fails in one process, an error ends all."""
    failure: Exception | None = None
    try:
        for _ in range(rounds):
            try:
                next(steps, None)
            except Exception as error:
                failure = error
            if group.any(failure is not None):
                break
    finally:
        steps.close()
    _fail_together(group, failure)


def leader_does(group: Group, make: Callable[[], T]) -> T:
    """Return what process 0 makes, to all, however long the others have to wait; an error is raised in all."""
    with ThreadPoolExecutor(1, thread_name_prefix="ununennium-lead") as thread:
        made = [thread.submit(make)] if group.leads else []
        while not group.any(bool(made) and bool(wait(made, _SECONDS).done)):
            pass
        result: T = group.of_leader(lambda: made[0].result())
    return result


def _fail_together(group: Group, error: Exception | None) -> None:
    failures = group.gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise ProcessError(f"process {rank} could not go on, and so no process can ({failure})")
