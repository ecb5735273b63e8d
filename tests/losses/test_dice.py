"""DiceLoss: the definition, nodata, accumulation, precision, errors (traps 2, 16, 17)."""

import math

import numpy as np
import pytest
import torch
from segmentation_models_pytorch.losses import DiceLoss as SmpDiceLoss
from torch import nn

from ununennium.losses import DiceLoss

IGNORE = 255
F64 = torch.float64


def make_batch(seed, images=3, classes=4, size=5, ignored=0.0):
    """Logits (B, C, H, W) in float64 that want a gradient, and classes (B, H, W) with some pixels ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, classes, size, size, dtype=F64, generator=generator)
    targets = torch.randint(max(classes, 2), (images, size, size), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < ignored] = IGNORE
    return logits.requires_grad_(), targets


def soft_targets(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, dtype=F64, generator=generator).pow(2)


def loss_and_gradient(loss_fn, logits, targets):
    logits = logits.detach().clone().requires_grad_()
    loss = loss_fn(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def plain_dice(logits, targets, ignore_index=None, weight=None, smooth=0.0, per_image=True):
    """The definition, pixel by pixel in Python's floats."""
    logits, targets = logits.detach().numpy(), targets.numpy()
    images, classes = logits.shape[:2]
    pixels = []  # (image, probabilities, target per class)
    for image, row, column in np.ndindex(images, *logits.shape[2:]):
        scores = [float(logits[image, c, row, column]) for c in range(classes)]
        if classes == 1:
            probabilities = [1 / (1 + math.exp(-scores[0]))]
        else:
            total = sum(math.exp(s) for s in scores)
            probabilities = [math.exp(s) / total for s in scores]
        if targets.ndim == 4:
            true = [float(targets[image, c, row, column]) for c in range(classes)]
            ignored = ignore_index is not None and all(t == ignore_index for t in true)
        else:
            label = int(targets[image, row, column])
            true = [float(label == 1)] if classes == 1 else [float(label == c) for c in range(classes)]
            ignored = label == ignore_index
        if not ignored:
            pixels.append((image, probabilities, true))
    groups = [[p for p in pixels if p[0] == i] for i in range(images)] if per_image else [pixels]
    losses = []
    for group in groups:
        numerator = denominator = 0.0
        for c in range(classes):
            holds = sum(t[c] for _, _, t in group)
            w = 1.0 if weight is None else weight[c]
            if holds == 0 or w == 0:
                continue
            common = sum(p[c] * t[c] for _, p, t in group)
            union = sum(p[c] for _, p, _ in group) + holds
            numerator += w * (1 - (2 * common + smooth) / (union + smooth))
            denominator += w
        if denominator:
            losses.append(numerator / denominator)
    return sum(losses) / len(losses) if losses else 0.0


SETTINGS = [
    {},
    {"smooth": 1.5},
    {"weight": [1.0, 4.0, 0.25, 0.0]},
    {"weight": [0.5, 2.0, 0.0, 3.0], "smooth": 0.5},
]


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.5, 0.95])
def test_equals_the_definition_for_classes(settings, ignored, per_image):
    for seed in range(3):
        logits, targets = make_batch(seed, ignored=ignored)
        settings = {**settings, "ignore_index": IGNORE, "per_image": per_image}
        loss = DiceLoss(**settings)(logits, targets)
        assert loss.dtype == F64
        assert loss.item() == pytest.approx(plain_dice(logits, targets, **settings), abs=1e-12)


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("smooth", [0.0, 2.0])
def test_equals_the_definition_for_one_channel(smooth, per_image):
    settings = {"ignore_index": IGNORE, "smooth": smooth, "per_image": per_image}
    logits, targets = make_batch(0, classes=1, ignored=0.3)
    targets[2][targets[2] == 1] = 0  # no positive pixel
    expected = pytest.approx(plain_dice(logits, targets, **settings), abs=1e-12)
    for given in (targets, targets.unsqueeze(1), targets.double(), targets.unsqueeze(1).float(), targets.byte()):
        assert DiceLoss(**settings)(logits, given).item() == expected
    without = torch.where(targets == IGNORE, 0, targets)
    expected = pytest.approx(plain_dice(logits, without, smooth=smooth, per_image=per_image), abs=1e-12)
    for given in (without, without.bool(), without.unsqueeze(1).bool()):
        assert DiceLoss(smooth=smooth, per_image=per_image)(logits, given).item() == expected


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("classes", [1, 3])
def test_equals_the_definition_for_soft_targets(classes, per_image):
    settings = {"ignore_index": IGNORE, "smooth": 0.5, "per_image": per_image, "weight": [2.0, 0.5, 1.0][:classes]}
    logits, _ = make_batch(0, classes=classes)
    targets = soft_targets(0, logits.shape)
    targets[0, :, :2] = IGNORE  # every channel of a pixel
    assert DiceLoss(**settings)(logits, targets).item() == pytest.approx(plain_dice(logits, targets, **settings))


