"""The way of a batch to the device: on CUDA beside the computation, from pinned memory."""

from typing import Any

import torch

from ununennium.training.batches import tensors_in, to_device


class Transfer:
    """Moves batches to a device; on CUDA on a stream of its own, while the batch before is computed on.

    Parameters
    ----------
    device : torch.device
        Where to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Any) -> Any:
        """Return the batch on the device; who uses it on the current stream finds it there."""
        if self._stream is None:
            return to_device(batch, self.device)
        with torch.cuda.stream(self._stream):
            moved = to_device(batch, self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in tensors_in(moved):
            if tensor.is_cuda:
                tensor.record_stream(current)  # its memory is the other stream's, and may not be given away too soon
        return moved
