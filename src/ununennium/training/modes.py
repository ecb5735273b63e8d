"""Train and eval mode, module by module."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class Modes:
    """The train or eval mode of every module in some modules, as it is now."""

    def __init__(self, *modules: nn.Module) -> None:
        self._modes = [(part, part.training) for module in modules for part in module.modules()]

    def restore(self) -> None:
        """Give every module its own mode back: a frozen BatchNorm stays frozen."""
        for module, training in self._modes:
            module.training = training


@contextmanager
def modes_restored(*modules: nn.Module) -> Iterator[None]:
    """Give every module its own mode back after a block."""
    modes = Modes(*modules)
    try:
        yield
    finally:
        modes.restore()
