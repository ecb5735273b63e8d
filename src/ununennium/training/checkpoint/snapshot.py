"""What a checkpoint holds of a run, gathered and put back under names that do not depend on wrappers."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ununennium.training.checkpoint.format import Contents
from ununennium.training.checkpoint.plain import pack
from ununennium.training.checkpoint.shards import sharded_as
from ununennium.training.distributed import is_sharded
from ununennium.training.errors import CheckpointError
from ununennium.training.precision import Precision
from ununennium.training.random_state import RandomState
from ununennium.training.state import TrainState


class Stateful(Protocol):
    """Something with a memory; what averages weights gives them under "averaged", the raw ones under "model"."""

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""


def _alone(value: Any) -> list[Any]:
    return [value]


class Entry(NamedTuple):
    """Where a restored run goes on: what is put in place at the last moment before it does."""

    random: RandomState | None
    loader: dict[str, Any] | None


class Run(NamedTuple):
    """The parts of a run that a checkpoint holds.

    Attributes
    ----------
    settings : dict
        What a run that goes on must have in common with the one that was left.
    figures, loader : dict or None
        Sums and position inside an epoch; None between epochs, and for loaders that are entered by counting.
    about : dict
        What the manifest says beside it, plain data: what the model can be made of anew, the run's configuration.
    """

    model: nn.Module
    loss_fn: Any
    optimizer: torch.optim.Optimizer
    precision: Precision
    callbacks: Sequence[Stateful]
    state: TrainState
    settings: dict[str, Any]
    figures: dict[str, Any] | None = None
    loader: dict[str, Any] | None = None
    about: Mapping[str, Any] = MappingProxyType({})


def gather(run: Run, over: Callable[[Any], list[Any]] = _alone, entry: Entry | None = None) -> Contents:
    """Collect everything that the next step depends on. Tensors are the live ones, not copies.

    Parameters
    ----------
    run : Run
        Its parts.
    over : callable
        ``over(value)`` returns what every process has, by rank, to all of them.
    entry : Entry, optional
        Where the run goes on, if it was restored and has not gone on yet.
    """
    weights, extra = model_state(run.model)
    memories = [(c, _class_name(c), dict(c.state_dict())) for c in run.callbacks]
    averaged: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for callback, name, memory in memories:
        if _averages(callback):
            averaged = memory.pop("averaged")
            weights |= memory.pop("model")
            if averaged:
                about = {"averaged": {"callback": name.rpartition(".")[2], "default": memory["default"]}}
    loss_fn, state = run.loss_fn, run.state
    random = (entry.random if entry is not None else None) or RandomState.capture()
    own, *others = over({"random": random.as_list(), "figures": run.figures})
    training = {
        "state": state.state_dict(),
        "settings": run.settings,
        "figures": own["figures"],
        "loader": entry.loader if entry is not None else run.loader,
        "optimizer": _optimizer_state(run.optimizer, _names(run.model, loss_fn)),
        "precision": run.precision.state_dict(),
        "callbacks": [[name, memory] for c, name, memory in memories if not _looks_on(c)],
        "onlookers": [[name, memory] for c, name, memory in memories if _looks_on(c)],
        "random": own["random"],
        "others": others,  # the same of the other processes, by rank
        "loss": dict(loss_fn.state_dict()) if isinstance(loss_fn, nn.Module) else {},
        "extra": extra,
        "unsaved": _unsaved_buffers(run.model),
        "trained": [name for name, p in _canonical_parameters(run.model) if p.requires_grad],
    }
    figures = state.records[-1][1] if state.records else {}
    position = {"epoch": state.epoch, "batch": state.batch, "optimizer_steps": state.optimizer_steps}
    info = {"run": state.run, "position": position, "figures": figures, **run.about, **about}
    parameters = frozenset(name for name, _ in _canonical_parameters(run.model))
    return Contents(weights, training, info, parameters, averaged)


def check_memories(memories: Mapping[str, dict[str, Any]]) -> None:
    """Raise if what a checkpoint would have to hold is no plain data, naming where."""
    for name, memory in memories.items():
        pack(memory, {}, name)


def of_rank(contents: Contents, rank: int, size: int) -> tuple[list[Any] | None, list[dict[str, Any]]]:
    """Return a process's random state, if it had one, and the sums that it goes on from.

    Among as many processes as before each goes on from its own sums; else process 0 takes over those of all.
    """
    training = contents.training
    ranks = [{"random": training["random"], "figures": training["figures"]}, *training.get("others", [])]
    mine = ranks[rank : rank + 1] if len(ranks) == size else ranks if rank == 0 else []
    random = ranks[rank]["random"] if rank < len(ranks) else None
    return random, [part["figures"] for part in mine if part["figures"] is not None]


def restore(contents: Contents, run: Run) -> Entry:
    """Put everything back where `gather` took it from; what waits for the last moment is returned.

    Raises
    ------
    CheckpointError
        If settings, model, loss, optimizer or callbacks are not the checkpoint's, naming the difference; model and
        optimizer are as they were then.
    """
    model, loss_fn, optimizer = run.model, run.loss_fn, run.optimizer
    training = contents.training
    _compare(training["settings"], run.settings)
    weights = matched_weights(contents, model)
    groups = _optimizer_groups(training["optimizer"], optimizer, _names(model, loss_fn))
    callbacks = [c for c in run.callbacks if not _looks_on(c)]
    there, here = [name for name, _ in training["callbacks"]], [_class_name(c) for c in callbacks]
    if there != here:
        raise CheckpointError(
            f"the checkpoint's callbacks with a memory are {there}, the Trainer's {here}: pass the same ones in the "
            "same order, or take the weights alone with Trainer.load_weights"
        )
    own_loss = loss_fn.state_dict() if isinstance(loss_fn, nn.Module) else {}
    if _shapes(training["loss"]) != _shapes(own_loss):
        raise CheckpointError(
            f"the checkpoint's loss holds {_some(training['loss'])} and the Trainer's {_some(own_loss)}, or in other "
            "shapes: pass the same loss, or take the weights alone with Trainer.load_weights"
        )
    memories = list(zip(callbacks, training["callbacks"], strict=True))
    left = list(training.get("onlookers", []))
    for callback in (c for c in run.callbacks if _looks_on(c)):
        own = next((memory for memory in left if memory[0] == _class_name(callback)), None)
        if own is not None:
            left.remove(own)
            memories.append((callback, own))
    for callback, (name, callback_state) in memories:
        memory = {**callback_state, "averaged": contents.averaged} if _averages(callback) else callback_state
        try:
            callback.load_state_dict(memory)  # first, since it may raise
        except Exception as error:
            error.add_note(f"This happened in load_state_dict of {name}, while a checkpoint was restored.")
            raise
    load_weights(model, weights)
    if own_loss:
        loss_fn.load_state_dict(training["loss"])
    _load_optimizer(optimizer, groups)
    for name, parameter in _canonical_parameters(model) if "trained" in training else ():
        parameter.requires_grad_(name in training["trained"])  # as a callback that freezes or frees has left it
    unsaved = training.get("unsaved", {})
    for name, buffer in _unsaved_buffers(model).items():
        if name in unsaved and unsaved[name].shape == buffer.shape:
            buffer.copy_(unsaved[name])
    run.precision.load_state_dict(training["precision"])
    run.state.load_state_dict(training["state"])
    return Entry(None, training["loader"])


def _looks_on(callback: Any) -> bool:
    """Tell whether a run can be resumed with or without a callback."""
    return bool(getattr(callback, "looks_on", False))


def _averages(callback: Any) -> bool:
    """Tell whether a callback's memory holds weights."""
    return bool(getattr(callback, "averages_weights", False))


