"""A run that is made to be killed: everything random that there is, and all that remembers.

As a script it trains into a folder, going on from what it finds there, and prints the digest of how it ended. SECONDS
in the environment makes its batches last longer.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ununennium.training import (
    Callback,
    CheckpointCallback,
    EarlyStoppingCallback,
    EMACallback,
    GradualUnfreeze,
    LRSchedulerCallback,
    SWACallback,
    Trainer,
)

EPOCHS, ACCUMULATION = 4, 4
SAMPLES, BATCH = 27, 2  # 14 batches an epoch: windows of 4, 4, 4 and 2; the last batch has one sample
STEPS = EPOCHS * 4


class Augmented(Dataset):
    """Images that are moved about with all three global generators; tells which of them were loaded."""

    def __init__(self, samples=SAMPLES):
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(samples, 3, 8, 8, generator=generator)
        self.masks = torch.randint(0, 3, (samples, 8, 8), generator=generator)
        self.masks[:, :2] = 255
        self.loaded = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.loaded.append(index)
        image, mask = self.images[index], self.masks[index]
        if random.random() < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        image = image + 0.1 * float(np.random.randn()) + 0.1 * torch.randn(image.shape)
        return {"image": image, "mask": mask, "index": index}


class Log(Callback):
    """What was trained on, and at which learning rates; remembered."""

    def __init__(self):
        self.samples, self.rates = [], []

    def on_batch_end(self, trainer, batch_idx, logs):
        self.rates.append(trainer.optimizer.param_groups[0]["lr"])

    def state_dict(self):
        return {"samples": self.samples, "rates": self.rates}

    def load_state_dict(self, state):
        self.samples, self.rates = list(state["samples"]), list(state["rates"])


class Noisy(Callback):
    """Draws where callbacks draw."""

    def __init__(self):
        self.drawn = []

    def _draw(self):
        self.drawn.append([random.random(), float(np.random.rand()), float(torch.rand(()))])

    def on_train_start(self, trainer):
        random.random(), np.random.rand(), torch.rand(())  # when a run starts, and it starts anew after each kill

    def on_epoch_start(self, trainer, epoch):
        torch.rand(()), np.random.rand()

    def on_batch_end(self, trainer, batch_idx, logs):
        self._draw()

    def on_epoch_end(self, trainer, epoch, logs):
        self._draw()

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = list(state["drawn"])


class Victim(Trainer):
    """Writes down the samples of every training batch."""

    def compute_loss(self, batch):
        log = next((c for c in self.callbacks.callbacks if isinstance(c, Log)), None)
        if self.model.training and log is not None:
            log.samples = [*log.samples, *batch["index"].tolist()]
        time.sleep(float(os.environ.get("SECONDS", 0)))
        return super().compute_loss(batch)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 3, 1)
    )


def averages(kind):
    """Return what averages the weights, and for "swa" what freezes some of them, too."""
    if kind == "ema":
        return [EMACallback(decay=0.9, warmup=3)]
    return [GradualUnfreeze({1: ["0", "1"]}), SWACallback(0.02, 2, anneal_epochs=1)]


def build(folder, workers=0, *, data=None, callbacks=(), checkpoints=None, model=None, **kwargs):
    """Return the Trainer; every start begins from other weights and generators, as a forgetful script would.

    In fp16 the loss scale grows as the run goes on, every third step.
    """
    torch.manual_seed(int.from_bytes(os.urandom(4), "little") if kwargs.pop("unseeded", True) else 0)
    model = model or network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS)
    loaders = {"batch_size": BATCH, "num_workers": workers, "persistent_workers": workers > 0}
    train = DataLoader(data or Augmented(), shuffle=True, **loaders)
    every = {"every_n_steps": 1, "keep_last": 2, **(checkpoints or {})}
    trainer = Victim(
        model,
        optimizer,
        nn.CrossEntropyLoss(ignore_index=255),
        train,
        DataLoader(Augmented(9), **loaders),
        callbacks=[
            Log(),
            Noisy(),
            LRSchedulerCallback(schedule, step_on="batch"),
            EarlyStoppingCallback(patience=3),
            *averages(kwargs.pop("average", None) or os.environ.get("AVERAGE", "ema")),
            CheckpointCallback(folder, monitor="val_iou", **every),
            *callbacks,
        ],
        gradient_accumulation_steps=ACCUMULATION,
        gradient_clip_norm=0.5,
        device="cpu",
        progress=False,
        **kwargs,
    )
    if trainer.precision.scales:  # the usual one stays what it is for 2000 steps
        trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    return trainer


def digest(trainer):
    """Return SHA-256 over all that a run leaves.

    That is weights, optimizer, callbacks, history, counters, the loss scale, random states.
    """
    hashed = hashlib.sha256()

    def take(value):
        if isinstance(value, torch.Tensor):
            hashed.update(repr((value.dtype, tuple(value.shape))).encode() + value.contiguous().numpy().tobytes())
        elif isinstance(value, np.ndarray):
            hashed.update(value.tobytes())
        elif isinstance(value, dict):
            for key in value:
                take(key), take(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                take(item)
        else:
            hashed.update(repr(value).encode())

    state = trainer.state.state_dict()
    del state["run"]
    callbacks = [
        c.best if isinstance(c, CheckpointCallback) else c.state_dict()  # its names count how often it was killed
        for c in trainer.callbacks.with_memory
    ]
    take([dict(trainer.model.state_dict()), trainer.optimizer.state_dict(), callbacks, trainer.history, state])
    take(trainer.precision.state_dict())
    take([random.getstate(), np.random.get_state(), torch.get_rng_state()])
    return hashed.hexdigest()


def start_victim(folder, workers, **environment):
    """Start this file as a process, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


def main():
    """Train into a folder, with so many workers; print when it starts, and the digest of the end."""
    folder, workers = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    random.seed(0), np.random.seed(0)
    trainer = build(folder, workers, seed=3, unseeded=False)
    print("started", flush=True)
    trainer.fit(EPOCHS, resume="auto")
    log = next(c for c in trainer.callbacks.callbacks if isinstance(c, Log))
    print(json.dumps({"digest": digest(trainer), "samples": log.samples, "rates": log.rates}), flush=True)


if __name__ == "__main__":
    main()
