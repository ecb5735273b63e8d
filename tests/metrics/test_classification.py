"""Figures over one confusion matrix: scikit-learn's and torchmetrics' values, absent classes, classes beside means."""

import math
import warnings

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.classification as tm

from ununennium.metrics import (
    F1,
    AverageAccuracy,
    CohenKappa,
    ConfusionMatrix,
    Dice,
    IoU,
    MetricCollection,
    OverallAccuracy,
    Precision,
    Recall,
)
from ununennium.metrics.classification import class_figures

IGNORE = 255
OF_CLASSES = {
    IoU: (sklearn.metrics.jaccard_score, tm.multiclass_jaccard_index),
    Dice: (sklearn.metrics.f1_score, tm.multiclass_f1_score),
    F1: (sklearn.metrics.f1_score, tm.multiclass_f1_score),
    Precision: (sklearn.metrics.precision_score, tm.multiclass_precision),
    Recall: (sklearn.metrics.recall_score, tm.multiclass_recall),
}
OF_ALL = [OverallAccuracy, AverageAccuracy, CohenKappa]


def make_maps(seed=0, classes=6, shape=(3, 12, 12), ignored=0.3):
    """Predicted and true classes; 3 is in neither, 4 only predicted, 5 only true, 0 is half of all."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(-3, 3, shape, generator=generator).clamp(min=0)
    targets[torch.rand(shape, generator=generator) < 0.05] = 5
    predictions = torch.where(torch.rand(shape, generator=generator) < 0.6, targets, targets.flip(0))
    predictions[torch.rand(shape, generator=generator) < 0.1] = 4
    predictions[predictions == 5] = 1
    targets[torch.rand(shape, generator=generator) < ignored] = IGNORE
    return predictions, targets


def valid(predictions, targets, ignore_index=IGNORE):
    return targets[targets != ignore_index].numpy(), predictions[targets != ignore_index].numpy()


def computed(metric, *batches):
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "none"])
@pytest.mark.parametrize("metric", OF_CLASSES)
@pytest.mark.parametrize("ignore_index", [IGNORE, 1, -1])
def test_figures_of_classes_equal_scikit_learn(metric, average, ignore_index):
    """Over the classes that occur, with 0 for one that only one of the maps holds."""
    for seed in range(3):
        predictions, targets = make_maps(seed)
        targets = torch.where(targets == IGNORE, ignore_index, targets)
        figure = computed(metric(6, ignore_index=ignore_index, average=average), (predictions, targets))
        true, predicted = valid(predictions, targets, ignore_index)
        settings = {"average": None if average == "none" else average, "zero_division": 0}
        expected = OF_CLASSES[metric][0](true, predicted, **settings)
        if average == "none":
            assert len(np.union1d(true, predicted)) == 5
            each, expected = expected, np.full(6, np.nan)
            expected[np.union1d(true, predicted)] = each
        assert figure.dtype == torch.float64
        np.testing.assert_allclose(figure.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "none"])
@pytest.mark.parametrize("metric", OF_CLASSES)
def test_figures_of_classes_equal_torchmetrics(metric, average):
    predictions, targets = make_maps()
    figure = computed(metric(6, ignore_index=IGNORE, average=average), (predictions, targets))
    expected = OF_CLASSES[metric][1](predictions, targets, num_classes=6, average=average, ignore_index=IGNORE)
    np.testing.assert_allclose(figure.nan_to_num(0), expected, rtol=0, atol=1e-6)  # its absent classes are 0


@pytest.mark.parametrize("ignore_index", [IGNORE, 1, -1])
def test_figures_of_the_whole_equal_scikit_learn(ignore_index):
    oracles = sklearn.metrics.accuracy_score, sklearn.metrics.balanced_accuracy_score, sklearn.metrics.cohen_kappa_score
    for seed in range(3):
        predictions, targets = make_maps(seed)
        targets = torch.where(targets == IGNORE, ignore_index, targets)
        true, predicted = valid(predictions, targets, ignore_index)
        for metric, oracle in zip(OF_ALL, oracles, strict=True):
            with warnings.catch_warnings():  # of the balanced accuracy: a class is predicted that is nowhere true
                warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
                expected = oracle(true, predicted)
            figure = computed(metric(6, ignore_index=ignore_index), (predictions, targets))
            assert figure.dtype == torch.float64
            assert figure.ndim == 0
            assert figure.item() == pytest.approx(expected, abs=1e-12)


def test_figures_of_the_whole_equal_torchmetrics():
    predictions, targets = make_maps()
    settings = {"num_classes": 6, "ignore_index": IGNORE}
    expected = {
        OverallAccuracy: tm.multiclass_accuracy(predictions, targets, average="micro", **settings),
        CohenKappa: tm.multiclass_cohen_kappa(predictions, targets, **settings),
    }
    for metric, value in expected.items():
        figure = computed(metric(6, ignore_index=IGNORE), (predictions, targets))
        assert figure.item() == pytest.approx(value.item(), abs=1e-6)


def test_a_class_that_is_predicted_and_nowhere_true_is_in_the_mean_of_recalls_and_not_in_the_average_accuracy():
    maps = torch.tensor([[0, 0, 2, 1]]), torch.tensor([[0, 0, 0, 1]])
    assert computed(Recall(4), maps).item() == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert computed(AverageAccuracy(4), maps).item() == pytest.approx((2 / 3 + 1) / 2)
    np.testing.assert_array_equal(computed(Recall(4, average="none"), maps), [2 / 3, 1, 0, math.nan])


def test_a_class_that_is_never_predicted_keeps_its_place_in_the_mean_of_precisions():
    """Else a model would gain by giving a class up."""
    maps = torch.tensor([[0, 0, 0, 0]]), torch.tensor([[0, 0, 0, 1]])
    np.testing.assert_array_equal(computed(Precision(3, average="none"), maps), [0.75, 0, math.nan])
    assert computed(Precision(3), maps) == 0.375


def test_agreement_no_better_than_chance_is_a_kappa_of_zero():
    maps = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 0, 1, 1]])
    assert computed(CohenKappa(2), maps) == 0
    assert computed(CohenKappa(2), (maps[0], maps[0])) == 1
    assert computed(CohenKappa(2), (maps[0], 1 - maps[0])) == -1
    assert computed(CohenKappa(2), (maps[0] * 0, maps[0] * 0)).isnan()  # all of one class: nothing to agree on


def test_kappa_of_as_many_pixels_as_the_earth_has():
    """Its products of counts are beyond the integers."""
    metric = CohenKappa(2)
    counts = 10**15 * torch.tensor([0, 0, 0, 3, 1, 0, 2, 4, 0, 0, 0, 0])
    metric.load_state_dict({"counts": counts, "ignored": torch.zeros((), dtype=torch.int64)})
    assert metric.confusion.compute().tolist() == [[3 * 10**15, 10**15], [2 * 10**15, 4 * 10**15]]
    assert metric.compute().item() == pytest.approx(0.4, abs=1e-12)


@pytest.mark.parametrize("metric", [*OF_CLASSES, *OF_ALL])
def test_nothing_counted_is_nan(metric):
    assert metric(3).compute().isnan()
    nothing = torch.full((1, 4), IGNORE)
    assert computed(metric(3, ignore_index=IGNORE), (torch.zeros_like(nothing), nothing)).isnan()


@pytest.mark.parametrize("average", ["micro", "weighted", "none"])
def test_nothing_counted_is_nan_for_every_average(average):
    assert all(metric(3, average=average).compute().isnan().all() for metric in OF_CLASSES)


@pytest.mark.parametrize("metric", [*OF_CLASSES, *OF_ALL])
def test_what_is_predicted_at_an_ignored_pixel_changes_nothing(metric):
    """Trap 17."""
    predictions, targets = make_maps()
    changed = torch.where(targets == IGNORE, 2, predictions)
    assert not torch.equal(changed, predictions)
    metrics = [metric(6, ignore_index=IGNORE) for _ in range(2)]
    assert computed(metrics[0], (predictions, targets)) == computed(metrics[1], (changed, targets))


# --- classes beside their mean


NAMES = ["a", "b", "c", "d", "e", "f"]


def test_classes_stand_beside_their_mean():
    metrics = MetricCollection(
        {
            "iou": IoU(6, ignore_index=IGNORE, class_names=NAMES, per_class=True),
            "recall": Recall(6, ignore_index=IGNORE, average="micro", per_class=True),
            "oa": OverallAccuracy(6, ignore_index=IGNORE, class_names=NAMES),
        }
    )
    metrics.update(*make_maps())
    figures = metrics.compute()
    expected = ["iou", *(f"iou/{name}" for name in NAMES), "recall", *(f"recall/{number}" for number in range(6)), "oa"]
    assert list(figures) == metrics.names() == expected
    for name, metric in (("iou", IoU), ("recall", Recall)):
        each = computed(metric(6, ignore_index=IGNORE, average="none"), make_maps())
        shown = [value for key, value in figures.items() if key.startswith(f"{name}/")]
        np.testing.assert_array_equal(shown, each)
    assert math.isnan(figures["iou/d"])
    assert figures["iou"] == computed(IoU(6, ignore_index=IGNORE), make_maps()).item()
    assert figures["recall"] == computed(Recall(6, ignore_index=IGNORE, average="micro"), make_maps()).item()
    assert figures["recall"] == figures["oa"]


def test_classes_beside_their_mean_are_those_of_all_processes():
    """``reduced`` over two, the other of which has counted the same."""
    metrics = MetricCollection([IoU(6, ignore_index=IGNORE, per_class=True), Dice(6, ignore_index=IGNORE)])
    other = MetricCollection([IoU(6, ignore_index=IGNORE, per_class=True)])
    metrics.update(*make_maps(0))
    other.update(*make_maps(1))
    others = iter(other._sources[0].state_dict().values())
    both = computed(IoU(6, ignore_index=IGNORE, average="none"), make_maps(0), make_maps(1))
    figures = metrics.compute(lambda tensor: tensor + next(others))
    np.testing.assert_array_equal([figures[f"iou/{number}"] for number in range(6)], both)
    assert figures["iou"] == both.nanmean().item()


@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "none"])
def test_each_class_is_given_whatever_the_average(average):
    metric = Dice(6, ignore_index=IGNORE, average=average)
    metric.update(*make_maps())
    expected = computed(Dice(6, ignore_index=IGNORE, average="none"), make_maps())
    np.testing.assert_array_equal(metric.compute_each(), expected)


def test_classes_without_and_with_their_mean_are_two_wishes():
    with pytest.raises(ValueError, match="without their mean: leave per_class or average out"):
        IoU(3, average="none", per_class=True)


def test_what_there_is_to_say_of_each_class():
    matrix = ConfusionMatrix(6, IGNORE)
    predictions, targets = make_maps()
    matrix.update(predictions, targets)
    figures = class_figures(matrix)
    assert list(figures) == ["iou", "dice", "precision", "recall", "support"]
    true, predicted = valid(predictions, targets)
    expected = sklearn.metrics.precision_recall_fscore_support(true, predicted, labels=range(6), zero_division=np.nan)
    for name, values in zip(("precision", "recall", "dice", "support"), expected, strict=True):
        occurs = np.union1d(true, predicted)
        np.testing.assert_allclose(figures[name][occurs], np.nan_to_num(values)[occurs], atol=1e-12)
    assert figures["support"].tolist() == np.bincount(true, minlength=6).tolist()
    assert figures["iou"][3].isnan()


# --- over one matrix


def test_all_figures_share_one_matrix_and_one_update(monkeypatch):
    seen = []
    original = ConfusionMatrix.update
    monkeypatch.setattr(ConfusionMatrix, "update", lambda self, *batch: seen.append(self) or original(self, *batch))
    kinds = [*OF_CLASSES, *OF_ALL]
    metrics = MetricCollection([kind(6, ignore_index=IGNORE) for kind in kinds])
    for seed in range(2):
        metrics.update(*make_maps(seed))
    assert len(seen) == 2
    assert seen[0] is seen[1] is metrics.confusion
    figures = metrics.compute()
    assert list(figures) == ["iou", "dice", "f1", "precision", "recall", "oa", "aa", "kappa"]
    for kind in kinds:
        assert figures[kind.name] == computed(kind(6, ignore_index=IGNORE), make_maps(0), make_maps(1)).item()
    assert figures["f1"] == figures["dice"]
    assert all(metrics.higher_is_better(name) is True for name in figures)


def test_counting_goes_on_from_the_counts_of_one_metric_and_of_several_processes():
    whole, first, second = (CohenKappa(6, ignore_index=IGNORE) for _ in range(3))
    expected = computed(whole, *(make_maps(seed) for seed in range(3)))
    first.update(*make_maps(0))
    second.update(*make_maps(1))
    other = CohenKappa(6, ignore_index=IGNORE)
    other.load_state_dict(first.state_dict())
    other.absorb(second.state_dict())
    other.update(*make_maps(2))
    assert other.compute() == expected


def test_labels_outside_the_classes_are_an_error_of_every_figure():
    for metric in (*OF_CLASSES, *OF_ALL):
        with pytest.raises(ValueError, match="1 targets lie outside the classes 0 … 2"):
            computed(metric(3), (torch.tensor([[0, 1]]), torch.tensor([[0, 7]])))
