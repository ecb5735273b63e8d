"""Mixed precision: where autocast applies, how the loss is scaled, whether an optimizer step happened."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Forward context, loss scale, unscaling and the optimizer step in one precision.

    The loss scaler is always there and inert unless the precision is fp16, so that the loop has no branch.

    Parameters
    ----------
    mode : bool or {"bf16", "fp16"}
        ``True`` is bf16 where the device has it (CPUs included), else fp16.
    device : torch.device
        Where the model runs.

    Raises
    ------
    ValueError
        If the mode is unknown, or the device lacks the one that was named.
    """

    def __init__(self, mode: bool | str, device: torch.device) -> None:
        if not (isinstance(mode, bool) or mode in _DTYPES):
            raise ValueError(f'mixed_precision must be True, False, "bf16" or "fp16", got {mode!r}')
        if mode == "bf16" and not _has_bf16(device):
            raise ValueError(f'{device} has no bf16: use mixed_precision="fp16" or True')
        if mode is True:
            mode = "bf16" if _has_bf16(device) else "fp16"
        self.dtype: torch.dtype | None = _DTYPES[mode] if isinstance(mode, str) else None
        self.scaler: torch.amp.GradScaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self._context: AbstractContextManager[Any] = (
            nullcontext() if self.dtype is None else torch.autocast(device.type, self.dtype)
        )

    @property
    def name(self) -> str:
        """The data type of the forward."""
        return str(self.dtype or torch.get_default_dtype()).removeprefix("torch.")

    @property
    def scales(self) -> bool:
        """Whether the loss is scaled, so that a gradient may overflow and its step be skipped."""
        return self.scaler.is_enabled()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which model and loss run."""
        return self._context

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss to differentiate."""
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: torch.optim.Optimizer, others: Sequence[Tensor]) -> None:
        """Give gradients their true size: the optimizer's, and those of parameters that it does not hold."""
        if self.scales:
            self.scaler.unscale_(optimizer)
            gradients = [p.grad for p in others if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, 1 / self.scaler.get_scale())

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Take the optimizer step and tell whether it happened: an overflow in fp16 skips it.

        Raises
        ------
        FloatingPointError
            If gradients overflow at every scale, so that no step can ever happen.
        """
        if not self.scales:
            optimizer.step()
            return True
        before: float = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        after: float = self.scaler.get_scale()
        if after < 2.0**-20:
            raise FloatingPointError(
                "fp16 gradients overflow at every loss scale: the loss or the gradients are not finite. "
                'Use mixed_precision="bf16" or False, or a lower learning rate.'
            )
        return after >= before

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler's state; empty unless the precision is fp16."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a scaler's state; one from another precision is left alone."""
        if state and self.scales:
            self.scaler.load_state_dict(state)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    return True
