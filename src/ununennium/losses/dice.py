"""The soft Dice loss."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ununennium._arguments import integer
from ununennium.losses import pixels
from ununennium.losses.unrolled import Unrolled


class DiceLoss(nn.Module):
    r"""Soft Dice loss of class logits, exact on ignored pixels.

    For class :math:`c`, with :math:`p` the softmax of the logits (the sigmoid for one channel), :math:`y` the
    target and sums over the valid pixels of one image (of the batch with ``per_image=False``),

    .. math:: L = \sum_c k_c \left(1 - \frac{2 \sum p_c y_c + s}{\sum p_c + \sum y_c + s}\right),
       \qquad k_c = \frac{w_c\,[\sum y_c > 0]}{\sum_j w_j\,[\sum y_j > 0]},

    so that classes which the target does not hold don't dilute the mean. The result is the mean over the images
    that hold a class at all; a batch without any gives 0 and a gradient of 0. With one channel that class is class 1:
    an image without a positive pixel counts for nothing. Where such images matter, add another loss or use two
    channels.

    Parameters
    ----------
    ignore_index : int, optional
        Target value of pixels that count for nothing (nodata); in soft targets, of every channel of such a pixel.
    weight : Tensor or sequence of float, optional
        Weight :math:`w_c` of each class, shape (C,), at least one above 0.
    smooth : float, default 0.0
        Added to numerator and denominator, in pixels.
    per_image : bool, default True
        Dice of each image, then their mean: what accumulation and several processes reproduce exactly. With
        ``False`` one Dice over the whole batch: a ratio of sums over the batch, which no way of averaging
        smaller batches can reproduce, so that accumulation, a short last batch or a second process change what
        is optimised.

    Raises
    ------
    TypeError
        If ``ignore_index`` is no integer.
    ValueError
        If ``smooth`` is negative or not finite, or ``weight`` is not finite numbers of at least 0, (C,), not all 0.

    Notes
    -----
    Inputs of ``forward`` are logits (B, C, H, W), never probabilities, and targets

    - integer classes (B, H, W) of any integer type or bool, with values 0 … C-1 or ``ignore_index``;
    - for one channel, 0 and 1 (or probabilities) of shape (B, H, W) or (B, 1, H, W);
    - for soft targets, class probabilities (B, C, H, W).

    Volumes (B, C, D, H, W) work likewise. Half precisions are computed in float32, whatever autocast does; float64
    stays float64.

    References
    ----------
    Milletari, Navab, Ahmadi: V-Net, 3DV 2016, https://doi.org/10.1109/3DV.2016.79 (the loss); Sudre et al.,
    DLMIA 2017, https://doi.org/10.1007/978-3-319-67558-9_28 (class weights).

    Examples
    --------
    >>> loss_fn = DiceLoss(ignore_index=255)
    >>> loss_fn(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))
    tensor(0.3333)
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        ignore_index: int | None = None,
        weight: Tensor | Sequence[float] | None = None,
        smooth: float = 0.0,
        per_image: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= smooth < math.inf:
            raise ValueError(f"smooth must be at least 0 and finite, got {smooth}")
        if weight is not None:
            weight = torch.as_tensor(weight, dtype=torch.float32).detach().clone()
            if weight.ndim != 1 or not bool(((weight >= 0) & weight.isfinite()).all() & (weight > 0).any()):
                raise ValueError(
                    f"weight must hold one finite number >= 0 a class, shape (C,), not all 0; got {weight.tolist()}"
                )
        self.register_buffer("weight", weight)
        self.ignore_index: int | None = None if ignore_index is None else integer("ignore_index", ignore_index)
        self.smooth = smooth
        self.per_image = per_image
        self._seen_logits = False
        self._unrolled: Unrolled | None = None

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Dice loss of one batch.

        Parameters
        ----------
        outputs : Tensor
            Logits (B, C, H, W), floating point.
        targets : Tensor
            Classes (B, H, W) or soft targets (B, C, H, W); see the class.

        Returns
        -------
        Tensor
            A scalar in float32 (float64 for float64 logits).

        Raises
        ------
        ValueError
            If the shapes or kinds don't fit each other, or the class weights the channels; if the first batch's
            outputs are probabilities; on the CPU, if a target is no class and not ``ignore_index``. On an
            accelerator a label outside the classes stops the device, as in PyTorch's cross-entropy.
        """
        self._check(outputs, targets)
        if not self._seen_logits and not torch.compiler.is_compiling():
            if pixels.are_probabilities(outputs):
                raise ValueError(
                    "DiceLoss takes logits, but these outputs are at least 0 and sum to 1 over the classes at every "
                    "pixel, as probabilities do: leave the softmax out of the model (DiceLoss applies it)"
                )
            self._seen_logits = True
        settings = self.weight, self.ignore_index, self.smooth, self.per_image
        unrolled = None if torch.compiler.is_compiling() else self._unrolled
        loss: Tensor = _Dice.apply(outputs.flatten(2), self._flat(outputs, targets), *settings, unrolled)
        return loss

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the passes over the pixels in place: two to four times quicker on a CPU once compiled.

        What changes is when they are compiled, in the first steps, and rounding. A new batch size compiles nothing,
        a second size of images once more. Soft targets, one channel and more than 32 classes are computed without;
        so is everything, after a warning, where the compiler fails.

        Parameters
        ----------
        *args, **kwargs
            Of ``torch.compile``.
        """
        self._unrolled = Unrolled(*args, **kwargs)

    def target_count(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Count what the mean is over: the images that hold a class (1 or 0 with ``per_image=False``).

        Parameters
        ----------
        outputs, targets : Tensor
            As for ``forward``.

        Returns
        -------
        Tensor
            The count, 0-dimensional, on the device of the targets.
        """
        if outputs.shape[1] > 1 and not targets.is_floating_point():  # every valid pixel holds a class
            labels, valid = pixels.labels_of(targets, self.ignore_index)
            counts = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid
            if self.weight is not None:
                counts = counts & (self.weight.to(labels.device) > 0)[labels]
            holds = counts.flatten(1).any(1)
        else:
            self._check(outputs, targets)
            true, _ = pixels.one_hot(self._flat(outputs, targets), self.ignore_index, outputs.shape[1], outputs)
            holds = pixels.class_share(true.sum(2), self.weight).sum(1) > 0
        return holds.sum() if self.per_image else holds.any().long()

    def _flat(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return classes (B, N), or targets (B, C, N) in floating point, looked at on the CPU."""
        if not targets.is_floating_point():
            return targets.reshape(len(outputs), -1)
        soft = targets.reshape(*outputs.shape[:2], -1)
        if soft.device.type == "cpu" and soft.numel() and not torch.compiler.is_compiling():
            valid = soft.detach()
            if self.ignore_index is not None:
                valid = torch.where((valid != self.ignore_index).any(1, keepdim=True), valid, 0)
            low, high = valid.aminmax()
            if not (low > -0.01 and high < 1.01):  # resampling overshoots by a rounding error
                raise pixels.outside(f"probabilities from {low:.4g} to {high:.4g}", "0 … 1", self.ignore_index)
        return soft

    def _check(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.ndim < 4 or not outputs.is_floating_point():
            raise ValueError(
                "DiceLoss takes logits (B, C, H, W) in floating point, got outputs of shape "
                f"{tuple(outputs.shape)} and type {outputs.dtype}. A single class needs a channel too, (B, 1, H, W): "
                "add it with outputs.unsqueeze(1)."
            )
        classes = outputs.shape[1]
        if self.weight is not None and len(self.weight) != classes:
            raise ValueError(
                f"DiceLoss has {len(self.weight)} class weights, but the outputs have {classes} channels: give one "
                "weight a channel"
            )
        per_pixel = (outputs.shape[0], *outputs.shape[2:])
        soft = targets.is_floating_point()
        if targets.shape == outputs.shape and not soft and classes > 1:
            raise ValueError(
                f"targets of shape {tuple(targets.shape)} are {targets.dtype}: pass classes {per_pixel} with "
                "targets.argmax(1) if they are one-hot, or class probabilities with targets.float()"
            )
        if targets.shape == per_pixel and soft and classes > 1:
            raise ValueError(
                f"targets of shape {tuple(targets.shape)} are {targets.dtype}, but a class for each pixel is an "
                "integer: convert the mask with .long(), or give class probabilities (B, C, H, W)"
            )
        if targets.shape not in (per_pixel, outputs.shape):
            raise ValueError(
                f"targets of shape {tuple(targets.shape)} don't fit outputs of shape {tuple(outputs.shape)}: DiceLoss "
                f"takes integer classes of shape {per_pixel} or class probabilities of shape {tuple(outputs.shape)}"
            )


class _Dice(torch.autograd.Function):
    """The loss of logits (B, C, N), and its derivatives by the sums over pixels, from which the gradient is made."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        weight: Tensor | None,
        ignore_index: int | None,
        smooth: float,
        per_image: bool,
        unrolled: Unrolled | None,
    ) -> Tensor:
        found = None
        with torch.autocast(logits.device.type, enabled=False):
            if unrolled is not None:
                found = unrolled.loss(logits, targets, weight, ignore_index, smooth, per_image)
            if found is None:
                sums = pixels.sums(logits, targets, ignore_index)
                found = pixels.loss_of_sums(sums, weight, smooth, per_image)
        loss, by_true, by_all = found
        ctx.ignore_index, ctx.unrolled = ignore_index, unrolled
        ctx.save_for_backward(logits, targets, by_true, by_all)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, by_true, by_all = ctx.saved_tensors
        by_true, by_all = factor * by_true, factor * by_all
        of_logits = of_targets = None
        with torch.autocast(logits.device.type, enabled=False):
            arguments = logits, targets, by_true, by_all, ctx.ignore_index
            if ctx.needs_input_grad[0]:
                if ctx.unrolled is not None:
                    of_logits = ctx.unrolled.gradient(*arguments)
                if of_logits is None:
                    of_logits = pixels.gradient(*arguments)
            if ctx.needs_input_grad[1]:
                of_targets = pixels.target_gradient(*arguments)
        return of_logits, of_targets, None, None, None, None, None
