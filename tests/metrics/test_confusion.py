"""IoU, Dice and the confusion matrix: exact counts, scikit-learn's figures, nodata (traps 14, 15, 16, 17)."""

import math
import warnings

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch.nn.functional import one_hot

from ununennium.kernels import Kernels
from ununennium.metrics import ConfusionMatrix, Dice, IoU, MetricCollection
from ununennium.metrics.confusion import _highest

IGNORE = 255
ORACLES = {IoU: sklearn.metrics.jaccard_score, Dice: sklearn.metrics.f1_score}


def make_batch(seed, images=4, classes=5, size=9, ignored=0.3):
    """Logits (B, C, H, W) and classes (B, H, W); neither holds class 3, one in ten of the others is predicted wrong."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes - 1, (images, size, size), generator=generator)
    targets[targets == 3] = classes - 1
    logits = torch.randn(images, classes, size, size, generator=generator) + 2 * one_hot(targets, classes).movedim(
        -1, 1
    )
    logits[:, 3] = -10
    targets[torch.rand(targets.shape, generator=generator) < ignored] = IGNORE
    return logits, targets


def computed(metric, *batches):
    for outputs, targets in batches:
        metric.update(outputs, targets)
    return metric.compute()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.97])
def test_the_matrix_equals_scikit_learn(seed, ignored):
    logits, targets = make_batch(seed, ignored=ignored)
    matrix = computed(ConfusionMatrix(5, IGNORE), (logits[:1], targets[:1]), (logits[1:], targets[1:]))
    valid = targets != IGNORE
    expected = sklearn.metrics.confusion_matrix(targets[valid], logits.argmax(1)[valid], labels=range(5))
    assert matrix.dtype == torch.int64
    assert np.array_equal(matrix.numpy(), expected)


@pytest.mark.parametrize("ignore_index", [IGNORE, 0, 2, -1])
@pytest.mark.parametrize("average", ["macro", "micro", "none"])
@pytest.mark.parametrize("metric", [IoU, Dice])
def test_figures_equal_scikit_learn(metric, average, ignore_index):
    for seed in range(3):
        logits, targets = make_batch(seed)
        targets = torch.where(targets == IGNORE, ignore_index, targets)
        figure = computed(metric(5, ignore_index=ignore_index, average=average), (logits, targets))
        valid = targets != ignore_index
        true, predicted = targets[valid].numpy(), logits.argmax(1)[valid].numpy()
        if average == "none":
            expected = np.full(5, np.nan)
            expected[np.union1d(true, predicted)] = ORACLES[metric](true, predicted, average=None)
        else:
            expected = ORACLES[metric](true, predicted, average=average)
        assert figure.dtype == torch.float64
        np.testing.assert_allclose(figure.numpy(), expected, rtol=0, atol=1e-12)


def test_absent_classes_are_nan_and_left_out_of_the_mean():
    """Trap 16: class 2 is nowhere; class 1 is only predicted and class 3 only true, which is 0, not absent."""
    predictions, targets = torch.tensor([[0, 0, 1, 0]]), torch.tensor([[0, 0, 0, 3]])
    each = computed(IoU(4, average="none"), (predictions, targets))
    np.testing.assert_array_equal(each, [0.5, 0, math.nan, 0])
    assert computed(IoU(4), (predictions, targets)) == 0.5 / 3
    assert computed(Dice(4), (predictions, targets)) == 4 / 6 / 3


@pytest.mark.parametrize("average", ["macro", "micro", "none"])
@pytest.mark.parametrize("metric", [IoU, Dice])
def test_nothing_counted_is_nan(metric, average):
    assert metric(3, average=average).compute().isnan().all()
    logits, targets = make_batch(0, ignored=1.1)
    assert computed(metric(5, average=average, ignore_index=IGNORE), (logits, targets)).isnan().all()


@pytest.mark.parametrize("value", [0.0, 1e30, -math.inf, math.inf, math.nan])
@pytest.mark.parametrize("ignore_index", [IGNORE, 2, -1])
@pytest.mark.parametrize("metric", [IoU, Dice])
def test_what_a_prediction_says_at_an_ignored_pixel_changes_nothing(metric, ignore_index, value):
    """Trap 17: not by a single bit."""
    logits, targets = make_batch(0)
    targets = torch.where(targets == IGNORE, ignore_index, targets)
    ignored = (targets == ignore_index).unsqueeze(1)
    changed = logits.clone()
    changed[:, 1:2] = torch.where(ignored, value, changed[:, 1:2])
    assert not torch.equal(changed.argmax(1), logits.argmax(1))
    first, second = (metric(5, ignore_index=ignore_index, average="none") for _ in range(2))
    torch.testing.assert_close(
        computed(first, (logits, targets)), computed(second, (changed, targets)), rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(first.confusion.compute(), second.confusion.compute())


@pytest.mark.parametrize("ignore_index", [IGNORE, 2, -1])
@pytest.mark.parametrize("prediction", [-1, 5, IGNORE])
def test_integer_predictions_of_anything_at_an_ignored_pixel_change_nothing(prediction, ignore_index):
    """Trap 17: a map that is nodata where the mask is."""
    logits, targets = make_batch(0)
    targets = torch.where(targets == IGNORE, ignore_index, targets)
    predictions = logits.argmax(1)
    changed = torch.where(targets == ignore_index, prediction, predictions)
    matrices = [computed(ConfusionMatrix(5, ignore_index), (p, targets)) for p in (predictions, changed)]
    assert torch.equal(*matrices)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 50, 101])
def test_every_pixel_counts_once_whatever_the_batch_size(batch_size):
    """Trap 14, one process: 101 tiles give one matrix with 101·H·W entries."""
    logits, targets = make_batch(0, images=101, ignored=0.0)
    batches = zip(logits.split(batch_size), targets.split(batch_size), strict=True)
    matrix = computed(ConfusionMatrix(5), *batches)
    assert matrix.sum() == 101 * 9 * 9
    assert torch.equal(matrix, computed(ConfusionMatrix(5), (logits, targets)))


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_batches_are_summed_before_they_are_divided(average):
    """Trap 15: not a mean of batch means."""
    logits, targets = make_batch(0)
    targets[:3] = torch.where(
        torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.9, IGNORE, targets[:3]
    )
    logits[3] = logits[3].flip(0)
    metric = IoU(5, ignore_index=IGNORE, average=average)
    whole = computed(metric, (logits, targets))
    metric.reset()
    parts = computed(metric, *((logits[i : i + 1], targets[i : i + 1]) for i in range(4)))
    assert parts == whole
    means = [computed(IoU(5, ignore_index=IGNORE), (logits[i : i + 1], targets[i : i + 1])) for i in range(4)]
    assert abs(torch.stack(means).mean() - whole) > 0.01


def test_counts_beyond_float32_are_exact():
    """2²⁴ + 1 has no float32, and a sum in one would stop there."""
    ones = torch.ones(1, 1 << 12, 1 << 12, dtype=torch.uint8)
    matrix = ConfusionMatrix(2)
    matrix.update(ones, ones)
    matrix.update(ones[:, :1, :1], ones[:, :1, :1])
    assert matrix.compute().tolist() == [[0, 0], [0, (1 << 24) + 1]]


def test_reset_forgets():
    logits, targets = make_batch(0)
    metric = IoU(5, ignore_index=IGNORE)
    metric.update(logits.flip(1), targets)
    metric.compute()
    metric.reset()
    assert metric.compute().isnan()
    again = computed(metric, (logits, targets))
    assert again == computed(IoU(5, ignore_index=IGNORE), (logits, targets))
    metric.update(logits, torch.full_like(targets, 77))  # labels that are none are forgotten too
    metric.reset()
    assert computed(metric, (logits, targets)) == again


def test_computing_changes_nothing():
    logits, targets = make_batch(0)
    metric = Dice(5, ignore_index=2)
    metric.update(logits, torch.where(targets == IGNORE, 2, targets))
    assert metric.compute() == metric.compute()
    matrix = metric.confusion.compute()
    matrix.zero_()
    assert metric.confusion.compute().sum() > 0


# --- what outputs and targets may be


@pytest.mark.parametrize("ignore_index", [None, IGNORE, 2, -1, -100, 256])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_every_integer_type_and_every_ignore_index_do_the_same(dtype, ignore_index):
    logits, targets = make_batch(0)
    holds = ignore_index is not None and torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max
    targets = torch.where(targets == IGNORE, ignore_index if holds else 0, targets)
    matrix = computed(ConfusionMatrix(5, ignore_index), (logits, targets.to(dtype)))
    valid = targets != (ignore_index if holds else 1000)
    expected = sklearn.metrics.confusion_matrix(targets[valid], logits.argmax(1)[valid], labels=range(5))
    assert np.array_equal(matrix.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
@pytest.mark.parametrize("channel", [False, True])
def test_one_logit_is_two_classes(dtype, channel):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 6, 6, generator=generator)
    logits[0, 0, 0, 0] = 0.0  # a probability of one half is not above it
    targets = torch.rand(3, 6, 6, generator=generator) < 0.4
    given = (targets.unsqueeze(1) if channel else targets).to(dtype)
    expected = sklearn.metrics.jaccard_score(targets.flatten(), logits.flatten() > 0, average=None)
    np.testing.assert_allclose(computed(IoU(2, average="none"), (logits, given)), expected)


def test_logits_probabilities_predictions_and_memory_formats_do_the_same():
    logits, targets = make_batch(0)
    expected = computed(ConfusionMatrix(5, IGNORE), (logits, targets))
    for outputs in (
        logits.softmax(1),
        logits.argmax(1),
        logits.argmax(1).to(torch.uint8),
        logits.contiguous(memory_format=torch.channels_last),
        logits.clone().requires_grad_(),
        logits.double(),
    ):
        assert torch.equal(computed(ConfusionMatrix(5, IGNORE), (outputs, targets)), expected)
    scenes = computed(ConfusionMatrix(5, IGNORE), (logits.flatten(2), targets.flatten(1)))
    vectors = computed(ConfusionMatrix(5, IGNORE), (logits.movedim(1, -1).reshape(-1, 5), targets.flatten()))
    assert torch.equal(scenes, expected)
    assert torch.equal(vectors, expected)


def test_batches_are_left_as_they_are():
    logits, targets = make_batch(0)
    for dtype in (torch.int64, torch.uint8):
        z, t = logits.clone(), targets.to(dtype, copy=True)
        ConfusionMatrix(5, IGNORE).update(z, t)
        assert torch.equal(z, logits)
        assert torch.equal(t, targets.to(dtype))


# --- bad input


@pytest.mark.parametrize("label", [-1, 5, 77, IGNORE])
@pytest.mark.parametrize("ignore_index", [None, 2, 6, -100])
def test_labels_outside_the_classes_are_counted_and_raised_in_compute(label, ignore_index):
    logits, targets = make_batch(0, ignored=0.0)
    targets[0, 0, :7] = label
    if ignore_index is not None:
        targets[1, 0, :3] = ignore_index
    metric = IoU(5, ignore_index=ignore_index)
    metric.update(logits, targets)
    with pytest.raises(ValueError, match=rf"^7 targets lie outside the classes 0 … 4.*ignore_index={ignore_index}"):
        metric.compute()


def test_an_ignore_index_that_the_mask_type_cannot_hold_ignores_nothing_else():
    """In eight bits, 156 is -100."""
    logits, targets = make_batch(0, ignored=0.0)
    targets[0, 0, 0] = 156
    with pytest.raises(ValueError, match="1 targets lie outside"):
        computed(IoU(5, ignore_index=-100), (logits, targets.to(torch.uint8)))


@pytest.mark.parametrize("prediction", [-1, 5, IGNORE])
def test_integer_predictions_outside_the_classes_are_counted_and_raised_in_compute(prediction):
    logits, targets = make_batch(0)
    predictions = logits.argmax(1)
    predictions[0, :3, :3] = prediction
    valid = (targets[0, :3, :3] != IGNORE).sum()
    assert 0 < valid < 9
    metric = IoU(5, ignore_index=IGNORE)
    metric.update(predictions, targets)
    with pytest.raises(ValueError, match=f"^{valid} predictions at valid pixels lie outside the classes 0 … 4"):
        metric.compute()


LOGITS = torch.zeros(2, 5, 4, 4)
CLASSES = torch.zeros(2, 4, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (LOGITS, CLASSES.float(), r"float32.*\.long\(\)"),
        (LOGITS[:, :4], CLASSES, "4 channels.*num_classes=5"),
        (LOGITS[:, :1], CLASSES, "1 channels.*num_classes=5"),
        (LOGITS, CLASSES[:, :3], r"need targets of shape \(2, 4, 4\), got \(2, 3, 4\)"),
        (LOGITS, CLASSES.unsqueeze(1), r"need targets of shape \(2, 4, 4\), got \(2, 1, 4, 4\)"),
        (LOGITS, CLASSES.flatten(1), r"need targets of shape \(2, 4, 4\), got \(2, 16\)"),
        (CLASSES, CLASSES[:1], r"\(2, 4, 4\) and targets \(1, 4, 4\) differ in shape"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), "0 channels.*num_classes=5"),
    ],
)
def test_bad_batches_are_refused_with_cause_and_remedy(outputs, targets, message):
    metric = IoU(5)
    with pytest.raises(ValueError, match=message):
        metric.update(outputs, targets)
    assert metric.compute().isnan()  # nothing was counted


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_classes": 1}, ValueError, "at least 2 .*got 1"),
        ({"num_classes": 0}, ValueError, "at least 2"),
        ({"num_classes": 2.0}, TypeError, r"num_classes must be an integer, got 2\.0"),
        ({"num_classes": 3.0, "class_names": ["a", "b", "c"]}, TypeError, r"num_classes must be an integer, got 3\.0"),
        ({"num_classes": True}, TypeError, "num_classes must be an integer, got True"),
        ({"num_classes": 3, "ignore_index": 0.5}, TypeError, r"ignore_index must be an integer, got 0\.5"),
        ({"num_classes": 3, "average": None}, ValueError, '"macro", "micro" or "none", got None'),
        ({"num_classes": 3, "class_names": ["a", "b"]}, ValueError, "3 different names.*num_classes=3"),
        ({"num_classes": 3, "class_names": ["a", "b", "a"]}, ValueError, "3 different names"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        IoU(**arguments)


def test_numpy_integers_are_integers():
    logits, targets = make_batch(0)
    figure = computed(IoU(np.int64(5), ignore_index=np.uint8(IGNORE)), (logits, targets))
    assert figure == computed(IoU(5, ignore_index=IGNORE), (logits, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channels first", "channels last", "a view", "volume", "no pixels axis"])
def test_the_predicted_class_is_the_first_of_the_highest(dtype, layout):
    """Of PyTorch's own maximum, over several tiles: at ties, at NaN and at infinities."""
    draw = torch.Generator().manual_seed(1)
    shape = {"volume": (2, 5, 3, 130, 140), "no pixels axis": (70, 5)}.get(layout, (3, 5, 190, 200))
    logits = torch.randint(-2, 3, shape, generator=draw).to(dtype)
    logits[torch.rand(shape, generator=draw) < 0.1] = -torch.inf
    if layout == "channels last":
        logits = logits.to(memory_format=torch.channels_last)
    if layout == "a view":
        logits = logits.repeat(1, 2, 1, 1)[:, 1::2, ::2]
    spoiled = logits.clone()
    spoiled[-1][torch.rand(spoiled.shape[1:], generator=draw) < 0.1] = torch.nan
    for outputs in (logits, spoiled):
        assert torch.equal(_highest(outputs).long(), outputs.max(1).indices)


