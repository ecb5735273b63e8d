"""The two passes of the Dice loss over all pixels: sums for each class, and the gradient. Memory for one tile each.

Logits are (B, C, N) here, with N the pixels of an image; targets are classes (B, N) of any integer type, or one
target for each channel (B, C, N) in floating point. One channel is class 1 of two. Both passes compute the
probabilities anew, tile by tile in the cache, so that nothing of the logits' size is kept between them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_TINY = 1e-7  # keeps 0 / 0 away where soft targets hold next to nothing
_PIXELS = 1 << 16  # of a tile: it fits a CPU's cache, and is enough for two threads
_MOST_ELEMENTS = 1 << 21  # of a tile, where classes are many
_ELEMENTS_ON_ACCELERATORS = 1 << 26  # there, launching kernels costs more than memory


def computing_dtype(logits: Tensor) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def tiles(logits: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Yield slices of images, each with the slices of their pixels: several small images, or parts of a large one."""
    images, channels, pixels = logits.shape
    if torch.compiler.is_compiling():
        yield slice(None), [slice(None)]
        return
    on_cpu = logits.device.type == "cpu"
    most = max(min(_PIXELS, _MOST_ELEMENTS // channels) if on_cpu else _ELEMENTS_ON_ACCELERATORS // channels, 1)
    parts = [slice(start, min(start + most, pixels)) for start in range(0, pixels, most)]
    at_once = max(most // max(pixels, 1), 1)
    for start in range(0, images, at_once):
        yield slice(start, min(start + at_once, images)), parts


def sums(logits: Tensor, targets: Tensor, ignore_index: int | None) -> Tensor:
    """Sum over the valid pixels of each image.

    Parameters
    ----------
    logits, targets : Tensor
        See the module.
    ignore_index : int or None
        Target value of pixels that count for nothing.

    Returns
    -------
    Tensor
        (3, B, C): of probability times target, of the probability, of the target.

    Raises
    ------
    ValueError
        On the CPU, if a target is no class.
    """
    images, channels, _ = logits.shape
    totals = torch.zeros((3, images, channels), dtype=computing_dtype(logits), device=logits.device)
    room = _Room(logits)
    for some, parts in tiles(logits):
        of_tiles = []
        for part in parts:
            tile, of_tile = logits[some, :, part], targets[some, ..., part]
            if _by_class(logits, targets):
                of_tiles.append(_sums_by_class(tile, of_tile, ignore_index, room))
            else:
                of_tiles.append(_sums_by_channel(tile, of_tile, ignore_index))
        if of_tiles:
            totals[:, some] = torch.stack(of_tiles).sum(0)
    return totals


def loss_of_sums(sums: Tensor, weight: Tensor | None, smooth: float, per_image: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, and its derivatives (B, C) by the sums of probability times target and of the probability.

    With I, P and Y the sums of probability times target, probability and target, U = P + Y + s and N = 2 I + s, they
    are -2 k / U by I and k N / U² by P and by Y.
    """
    common, predicted, true = sums if per_image else sums.sum(1, keepdim=True)
    union = predicted + true + smooth
    numerator, denominator = 2 * common + smooth, union.clamp(min=_TINY)
    share = class_share(true, weight)
    images = (share.sum(-1) > 0).sum().clamp(min=1)
    loss = (share * (1 - numerator / denominator)).sum(-1).sum() / images
    share = share / (images * denominator)
    by_all = torch.where(union < _TINY, 0, share * numerator / denominator)
    # A memory of their own, and a row for each image though they share a Dice.
    rows = torch.zeros_like(sums[0])
    return loss, rows - 2 * share, rows + by_all


def class_share(true: Tensor, weight: Tensor | None) -> Tensor:
    """Weight of each class in the mean over classes, from its pixels in the target; rows sum to 1 or 0."""
    present = (true > 0).to(true.dtype)
    if weight is not None:
        present = present * weight.to(true)
    total = present.sum(-1, keepdim=True)
    return present / torch.where(total > 0, total, 1)


def gradient(logits: Tensor, targets: Tensor, by_true: Tensor, by_all: Tensor, ignore_index: int | None) -> Tensor:
    """Return the gradient for logits of a function of the sums.

    Parameters
    ----------
    logits, targets, ignore_index
        As for `sums`.
    by_true, by_all : Tensor
        Derivatives (B, C) of the function by the sums of probability times target and of the probability.

    Returns
    -------
    Tensor
        (B, C, N) in the type and the memory format of the logits; 0 at ignored pixels.
    """
    result = torch.empty_like(logits)
    room = _Room(logits)
    for some, parts in tiles(logits):
        for part in parts:
            tile = some, slice(None), part
            arguments = result[tile], logits[tile], targets[some, ..., part], by_true[some], by_all[some], ignore_index
            if _by_class(logits, targets):
                _write_gradient_by_class(*arguments, room)
            else:
                _write_gradient_by_channel(*arguments)
    return result


def target_gradient(
    logits: Tensor, targets: Tensor, by_true: Tensor, by_target: Tensor, ignore_index: int | None
) -> Tensor:
    """Return the gradient for targets in floating point, from the derivatives by the sums that hold them."""
    result = torch.empty_like(targets)
    for some, parts in tiles(logits):
        for part in parts:
            tile = some, slice(None), part
            _, valid = one_hot(targets[tile], ignore_index, logits.shape[1], logits)
            probabilities = _probabilities(logits[tile], valid)
            slope = by_true[some].unsqueeze(2) * probabilities + by_target[some].unsqueeze(2)
            result[tile] = slope if valid is None else torch.where(valid, slope, 0)
    return result


def labels_of(targets: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor | None]:
    """Return int64 labels, 0 where ignored, and where they are valid."""
    labels = targets.long()  # before comparing: among uint8 an ignore_index of -100 is 156
    if ignore_index is None:
        return labels, None
    valid = labels != ignore_index
    return torch.where(valid, labels, 0), valid


def one_hot(targets: Tensor, ignore_index: int | None, channels: int, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return targets (B, C, N) in the type to compute in, 0 where ignored, and where (B, 1, N) they are valid."""
    dtype = computing_dtype(logits)
    if targets.is_floating_point():
        if ignore_index is None:
            return targets.to(dtype), None
        valid = (targets != ignore_index).any(1, keepdim=True)
        return torch.where(valid, targets, 0).to(dtype), valid
    labels, counts = labels_of(targets.unsqueeze(1), ignore_index)
    classes = max(channels, 2)
    refuse_strange_labels(labels, classes, ignore_index)
    true = labels == torch.arange(classes - channels, classes, device=labels.device).unsqueeze(1)
    return (true if counts is None else true & counts).to(dtype), counts


def refuse_strange_labels(labels: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raise for labels that are no class: on the CPU now, on CUDA when the device gets there, without waiting."""
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        strange = labels[(labels < 0) | (labels >= classes)].unique().tolist()
        if strange:
            found = f"label{'s' * (len(strange) > 1)} {', '.join(map(str, strange[:10]))}"
            raise outside(found, f"the classes 0 … {classes - 1}", ignore_index)
    elif labels.device.type in ("cpu", "cuda"):
        torch._assert_async(
            ((labels >= 0) & (labels < classes)).all(),
            f"DiceLoss: targets hold labels outside the classes 0 … {classes - 1}, and ignore_index is {ignore_index}",
        )


@torch.no_grad()
def are_probabilities(outputs: Tensor) -> bool:
    """Tell whether outputs (B, C, ...) are at least 0 and sum to 1 over the classes everywhere, as no logits do."""
    if outputs.ndim < 2 or outputs.shape[1] < 2 or not outputs.numel():
        return False
    return bool((outputs >= 0).all() & ((outputs.float().sum(1) - 1).abs() < 0.01).all())


def outside(found: str, expected: str, ignore_index: int | None) -> ValueError:
    """Make the error about targets that are none."""
    return ValueError(
        f"targets hold {found}, outside {expected}, and ignore_index is {ignore_index}: correct the targets, or name "
        "the value of nodata with DiceLoss(ignore_index=…)"
    )


# --- classes on a CPU: the true class of a pixel is looked up, not compared with every class


def _by_class(logits: Tensor, targets: Tensor) -> bool:
    return (
        logits.shape[1] > 1
        and not targets.is_floating_point()
        and logits.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )


class _Room:
    """Two tiles of memory that are used again and again: what the allocator gives anew is not in the cache."""

    def __init__(self, logits: Tensor) -> None:
        self._like = logits
        self._memory: list[Tensor] = []

    def of(self, tile: Tensor) -> list[Tensor]:
        """Return two contiguous tensors of a tile's shape in the type to compute in."""
        if not self._memory or self._memory[0].numel() < tile.numel():
            empty = torch.empty(2, tile.numel(), dtype=computing_dtype(tile))
            self._memory = list(empty)
        return [memory[: tile.numel()].view(tile.shape) for memory in self._memory]


def _sums_by_class(logits: Tensor, targets: Tensor, ignore_index: int | None, room: _Room) -> Tensor:
    images, channels, _ = logits.shape
    labels, valid = labels_of(targets, ignore_index)
    probabilities, _ = _softmax(logits, valid, room)
    try:
        of_true = probabilities.gather(1, labels.unsqueeze(1)).flatten()
    except RuntimeError:
        refuse_strange_labels(labels, channels, ignore_index)
        raise
    cells = _cells(labels, channels)
    # In float64: bincount adds one after the other, and float32 would lose a percent at a million pixels.
    common = torch.bincount(cells, of_true.double(), minlength=images * channels).view(images, channels)
    true = torch.bincount(cells, minlength=images * channels).view(images, channels)
    if valid is not None:
        true[:, 0] -= (~valid).sum(1)
    predicted = probabilities.sum(2)
    return torch.stack([common.to(predicted.dtype), predicted, true.to(predicted.dtype)])


def _write_gradient_by_class(
    result: Tensor,
    logits: Tensor,
    targets: Tensor,
    by_true: Tensor,
    by_all: Tensor,
    ignore_index: int | None,
    room: _Room,
) -> None:
    labels, valid = labels_of(targets, ignore_index)
    probabilities, slope = _softmax(logits, valid, room)
    index = labels.unsqueeze(1)
    of_class = by_true.flatten().index_select(0, _cells(labels, logits.shape[1])).view(index.shape)
    of_true = probabilities.gather(1, index).mul_(of_class)
    torch.mul(probabilities, by_all.unsqueeze(2), out=slope)
    mean = slope.sum(1, keepdim=True).add_(of_true)
    direct = result.dtype == slope.dtype and result.stride(2) == 1
    rows = torch.addcmul(slope, probabilities, mean, value=-1, out=result if direct else slope)
    rows.scatter_add_(1, index, of_true)
    if not direct:
        _copy(result, rows)


def _cells(labels: Tensor, channels: int) -> Tensor:
    """Return the places of labels (B, N) in a table (B, C), flat."""
    if len(labels) == 1:
        return labels.flatten()
    return (labels + channels * torch.arange(len(labels)).unsqueeze(1)).flatten()


def _softmax(logits: Tensor, valid: Tensor | None, room: _Room) -> tuple[Tensor, Tensor]:
    """Return probabilities, 0 where not valid, and a tile of memory that is free."""
    inputs, probabilities = room.of(logits)
    _copy(inputs, logits)
    torch.softmax(inputs, 1, out=probabilities)
    if valid is not None and not valid.all():
        counts = valid.unsqueeze(1)
        probabilities.mul_(counts.to(probabilities.dtype))
        if not probabilities.sum().isfinite():  # NaN times 0: not even that gets out of an ignored pixel
            probabilities.copy_(torch.where(counts, probabilities, 0))
    return probabilities, inputs


def _copy(to: Tensor, source: Tensor) -> None:
    """Copy a tile, class by class where channels come last in memory: then all threads copy."""
    if source.stride(2) == to.stride(2) == 1:
        to.copy_(source)
    else:
        for one, other in zip(to.unbind(1), source.unbind(1), strict=True):
            one.copy_(other)


# --- anything else: every channel has its target


def _sums_by_channel(logits: Tensor, targets: Tensor, ignore_index: int | None) -> Tensor:
    true, valid = one_hot(targets, ignore_index, logits.shape[1], logits)
    probabilities = _probabilities(logits, valid)
    return torch.stack([(probabilities * true).sum(2), probabilities.sum(2), true.sum(2)])


def _write_gradient_by_channel(
    result: Tensor, logits: Tensor, targets: Tensor, by_true: Tensor, by_all: Tensor, ignore_index: int | None
) -> None:
    true, valid = one_hot(targets, ignore_index, logits.shape[1], logits)
    probabilities = _probabilities(logits, valid)
    slope = by_true.unsqueeze(2) * true + by_all.unsqueeze(2)
    if logits.shape[1] == 1:
        result.copy_(probabilities * (1 - probabilities) * slope)
    else:
        slope = probabilities * slope
        result.copy_(slope - probabilities * slope.sum(1, keepdim=True))


def _probabilities(logits: Tensor, valid: Tensor | None) -> Tensor:
    logits = logits.to(computing_dtype(logits))
    if valid is not None:  # before softmax, so that not even NaN gets out of an ignored pixel
        logits = torch.where(valid, logits, 0)
    probabilities = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
    return probabilities if valid is None else torch.where(valid, probabilities, 0)
