"""The processes that train together: sums over all of them, their votes, and the gradient's reduction.

One process alone has the same interface, in which every reduction is the identity.
"""

import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ununennium.training.errors import ProcessError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Group:
    """The processes that train together.

    Parameters
    ----------
    device : torch.device
        Where tensors are that are summed.
    rank, size : int
        Number of this process, and how many there are. One alone needs no process group.

    Attributes
    ----------
    leads : bool
        Whether this is process 0, which prints and writes.
    sharded : nn.Module or None
        The model whose parameters are sharded over the processes.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device, self.rank, self.size = device, rank, size
        self.leads = rank == 0
        self.sharded: Any = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, on the device."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        self._call(dist.all_reduce, total)
        return total

    def any(self, wish: bool) -> bool:
        """Tell whether a process wants something."""
        return wish if self.size == 1 else bool(self.sum(torch.tensor(float(wish))).item())

    def gather(self, value: Any) -> list[Any]:
        """Return what every process has, by rank, to all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._call(dist.all_gather_object, values, value)
        return values

    def of_leader(self, make: Callable[[], Any]) -> Any:
        """Return what process 0 makes, to all; an error in making it is raised by all."""
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]
        if self.leads:
            try:
                made = [make(), None]
            except Exception as error:
                made = [None, error]
        self._call(dist.broadcast_object_list, made, 0)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def follow_leader(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have in process 0."""
        if self.size == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor.detach())
        for alike in by_type.values():  # one message a type
            together = torch.cat([tensor.reshape(-1) for tensor in alike])
            self._call(dist.broadcast, together, 0)
            parts = together.split([tensor.numel() for tensor in alike])
            for tensor, part in zip(alike, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def shard(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Shard a model's parameters over the processes with FSDP2, and point the optimizer at the shards.

        Blocks with a fair part of the parameters are gathered one at a time, the rest with the whole model; in their
        own type, which autocast turns into a lower one where it does so in one process, since BatchNorm's statistics
        go with no other.

        Parameters
        ----------
        model : nn.Module
            Changed in place; all processes begin with the weights of process 0.
        optimizer : torch.optim.Optimizer
            Its groups hold the sharded parameters afterwards, in the same order.

        Raises
        ------
        ValueError
            If the optimizer has taken a step already.
        """
        from torch.distributed.device_mesh import init_device_mesh  # they take seconds
        from torch.distributed.fsdp import fully_shard

        if optimizer.state:
            raise ValueError('distributed="fsdp" needs an optimizer that has not stepped: make a new one, and load')
        self.follow_leader([*model.parameters(), *model.buffers()])
        names = {id(p): name for name, p in model.named_parameters()}
        held = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in [*_blocks(model), model]:
            fully_shard(block, mesh=mesh)
        sharded = dict(model.named_parameters())
        for group, of_group in zip(optimizer.param_groups, held, strict=True):
            group["params"] = [sharded[name] for name in of_group]
        self.sharded = model

    def wrap(self, forward: Callable[[Any], Any], modules: Sequence[nn.Module], find_unused: bool) -> Any:
        """Return what computes a batch, and reduces the gradient of the modules over all processes going backward."""
        if self.size == 1 or self.sharded is not None:
            return forward
        return nn.parallel.DistributedDataParallel(_Forward(forward, modules), find_unused_parameters=find_unused)

    def gathering(self, wrapped: Any) -> AbstractContextManager[Any]:
        """Return a context in which gradients stay in this process, to be reduced with those of a later batch."""
        if self.sharded is not None:
            return self._unreduced()
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            context: AbstractContextManager[Any] = wrapped.no_sync()
            return context
        return nullcontext()

    @contextmanager
    def _unreduced(self) -> Iterator[None]:
        self.sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.sharded.set_requires_gradient_sync(True)

    def _call(self, collective: Callable[..., Any], *arguments: Any) -> None:
        try:
            collective(*arguments)
        except RuntimeError as error:
            raise self._lost(error) from error

    def lost(self, error: BaseException) -> ProcessError | None:
        """Return what an error of a reduction that is not ours means, DDP's or a metric's; None for any other error."""
        of_backend = isinstance(error, dist.DistError) or "gloo" in str(error) or "Timed out waiting" in str(error)
        ours = isinstance(error, ProcessError) or not isinstance(error, RuntimeError)
        return None if self.size == 1 or ours or not of_backend else self._lost(error)

    def _lost(self, error: BaseException) -> ProcessError:
        return ProcessError(
            f"process {self.rank} lost the others: one of this run has ended, and what it wrote before tells why "
            f"({str(error).splitlines()[0][:200]})"
        )


def is_sharded(tensor: Any) -> bool:
    """Tell whether a tensor is a `torch.distributed.tensor.DTensor`, which takes seconds to import."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    sharded: Any = tensor
    held: Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return held


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered from the processes if it is sharded."""
    sharded: Any = tensor
    gathered: Tensor = sharded.full_tensor() if is_sharded(tensor) else tensor
    return gathered


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the innermost modules with a 64th of a model's parameters or more; containers need not be called."""
    limit = sum(p.numel() for p in model.parameters()) / 64
    found: list[nn.Module] = []
    taken: set[nn.Parameter] = set()

    def visit(module: nn.Module) -> None:
        for child in module.children():
            visit(child)
        left = [p for p in module.parameters() if p not in taken]
        if module is model or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return
        if left and sum(p.numel() for p in left) >= limit:
            found.append(module)
            taken.update(left)

    visit(model)
    return found


class _Forward(nn.Module):
    """A step as a module, so that a user's own may use several models and losses, and the model stays the user's."""

    def __init__(self, forward: Callable[[Any], Any], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self._forward = forward

    def forward(self, batch: Any) -> Any:
        return self._forward(batch)


def join(backend: str | None, device: str | torch.device | None) -> str | torch.device | None:
    """Join the processes that torchrun started with this one, or those of a group that is there already.

    Parameters
    ----------
    backend : str, optional
        Of the process group; "nccl" on CUDA and "gloo" elsewhere by default.
    device : str or torch.device, optional
        Asked for; by default the CUDA device of the local rank.

    Returns
    -------
    str or torch.device or None
        The device to use.

    Raises
    ------
    RuntimeError
        In a process that torchrun did not start and that has no group.
    ValueError
        If a group that is there has another backend.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device is None and torch.cuda.is_available():
        device = f"cuda:{local}"
    on_cuda = device is not None and torch.device(device).type == "cuda"
    if not dist.is_initialized():
        missing = [name for name in _TORCHRUN if name not in os.environ]
        if missing:
            script = sys.argv[0] or "train.py"
            raise RuntimeError(
                f"distributed training needs a process that torchrun has started ({', '.join(missing)} are not set): "
                f"run\n    torchrun --nproc_per_node={max(torch.cuda.device_count(), 2)} {script}\n"
                "or use distributed=False, or make a process group before the Trainer"
            )
        if on_cuda:
            torch.cuda.set_device(device)
        from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

        store, rank, size = next(iter(rendezvous("env://")))
        # Else a restarted process may be given the address of one that is gone.
        store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend or ("nccl" if on_cuda else "gloo"), store=store, rank=rank, world_size=size)
        atexit.register(_leave)
    elif backend is not None and dist.get_backend() != backend:
        raise ValueError(
            f"backend={backend!r}, but the process group that is there has {dist.get_backend()!r}: leave backend out"
        )
    return device


def group_on(device: torch.device, distributed: bool) -> Group:
    """Return the processes that train together, which were joined before."""
    return Group(device, dist.get_rank(), dist.get_world_size()) if distributed else Group(device)


def _leave() -> None:
    """Destroy the group and its threads while Python is there: one that ends later may abort the process."""
    gc.collect()  # what still holds the group: a reducer in a cycle
    if dist.is_initialized():
        dist.destroy_process_group()