def _compare(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise for the first setting in which a run differs from the one that was left."""
    for name, value in here.items():
        if name in there and there[name] != value:
            before, now = _differing(there[name], value)
            raise CheckpointError(
                f"the checkpoint's run had {name}={before!r}, this one has {now!r}, so that it can't go "
                "on as if it had not been left: pass the same, or take the weights alone with Trainer.load_weights"
            )


def _differing(there: Any, here: Any) -> tuple[Any, Any]:
    """Return of two mappings the parts in which they differ, of anything else both."""
    if not (isinstance(there, Mapping) and isinstance(here, Mapping)):
        return there, here
    alike = {name for name in there.keys() & here.keys() if there[name] == here[name]}
    before, now = ({k: v for k, v in values.items() if k not in alike} for values in (there, here))
    return before, now


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Load whole weights, also into a model that is sharded."""
    own = model.state_dict()
    cut = {name: sharded_as(own[name], w) if isinstance(w, Tensor) else w for name, w in weights.items()}
    model.load_state_dict(cut)


def model_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a model's tensors by canonical name, and what else its ``state_dict`` has."""
    everything = {canonical(name): value for name, value in unwrapped(model).state_dict().items()}
    weights = {name: value for name, value in everything.items() if isinstance(value, Tensor)}
    return weights, {name: value for name, value in everything.items() if name not in weights}


def matched_weights(contents: Contents, model: nn.Module) -> dict[str, Any]:
    """Return a checkpoint's weights as the ``state_dict`` of a model, wrapped or compiled however.

    Raises
    ------
    CheckpointError
        If names or shapes differ.
    """
    there = {**contents.model, **contents.training["extra"]}
    own = model.state_dict()
    inner = {canonical(name): name for name in unwrapped(model).state_dict()}
    prefix = next(iter(own), "").removesuffix(next(iter(unwrapped(model).state_dict()), ""))
    missing, unexpected = inner.keys() - there.keys(), there.keys() - inner.keys()
    if missing or unexpected:
        raise CheckpointError(
            f"the checkpoint is of another model: it lacks {_some(missing)}, and the model has no {_some(unexpected)}: "
            "make the model with the arguments that it was trained with"
        )
    weights = {prefix + inner[name]: value for name, value in there.items()}
    for name, value in sorted(weights.items()):
        if isinstance(value, Tensor) and value.shape != own[name].shape:
            raise CheckpointError(
                f"the checkpoint is of another model: {name} has shape {tuple(value.shape)} there and "
                f"{tuple(own[name].shape)} in the model: make it with the arguments that it was trained with"
            )
    return weights


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's module inside `torch.compile` and `DistributedDataParallel`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def canonical(name: str) -> str:
    """Return a parameter's name without what compiling a part of the model puts in."""
    return name.replace("_orig_mod.", "")


def _canonical_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(canonical(name), p) for name, p in unwrapped(model).named_parameters(remove_duplicate=False)]


