"""Functions over pixels, compiled by PyTorch's inductor when they are first needed, and done without where it fails."""

import warnings
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

MOST_CHANNELS = 32  # that are unrolled: a kernel grows with them, and so does the time to compile it
_PLAIN = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}  # what inductor compares


class Kernels:
    """Compiled functions; none any more, after a warning, once the compiler fails.

    Parameters
    ----------
    owner : str
        Who goes on without, more slowly: for the warning.
    *args, **kwargs
        Of ``torch.compile``.

    Attributes
    ----------
    broken : bool
        Whether the compiler has failed.
    """

    def __init__(self, owner: str, *args: Any, **kwargs: Any) -> None:
        self._owner, self._args, self._kwargs = owner, args, kwargs
        self._made: dict[Hashable, Callable[..., Any]] = {}
        self.broken: bool = False

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle what to compile with, not what was compiled."""
        return _again, (self._owner, self._args, self._kwargs)

    def has(self, function: Callable[..., Any], key: Hashable) -> bool:
        """Tell whether a function has been compiled under a key."""
        return (function, key) in self._made

    def run(self, function: Callable[..., Any], key: Hashable, *arguments: Any) -> Any:
        """Return what a function gives, compiled anew for each key, or None if the compiler fails.

        Parameters
        ----------
        function : callable
            A function of a module.
        key : hashable
            What kinds of arguments have in common that one program does well: types, memory formats.
        *arguments
            Of the function.
        """
        try:
            if (function, key) not in self._made:
                self._made[function, key] = self._compiled(function)
            return self._made[function, key](*arguments)
        except Exception as reason:
            self.broken = True
            why = " ".join(f"{type(reason).__name__}: {reason}".split())
            warnings.warn(f"{self._owner} goes on without compiled kernels, more slowly: {why:.300}", stacklevel=2)
            return None

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Code of its own, as torch.compile counts recompilations by code, whoever they are for.
        assert isinstance(function, FunctionType)
        own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        settings = dict(self._kwargs)
        if not self._args and not settings.keys() & {"backend", "mode", "options"}:
            settings["options"] = {
                # All sums of a pixel in one loop: by default it is cut at sixteen, and each part computes softmax.
                "cpp.max_horizontal_fusion_size": 4 * MOST_CHANNELS,
                "cpp.enable_tiling_heuristics": False,  # which give up vectors where channels come last
                "guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe,  # a call takes less: ours never change
            }
        compiled: Callable[..., Any] = torch.compile(own, *self._args, **settings)
        return compiled


def plain(integers: Tensor) -> Tensor:
    """Return integers in a type that compiled functions take: theirs, or int64."""
    return integers if integers.dtype in _PLAIN else integers.long()


def _again(owner: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kernels:
    return Kernels(owner, *args, **kwargs)