def test_many_classes_are_counted_as_exactly():
    """Beyond what fits the small integers that few classes are counted with."""
    draw = torch.Generator().manual_seed(2)
    for classes in (179, 180, 181, 255, 256, 300):
        targets = torch.randint(0, classes, (2, 40, 40), generator=draw)
        logits = torch.randn(2, classes, 40, 40, generator=draw)
        matrix = ConfusionMatrix(classes)
        matrix.update(logits, targets)
        expected = sklearn.metrics.confusion_matrix(
            targets.flatten(), logits.argmax(1).flatten(), labels=range(classes)
        )
        assert torch.equal(matrix.compute(), torch.from_numpy(expected))


def counted_twice(batches, num_classes, ignore_index, **options):
    """Return what a matrix and one with compiled kernels have counted."""
    plain, compiled = ConfusionMatrix(num_classes, ignore_index), ConfusionMatrix(num_classes, ignore_index)
    compiled.compile(**options)
    for outputs, targets in batches:
        plain.update(outputs, targets)
        compiled.update(outputs, targets)
    return plain.state_dict(), compiled.state_dict()


def large_batches(classes, dtype, layout, kind=torch.int64):
    """Yield images large enough for a kernel, with ties, NaN, infinities and labels of every kind."""
    draw = torch.Generator().manual_seed(3)
    for images in (3, 1):
        logits = torch.randint(-2, 3, (images, classes, 70, 80), generator=draw).to(dtype)
        spoil = torch.rand(logits.shape, generator=draw)
        logits = logits.where(spoil > 0.05, torch.nan).where(spoil < 0.9, torch.inf).where(spoil < 0.8, -torch.inf)
        targets = torch.randint(-1, classes + 2, (images, 70, 80), generator=draw)
        targets = targets.where(torch.rand(targets.shape, generator=draw) > 0.1, IGNORE)
        yield logits.contiguous(memory_format=layout), targets.to(kind)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ignore_index", [None, IGNORE, -1, 0])
