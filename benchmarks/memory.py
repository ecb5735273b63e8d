"""Peak memory of a process that trains one epoch of the part ``epoch``, beyond what its imports take.

Each figure is of processes of their own, with the C library's allocator as it is. The smallest of three counts.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _contenders import ALL, HandTuned, Setting, prepared
from _timing import ALLOCATOR, Row, main

PART, ROUNDS = "memory", 3


def resident(peak: bool = False) -> float:
    """Return the process's memory now or at its peak, in MB, as Linux tells it."""
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def alone(title: str) -> float:
    """Return the MB that an epoch of one contender takes, in this process."""
    import lightning
    import segmentation_models_pytorch
    import torchgeo.trainers
    import torchmetrics

    import ununennium.training

    del lightning, segmentation_models_pytorch, torchgeo, torchmetrics, ununennium  # the same imports for all
    make = next(make for make in ALL if make.title == title)
    with tempfile.TemporaryDirectory() as folder:
        forget_peak()
        before = resident()
        prepared(make, Setting(), Path(folder) / "run")()
        return resident(peak=True) - before


def measure() -> list[Row]:
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    peaks: dict[str, list[float]] = {make.title: [] for make in ALL}
    for _ in range(ROUNDS):
        for title, found in peaks.items():
            command = [sys.executable, __file__, title]
            run = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
            found.append(float(run.stdout.split()[-1]))
    peer = HandTuned.title
    return [
        Row(PART, title, min(found), "MB", None if title == peer else peer,
            None if title == peer else min(found) / min(peaks[peer]), None, sorted(found)[1] / min(found) - 1)
        for title, found in peaks.items()
    ]  # fmt: skip


if __name__ == "__main__":
    print(alone(sys.argv[1])) if len(sys.argv) == 2 else main(PART, measure)
