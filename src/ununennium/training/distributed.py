"""The processes that train together: sums over all of them, their votes, and the gradient's reduction.

One process alone has the same interface, in which every reduction is the identity.
"""

import atexit
import gc
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ununennium.training.batches import tensors_in
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
    given : list of Tensor
        What that model has given since it was cleared, and gradients go back through.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device = device
        self.rank = rank
        self.size = size
        self.leads: bool = rank == 0
        self.sharded: Any = None
        self.given: list[Tensor] = []

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, on the device."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        self._call(dist.all_reduce, total)
        return total

    def start_sum(self, scalars: Sequence[Tensor | float], numbers: Sequence[float]) -> Callable[[], Tensor]:
        """Begin to sum 0-dimensional tensors and some numbers over all processes, float64, in one vector.

        What is returned gives the sums; on CUDA its stream waits for them, and not the host.
        """
        host = torch.tensor(numbers, dtype=torch.float64)
        on_cuda = self.device.type == "cuda"
        rest = (host.pin_memory() if on_cuda else host).to(self.device, non_blocking=on_cuda)
        first = [scalar if isinstance(scalar, Tensor) else torch.full((), scalar) for scalar in scalars]
        votes = torch.cat([*(scalar.reshape(1).to(self.device, torch.float64) for scalar in first), rest])
        work = self._call(dist.all_reduce, votes, async_op=True)

        def finish() -> Tensor:
            self._call(work.wait)
            return votes

        return finish

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

    def check_alike(self, own: Mapping[str, Any]) -> None:
        """Raise where processes that have to be given the same things were not, naming the first of them."""
        for rank, other in enumerate(self.gather(own)):
            for name, value in other.items():
                if value != own[name]:
                    raise ProcessError(
                        f"{name} is {own[name]!r} in process {self.rank} and {value!r} in process {rank}: "
                        "pass the same to all"
                    )

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
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

    def shard(self, model: nn.Module, optimizer: torch.optim.Optimizer, lower: torch.dtype | None = None) -> None:
        """Shard a model's parameters over the processes with FSDP2, and point the optimizer at the shards.

        Blocks with a fair part of the parameters are gathered one at a time, the rest with the whole model. Blocks of
        convolutions and linear layers, which autocast turns into the lower type in one process too, are gathered in
        it; others, such as BatchNorm, in their own. Gradients are summed in their own type.

        Parameters
        ----------
        model : nn.Module
            Changed in place; all processes begin with the weights of process 0.
        optimizer : torch.optim.Optimizer
            Its groups hold the sharded parameters afterwards, in the same order.
        lower : torch.dtype, optional
            What autocast computes in.

        Raises
        ------
        ValueError
            If the optimizer has taken a step already.
        """
        from torch.distributed.device_mesh import init_device_mesh  # they take seconds
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if optimizer.state:
            raise ValueError('distributed="fsdp" needs an optimizer that has not stepped: make a new one, and load')
        self.broadcast([*model.parameters(), *model.buffers()])
        names = {id(p): name for name, p in model.named_parameters()}
        held = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        mesh = init_device_mesh(self.device.type, (self.size,))
        own = MixedPrecisionPolicy(cast_forward_inputs=False)
        lowered = MixedPrecisionPolicy(lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in [*_blocks(model), model]:
            fully_shard(block, mesh=mesh, mp_policy=lowered if lower and _is_lowered(block) else own)
        sharded = dict(model.named_parameters())
        for group, of_group in zip(optimizer.param_groups, held, strict=True):
            group["params"] = [sharded[name] for name in of_group]
        model.register_forward_hook(torch.compiler.disable(self._keep_given))
        self.sharded = model

    def _keep_given(self, module: nn.Module, arguments: Any, given: Any) -> None:
        self.given += [tensor for tensor in tensors_in(given) if tensor.requires_grad]

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

    def _call(self, collective: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return collective(*arguments, **options)
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


def reader(tensor: Tensor) -> Callable[[], list[float]]:
    """Return what reads the numbers of a tensor as they are now, without waiting for what the device does later."""
    if tensor.device.type == "cpu":
        return tensor.clone().tolist
    host = tensor.to("cpu", non_blocking=True)
    copied = torch.accelerator.current_stream(tensor.device).record_event()

    def read() -> list[float]:
        copied.synchronize()
        numbers: list[float] = host.tolist()
        return numbers

    return read


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


def _is_lowered(block: nn.Module) -> bool:
    """Tell whether all parameters of a block are float32 and of layers that autocast runs in a lower type."""
    layers = [m for m in block.modules() if next(m.parameters(recurse=False), None) is not None]
    alike = all(isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) for layer in layers)
    return alike and all(p.dtype is torch.float32 for p in block.parameters())


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
        store = PrefixStore(_name_of_start(store, rank, size), store)
        dist.init_process_group(backend or ("nccl" if on_cuda else "gloo"), store=store, rank=rank, world_size=size)
        atexit.register(_leave)
    elif backend is not None and dist.get_backend() != backend:
        raise ValueError(
            f"backend={backend!r}, but the process group that is there has {dist.get_backend()!r}: leave backend out"
        )
    return device


def _name_of_start(store: Any, rank: int, size: int) -> str:
    """Return a name that the processes of this start share, and those of an earlier one on the same store did not.

    torchrun keeps its store over restarts, and each host counts them by itself, so neither tells one start from
    another. Each process calls under a name of its own; process 0 answers what it finds until all have thanked for it.
    """
    name = secrets.token_hex(8)
    if rank:
        store.set(f"call/{rank}", name)
        start: str = store.get(name).decode()
        store.set(f"{start}/{rank}", "thanks")
        return start
    deadline = time.monotonic() + store.timeout.total_seconds()
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"call/{other}"]):
                store.set(store.get(f"call/{other}").decode(), name)  # of this start or of one that is gone
        if time.monotonic() > deadline:
            raise ProcessError(
                f"of {size} processes {len(missing)} did not come ({sorted(missing)}, counted from 0): see in their "
                "output what they ended of or wait for, and start all again"
            )
        time.sleep(0.002)
    return name


def group_on(device: torch.device, distributed: bool) -> Group:
    """Return the processes that train together, which were joined before."""
    return Group(device, dist.get_rank(), dist.get_world_size()) if distributed else Group(device)


def _leave() -> None:
    """Destroy the group and its threads while Python is there: one that ends later may abort the process."""
    gc.collect()  # what still holds the group: a reducer in a cycle
    if dist.is_initialized():
        dist.destroy_process_group()
