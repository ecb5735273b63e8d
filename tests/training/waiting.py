"""Where the host would wait for a device, found on the CPU."""

from contextlib import ExitStack

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ununennium.training import Callback

READS = {"item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__", "__contains__"}


class NoSynchronisation(TorchDispatchMode):
    """Fail where the host would wait for a device: reading a value, a size that depends on values, a copy to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "bincount", "item"), name
        return function(*args, **(kwargs or {}))


class NoReading(TorchFunctionMode):
    """Fail where a tensor is read that is no operator's business while it is on the CPU, as in ``tolist``."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in READS, name
        assert not (name == "to" and "cpu" in [a for a in args if isinstance(a, str)]), name
        return function(*args, **(kwargs or {}))


class FromHookToHook:
    """Let nobody wait from a batch's first hook to its last; the first batch of a run is looked at, and passed over.

    Attributes
    ----------
    first, last : Callback
        To be put around a Trainer's callbacks.
    batches : int
        How many were watched.
    """

    def __init__(self):
        self.batches = 0
        self._modes = ExitStack()

        class First(Callback):
            def on_batch_start(_, trainer, batch_idx):  # noqa: N805
                if trainer.state.batch or trainer.state.epoch:
                    self._modes.enter_context(NoSynchronisation())
                    self._modes.enter_context(NoReading())

        class Last(Callback):
            def on_batch_end(_, trainer, batch_idx, logs):  # noqa: N805
                self.batches += trainer.state.batch > 1 or trainer.state.epoch > 0
                self._modes.close()

        self.first, self.last = First(), Last()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._modes.close()
