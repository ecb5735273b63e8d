"""Epochs of a U-Net ResNet-18 on a CPU: the specification's own call against peers, and against loops by hand.

Twelve bands, ten classes, 64 chips of 128² to train and 16 to validate, batches of 4, bf16, AdamW. An epoch trains,
validates IoU and F1 and writes the best and the last checkpoint. Of two epochs a round, which end with the checkpoint
on disk, the mean counts.
"""

import tempfile
from functools import partial
from pathlib import Path

from _contenders import ALL, WITHOUT, HandTuned, OurTrainer, Setting, prepared
from _timing import Row, interleaved, main, row

PART, EPOCHS, ROUNDS, BUDGET, LIMIT = "epoch", 2, 7, 600, 1.05


def measure() -> list[Row]:
    setting = Setting()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {make.title: prepared(make, setting, folder / make.title) for make in ALL}
        for lever, levers in WITHOUT.items():
            title = f"{HandTuned.title} without {lever}"
            runs[title] = prepared(HandTuned, setting, folder / title, levers=levers)
        timings = interleaved({title: partial(run, EPOCHS) for title, run in runs.items()}, ROUNDS, budget=BUDGET)
        timings = {title: timing.each(EPOCHS) for title, timing in timings.items()}
    return [
        row(PART, title, timings, None if title == HandTuned.title else HandTuned.title,
            LIMIT if title == OurTrainer.title else None)
        for title in runs
    ]  # fmt: skip


if __name__ == "__main__":
    main(PART, measure)
