"""Data order is a function of (seed, epoch) (trap 8), and the user's loader is left alone."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ununennium.training.loading import EpochLoader


class Numbers(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index


class GlobalSampler(Sampler):
    """Draws from all three global generators, and yields one list again and again."""

    def __iter__(self):
        batch = []
        for _ in range(4):
            batch[:] = [random.randrange(12), int(np.random.randint(12)), int(torch.randint(12, ()))]
            yield batch

    def __len__(self):
        return 4


class EpochBatches(Sampler):
    """A batch sampler of the user's own with the customary set_epoch."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter([order[:6], order[6:]])

    def __len__(self):
        return 2


class ShufflesItself(Sampler):
    """Shuffles its own list in place, as some do."""

    def __init__(self):
        self.indices = list(range(12))
        self.generator = np.random.default_rng(0)

    def __iter__(self):
        self.generator.shuffle(self.indices)
        return iter(self.indices)

    def __len__(self):
        return 12


data = Numbers()
LOADERS = {
    "shuffle": lambda: DataLoader(data, batch_size=4, shuffle=True),
    "own generator": lambda: DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "two workers": lambda: DataLoader(data, batch_size=4, shuffle=True, num_workers=2),
    "subset": lambda: DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(range(12))),
    "weighted": lambda: DataLoader(data, batch_size=4, sampler=WeightedRandomSampler(range(1, 13), 12)),
    "distributed": lambda: DataLoader(data, batch_size=4, sampler=DistributedSampler(data, 1, 0)),
    "batch sampler": lambda: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False)),
    "own batch sampler": lambda: DataLoader(data, batch_sampler=EpochBatches()),
    "global generators": lambda: DataLoader(data, batch_sampler=GlobalSampler()),
    "shuffles itself": lambda: DataLoader(data, batch_size=4, sampler=ShufflesItself()),
    "no batching": lambda: DataLoader(data, batch_size=None, shuffle=True),
}


def order(loader, epoch, seed=7):
    return [
        batch.tolist() if isinstance(batch, torch.Tensor) else batch
        for batch in EpochLoader(loader, 0).epoch(seed, epoch)
    ]


@pytest.mark.parametrize("name", LOADERS)
def test_order_differs_by_epoch_and_is_a_function_of_seed_and_epoch(name):
    loader = LOADERS[name]()
    running = EpochLoader(loader, 0)
    epochs = [[b.tolist() if isinstance(b, torch.Tensor) else b for b in running.epoch(7, e)] for e in range(4)]
    assert len({repr(e) for e in epochs}) == 4
    assert all(len({repr(batch) for batch in e}) > 1 for e in epochs)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    for epoch, expected in enumerate(epochs):  # entered afresh, in another process's random state
        assert order(LOADERS[name](), epoch) == expected
    if name not in ("own batch sampler", "distributed"):  # which have seeds of their own
        assert order(loader, 0, seed=8) != epochs[0]


@pytest.mark.parametrize("name", [n for n in LOADERS if n not in ("weighted", "global generators")])
def test_every_sample_comes_once(name):
    batches = order(LOADERS[name](), 3)
    flat = batches if name == "no batching" else [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(12))


@pytest.mark.parametrize("name", [n for n in LOADERS if n != "two workers"])
def test_the_main_generators_and_the_users_loader_are_left_alone(name):
    loader = LOADERS[name]()
    sampler_state = repr(vars(loader.sampler)), getattr(loader.sampler, "indices", None)
    generator_state = None if loader.generator is None else loader.generator.get_state()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    batch_sampler, dataset = loader.batch_sampler, loader.dataset
    order(loader, 1)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert (repr(vars(loader.sampler)), getattr(loader.sampler, "indices", None)) == sampler_state
    assert loader.batch_sampler is batch_sampler
    assert loader.dataset is dataset
    if generator_state is not None:
        assert torch.equal(loader.generator.get_state(), generator_state)


def test_persistent_workers_get_each_epochs_order():
    loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=2, persistent_workers=True)
    running = EpochLoader(loader, 0)
    plain = LOADERS["shuffle"]()
    assert [[b.tolist() for b in running.epoch(7, e)] for e in range(3)] == [order(plain, e) for e in range(3)]


def test_an_endless_sampler_is_drawn_lazily():
    class Endless(Sampler):
        def __iter__(self):
            while True:
                yield [random.randrange(12)]

    batches = EpochLoader(DataLoader(data, batch_sampler=Endless()), 0).epoch(7, 0)
    assert len([next(batches) for _ in range(200)]) == 200


def test_iterable_datasets_and_other_iterables_are_told_the_epoch():
    class Stream(IterableDataset):
        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([self.epoch * 10 + i for i in range(4)])

    class Batches:
        set_epoch = Stream.set_epoch

        def __iter__(self):
            return iter([torch.tensor([self.epoch])])

    assert order(DataLoader(Stream(), batch_size=2), 3) == [[30, 31], [32, 33]]
    assert order(Batches(), 3) == [[3]]


def test_an_iterator_that_is_used_up_says_so():
    loader = EpochLoader(iter([1, 2]), 0)
    assert list(loader.epoch(7, 0)) == [1, 2]
    with pytest.raises(ValueError, match=r"no batch in epoch 1.*pass a DataLoader"):
        list(loader.epoch(7, 1))