def test_one_hot_floats_are_the_same_as_classes():
    logits, targets = make_batch(0)
    one_hot = nn.functional.one_hot(targets, 4).movedim(-1, 1).double()
    for first, second in zip(*(loss_and_gradient(DiceLoss(), logits, t) for t in (targets, one_hot)), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-15)


def test_volumes_and_memory_formats():
    logits, targets = make_batch(0, size=6)
    expected = DiceLoss()(logits, targets)
    volume = DiceLoss()(logits.reshape(3, 4, 2, 3, 6), targets.reshape(3, 2, 3, 6))
    last = DiceLoss()(logits.contiguous(memory_format=torch.channels_last), targets)
    torch.testing.assert_close(volume, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_equals_smp_where_every_image_holds_every_class(smooth, ignored):
    """The definitions coincide there.

    Elsewhere they don't: smp divides by all C classes, so that absent ones dilute the mean; it knows only one Dice
    over the whole batch; its class weights are divided by the sum over all classes, present or not; and it adds its
    ``smooth`` to half of numerator and denominator, so that ours is twice that.
    """
    logits, targets = make_batch(0, size=12, ignored=ignored)
    assert all(len(t[t != IGNORE].unique()) == 4 for t in targets)
    smp = SmpDiceLoss("multiclass", smooth=smooth, ignore_index=IGNORE)
    settings = {"smooth": 2 * smooth, "ignore_index": IGNORE}
    torch.testing.assert_close(DiceLoss(per_image=False, **settings)(logits, targets), smp(logits, targets))
    one_by_one = torch.stack([smp(z, t) for z, t in zip(logits.split(1), targets.split(1), strict=True)]).mean()
    torch.testing.assert_close(DiceLoss(**settings)(logits, targets), one_by_one)


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_equals_smp_for_one_channel(ignored):
    logits, targets = make_batch(0, classes=1, ignored=ignored)
    smp = SmpDiceLoss("binary", ignore_index=IGNORE)
    ours = DiceLoss(ignore_index=IGNORE, per_image=False)
    torch.testing.assert_close(ours(logits, targets), smp(logits, targets))


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize(
    ("classes", "settings"), [(4, {}), (4, {"weight": [1.0, 3.0, 0.5, 0.0], "smooth": 1.0}), (1, {"smooth": 0.5})]
)
def test_the_gradient_is_that_of_finite_differences(classes, settings, per_image):
    logits, targets = make_batch(0, images=2, classes=classes, size=2, ignored=0.3)
    loss_fn = DiceLoss(ignore_index=IGNORE, per_image=per_image, **settings)
    assert torch.autograd.gradcheck(lambda z: loss_fn(z, targets), logits)


def test_the_gradient_of_soft_targets_is_that_of_finite_differences():
    logits, _ = make_batch(0, images=2, classes=3, size=2)
    targets = soft_targets(1, logits.shape).requires_grad_()  # a teacher may learn too
    assert torch.autograd.gradcheck(DiceLoss(smooth=1.0), (logits, targets))


# --- nodata


@pytest.mark.parametrize("kind", ["classes", "one channel", "soft"])
@pytest.mark.parametrize("value", [0.0, -1e30, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("per_image", [True, False])
def test_what_a_prediction_says_at_an_ignored_pixel_changes_nothing(kind, value, per_image):
    """Trap 17: the loss and every gradient are equal bit for bit."""
    logits, targets = make_batch(0, classes=1 if kind == "one channel" else 4, ignored=0.5)
    ignored = (targets == IGNORE).unsqueeze(1)
    if kind == "soft":
        targets = torch.where(ignored, IGNORE, soft_targets(0, logits.shape))
    loss_fn = DiceLoss(ignore_index=IGNORE, per_image=per_image)
    loss, gradient = loss_and_gradient(loss_fn, logits, targets)
    changed, changed_gradient = loss_and_gradient(loss_fn, torch.where(ignored, value, logits), targets)
    assert changed.item() == loss.item()
    assert torch.equal(changed_gradient, gradient)
    assert loss.item() > 0
    assert (gradient[ignored.expand_as(gradient)] == 0).all()
    assert (gradient[~ignored.expand_as(gradient)] != 0).any()


@pytest.mark.parametrize("kind", ["classes", "one channel", "soft", "no positive pixel", "classes of weight 0"])
@pytest.mark.parametrize("value", [1.0, math.nan])
@pytest.mark.parametrize("per_image", [True, False])
def test_a_batch_with_nothing_valid_gives_0_and_finite_gradients(kind, value, per_image):
    loss_fn = DiceLoss(ignore_index=IGNORE, per_image=per_image)
    logits = torch.full((2, 1 if kind in ("one channel", "no positive pixel") else 3, 4, 4), value, dtype=F64)
    targets = torch.full((2, 4, 4), IGNORE)
    if kind == "soft":
        targets = torch.full(logits.shape, float(IGNORE))
    elif kind == "no positive pixel":
        logits.fill_(1.0)
        targets.zero_()
    elif kind == "classes of weight 0":
        logits.fill_(1.0)
        targets.zero_()
        loss_fn = DiceLoss(weight=[0.0, 1.0, 1.0], per_image=per_image)
    loss, gradient = loss_and_gradient(loss_fn, logits, targets)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert loss_fn.target_count(logits, targets).item() == 0


def test_an_image_with_nothing_valid_leaves_the_others_as_they_are():
    logits, targets = make_batch(0)
    targets[1] = IGNORE
    loss_fn = DiceLoss(ignore_index=IGNORE)
    loss, gradient = loss_and_gradient(loss_fn, logits, targets)
    others, other_gradient = loss_and_gradient(loss_fn, logits[[0, 2]], targets[[0, 2]])
    torch.testing.assert_close(loss, others, rtol=0, atol=1e-15)
    torch.testing.assert_close(gradient[[0, 2]], other_gradient, rtol=0, atol=1e-15)
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize("ignore_index", [IGNORE, 2, -1, -100, 256])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_every_integer_type_and_every_ignore_index_do_the_same(dtype, ignore_index):
    holds = torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max  # else no other value is taken for it
    logits, targets = make_batch(0, ignored=0.4 if holds else 0.0)
    targets = torch.where(targets == IGNORE, ignore_index, targets)
    settings = {"ignore_index": ignore_index}
    loss_fn = DiceLoss(**settings)
    expected = pytest.approx(plain_dice(logits, targets, **settings), abs=1e-12)
    assert loss_fn(logits, targets.to(dtype)).item() == expected
    assert loss_fn.target_count(logits, targets.to(dtype)) == 3


def test_absent_classes_do_not_dilute_the_mean():
    """Trap 16: only the classes that an image's target holds are in its mean."""
    logits, targets = make_batch(0, images=2)
    targets[0] = 1
    targets[1] = targets[1] % 2
    probabilities = logits.detach().softmax(1)

    def dice_loss(image, c):
        p, y = probabilities[image, c], (targets[image] == c).double()
        return 1 - 2 * (p * y).sum() / (p.sum() + y.sum())

    expected = (dice_loss(0, 1) + (dice_loss(1, 0) + dice_loss(1, 1)) / 2) / 2
    torch.testing.assert_close(DiceLoss()(logits.detach(), targets), expected)


# --- accumulation


def cut(settings, logits, targets, parts):
    """Σ count · loss / Σ count over micro-batches, and its gradient."""
    loss_fn = DiceLoss(**settings)
    logits = logits.detach().clone().requires_grad_()
    total = count = 0
    for z, t in zip(logits.split(parts), targets.split(parts), strict=True):
        share = loss_fn.target_count(z, t)
        total, count = total + share * loss_fn(z, t), count + share
    loss = total / count
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


WEIGHTS = [None, [1.0, 4.0, 0.25, 2.0], [0.0, 0.0, 3.0, 0.0]]


@pytest.mark.parametrize("parts", [[2, 2, 2, 2], [1, 4, 3], [1] * 8])
@pytest.mark.parametrize(
    ("kind", "weight"), [*(("classes", w) for w in WEIGHTS), ("one channel", None), *(("soft", w) for w in WEIGHTS[:2])]
)
def test_counts_weight_micro_batches_to_the_gradient_of_the_one_big_batch(kind, weight, parts):
    """Trap 2: images with 0 to 100 % of their pixels ignored, without a class that counts, or without a positive."""
    logits, targets = make_batch(0, images=8, classes=1 if kind == "one channel" else 4)
    generator = torch.Generator().manual_seed(1)
    for image, share in enumerate([0.0, 0.9, 0.3, 1.0, 0.95, 0.0, 1.0, 0.5]):
        targets[image][torch.rand(5, 5, generator=generator) < share] = IGNORE
    targets[5] = 0
    if kind == "soft":
        ignored = (targets == IGNORE).unsqueeze(1)
        targets = torch.where(ignored, IGNORE, soft_targets(0, logits.shape))
        targets[5] = 0
    settings = {"ignore_index": IGNORE, "weight": weight, "smooth": 0.5}
    loss, gradient = loss_and_gradient(DiceLoss(**settings), logits, targets)
    cut_loss, cut_gradient = cut(settings, logits, targets, parts)
    assert (cut_loss - loss).abs() <= 1e-12 * loss
    assert (cut_gradient - gradient).norm() <= 1e-12 * gradient.norm()


def test_one_dice_over_the_batch_is_not_reproduced_by_micro_batches():
    """What the documentation says of per_image=False: accumulation changes what is optimised."""
    logits, targets = make_batch(0, images=4)
    targets[:2, 1:] = IGNORE
    settings = {"ignore_index": IGNORE, "per_image": False}
    loss, gradient = loss_and_gradient(DiceLoss(**settings), logits, targets)
    cut_loss, cut_gradient = cut(settings, logits, targets, [2, 2])
    assert (cut_loss - loss).abs() > 1e-3 * loss
    assert (cut_gradient - gradient).norm() > 1e-2 * gradient.norm()


def test_counts_by_hand():
    logits = torch.zeros(3, 2, 4, 4)
    targets = torch.zeros(3, 4, 4, dtype=torch.uint8)
    targets[1] = IGNORE
    targets[2, 0, 0] = 1
    settings = {"ignore_index": IGNORE}
    assert DiceLoss(**settings).target_count(logits, targets) == 2
    assert DiceLoss(**settings, weight=[0, 1]).target_count(logits, targets) == 1
    assert DiceLoss(**settings, per_image=False).target_count(logits, targets) == 1
    assert DiceLoss(**settings).target_count(logits[:, :1], targets) == 1  # images with a positive pixel
    assert DiceLoss(**settings).target_count(logits[1:2], targets[1:2]) == 0


# --- precision


@pytest.mark.parametrize("classes", [1, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(classes, dtype):
    """The result is the float32 result on the same rounded logits, its gradient rounded once."""
    logits, targets = make_batch(0, classes=classes, size=64, ignored=0.2)
    logits = logits.detach().to(dtype)
    loss_fn = DiceLoss(ignore_index=IGNORE)
    expected, expected_gradient = loss_and_gradient(loss_fn, logits.float(), targets)
    with torch.autocast("cpu", dtype=dtype):
        loss, gradient = loss_and_gradient(loss_fn, logits, targets)
        from_float32 = loss_fn(logits.float(), targets)
    assert loss.dtype == from_float32.dtype == torch.float32
    assert loss.item() == from_float32.item() == expected.item()
    assert torch.equal(gradient, expected_gradient.to(dtype))
    assert loss_fn(logits, targets).dtype == torch.float32


def test_logits_of_any_size_give_finite_gradients():
    logits, targets = make_batch(0)
    for scale in (1e4, 1e30, -1e30):
        loss, gradient = loss_and_gradient(DiceLoss(), (logits * scale).float(), targets)
        assert 0 <= loss <= 1
        assert gradient.isfinite().all()


# --- a module like any other


def test_settings_belong_to_the_loss():
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0], requires_grad=True)
    loss_fn = DiceLoss(weight=weight)
    logits, targets = make_batch(0)
    before = loss_fn(logits, targets)
    with torch.no_grad():
        weight.mul_(torch.tensor([5.0, 1.0, 1.0, 1.0]))
    assert loss_fn(logits, targets) == before  # a copy
    assert list(loss_fn.parameters()) == []
    assert loss_fn.to("meta").weight.device.type == "meta"
    assert list(DiceLoss().state_dict()) == []


def test_the_loss_changes_neither_logits_nor_targets():
    logits, targets = make_batch(0, ignored=0.4)
    z, t = logits.detach().clone(), targets.clone()
    loss_fn = DiceLoss(ignore_index=IGNORE)
    loss_fn(logits, targets).backward()
    loss_fn.target_count(logits, targets)
    assert torch.equal(logits, z)
    assert torch.equal(targets, t)


# --- bad input

LOGITS = torch.zeros(2, 3, 4, 4)
CLASSES = torch.zeros(2, 4, 4, dtype=torch.long)


@pytest.mark.parametrize("index", [255.0, True, "255"])
def test_an_ignore_index_is_an_integer(index):
    with pytest.raises(TypeError, match=f"ignore_index must be an integer, got {index!r}"):
        DiceLoss(ignore_index=index)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"smooth": -1.0}, "smooth must be at least 0"),
        ({"smooth": math.nan}, "smooth must be at least 0"),
        ({"weight": [1.0, -1.0]}, "one finite number >= 0 a class"),
        ({"weight": [1.0, math.nan]}, "one finite number >= 0 a class"),
        ({"weight": [1.0, math.inf]}, "one finite number >= 0 a class"),
        ({"weight": [0.0, 0.0]}, "not all 0"),
        ({"weight": 1.0}, r"shape \(C,\)"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        DiceLoss(**settings)


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (LOGITS[:, 0], CLASSES, r"takes logits \(B, C, H, W\).*\(2, 4, 4\).*unsqueeze\(1\)"),
        (LOGITS[:, 0], CLASSES.float(), r"takes logits \(B, C, H, W\)"),  # would be soft targets of four classes
        (LOGITS.long(), CLASSES, "floating point.*int64"),
        (LOGITS, CLASSES.float(), r"float32, but a class.*\.long\(\)"),
        (LOGITS, CLASSES[:, :3], r"\(2, 3, 4\) don't fit.*\(2, 3, 4, 4\).*\(2, 4, 4\)"),
        (LOGITS, CLASSES[:1], r"\(1, 4, 4\) don't fit"),
        (LOGITS, CLASSES.unsqueeze(1), r"\(2, 1, 4, 4\) don't fit"),
        (LOGITS, LOGITS[:, :2], r"\(2, 2, 4, 4\) don't fit"),
        (LOGITS, LOGITS.long(), r"int64.*argmax\(1\).*float\(\)"),
        (LOGITS[:, :1], LOGITS, r"\(2, 3, 4, 4\) don't fit"),
        (LOGITS.softmax(1), CLASSES, "sum to 1.*leave the softmax out"),
        (LOGITS.softmax(1).bfloat16(), CLASSES, "sum to 1.*leave the softmax out"),
    ],
)
def test_bad_batches_are_refused_with_cause_and_remedy(outputs, targets, message):
    with pytest.raises(ValueError, match=message):
        DiceLoss()(outputs, targets)


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(ValueError, match="2 class weights, but the outputs have 3 channels"):
        DiceLoss(weight=[1.0, 2.0])(LOGITS, CLASSES)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("label", [IGNORE, -1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_label_outside_the_classes_is_an_error_that_names_it(channels, label, dtype):
    if dtype is torch.uint8 and label < 0:
        pytest.skip("no such uint8")
    targets = CLASSES.clone()
    targets[1, 2, 3] = label
    message = (
        rf"label {label}, outside the classes 0 … {max(channels, 2) - 1}, and ignore_index is None.*ignore_index=…"
    )
    with pytest.raises(ValueError, match=message):
        DiceLoss()(LOGITS[:, :channels], targets.to(dtype))
    with pytest.raises(ValueError, match="ignore_index is 7"):
        DiceLoss(ignore_index=7)(LOGITS[:, :channels], targets.to(dtype))
    DiceLoss(ignore_index=label)(LOGITS[:, :channels], targets.to(dtype))


def test_an_ignore_index_that_the_mask_type_cannot_hold_ignores_nothing_else():
    """In eight bits, 156 is -100 and 0 is 256."""
    targets = CLASSES.to(torch.uint8)
    targets[0, 0, 0] = 156
    with pytest.raises(ValueError, match="label 156"):
        DiceLoss(ignore_index=-100)(LOGITS, targets)


@pytest.mark.parametrize("value", [IGNORE, -1.0, math.nan])
@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 1, 4, 4), (2, 3, 4, 4)])
def test_soft_targets_outside_0_to_1_are_an_error(shape, value):
    targets = torch.zeros(shape)
    targets.view(-1)[5] = value
    with pytest.raises(ValueError, match=r"outside 0 … 1.*ignore_index=…"):
        DiceLoss()(LOGITS[:, : 3 if shape[1] == 3 else 1], targets)
    DiceLoss()(LOGITS[:, :1], torch.full((2, 4, 4), 1.0000001))  # a rounding error is none


def test_logits_that_only_once_look_like_probabilities_go_on_training():
    """Outputs are looked at in the first batch: a model gives probabilities always or never."""
    loss_fn = DiceLoss()
    loss_fn(LOGITS, CLASSES)
    loss_fn(LOGITS.softmax(1), CLASSES)
