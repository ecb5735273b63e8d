"""Processes that draw different orders, or were given different splits, find out instead of training some twice."""

import pytest
import torch
from processes import run
from test_same_result import Tiles, network
from torch import nn
from torch.utils.data import DataLoader, Sampler, SubsetRandomSampler, random_split

from ununennium.training import Trainer
from ununennium.training.errors import ProcessError

SAMPLES = 16


class PartsLater(Sampler):
    """The same first batch in all processes, and then each its own."""

    def __init__(self, rank):
        self.rank = rank

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        return iter([0, 1, 2, 3, *(torch.arange(4, SAMPLES).roll(self.rank).tolist())])


def loader(kind, rank):
    torch.manual_seed(rank)  # as a script that seeds nothing
    data = Tiles(SAMPLES, turned=False)
    if kind == "split":
        return DataLoader(random_split(data, [12, 4])[0], 2)
    if kind == "sampler":
        return DataLoader(data, 2, sampler=SubsetRandomSampler(torch.randperm(SAMPLES)[:12].tolist()))
    return DataLoader(data, 2, sampler=PartsLater(rank))


def train(rank, world, kind, accumulation):
    model = network()
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss(ignore_index=255), loader(kind, rank),
        gradient_accumulation_steps=accumulation, distributed=True, device="cpu", seed=0, progress=False,
    )  # fmt: skip
    with pytest.raises(ProcessError) as caught:
        trainer.fit(2)
    return str(caught.value), trainer.state.optimizer_steps


@pytest.mark.parametrize(
    ("kind", "message", "steps"),
    [
        ("split", "the training split (random_split needs a seeded generator) is '12 of 16 samples, digest ", 0),
        ("sampler", "the order of the samples is ", 0),
        ("parts later", "the processes draw different orders of the samples", 1),
    ],
)
def test_different_orders_end_all(tmp_path, kind, message, steps):
    for found, taken in run(2, train, tmp_path, kind, 2 if kind == "parts later" else 1):
        assert message in found
        assert taken == steps
