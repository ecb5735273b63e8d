"""A run does not go on with another split of its data: it would validate on what it was trained on."""

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, random_split

from ununennium.training import CheckpointCallback, CheckpointError, Trainer
from ununennium.training.loading import EpochLoader

DATA = TensorDataset(torch.arange(40.0).reshape(20, 2), torch.zeros(20, 1))


def trained(folder, train, val, epochs):
    model = nn.Linear(2, 1)
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), 1e-4), nn.MSELoss(), DataLoader(train, 4, shuffle=True),
        DataLoader(val, 4), [CheckpointCallback(folder)], device="cpu", progress=False, seed=0,
    )  # fmt: skip
    trainer.fit(epochs, resume="auto")
    return trainer


def test_a_split_that_is_drawn_anew_is_refused(tmp_path):
    torch.manual_seed(1)
    trained(tmp_path, *random_split(DATA, [15, 5]), 1)
    with pytest.raises(
        CheckpointError, match=r"had the training split \(random_split needs a seeded generator\)='15 of"
    ):
        trained(tmp_path, *random_split(DATA, [15, 5]), 2)


def test_a_validation_split_is_compared_too(tmp_path):
    train = Subset(DATA, range(10))
    trained(tmp_path, train, Subset(DATA, range(10, 15)), 1)
    with pytest.raises(CheckpointError, match="had the validation split"):
        trained(tmp_path, train, Subset(DATA, range(11, 16)), 2)


def test_the_same_split_goes_on(tmp_path):
    for epochs in (1, 2):
        split = random_split(DATA, [15, 5], torch.Generator().manual_seed(3))
        trainer = trained(tmp_path, *split, epochs)
    assert trainer.state.epoch == 2


def split_of(dataset):
    return EpochLoader(DataLoader(dataset, 4), 0).split


def test_it_is_told_by_what_it_takes_of_the_whole():
    assert split_of(DATA) is None
    assert split_of(ConcatDataset([DATA, DATA])) is None
    first = split_of(Subset(DATA, [3, 1, 2]))
    assert first == split_of(Subset(DATA, torch.tensor([3, 1, 2])))
    assert first.startswith("3 of 20 samples, digest ")
    nested = split_of(Subset(Subset(DATA, range(10)), [3, 1, 2]))
    others = [Subset(DATA, [1, 2, 3]), Subset(DATA, ["a", "b"]), Subset(Subset(DATA, range(1, 11)), [3, 1, 2])]
    assert len({first, nested, *map(split_of, others)}) == 5
