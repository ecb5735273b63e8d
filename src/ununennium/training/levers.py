"""What makes training faster and changes nothing that is meant: memory layout, compilation, fused optimizer steps."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ununennium.training.errors import causes
from ununennium.training.random_state import RandomState

P = ParamSpec("P")
T = TypeVar("T")

_FUSED = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD


class Levers:
    """The layout and the compilation of a model, each undone where a first batch shows that it does not work.

    Parameters
    ----------
    model : nn.Module
        On its device; changed in place.
    loss_fn : callable
        Compiled with the model, if it is a module with a ``compile`` of its own.
    channels_last : bool or None
        Keep the weights of 2-D convolutions with the channels last in memory, so that their outputs are, too, and every
        convolution takes its quickest way. None does so if the model has any, and goes back if it can't work on that.
    compiles : bool or mapping
        Compile with `nn.Module.compile`, whose arguments a mapping gives.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Any, channels_last: bool | None, compiles: bool | Mapping[str, Any]
    ) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._undoes: dict[str, tuple[Callable[[BaseException], bool], Callable[[], object]]] = {}
        if channels_last or (channels_last is None and any(isinstance(m, nn.Conv2d) for m in model.modules())):
            model.to(memory_format=torch.channels_last)
            if channels_last is None:
                back = "the model needs tensors with the channels first, and is run so (channels_last=False)"
                self._undoes[back] = _is_of_layout, lambda: _contiguous(model)
        if compiles is not False and not _is_compiled(model):
            options = {} if compiles is True else dict(compiles)
            model.compile(**options)
            if isinstance(loss_fn, nn.Module) and type(loss_fn).compile is not nn.Module.compile:
                loss_fn.compile()
            self._undoes["the model can't be compiled here, and is run as it is"] = _is_of_compiler, self._uncompile

    def guarded(self, run: Callable[P, T]) -> Callable[P, T]:
        """Return what runs a first batch: undoing what it fails for and running it again, as if for the first time."""
        return lambda *args, **options: self._run(lambda: run(*args, **options))

    def _run(self, run: Callable[[], T]) -> T:
        undone: dict[str, Exception] = {}
        while self._undoes:
            random, buffers = RandomState.capture(), [(b, b.clone()) for b in self._model.buffers()]
            try:
                result = run()
            except Exception as error:
                names = [name for name, (fits, _) in self._undoes.items() if fits(error)]
                if not names:
                    raise
                undone[names[0]] = error
                self._undoes.pop(names[0])[1]()
                random.restore()
                with torch.no_grad():
                    for buffer, before in buffers:
                        buffer.copy_(before)
            else:
                _tell(undone)
                return result
        result = run()
        _tell(undone)
        return result

    def _uncompile(self) -> None:
        for module in (self._model, self._loss_fn):
            if isinstance(module, nn.Module):
                module._compiled_call_impl = None


def fuse(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Have an optimizer of PyTorch's take its step in one kernel, if its user left that choice to PyTorch.

    That is Adam, AdamW and SGD that were given neither ``fused`` nor ``foreach`` and have not stepped yet.
    """
    if type(optimizer) not in _FUSED or optimizer.state or any(getattr(m, "sparse", False) for m in model.modules()):
        return
    groups = optimizer.param_groups
    tensors = [p for group in groups for p in group["params"]]
    if any(isinstance(group["lr"], Tensor) or group.get("differentiable") for group in groups):
        return
    if all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps") for p in tensors):
        for group in groups:
            if group.get("fused") is None and group.get("foreach") is None:
                group["fused"] = True


def _tell(undone: Mapping[str, Exception]) -> None:
    for what, error in undone.items():
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"{what}: {reason:.300}", stacklevel=2)


def _is_of_layout(error: BaseException) -> bool:
    return any("view size is not compatible" in str(e) for e in causes(error))


def _is_of_compiler(error: BaseException) -> bool:
    return any(type(e).__module__.startswith(("torch._dynamo", "torch._inductor")) for e in causes(error))


def _is_compiled(model: nn.Module) -> bool:
    return model._compiled_call_impl is not None or hasattr(model, "_orig_mod")


def _contiguous(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.contiguous()
