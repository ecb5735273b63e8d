"""The soft Dice loss."""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_TINY = 1e-7  # keeps 0 / 0 away where soft targets hold next to nothing


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
        self.ignore_index = None if ignore_index is None else operator.index(ignore_index)
        self.smooth = smooth
        self.per_image = per_image
        self._seen_logits = False

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
        one_hot, valid = self._one_hot(outputs, targets)
        if not self._seen_logits and not torch.compiler.is_compiling():
            _refuse_probabilities(outputs)
            self._seen_logits = True
        with torch.autocast(outputs.device.type, enabled=False):
            logits = outputs.to(one_hot.dtype)
            if valid is not None:  # before softmax, so that not even NaN gets out of an ignored pixel
                logits = torch.where(valid, logits, 0)
            probabilities = logits.sigmoid() if outputs.shape[1] == 1 else logits.softmax(1)
            if valid is not None:
                probabilities = torch.where(valid, probabilities, 0)
            pixels = tuple(range(2, outputs.ndim)) if self.per_image else (0, *range(2, outputs.ndim))
            intersection = (probabilities * one_hot).sum(pixels)
            predicted, true = probabilities.sum(pixels), one_hot.sum(pixels)
            union = (predicted + true + self.smooth).clamp(min=_TINY)
            share = self._class_share(true)
            losses = (share * (1 - (2 * intersection + self.smooth) / union)).sum(-1)
            return losses.sum() / (share.sum(-1) > 0).sum().clamp(min=1)

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
            labels, valid = self._labels(targets)
            counts = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid
            if self.weight is not None:
                counts = counts & (self.weight.to(labels.device) > 0)[labels]
            holds = counts.flatten(1).any(1)
        else:
            one_hot, _ = self._one_hot(outputs, targets)
            holds = self._class_share(one_hot.flatten(2).sum(2)).sum(1) > 0
        return holds.sum() if self.per_image else holds.any().long()

    def _class_share(self, true: Tensor) -> Tensor:
        """Weight of each class in the mean over classes, from its pixels in the target; rows sum to 1 or 0."""
        present = (true > 0).to(true.dtype)
        if self.weight is not None:
            present = present * self.weight.to(true)
        total = present.sum(-1, keepdim=True)
        return present / torch.where(total > 0, total, 1)

    def _one_hot(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Targets (B, C, …) with zeros at ignored pixels, in the type to compute in, and where they are valid."""
        self._check(outputs, targets)
        dtype = torch.float64 if outputs.dtype == torch.float64 else torch.float32
        if targets.ndim < outputs.ndim:
            targets = targets.unsqueeze(1)
        if targets.is_floating_point():
            valid = None if self.ignore_index is None else (targets != self.ignore_index).any(1, keepdim=True)
            soft = targets if valid is None else torch.where(valid, targets, 0)
            if soft.device.type == "cpu" and soft.numel():
                low, high = soft.aminmax()
                if not (low > -0.01 and high < 1.01):  # resampling overshoots by a rounding error
                    raise self._strange(f"probabilities from {low:.4g} to {high:.4g}", "0 … 1")
            return soft.to(dtype), valid
        labels, valid = self._labels(targets)
        channels = outputs.shape[1]
        classes = max(channels, 2)  # one channel is class 1 of two, so that labels are checked alike
        one_hot = torch.zeros((len(outputs), classes, *outputs.shape[2:]), dtype=dtype, device=outputs.device)
        ones = torch.ones_like(labels, dtype=dtype) if valid is None else valid.to(dtype)
        try:
            one_hot.scatter_(1, labels, ones)
        except RuntimeError:
            strange = labels[(labels < 0) | (labels >= classes)].unique().tolist()
            if not strange:
                raise
            raise self._strange(
                f"label{'s' * (len(strange) > 1)} {', '.join(map(str, strange[:10]))}", f"the classes 0 … {classes - 1}"
            ) from None
        return one_hot[:, -channels:], valid

    def _labels(self, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return int64 labels, 0 where ignored, and where they are valid."""
        labels = targets.long()  # before comparing: among uint8 an ignore_index of -100 is 156
        if self.ignore_index is None:
            return labels, None
        valid = labels != self.ignore_index
        return torch.where(valid, labels, 0), valid

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

    def _strange(self, found: str, expected: str) -> ValueError:
        return ValueError(
            f"targets hold {found}, outside {expected}, and ignore_index is {self.ignore_index}: correct the targets, "
            "or name the value of nodata with DiceLoss(ignore_index=…)"
        )


@torch.no_grad()
def _refuse_probabilities(outputs: Tensor) -> None:
    """Raise if every pixel's outputs are at least 0 and sum to 1, which no network's logits do."""
    if outputs.shape[1] > 1 and outputs.numel():
        sums = outputs.float().sum(1)
        if bool((outputs >= 0).all() & ((sums - 1).abs() < 0.01).all()):
            raise ValueError(
                "DiceLoss takes logits, but these outputs are at least 0 and sum to 1 over the classes at every pixel, "
                "as probabilities do: leave the softmax out of the model (DiceLoss applies it)"
            )
