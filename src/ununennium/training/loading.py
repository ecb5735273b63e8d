"""Data order and randomness: which samples an epoch has, and what each draws, decided by (seed, epoch)."""

import copy
import hashlib
import os
import random
import signal
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
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
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    default_convert,
    get_worker_info,
)

from ununennium.training.errors import DataOrderError
from ununennium.training.random_state import RandomState

Key = tuple[int, ...]

_END = object()
_GENERATORS = (random.Random, np.random.RandomState, np.random.Generator, torch.Generator)

_SELF_CONTAINED = (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
_DRAWN_AT_ONCE = 64  # batches drawn ahead from a sampler that uses the global generators


class LoadedBatch(NamedTuple):
    """A batch and its place in the order.

    Attributes
    ----------
    batch : Any
        What the user's loader would yield.
    indices : Any
        What its sampler gave for it; None for iterables, whose indices nobody sees.
    digest : str
        Of all indices of the epoch up to and with these; equal orders have equal digests.
    counts : bool
        Whether the batch is of this process. False where a global batch has fewer samples than there are processes:
        one that would have none is given a sample of another, to be trained on without effect.
    """

    batch: Any
    indices: Any
    digest: str
    counts: bool = True


class EpochLoader:
    """The batches of each epoch of a loader, as a function of (seed, epoch), entered at any batch.

    For a `torch.utils.data.DataLoader` over a map-style dataset a twin of the user's loader runs, with the same
    dataset, collate function, workers and options. Its order is the user's sampler or batch sampler, copied, told the
    epoch if it has ``set_epoch``, and drawn lazily with generators of its own. Each sample is loaded, and each batch
    collated, with the global generators (``random``, NumPy, PyTorch's on the CPU), and those that the dataset's
    transforms hold, seeded from its place in that order: neither the number of workers nor a restart changes a byte,
    and batches that were passed are not loaded. The user's loader, its sampler and the main process's generators are
    left as they were.

    Any other iterable is told the epoch where it can be, and entered by loading what was passed; what it draws in this
    process is seeded from (seed, epoch), what its workers draw depends on their number.

    Parameters
    ----------
    loader : iterable of batches
        The user's loader.
    stream : int
        Tells loaders with the same seed apart.
    rank, size : int
        Which of how many processes this is. The loader's batch size is what one process takes; every process draws the
        same order, cuts it into batches for all, and loads its share of each.
    pads : bool, default True
        Give a process whose share is empty a sample of another, so that all run through as many batches; else it has
        fewer.
    pins : bool, default False
        Have batches in pinned memory, whatever the user's loader says, so that copying them to the device waits for
        nothing.

    Raises
    ------
    ValueError
        For a loader with ``in_order=False``, whose order is left to chance; for several processes over an iterable
        dataset, whose shares nobody can cut.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        stream: int,
        rank: int = 0,
        size: int = 1,
        pads: bool = True,
        pins: bool = False,
    ) -> None:
        self.loader = loader
        self._rank, self._size, self._pads = rank, size, pads
        self._stream = stream
        self._twin: DataLoader[Any] | None = None
        self._private: RandomState | None = None
        self._order: Order | None = None
        if size > 1 and not (isinstance(loader, (list, tuple)) or _is_mapped(loader)):
            raise ValueError(
                f"the loader ({type(loader).__name__}) can't be shared out among {size} processes exactly, as nobody "
                "knows what it will give: pass a DataLoader over a dataset with __getitem__ and __len__"
            )
        if not isinstance(loader, DataLoader):
            return
        if loader.num_workers and not getattr(loader, "in_order", True):
            raise ValueError(
                "the loader has in_order=False, so that its order depends on which worker is fastest and no run can be "
                "repeated or resumed: use in_order=True"
            )
        mapped = _is_mapped(loader)
        if not mapped and self._remembers():
            return
        self._twin = copy.copy(loader)
        changes: dict[str, Any] = {
            "generator": torch.Generator(),
            "worker_init_fn": _InitWorker(loader.worker_init_fn, mapped),
            "_iterator": None,
            "pin_memory": pins or loader.pin_memory,
        }
        if mapped:
            batched = loader.batch_sampler is not None
            self._order = Order(loader.batch_sampler or loader.sampler, rank, size, pads)
            changes |= {
                "batch_sampler": self._order,
                "dataset": Keyed(loader.dataset, loader.collate_fn, batched),
                "collate_fn": _as_it_is,
            }
        self._twin.__dict__.update(changes)  # DataLoader.__setattr__ forbids assigning a sampler

    def __len__(self) -> int:
        if self._order is not None:
            return len(self._order)
        return -(-len(self.loader) // self._size)  # type: ignore[arg-type]

    def end_workers(self) -> None:
        """End workers that persist; the garbage collector, to which a Trainer falls, would wait 5 seconds for each."""
        if self._twin is not None:
            self._twin._iterator = None

    def describe(self) -> dict[str, Any]:
        """Return what a run that goes on must have in common with the one that was left; None where it is unknown."""
        loader: Any = self.loader
        samples = _length(loader.dataset) if self._order is not None else None
        sizes = (getattr(source, "batch_size", None) for source in (loader, getattr(loader, "batch_sampler", None)))
        batch_size = next((size for size in sizes if isinstance(size, int)), None)
        return {
            "samples": samples,
            "batch_size": None if batch_size is None else batch_size * self._size,
            "batches": _length(self),
        }

    @cached_property
    def split(self) -> str | None:
        """Which samples a `torch.utils.data.Subset` takes of its dataset, as a digest; None of any other dataset."""
        dataset = getattr(self.loader, "dataset", None)
        hashed, samples = hashlib.sha256(), None
        while isinstance(dataset, Subset):
            indices = np.asarray(dataset.indices)
            hashed.update(repr(indices.tolist()).encode() if indices.dtype == object else indices.tobytes())
            samples = len(indices) if samples is None else samples
            dataset = dataset.dataset
        return None if samples is None else f"{samples} of {_length(dataset)} samples, digest {hashed.hexdigest()[:12]}"

    def state_dict(self) -> dict[str, Any] | None:
        """Return the position of an iterable loader that can tell it, between two batches; None of any other."""
        if self._order is not None or self._private is None or not self._remembers():
            return None
        random = self._private
        return {"loader": self.loader.state_dict(), "random": random.as_list()}  # type: ignore[attr-defined]

    def indices(self, seed: int, epoch: int, batches: range) -> dict[int, Any]:
        """Return what the sampler gives for some batches of an epoch, by batch; empty for iterables."""
        if self._order is None:
            return {}
        drawn = self._order.draw((seed, self._stream, epoch))
        return {number: indices for number, indices in islice(drawn, batches.stop) if number in batches}

    def epoch(
        self, seed: int, epoch: int, start: int = 0, digest: str | None = None, state: dict[str, Any] | None = None
    ) -> Iterator[LoadedBatch]:
        """Return the batches of one epoch of the run with this seed.

        Parameters
        ----------
        seed, epoch : int
            What the order is drawn from.
        start : int, default 0
            The first batch; those before it are passed.
        digest : str, optional
            What the order had drawn before ``start`` when it was left; compared with what it draws now.
        state : dict, optional
            What ``state_dict`` gave there: the loader goes on from it, instead of loading what was passed.

        Raises
        ------
        ValueError
            While iterating, if there is not a single batch.
        DataOrderError
            While iterating, if the order is another than the one that was left.
        """
        key = (seed, self._stream, epoch)
        if self._twin is not None:
            self._twin.generator.manual_seed(_seed(key))
        if self._order is not None:
            self._order.enter(key, start, digest)
            batches = self._mapped()
        else:
            batches = self._iterated(key, start, state)
        position = start
        try:
            for batch in batches:
                yield batch
                position += 1
        except Exception as error:
            error.add_note(f"This happened while batch {position} of epoch {epoch} was read.")
            raise
        if position == 0 and self._size == 1:
            raise ValueError(
                f"the loader ({type(self.loader).__name__}) gave no batch in epoch {epoch}. An iterator that can be "
                "run through only once serves one epoch: pass a DataLoader, or an object whose __iter__ starts anew."
            )

    def _mapped(self) -> Iterator[LoadedBatch]:
        assert self._twin is not None
        assert self._order is not None
        source: Iterable[Any] = self._twin
        if self._is_plain:
            source = map(self._twin.dataset.__getitems__, self._order)  # type: ignore[attr-defined]
        for batch in source:
            if not self._order.drawn:
                raise self._not_one_to_one()
            yield LoadedBatch(batch, *self._order.drawn.popleft())
        if self._order.drawn:
            raise self._not_one_to_one()

    @property
    def _is_plain(self) -> bool:
        """Whether the twin would do nothing but ask its dataset for each batch, in this process."""
        loader: Any = self._twin
        return not (loader.num_workers or loader.pin_memory) and type(loader).__iter__ is DataLoader.__iter__

    def _not_one_to_one(self) -> ValueError:
        return ValueError(
            f"{type(self.loader).__name__} has an __iter__ of its own that does not yield one batch for each that its "
            "sampler draws, so that nobody can tell which samples a batch holds: use a plain DataLoader, or put it "
            "behind an iterable of your own"
        )

    def _iterated(self, key: Key, start: int, state: dict[str, Any] | None) -> Iterator[LoadedBatch]:
        source: Any = self._twin if self._twin is not None else self.loader
        for told in (source, getattr(source, "dataset", None)):
            _set_epoch(told, key[-1])
        private = RandomState.seeded(_seed(key)) if not isinstance(source, (list, tuple)) else None
        left = None
        if state is not None:
            left = RandomState(*state["random"])
            with RandomState.capture(devices=False).put_back():  # it may begin to iterate
                source.load_state_dict(state["loader"])
        self._private = private
        passed = 0 if state is not None else start
        batches: Iterator[Any] = _with_generators(source, private, at_once=1, left=left)
        if self._size > 1:
            batches = _shared(batches, self._rank, self._size, self._pads)
        for number in range(passed):
            if next(batches, _END) is _END:
                raise DataOrderError(
                    f"the loader ended after {number} batches, and the run was left after {start} of this epoch: it "
                    "must give the same batches again"
                )
        for batch in batches:
            yield batch if isinstance(batch, LoadedBatch) else LoadedBatch(batch, None, "")

    def _remembers(self) -> bool:
        return all(callable(getattr(self.loader, name, None)) for name in ("state_dict", "load_state_dict"))


class Order:
    """The batch sampler of a twin: one epoch's indices, each batch with its key, drawn lazily.

    Parameters
    ----------
    sampler : iterable
        The user's batch sampler, or their sampler where there is none.
    rank, size, pads
        See `EpochLoader`. Batches of `BatchSampler` are drawn for all processes together and cut into shares, so that
        a batch for all holds the same samples whatever their number; of others each process takes one in turn.

    Attributes
    ----------
    drawn : deque of (indices, digest, counts)
        Of the batches drawn and not yet yielded by the loader.
    """

    def __init__(self, sampler: Any, rank: int = 0, size: int = 1, pads: bool = True) -> None:
        self.drawn: deque[tuple[Any, str, bool]] = deque()
        self._rank, self._size, self._pads = rank, size, pads
        self._cuts = type(sampler) is BatchSampler
        if size > 1 and self._cuts:
            sampler = BatchSampler(sampler.sampler, sampler.batch_size * size, sampler.drop_last)
        self._sampler = sampler
        self._key: Key = ()
        self._start = 0
        self._expected: str | None = None

    def enter(self, key: Key, start: int, digest: str | None) -> None:
        """Set the (seed, stream, epoch), the first batch and the digest expected there, for the next iteration."""
        self._key, self._start, self._expected = key, start, digest

    def __len__(self) -> int:
        sampler: Any = self._sampler
        if self._size == 1:
            return len(sampler)
        if not self._cuts:
            return -(-len(sampler) // self._size)
        samples, batch = len(_undivided(sampler.sampler)), sampler.batch_size
        return int(samples // batch if sampler.drop_last else -(-samples // batch))

    def draw(self, key: Key) -> Iterator[tuple[int, Any]]:
        """Draw the order of a (seed, stream, epoch) from its beginning: numbers of batches and their indices."""
        seeds = random.Random(_seed(key))
        sampler = _fresh(self._sampler, seeds, epoch=key[-1], divided=self._size == 1)
        private = None if _self_contained(sampler) else RandomState.seeded(seeds.getrandbits(32))
        drawn = _with_generators(sampler, private, _DRAWN_AT_ONCE)
        return enumerate(drawn if self._cuts or self._size == 1 else _together(drawn, self._size))

    def _check_repeatable(self) -> None:
        """Raise for a sampler that gives something else each time, though it is told the same."""
        seeds = random.Random(_seed(self._key))
        if _self_contained(_fresh(self._sampler, seeds, epoch=self._key[-1])):
            return
        first, second = ([_text(indices) for _, indices in islice(self.draw(self._key), 4)] for _ in range(2))
        if first != second:
            raise DataOrderError(
                f"the sampler ({self._name}) gives another order each time that it is asked, so that no run can be "
                "repeated or resumed: draw from the global generators, from a generator that is an attribute of the "
                "sampler, or from one made in __iter__ from set_epoch's epoch"
            )

    def __iter__(self) -> Iterator[tuple[Key, int, Any]]:
        self.drawn.clear()
        self._check_repeatable()
        digest = hashlib.blake2b(digest_size=16)
        end = -1
        for end, indices in self.draw(self._key):
            if end == self._start:
                self._compare(digest.hexdigest())
            digest.update(_text(indices))
            if end >= self._start:
                first, share, counts = (0, indices, True) if self._size == 1 else self._share(indices)
                if counts or self._pads:
                    self.drawn.append((indices, digest.hexdigest(), counts))
                    yield (*self._key, end), first, share
        if end < self._start:
            self._compare(digest.hexdigest(), ended=end + 1 < self._start)

    def _share(self, indices: Any) -> tuple[int, Any, bool]:
        """Return this process's share of a batch for all: the place of its first sample, its indices, if it has any."""
        if not self._cuts:
            counts = self._rank < len(indices)
            return self._rank, indices[self._rank if counts else 0], counts
        each, more = divmod(len(indices), self._size)
        first = self._rank * each + min(self._rank, more)
        share = indices[first : first + each + (self._rank < more)]
        return (first, share, True) if share else (0, indices[:1], False)

    @property
    def _name(self) -> str:
        return type(getattr(self._sampler, "sampler", self._sampler)).__name__

    def _compare(self, digest: str, ended: bool = False) -> None:
        if self._start and self._expected is not None and (ended or digest != self._expected):
            raise DataOrderError(
                f"the {self._start} batches before this point hold other samples than when the run was left, so it "
                f"can't go on exactly. The sampler ({self._name}) must be a function of its generators and "
                "set_epoch, and the dataset and batch size the same. To start the epoch anew, load the weights alone."
            )


class Keyed(Dataset[Any]):
    """A map-style dataset that loads and collates a whole batch, seeded from its place in the order.

    Parameters
    ----------
    dataset : Dataset
        The user's.
    collate : callable
        The user's collate function.
    batched : bool
        Whether the sampler gives lists of indices, or one index at a time.
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any], batched: bool) -> None:
        self.dataset = dataset
        self.collate = collate
        self.batched = batched
        self._at_once = batched and _reads_batches(dataset)
        self._draws = not (_draws_nothing(dataset) and collate in (default_collate, default_convert))
        self._held: list[Any] | None = None

    def __getitems__(self, place: tuple[Key, int, Any]) -> Any:
        """Return the collated batch at a (key, first place in that batch, indices)."""
        key, first, indices = place
        if not self._draws:
            return self.collate([self.dataset[i] for i in indices] if self.batched else self.dataset[indices])
        if self._held is None:
            self._held = held_generators(self.dataset)
        in_worker = get_worker_info() is not None
        with nullcontext() if in_worker else RandomState.capture(devices=False).put_back():
            words = _words(key, first, len(indices) if self.batched and not self._at_once else 1)
            if not self.batched or self._at_once:
                self._seed(next(words))
                samples = self.dataset.__getitems__(list(indices)) if self.batched else self.dataset[indices]
            else:
                samples = []
                for index, word in zip(indices, words, strict=True):
                    self._seed(word)
                    samples.append(self.dataset[index])
            return self.collate(samples)  # which draws on from where the last sample stopped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}  # a worker that was spawned looks for its own

    def _seed(self, word: tuple[int, int, int]) -> None:
        random.seed(word[0])
        np.random.seed(word[1])
        torch.default_generator.manual_seed(word[2])
        for number, generator in enumerate(self._held or ()):
            reseed(generator, word[0] + number + 1)


def held_generators(root: Any) -> list[Any]:
    """Return the random generators that objects reachable from a dataset keep for themselves.

    Looked through are attributes (also those in slots, and of classes), closures, default arguments, what
    `functools.partial` holds, the globals that functions and methods name, and containers of fewer than a thousand
    items. Not found is what does not exist yet when the first sample is loaded.
    """
    found: list[Any] = []
    seen: set[int] = set()
    todo = [root]
    while todo:
        value = todo.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _GENERATORS):
            found.append(value)
        elif isinstance(value, dict):
            todo += list(value.values()) if len(value) < 1000 else []
        elif isinstance(value, (list, tuple, set)):
            todo += list(value) if len(value) < 1000 else []
        elif not isinstance(value, (type, torch.Tensor, np.ndarray)):
            if type(value).__module__ != "builtins" or callable(value):
                todo += list(getattr(value, "__dict__", {}).values())
            todo += _of_function(value)
            if _is_foreign(type(value)):
                for kind in filter(_is_foreign, type(value).__mro__):
                    todo += list(vars(kind).values())  # methods among them, which may name globals
                    slots = vars(kind).get("__slots__", ())
                    names = (slots,) if isinstance(slots, str) else slots
                    todo += [getattr(value, name) for name in names if hasattr(value, name)]
            todo += [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _filled(cell)]
            todo += [bound for bound in [getattr(value, "__self__", None)] if bound is not None]
    return found


def _is_foreign(kind: type) -> bool:
    """Tell whether a class is neither Python's nor PyTorch's nor NumPy's, which keep no generators in classes."""
    package = kind.__module__.split(".")[0]
    return package not in sys.stdlib_module_names and package not in ("torch", "numpy", "torchvision")


def _of_function(value: Any) -> list[Any]:
    """Return what a function or `functools.partial` holds: defaults, arguments, and generators among its globals."""
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    code, names = getattr(value, "__code__", None), getattr(value, "__globals__", None)
    if code is None or names is None:
        return []
    named = [names[name] for name in code.co_names if isinstance(names.get(name), _GENERATORS)]
    return [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *named]


def reseed(generator: Any, seed: int) -> None:
    """Seed a generator of any of the four kinds."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed & 0xFFFFFFFF)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed & 0xFFFFFFFF)


class _InitWorker:
    """Run the user's ``worker_init_fn`` where it finds the user's dataset, in a worker that only its parent ends."""

    def __init__(self, function: Callable[[int], None] | None, keyed: bool) -> None:
        self.function, self.keyed = function, keyed

    def __call__(self, worker_id: int) -> None:
        _leave_signals_to_the_parent()
        _forget_open_files()
        info = get_worker_info()
        if self.keyed:
            object.__setattr__(info, "dataset", info.dataset.dataset)  # type: ignore[union-attr]
        if self.function is not None:
            self.function(worker_id)


def _forget_open_files() -> None:
    """Close, in a worker, the files that TorchGeo has cached: a forked one would share its parent's places in them."""
    dataset = getattr(sys.modules.get("torchgeo.datasets.geo"), "RasterDataset", None)
    forget = getattr(getattr(dataset, "_cached_load_warp_file", None), "cache_clear", None)
    if forget is not None:
        forget()


def _leave_signals_to_the_parent() -> None:
    """Let a worker outlive signals that a terminal or scheduler sends to all: the parent still needs its batches.

    SIGTERM is what the parent itself ends its workers with, so it is answered if it comes from there.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return  # on macOS, SIGTERM ends a worker whoever sends it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, name="SIGTERM", daemon=True).start()


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:
        return None


def _as_it_is(value: Any) -> Any:
    return value


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _with_generators(
    iterable: Iterable[Any], private: RandomState | None, at_once: int, left: RandomState | None = None
) -> Iterator[Any]:
    """Iterate with the global generators exchanged for private ones while items are drawn, some at a time.

    ``left`` is where the private ones were left by an earlier iteration that this one takes up.
    """
    if private is None:
        yield from iterable
        return
    with private.swapped_in():
        iterator = iter(iterable)
    if left is not None:
        private.python, private.numpy, private.torch = left.python, left.numpy, left.torch
    while True:
        with private.swapped_in():
            items = [copy.copy(item) if at_once > 1 else item for item in islice(iterator, at_once)]
        yield from items  # never inside the exchange: what runs between is not ours
        if len(items) < at_once:
            return


def _words(key: Key, first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Hash a key to 3 × 32 bits, all that PyTorch's CPU generator uses of a seed, for ``count`` places in a batch."""
    digest = hashlib.shake_128(struct.pack(f"<{len(key)}q", *key)).digest(12 * (first + count))
    return struct.iter_unpack("<3I", digest[12 * first :])


def _seed(key: Key) -> int:
    return next(_words(key, 0, 1))[0]


def _text(indices: Any) -> bytes:
    """Return what is hashed of indices: their values, of objects without a value of their own nothing but the type."""
    if isinstance(indices, (list, tuple)):
        if set(map(type, indices)) <= {int}:
            return repr(indices).encode()
        return b"[" + b",".join(map(_text, indices)) + b"]"
    if isinstance(indices, (int, float, str, bytes, slice, np.generic, type(None))):
        return repr(indices).encode()
    if isinstance(indices, (torch.Tensor, np.ndarray)):
        return repr(indices.tolist()).encode()
    text = repr(indices)
    return (type(indices).__qualname__ if " at 0x" in text else text).encode()


def _set_epoch(target: Any, epoch: int) -> None:
    """Tell an object the epoch, if it has the ``set_epoch`` that PyTorch's samplers have."""
    method = getattr(target, "set_epoch", None)
    if callable(method):
        method(epoch)


def _is_mapped(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _together(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield so many items at a time, the last time what is left."""
    while group := list(islice(items, size)):
        yield group


def _shared(batches: Iterator[Any], rank: int, size: int, pads: bool) -> Iterator[LoadedBatch]:
    """Yield one process's batches of a list."""
    for group in _together(batches, size):
        if rank < len(group) or pads:
            counts = rank < len(group)
            yield LoadedBatch(group[rank if counts else 0], None, "", counts)


def _undivided(sampler: Any) -> Any:
    """Return a sampler that a user divided among processes as the whole that it divides."""
    if not isinstance(sampler, DistributedSampler):
        return sampler
    whole = copy.copy(sampler)
    whole.num_replicas, whole.rank = 1, 0
    whole.num_samples = whole.total_size = len(sampler.dataset)  # type: ignore[arg-type]
    return whole


def _fresh(sampler: Any, seeds: random.Random, epoch: int, divided: bool = True) -> Any:
    """Copy a sampler, and the samplers in it, with generators seeded anew and told the epoch.

    With ``divided=False`` a `DistributedSampler` is taken for the whole that it divides: who shares out is not it.
    """
    twin = copy.copy(sampler if divided else _undivided(sampler))
    for name, value in list(getattr(twin, "__dict__", {}).items()):
        fresh: Any
        if isinstance(value, torch.Generator) or (value is None and name == "generator"):
            fresh = torch.Generator().manual_seed(seeds.getrandbits(32))
        elif isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
            fresh = copy.deepcopy(value)
            reseed(fresh, seeds.getrandbits(32))
        elif isinstance(value, Sampler):
            fresh = _fresh(value, seeds, epoch, divided)
        elif isinstance(value, (list, dict, set, np.ndarray)):
            fresh = copy.copy(value)  # some samplers shuffle their own list in place
        else:
            continue
        twin.__dict__[name] = fresh
    _set_epoch(twin, epoch)
    return twin


def _self_contained(sampler: Any) -> bool:
    """Tell whether a sampler is known to draw from its own generator alone."""
    if type(sampler) is BatchSampler:
        return _self_contained(sampler.sampler)
    return type(sampler) in _SELF_CONTAINED or isinstance(sampler, (list, tuple, range))


def _reads_batches(dataset: Any) -> bool:
    """Tell whether a dataset reads a batch at once; Subset and StackDataset have ``__getitems__`` and may only loop."""
    if isinstance(dataset, Subset) and type(dataset).__getitems__ is Subset.__getitems__:
        return _reads_batches(dataset.dataset)
    if type(dataset) is StackDataset:
        parts = dataset.datasets
        return any(map(_reads_batches, parts.values() if isinstance(parts, dict) else parts))
    return callable(getattr(dataset, "__getitems__", None))


def _draws_nothing(dataset: Any) -> bool:
    """Tell whether loading a sample is known to draw nothing: tensors, and parts and chains of them."""
    if type(dataset) is Subset:
        return _draws_nothing(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(_draws_nothing, dataset.datasets))
    if type(dataset) is StackDataset:
        parts = dataset.datasets
        return all(map(_draws_nothing, parts.values() if isinstance(parts, dict) else parts))
    return type(dataset) is TensorDataset
