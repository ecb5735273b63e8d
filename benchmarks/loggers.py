"""What the progress bar, the CSV log and the TensorBoard log cost together, of a step of ten milliseconds.

The step sleeps for ten milliseconds, as one does that an accelerator works on; a pass is 100 of them. Progress is drawn
on a terminal that nobody looks at.
"""

import os
import pty
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from _timing import Row, interleaved, main, row
from ununennium.training import Callback, CSVLogger, TensorBoardLogger, Trainer

PART, STEPS, SECONDS, ROUNDS, LIMIT = "loggers", 100, 0.010, 12, 1.03


class TenMilliseconds(nn.Module):
    """A linear layer in a forward that takes ten milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(SECONDS)
        return self.layer(inputs)


@contextmanager
def terminal() -> Iterator[None]:
    """Have standard output and standard error lead to a terminal."""
    main_end, side = pty.openpty()
    reading = threading.Thread(target=_drain, args=(main_end,), daemon=True)
    reading.start()
    kept = sys.stdout, sys.stderr
    with os.fdopen(side, "w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        try:
            yield
        finally:
            sys.stdout, sys.stderr = kept
    reading.join()
    os.close(main_end)


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 65536):
            pass
    except OSError:  # how Linux says that the other side is closed
        pass


def contender(callbacks: list[Callback], progress: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    model = TenMilliseconds()
    batches = [(torch.randn(4, 8), torch.randint(0, 2, (4,)))] * STEPS
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    trainer = Trainer(
        model, optimizer, nn.CrossEntropyLoss(), batches, callbacks=callbacks, gradient_clip_norm=1.0, device="cpu",
        progress=progress, seed=0,
    )  # fmt: skip

    def epoch() -> None:
        with terminal():
            trainer.fit(1)

    return epoch


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contenders = {
            "nothing": contender([], False),
            "progress": contender([], True),
            "CSVLogger": contender([CSVLogger(folder / "csv")], False),
            "TensorBoardLogger": contender([TensorBoardLogger(folder / "tensorboard")], False),
            "all three": contender([CSVLogger(folder / "all"), TensorBoardLogger(folder / "all")], True),
        }
        timings = interleaved(contenders, ROUNDS, budget=120)
    timings = {what: timing.each(STEPS) for what, timing in timings.items()}
    limits = {"all three": LIMIT}
    return [row(PART, what, timings, None if what == "nothing" else "nothing", limits.get(what)) for what in contenders]


if __name__ == "__main__":
    main(PART, measure)