def _unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a model leaves out of its ``state_dict``; a forward may change them all the same."""
    inner = unwrapped(model)
    saved = inner.state_dict().keys()
    return {canonical(name): buffer for name, buffer in inner.named_buffers() if name not in saved}


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in state.items()}


def _names(model: nn.Module, loss_fn: Any) -> dict[int, str]:
    names = {id(p): canonical(name) for name, p in unwrapped(model).named_parameters()}
    if isinstance(loss_fn, nn.Module):
        names |= {id(p): f"loss_fn.{name}" for name, p in loss_fn.named_parameters() if id(p) not in names}
    return names


def _optimizer_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """Key the optimizer's state by parameter name instead of by position."""
    order = [names[id(p)] for p in _parameters(optimizer)]
    saved = optimizer.state_dict()
    return {
        "class": _class_name(optimizer),
        "options": _options(optimizer),
        "more": {k: v for k, v in saved.items() if k not in ("state", "param_groups")},
        "groups": [{**group, "params": [order[i] for i in group["params"]]} for group in saved["param_groups"]],
        "state": {order[i]: value for i, value in saved["state"].items()},
    }


def _optimizer_groups(saved: dict[str, Any], optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """Turn state by parameter name into what ``Optimizer.load_state_dict`` takes."""
    if saved["class"] != _class_name(optimizer):
        raise CheckpointError(
            f"the checkpoint's optimizer is {saved['class']}, the Trainer's {_class_name(optimizer)}: pass the same, "
            "or take the weights alone with Trainer.load_weights"
        )
    own = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if own != [group["params"] for group in saved["groups"]]:
        there = {name for group in saved["groups"] for name in group["params"]}
        here = {name for group in own for name in group}
        raise CheckpointError(
            f"the optimizer's parameter groups are not the checkpoint's: only there {_some(there - here)}, only here "
            f"{_some(here - there)}, {len(saved['groups'])} groups there and {len(own)} here: make it with the same, "
            "or take the weights alone with Trainer.load_weights"
        )
    parameters = _parameters(optimizer)
    index = {name: i for i, name in enumerate(name for group in own for name in group)}
    state = {index[name]: value for name, value in saved["state"].items()}
    _compare(saved.get("options", {}), _options(optimizer))
    return {
        **saved.get("more", {}),
        "param_groups": [{**group, "params": [index[n] for n in group["params"]]} for group in saved["groups"]],
        "state": {i: {k: _like(parameters[i], v) for k, v in value.items()} for i, value in state.items()},
    }


_MAY_CHANGE = ("lr", "foreach", "fused", "capturable", "differentiable")  # the rate is part of what is restored


def _options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the options that an optimizer was made with, as far as a schedule or the machine does not change them."""
    return {f"optimizer {k}": v for k, v in optimizer.defaults.items() if k not in _MAY_CHANGE and _is_plain(v)}


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, tuple, type(None)))


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state; in its own types, though PyTorch turns it into the parameter's."""
    optimizer.load_state_dict(state)
    for index, parameter in enumerate(_parameters(optimizer)):
        own = optimizer.state.get(parameter, {})
        for name, value in state["state"].get(index, {}).items():
            if isinstance(value, Tensor) and isinstance(own.get(name), Tensor) and own[name].dtype != value.dtype:
                own[name] = value.to(own[name].device)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _like(parameter: Tensor, value: Any) -> Any:
    """Lay a state tensor out as its parameter is, so that channels_last stays what it was."""
    if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
        if is_sharded(parameter):
            return sharded_as(parameter, value)
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return value


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _some(names: set[str] | Any) -> str:
    listed = sorted(names)
    return (
        f"{', '.join(listed[:5])}{f' and {len(listed) - 5} more' if len(listed) > 5 else ''}" if listed else "nothing"
    )
