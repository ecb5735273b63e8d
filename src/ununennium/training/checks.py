"""Arguments that can't be right, found before the first step."""

import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ununennium._arguments import integer
from ununennium.training.batches import describe
from ununennium.training.errors import BatchError


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device to train on: the one asked for, else CUDA, MPS or the CPU, whichever there is first.

    Raises
    ------
    ValueError
        If it is no device, or not on this machine.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device={device!r} is no device: use "cpu", "cuda", "cuda:1" or "mps"') from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    try:
        here = (resolved.index or 0) < there[resolved.type]
    except KeyError:
        here = _exists(resolved)
    if not here:
        found = ", ".join(f"{name}:{i}" for name, n in there.items() for i in range(n))
        raise ValueError(
            f"device {str(resolved)!r} is not on this machine, which has {found}: use one of these, or leave device "
            "out for the best one there is"
        )
    return resolved


def check_seed(seed: Any) -> None:
    """Raise unless a seed is None or an integer from which an order can be drawn."""
    if seed is not None and integer("seed", seed, minimum=0) >= 2**63:
        raise ValueError(f"seed must be below 2**63, got {seed}: take a smaller one")


def plain_mapping(name: str, value: Any) -> dict[str, Any]:
    """Return a mapping as a dict; raise for anything else."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of plain data, got {describe(value)}: give a dict")
    return dict(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def check_distributed(distributed: Any, backend: Any, sync_batchnorm: bool) -> None:
    """Raise for a kind of distribution that there is not, or settings of one that is not asked for."""
    if not isinstance(distributed, bool) and distributed != "fsdp":
        raise ValueError(f'distributed must be False, True or "fsdp", got {distributed!r}')
    if not distributed and (backend is not None or sync_batchnorm):
        name = "backend" if backend is not None else "sync_batchnorm"
        raise ValueError(f"{name} is for several processes: use it with distributed=True, or leave it out")


def check_compile(compiles: Any, channels_last: Any) -> None:
    """Raise unless ``compile`` is a bool or a mapping, and ``channels_last`` a bool or None."""
    if not isinstance(compiles, (bool, Mapping)):
        raise TypeError(
            f"compile must be True, False or a mapping of torch.nn.Module.compile's arguments, such as "
            f'{{"mode": "max-autotune"}}; got {compiles!r}'
        )
    if not (channels_last is None or isinstance(channels_last, bool)):
        raise TypeError(f"channels_last must be True, False or None (where it fits), got {channels_last!r}")


def check_sharding(loss_fn: Any, scales: bool, channels_last: bool | None) -> None:
    """Raise for what sharded training can't do."""
    if channels_last:
        raise ValueError(
            'distributed="fsdp" cuts parameters along their first dimension and keeps no memory format: leave '
            "channels_last out, or use distributed=True"
        )
    if scales:
        raise ValueError(
            'distributed="fsdp" and fp16: the loss scaler would judge each process\'s shard by itself, and processes '
            'would skip different steps. Use mixed_precision="bf16", or distributed=True'
        )
    if isinstance(loss_fn, nn.Module) and any(p.requires_grad for p in loss_fn.parameters()):
        raise ValueError(
            'distributed="fsdp" shards the model alone, and the loss has parameters of its own, whose gradients nobody '
            "would reduce: make it part of the model, or use distributed=True"
        )


def check_clip_norm(value: Any) -> None:
    """Raise unless ``value`` is None or a positive, finite number."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"gradient_clip_norm must be a finite number above 0, or None for no clipping, got {value!r}")


def check_list(name: str, value: Any) -> None:
    """Raise if a single callback or metric, or its class, was given where a list of them is meant."""
    if value is None or (isinstance(value, Iterable) and not isinstance(value, type) and not hasattr(value, "compute")):
        return
    kind = value.__name__ if isinstance(value, type) else type(value).__name__
    raise TypeError(f"{name} must be a list, got {describe(value)}: write {name}=[{kind}(…)]")


def check_loader(name: str, loader: Any) -> None:
    """Raise if a loader can't be iterated over or is known to be empty."""
    if isinstance(loader, type) or not isinstance(loader, Iterable):
        wrap = hasattr(loader, "__getitem__") and not isinstance(loader, type)
        hint = ": wrap the dataset, DataLoader(dataset, batch_size=…)" if wrap else ""
        raise TypeError(f"{name} must be a DataLoader or another iterable of batches, got {describe(loader)}{hint}")
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError:
        return
    if length == 0:
        raise ValueError(
            f"{name} is empty: its dataset has no samples, or fewer than one batch while drop_last=True drops it. "
            "Check the paths and the split, or make batch_size smaller"
        )


