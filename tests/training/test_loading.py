"""Data order and randomness are functions of (seed, epoch, place), whatever loads them (traps 8, 9, 10)."""

import random
import time
from collections import namedtuple
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from ununennium.training.errors import DataOrderError
from ununennium.training.loading import EpochLoader, _text, held_generators, reseed

SIZE = 13


class Holder:
    """A transform with generators of its own, as Albumentations and MONAI have."""

    def __init__(self):
        self.generators = [np.random.default_rng(), np.random.RandomState(), random.Random(), torch.Generator()]

    def __call__(self):
        numpy, legacy, python, tensor = self.generators
        return [numpy.random(), legacy.rand(), python.random(), float(torch.rand((), generator=tensor))]


class Augmented(Dataset):
    """Draws from every kind of generator, and tells its index."""

    def __init__(self):
        self.holder = Holder()

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        drawn = [random.random(), np.random.rand(), np.random.randn(), float(torch.rand(())), *self.holder()]
        return torch.tensor([index, *drawn], dtype=torch.float64)


class InBatches(Augmented):
    def __getitems__(self, indices):
        common = random.random()
        return [self[i] + common for i in indices]


class GlobalSampler(Sampler):
    """Draws from all three global generators, and yields one list again and again."""

    def __iter__(self):
        batch = []
        for _ in range(4):
            batch[:] = [random.randrange(SIZE), int(np.random.randint(SIZE)), int(torch.randint(SIZE, ()))]
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
        order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter([order[:6], order[6:9], order[9:]])

    def __len__(self):
        return 3


class ShufflesItself(Sampler):
    """Shuffles its own list in place, as some do."""

    def __init__(self):
        self.indices = list(range(SIZE))
        self.generator = np.random.default_rng(0)

    def __iter__(self):
        self.generator.shuffle(self.indices)
        return iter(self.indices)

    def __len__(self):
        return SIZE


Box = namedtuple("Box", "x y")


class Coordinates(Sampler):
    """Indices that are no integers, as TorchGeo's samplers give."""

    def __iter__(self):
        for _ in range(SIZE):
            yield Box(slice(float(torch.rand(())), 1.0), (1, "a"))

    def __len__(self):
        return SIZE


class Located(Augmented):
    def __getitem__(self, box):
        return super().__getitem__(0) + box.x.start


def mixup(samples):
    batch = default_collate(samples)
    return batch + random.random() + np.random.rand() + float(torch.rand(()))


class TwinLoader(DataLoader):
    """A subclass, as TorchGeo and others have."""


data = Augmented()
LOADERS = {
    "shuffle": lambda **k: DataLoader(data, batch_size=4, shuffle=True, **k),
    "in order": lambda **k: DataLoader(data, batch_size=4, **k),
    "drop last": lambda **k: DataLoader(data, batch_size=4, shuffle=True, drop_last=True, **k),
    "own generator": lambda **k: DataLoader(
        data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1), **k
    ),
    "collate draws": lambda **k: DataLoader(data, batch_size=4, shuffle=True, collate_fn=mixup, **k),
    "subclass": lambda **k: TwinLoader(data, batch_size=4, shuffle=True, **k),
    "subset": lambda **k: DataLoader(Subset(data, range(2, 12)), batch_size=4, shuffle=True, **k),
    "subset sampler": lambda **k: DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(range(SIZE)), **k),
    "replacement": lambda **k: DataLoader(data, batch_size=4, sampler=WeightedRandomSampler([1] + [9] * 12, 20), **k),
    "distributed": lambda **k: DataLoader(data, batch_size=4, sampler=DistributedSampler(data, 1, 0), **k),
    "batch sampler": lambda **k: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False), **k),
    "own batch sampler": lambda **k: DataLoader(data, batch_sampler=EpochBatches(), **k),
    "global generators": lambda **k: DataLoader(data, batch_sampler=GlobalSampler(), **k),
    "shuffles itself": lambda **k: DataLoader(data, batch_size=4, sampler=ShufflesItself(), **k),
    "no integers": lambda **k: DataLoader(Located(), batch_size=4, sampler=Coordinates(), **k),
    "no batching": lambda **k: DataLoader(data, batch_size=None, shuffle=True, **k),
    "reads batches": lambda **k: DataLoader(InBatches(), batch_size=4, shuffle=True, **k),
    "concatenated": lambda **k: DataLoader(ConcatDataset([data, data]), batch_size=4, shuffle=True, **k),
    "stacked": lambda **k: DataLoader(StackDataset(data, data), batch_size=4, shuffle=True, **k),
    "tensors": lambda **k: DataLoader(TensorDataset(torch.arange(SIZE)), batch_size=4, shuffle=True, **k),
}
WITHOUT_SEED = ("own batch sampler", "distributed", "in order")  # their order does not depend on the run's seed