@pytest.mark.parametrize("classes", [2, 13, 32])
def test_compiled_the_counts_are_the_same(layout, ignore_index, classes):
    calls = []

    def backend(graph, inputs):
        return lambda *arguments: calls.append(1) or graph.forward(*arguments)

    batches = large_batches(classes, torch.float64, layout)
    plain, compiled = counted_twice(batches, classes, ignore_index, backend=backend)
    assert len(calls) == 4  # images
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.uint16])
def test_compiled_any_integer_type_is_counted(kind):
    batches = large_batches(5, torch.float32, torch.contiguous_format, kind)
    plain, compiled = counted_twice(batches, 5, IGNORE, backend="eager")
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


@pytest.mark.parametrize("shape", [(2, 5, 20, 20), (2, 40, 70, 80), (500, 5)])
def test_what_no_kernel_pays_for_is_counted_without(shape):
    def backend(graph, inputs):
        raise AssertionError("compiled")

    outputs = torch.randn(shape)
    targets = outputs.argmax(1)
    plain, compiled = counted_twice([(outputs, targets)], shape[1], None, backend=backend)
    assert torch.equal(plain["counts"], compiled["counts"])


def test_where_the_compiler_fails_counting_goes_on():
    def broken(graph, inputs):
        raise ValueError("no compiler on this machine")

    batches = large_batches(5, torch.float32, torch.contiguous_format)
    with pytest.warns(UserWarning, match="ConfusionMatrix goes on without compiled kernels") as warned:
        plain, compiled = counted_twice(batches, 5, IGNORE, backend=broken)
    assert len(warned) == 1
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)]
)
def test_what_pytorchs_own_compiler_makes_of_it_counts_the_same(layout, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain, compiled = counted_twice(large_batches(10, dtype, layout), 10, IGNORE)
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


def test_a_collection_compiles_the_matrix_that_its_metrics_share(monkeypatch):
    calls = []
    monkeypatch.setattr(Kernels, "run", lambda self, function, key, *inputs: calls.append(key) or function(*inputs))
    outputs, targets = next(large_batches(5, torch.float32, torch.contiguous_format))
    targets[(targets < 0) | (targets > 4)] = IGNORE
    metrics = [IoU(5, ignore_index=IGNORE), Dice(5, ignore_index=IGNORE)]
    plain, compiled = MetricCollection(metrics), MetricCollection(metrics)
    compiled.compile()
    for collection in plain, compiled:
        collection.update(outputs, targets)
    assert compiled.compute() == plain.compute()
    assert len(calls) == len(outputs)