def check_passes(name: str, loader: Any, passes: int) -> None:
    """Raise if a loader is to be run through more often than it can be."""
    if passes > 1 and isinstance(loader, Iterator):
        raise ValueError(
            f"{name} is {describe(loader)}, which can be run through only once, but {passes} epochs need it {passes} "
            "times: pass a DataLoader, a list, or an object whose __iter__ starts anew"
        )


def check_model_and_loss(model: Any, loss_fn: Any) -> None:
    """Raise unless the model is a module and the loss can be called."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {describe(model)}")
    if not callable(loss_fn) or isinstance(loss_fn, type):
        raise TypeError(f"loss_fn must be callable with (outputs, targets), got {describe(loss_fn)}")


def check_optimizer(optimizer: Any, model: nn.Module, loss_fn: Any) -> None:
    """Raise unless all that the optimizer updates belongs to the model, or to a loss that learns."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS evaluates the loss several times a step, the Trainer once: use another optimizer")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {describe(optimizer)}")
    own = dict(model.named_parameters())
    known = {id(p) for p in own.values()}
    if isinstance(loss_fn, nn.Module):
        known |= {id(p) for p in loss_fn.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strange = [tuple(p.shape) for p in held if id(p) not in known]
    if strange:
        taken = {id(p) for p in held}
        left = [repr(name) for name, p in own.items() if p.requires_grad and id(p) not in taken]
        untrained = f", while it lacks the model's {', '.join(left[:4])}{', …' * (len(left) > 4)}" if left else ""
        raise ValueError(
            f"{len(strange)} of the optimizer's {len(held)} parameters are not the model's (the first has shape "
            f"{strange[0]}){untrained}. Training would not change the model as meant: create the optimizer from "
            "model.parameters() after the model is complete, its head replaced, say"
        )
    if not any(p.requires_grad for p in held):
        raise ValueError(
            "no parameter that the optimizer holds requires a gradient: unfreeze what is to be trained, "
            "parameter.requires_grad_(True)"
        )


def first_epoch(epochs: int, start_epoch: int, loaded: int | None) -> int:
    """Return the epoch to begin with; ``loaded`` is where a checkpoint that was loaded goes on.

    Raises
    ------
    TypeError, ValueError
        For a count that is no integer or out of range, or a start that contradicts the checkpoint.
    """
    integer("epochs", epochs, minimum=1)
    integer("start_epoch", start_epoch, minimum=0)
    if loaded is not None:
        if start_epoch not in (0, loaded):
            raise ValueError(
                f"start_epoch={start_epoch}, but the loaded checkpoint goes on at epoch {loaded}: leave start_epoch out"
            )
        return loaded
    if start_epoch >= epochs:
        raise ValueError(
            f"start_epoch={start_epoch} leaves nothing of epochs={epochs}, which is the final count: "
            f"to run {epochs} more, use epochs={start_epoch + epochs}"
        )
    return start_epoch


def make_floats(logs: dict[str, Any]) -> None:
    """Turn what callbacks have added to the logs into floats.

    Raises
    ------
    TypeError
        For what is no number, naming it.
    """
    for name, value in logs.items():
        if type(value) is not float:
            try:
                logs[name] = float(value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"the logs hold numbers, but a callback has set {name!r} to {describe(value)}: give a float"
                ) from error


def check_loss(loss: Any) -> None:
    """Raise unless a loss is a tensor with one number in it."""
    if not isinstance(loss, Tensor):
        raise BatchError(
            f"the loss must be a tensor that can be differentiated, but loss_fn gave {describe(loss)}: return one, "
            "without .item() or float(), and of several parts their sum"
        )
    if loss.ndim:
        raise BatchError(
            f"the loss must be one number, but loss_fn gave {describe(loss)}: end it with .mean(), or use "
            "reduction='mean'"
        )


def _exists(device: torch.device) -> bool:
    try:
        torch.empty(0, device=device)
    except Exception:  # whatever a backend raises that is not there
        return False
    return True


def check_transform(name: str, transform: Any) -> None:
    """Raise if a transform of batches can't be called."""
    if transform is not None and not callable(transform):
        raise TypeError(
            f"{name} must be a callable that takes a batch and returns the batch to use, got {describe(transform)}"
        )