def seen(loader, epoch, seed=7, start=0, digest=None):
    """Return the batches of an epoch as bytes, their indices, and the last digest."""
    loaded = list(EpochLoader(loader, 0).epoch(seed, epoch, start, digest))
    return [repr(b.batch) for b in loaded], [b.indices for b in loaded], [b.digest for b in loaded]


def scramble():
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


@pytest.fixture(autouse=True)
def _precise():
    torch.set_printoptions(precision=17, threshold=100_000)
    yield
    torch.set_printoptions(profile="default")


@pytest.mark.parametrize("name", LOADERS)
def test_an_epoch_is_a_function_of_seed_and_number(name):
    running = EpochLoader(LOADERS[name](), 0)
    epochs = []
    for epoch in range(3):
        loaded = list(running.epoch(7, epoch))
        epochs.append(([repr(b.batch) for b in loaded], [b.indices for b in loaded], [b.digest for b in loaded]))
    scramble()
    for epoch in (2, 0, 1):  # in any order, by other loader objects, from another random state
        assert seen(LOADERS[name](), epoch) == epochs[epoch]
    assert len({repr(batches) for batches, *_ in epochs}) == 3
    assert all(len(set(map(repr, indices))) > 1 for _, indices, _ in epochs)
    if name != "in order":
        assert len({repr(indices) for _, indices, _ in epochs}) == 3
    if name not in WITHOUT_SEED:
        assert seen(LOADERS[name](), 0, seed=8)[1] != epochs[0][1]


def test_an_epoch_that_was_abandoned_leaves_nothing_behind():
    running = EpochLoader(LOADERS["shuffle"](num_workers=2), 0)
    next(running.epoch(7, 0))
    assert [(b.indices, b.digest) for b in running.epoch(7, 1)] == list(
        zip(*seen(LOADERS["shuffle"](), 1)[1:], strict=True)
    )


