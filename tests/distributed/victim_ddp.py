"""The run that is made to be killed, in several processes.

As a script it trains in the process that torchrun (or RANK and its like in the environment) made it, going on from what
it finds in the folder, and prints when it starts and the digest of how it ended. In the environment: SECONDS makes
batches last longer, SAVING the committing of a checkpoint; FAILS is where process 1 raises an error of its own.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[1] / "training"))

from victim import Augmented, digest, network

from ununennium.training import (
    Callback,
    CheckpointCallback,
    EarlyStoppingCallback,
    LRSchedulerCallback,
    Trainer,
)
from ununennium.training.checkpoint import writer

EPOCHS, ACCUMULATION = 3, 2
SAMPLES, GLOBAL = 25, 6  # 5 batches an epoch: windows of 2, 2 and 1; the last batch has one sample
STEPS = EPOCHS * 3


class Exact(Augmented):
    """In float64, so that other orders of summation do not show, and not moved about at random."""

    def __getitem__(self, index):
        return {"image": self.images[index].double(), "mask": self.masks[index]}


class Fails(Augmented):
    def __init__(self, samples=SAMPLES, at=5):
        super().__init__(samples)
        self.at = at

    def __getitem__(self, index):
        if os.environ["RANK"] == "1" and len(self.loaded) == self.at:
            raise LookupError("tile 17 is not in the archive")
        return super().__getitem__(index)


class FailsForward(nn.Sequential):
    def __init__(self, *layers, training=True, at=4):
        super().__init__(*layers)
        self.calls, self.place = 0, (training, at)

    def forward(self, x):
        self.calls += self.training is self.place[0]
        if os.environ["RANK"] == "1" and (self.training, self.calls) == self.place:
            raise ArithmeticError("this model can't go on")
        return super().forward(x)


class FailsInHook(Callback):
    def __init__(self, hook, at):
        self.hook, self.at = hook, at

    def _maybe(self, hook, number):
        if os.environ["RANK"] == "1" and (hook, number) == (self.hook, self.at):
            raise OSError("no route to the tracker")

    def on_train_start(self, trainer):
        self._maybe("train_start", 0)

    def on_batch_start(self, trainer, batch_idx):
        self._maybe("batch_start", batch_idx)

    def on_batch_end(self, trainer, batch_idx, logs):
        self._maybe("batch_end", batch_idx)

    def on_epoch_end(self, trainer, epoch, logs):
        self._maybe("epoch_end", epoch)


def exact_network(start=0):
    torch.manual_seed(start)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 1)).double()


def failing(place):
    """Return what the Trainer has to be built with so that process 1 fails in this place."""
    if place == "dataset":
        return {"data": Fails()}
    if place == "validation":
        return {"val_data": Fails(7, at=1)}
    if place == "forward":
        return {"model": FailsForward(*network())}
    if place == "validation, forward":
        return {"model": FailsForward(*network(), training=False, at=1)}
    return {"callbacks": [FailsInHook(place, 2 if place.startswith("batch") else 0)]} if place else {}


def build(folder, world, *, data=None, val_data=None, model=None, callbacks=(), checkpoints=None, **kwargs):
    """Return the Trainer; all processes seed alike, as scripts do, and every start is from other weights."""
    start = kwargs.pop("start", 0)
    random.seed(start), np.random.seed(start), torch.manual_seed(start)
    model = network() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS)
    every = {"every_n_steps": 1, "keep_last": 2, **(checkpoints or {})}
    saves = [] if folder is None else [CheckpointCallback(folder, monitor="val_iou", **every)]
    options = {
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clip_norm": 0.5,
        "distributed": world > 1,
        "device": "cpu",
        "progress": False,
        "seed": 3,
    }
    return Trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(ignore_index=255),
        DataLoader(data or Augmented(SAMPLES), GLOBAL // world, shuffle=True),
        DataLoader(val_data or Augmented(7), GLOBAL // world),
        callbacks=[
            LRSchedulerCallback(schedule, step_on="batch"),
            EarlyStoppingCallback(patience=3),
            *callbacks,
            *saves,
        ],
        **{**options, **kwargs},
    )


def train(rank, world, folder, resume=None, start=0, **kwargs):
    """Train to the end; return the digest of all that this process has in the end."""
    trainer = build(folder, world, start=start, **kwargs)
    trainer.fit(EPOCHS, resume=resume)
    return digest(trainer)


def main():
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    honest, slow = writer.commit, float(os.environ.get("SAVING", 0))
    writer.commit = lambda *args: (time.sleep(slow), honest(*args))

    class Slow(Callback):
        def on_train_start(self, trainer):
            print(f"started {rank} {os.getpid()}\n", end="", flush=True)

        def on_batch_start(self, trainer, batch_idx):
            time.sleep(float(os.environ.get("SECONDS", 0)))

    options = failing(os.environ.get("FAILS"))
    options["callbacks"] = [Slow(), *options.get("callbacks", ())]
    found = train(rank, world, sys.argv[1], "auto", **options)
    print(json.dumps({"rank": rank, "digest": found}) + "\n", end="", flush=True)


if __name__ == "__main__":
    main()
