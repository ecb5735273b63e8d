"""The global random generators, taken and put back."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def mixed(*numbers: int) -> int:
    """Return a 32-bit seed that differs for different numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "little")


@dataclass
class RandomState:
    """States of the generators that code draws from without naming one.

    Attributes
    ----------
    python, numpy : state of ``random`` and of ``numpy.random``.
    torch : state of PyTorch's CPU generator, a tensor of uint8.
    devices : states of the accelerators' generators, in the order of the devices; empty while none was used.
    """

    python: Any
    numpy: Any
    torch: Tensor
    devices: list[Tensor]

    @classmethod
    def capture(cls, devices: bool = True) -> "RandomState":
        """Read the present states; with ``devices=False`` the host's alone, which no accelerator is asked for."""
        states: list[Tensor] = []
        if devices and torch.cuda.is_available() and torch.cuda.is_initialized():
            states = torch.cuda.get_rng_state_all()
        elif devices and torch.backends.mps.is_available():
            states = [torch.mps.get_rng_state()]
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), states)

    @classmethod
    def seeded(cls, seed: int) -> "RandomState":
        """Return the states that seeding everything on the CPU with one 32-bit number gives."""
        python, numpy = random.Random(seed).getstate(), np.random.RandomState(seed).get_state()
        return cls(python, numpy, torch.Generator().manual_seed(seed).get_state(), [])

    def as_list(self) -> list[Any]:
        """Return the states as plain data, from which ``RandomState(*…)`` makes them again."""
        return [self.python, self.numpy, self.torch, self.devices]

    def restore(self) -> None:
        """Put the states back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.devices and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.devices[: torch.cuda.device_count()])
        elif self.devices and torch.backends.mps.is_available():
            torch.mps.set_rng_state(self.devices[0])

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Put these states back after a block, whatever it draws."""
        try:
            yield
        finally:
            self.restore()

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run a block with these states as the global ones; both sides go on afterwards where they were."""
        with RandomState.capture(devices=False).put_back():
            self.restore()
            try:
                yield
            finally:
                inside = RandomState.capture(devices=False)
                self.python, self.numpy, self.torch = inside.python, inside.numpy, inside.torch