@pytest.mark.parametrize("name", LOADERS)
def test_it_is_entered_at_any_batch_without_loading_what_was_passed(name, monkeypatch):
    loader = LOADERS[name]()
    batches, indices, digests = seen(loader, 2)
    calls = []
    for kind in (Augmented, Located, InBatches, TensorDataset):
        original = kind.__getitem__
        monkeypatch.setattr(kind, "__getitem__", lambda self, i, f=original: calls.append(i) or f(self, i))
    for start in {1, len(batches) // 2, len(batches) - 1}:
        calls.clear()
        scramble()
        rest = seen(LOADERS[name](), 2, start=start, digest=digests[start - 1])
        assert rest == (batches[start:], indices[start:], digests[start:])
        expected = sum(len(i) if isinstance(i, list) else 1 for i in indices[start:])
        assert expected <= len(calls) <= 3 * expected  # stacked and located datasets call more than once a sample
    assert seen(LOADERS[name](), 2, start=len(batches), digest=digests[-1]) == ([], [], [])


@pytest.mark.parametrize(
    "name", ["shuffle", "collate draws", "replacement", "no integers", "no batching", "reads batches"]
)
@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str)
def test_the_number_of_workers_changes_no_byte(name, options):
    expected = [seen(LOADERS[name](), epoch)[0] for epoch in range(2)]
    running = EpochLoader(LOADERS[name](**options), 0)
    assert [[repr(b.batch) for b in running.epoch(7, epoch)] for epoch in range(2)] == expected
    assert [repr(b.batch) for b in EpochLoader(LOADERS[name](**options), 0).epoch(7, 1, start=1)] == expected[1][1:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker:UserWarning")  # on two cores
def test_four_workers_too():
    assert seen(LOADERS["collate draws"](num_workers=4), 1) == seen(LOADERS["collate draws"](), 1)


def test_samples_drawn_twice_are_augmented_anew():
    batches, indices, _ = seen(DataLoader(data, batch_size=1, sampler=[3, 3, 3]), 0)
    assert indices == [[3]] * 3
    assert len(set(batches)) == 3


@pytest.mark.parametrize("name", LOADERS)
def test_the_main_generators_and_the_users_loader_are_left_alone(name):
    loader = LOADERS[name]()
    np.random.randn()  # leaves a second normal number pending, which is part of NumPy's state

    def state():
        _, keys, *rest = np.random.get_state()
        sampler = repr(vars(loader.sampler)), repr(getattr(loader.sampler, "indices", None))
        own = None if loader.generator is None else loader.generator.get_state().tolist()
        return random.getstate(), keys.tolist(), rest, torch.get_rng_state().tolist(), sampler, own

    before, attributes = state(), {k: id(v) for k, v in vars(loader).items()}
    batches = EpochLoader(loader, 0).epoch(7, 1)
    next(batches)
    assert state() == before  # between two batches, and
    list(batches)
    assert state() == before  # after the epoch
    assert {k: id(v) for k, v in vars(loader).items()} == attributes


def test_the_users_worker_init_fn_finds_the_users_dataset():
    class Opens(Dataset):
        handle = None

        def __len__(self):
            return 4

        def __getitem__(self, index):
            assert get_worker_info().dataset is self
            return torch.tensor(self.handle)

    def init(worker_id):
        get_worker_info().dataset.handle = 40 + worker_id

    loader = EpochLoader(DataLoader(Opens(), batch_size=2, num_workers=2, worker_init_fn=init), 0)
    assert [b.batch.tolist() for b in loader.epoch(7, 0)] == [[40, 40], [41, 41]]


class Remembers(Sampler):
    """Counts its own epochs where no copy of it can be brought back."""

    calls: ClassVar[list] = []

    def __iter__(self):
        self.calls.append(1)
        return iter(torch.randperm(SIZE, generator=torch.Generator().manual_seed(len(self.calls))).tolist())

    def __len__(self):
        return SIZE


class Hidden(Sampler):
    """Keeps its generator in a helper."""

    def __init__(self):
        self.helper = Holder()

    def __iter__(self):
        return iter(self.helper.generators[0].permutation(SIZE).tolist())

    def __len__(self):
        return SIZE


@pytest.mark.parametrize("sampler", [Remembers, Hidden])
def test_a_sampler_with_a_hidden_memory_is_an_error_in_any_epoch(sampler):
    with pytest.raises(DataOrderError, match=rf"sampler \({sampler.__name__}\) gives another order each time"):
        seen(DataLoader(data, batch_size=4, sampler=sampler()), 0)


def test_another_order_than_the_one_that_was_left_is_an_error():
    _, _, digests = seen(LOADERS["own batch sampler"](), 0)
    with pytest.raises(DataOrderError, match=r"other samples than when the run was left.*EpochBatches"):
        seen(LOADERS["own batch sampler"](), 1, start=2, digest=digests[1])


RNG = np.random.default_rng(0)


def _by_global(x):
    return RNG.random()


def _by_default(x, rng=np.random.default_rng(1)):  # noqa: B008
    return rng.random()


class Slotted:
    __slots__ = ("rng",)
    shared = random.Random(2)

    def __init__(self):
        self.rng = np.random.default_rng(2)

    def __call__(self, x):
        return self.rng.random() + self.shared.random()


@pytest.mark.parametrize(
    "transform",
    [_by_global, _by_default, Slotted(), partial(_by_default, rng=np.random.default_rng(3))],
    ids=["global", "default argument", "slots and class", "partial"],
)
def test_generators_are_seeded_wherever_transforms_keep_them(transform):
    class Transformed(Dataset):
        def __len__(self):
            return SIZE

        def __getitem__(self, index):
            return torch.tensor([index, transform(index)], dtype=torch.float64)

    loader = DataLoader(Transformed(), batch_size=4, shuffle=True)
    whole = seen(loader, 1)
    assert seen(loader, 1) == whole
    assert seen(loader, 1, start=2)[0] == whole[0][2:]


class Splits(DataLoader):
    def __iter__(self):
        for batch in super().__iter__():
            yield from batch.split(2)


def test_a_loader_that_yields_other_batches_than_it_draws_says_so():
    with pytest.raises(ValueError, match=r"Splits has an __iter__ of its own.*use a plain DataLoader"):
        seen(Splits(data, batch_size=4), 0)


def test_another_dataset_or_batch_size_is_an_error():
    _, _, digests = seen(LOADERS["shuffle"](), 0)
    for other in (
        DataLoader(data, batch_size=3, shuffle=True),
        DataLoader(Subset(data, range(12)), batch_size=4, shuffle=True),
    ):
        with pytest.raises(DataOrderError, match="dataset and batch size the same"):
            seen(other, 0, start=2, digest=digests[1])


def test_an_endless_sampler_is_drawn_lazily():
    class Endless(Sampler):
        def __iter__(self):
            while True:
                yield [random.randrange(12)]

    batches = EpochLoader(DataLoader(data, batch_sampler=Endless()), 0).epoch(7, 0)
    assert len([next(batches) for _ in range(200)]) == 200


def test_a_late_batch_is_entered_without_delay():
    """Batch 100,000 of a shuffled epoch: the sampler's own drawing and nothing else."""
    loader = EpochLoader(DataLoader(TensorDataset(torch.arange(400_004)), batch_size=4, shuffle=True), 0)
    started = time.perf_counter()
    batch = next(loader.epoch(7, 0, start=100_000))
    assert batch.indices is not None
    assert time.perf_counter() - started < 30  # no measurement, a guard against loading 400,000 samples


def test_random_order_of_finishing_is_refused():
    loader = DataLoader(data, batch_size=4, num_workers=2, in_order=False)
    with pytest.raises(ValueError, match=r"in_order=False.*use in_order=True"):
        EpochLoader(loader, 0)


class Stream(IterableDataset):
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for i in range(6):
            yield self.epoch * 10 + i + random.random() / 2


class Batches:
    set_epoch = Stream.set_epoch
    __iter__ = Stream.__iter__


@pytest.mark.parametrize(
    "make", [lambda: DataLoader(Stream(), batch_size=2), Batches], ids=["iterable dataset", "iterable"]
)
def test_iterables_are_told_the_epoch_seeded_and_fast_forwarded(make):
    whole = seen(make(), 3)[0]
    scramble()
    assert seen(make(), 3)[0] == whole
    assert seen(make(), 3, start=2)[0] == whole[2:]
    assert seen(make(), 4)[0] != whole
    before = random.getstate()
    seen(make(), 3)
    assert random.getstate() == before


def test_an_iterator_that_is_used_up_says_so():
    loader = EpochLoader(iter([1, 2]), 0)
    assert [b.batch for b in loader.epoch(7, 0)] == [1, 2]
    with pytest.raises(ValueError, match=r"no batch in epoch 1.*pass a DataLoader"):
        list(loader.epoch(7, 1))


def test_held_generators_are_found_wherever_they_are():
    holder, closed, bound = Holder(), np.random.default_rng(), Holder()

    def transform(x, keyword=None):
        return closed.random()

    class Data:
        def __init__(self):
            self.transforms = {"a": [holder], "b": (transform, bound.__call__)}

    found = held_generators(Data())
    assert {id(g) for g in found} == {id(g) for g in [*holder.generators, closed, *bound.generators]}


@pytest.mark.parametrize("generator", Holder().generators, ids=lambda g: type(g).__name__)
def test_reseeding(generator):
    def draw():
        if isinstance(generator, torch.Generator):
            return torch.rand(3, generator=generator).tolist()
        return [float(generator.random()) for _ in range(3)]

    reseed(generator, 2**33 + 5)
    first = draw()
    draw()
    reseed(generator, 2**33 + 5)
    assert draw() == first
    reseed(generator, 6)
    assert draw() != first


def test_what_is_hashed_of_indices_stays_as_checkpoints_have_it():
    assert _text([3, 10]) == b"[3, 10]"
    assert _text((3, 10)) == b"(3, 10)"
    assert _text([]) == b"[]"
    assert _text([3, (1, 2.5)]) == b"[3,[1,2.5]]"
    assert _text([True, 3]) == b"[True,3]"
    assert _text(np.int64(3)) == repr(np.int64(3)).encode()
    assert _text(torch.tensor([3, 10])) == b"[3, 10]"
