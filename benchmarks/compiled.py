"""The epochs of the part ``epoch``, hand-tuned, with the network compiled; compiling takes minutes."""

import inspect
import tempfile
from functools import partial
from pathlib import Path

from _contenders import HandTuned, Levers, OurTrainer, Setting, prepared
from _timing import Row, interleaved, main, row
from ununennium.training import Trainer

PART, ROUNDS = "compiled", 5


def measure() -> list[Row]:
    contenders = {
        HandTuned.title: partial(HandTuned),
        "hand-tuned, compiled": partial(HandTuned, levers=Levers(compile=True)),
    }
    if "compile" in inspect.signature(Trainer).parameters:
        contenders |= {"Trainer": OurTrainer, "Trainer, compile=True": partial(OurTrainer, compile=True)}
    with tempfile.TemporaryDirectory() as folder:
        runs = {title: prepared(make, Setting(), Path(folder) / title) for title, make in contenders.items()}
        timings = interleaved(runs, ROUNDS)
    return [row(PART, title, timings, None if title == HandTuned.title else HandTuned.title) for title in runs]


if __name__ == "__main__":
    main(PART, measure)
