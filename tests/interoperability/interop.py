"""What these tests share: a small network, a Trainer that shows its batches, and what a run leaves, as one digest."""

import hashlib
import sys
from pathlib import Path

import torch
from torch import nn

from ununennium.training import CheckpointCallback, Trainer

sys.path.append(str(Path(__file__).parents[1] / "distributed"))  # for its ``processes.run``

IGNORE = 255


def network(channels=3, outputs=3, dtype=torch.float32):
    """Return a small pixel model with BatchNorm and dropout, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.2)
        return nn.Sequential(*layers, nn.Conv2d(8, outputs, 1)).to(dtype)


class Showing(Trainer):
    """Keeps what every step was given."""

    def __init__(self, *args, train_transform=None, val_transform=None, **kwargs):
        self.trained, self.validated = [], []
        kwargs |= {"device": "cpu", "progress": False}
        kwargs["train_transform"] = _kept(self.trained, train_transform)
        kwargs["val_transform"] = _kept(self.validated, val_transform)
        super().__init__(*args, **kwargs)


def _kept(batches, transform):
    def keep(batch):
        batches.append(batch if transform is None else transform(batch))
        return batches[-1]

    return keep


def trainer(train, val=None, model=None, loss_fn=None, optimizer=None, **kwargs):
    """Return a Trainer with AdamW; class logits and nodata unless said otherwise."""
    model = network() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01) if optimizer is None else optimizer
    loss_fn = nn.CrossEntropyLoss(ignore_index=IGNORE) if loss_fn is None else loss_fn
    return Showing(model, optimizer, loss_fn, train, val, **kwargs)


def bits(trainer):
    """Return SHA-256 over weights, optimizer, history and PyTorch's generator."""
    hashed = hashlib.sha256()
    for value in trainer.model.state_dict().values():
        hashed.update(value.numpy().tobytes())
    for state in trainer.optimizer.state_dict()["state"].values():
        hashed.update(b"".join(state[name].numpy().tobytes() for name in sorted(state)))
    hashed.update(repr(trainer.history).encode() + torch.get_rng_state().numpy().tobytes())
    return hashed.hexdigest()


def run_whole(build, folder, epochs=2):
    """Train without a break, keeping every checkpoint; return the run's bits and the checkpoints inside its epochs."""
    torch.manual_seed(0)
    trainer = build(seed=3, callbacks=[CheckpointCallback(folder, every_n_steps=1, keep_last=1000)])
    trainer.fit(epochs)
    places = sorted((p for p in folder.glob("step-*") if not p.is_symlink()), key=lambda p: int(p.name.split("-")[1]))
    batches = trainer.num_batches
    inside = [p for p in places if int(p.name.split("-")[1]) % batches]
    assert len(inside) >= 2 * epochs, "the epochs are too short for a checkpoint inside"
    end_workers(trainer)
    return bits(trainer), inside


def run_resumed(build, checkpoint, folder, epochs=2):
    """Go on from a checkpoint, with generators that stand elsewhere; return the bits of the end."""
    torch.manual_seed(1000)
    trainer = build(callbacks=[CheckpointCallback(folder, every_n_steps=1, keep_last=1000)])
    trainer.fit(epochs, resume=checkpoint)
    end_workers(trainer)
    return bits(trainer)


def end_workers(trainer):
    """End workers that persist; left to the garbage collector, each of them is waited for 5 seconds."""
    for loader in (trainer._train_batches, trainer._val_batches):
        if loader._twin is not None:
            loader._twin._iterator = None


def same(one, other):
    """Tell whether two batches hold the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def tensors(batch):
    """Return the tensors of a mapping."""
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def copied(batch):
    """Return a mapping with its tensors copied."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
