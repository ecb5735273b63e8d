"""MetricCollection: one matrix for all, names, torchmetrics in the same list."""

import copy
import math
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
import torchmetrics

from ununennium.metrics import ConfusionMatrix, Dice, IoU, Metric, MetricCollection
from ununennium.training.checkpoint.plain import pack, unpack


def make_batch(seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(3, classes, 6, 6, generator=generator),
        torch.randint(classes, (3, 6, 6), generator=generator),
    )


@pytest.fixture
def updates(monkeypatch):
    """The confusion matrices that were updated, in order."""
    seen = []
    original = ConfusionMatrix.update

    def update(self, outputs, targets):
        seen.append(self)
        original(self, outputs, targets)

    monkeypatch.setattr(ConfusionMatrix, "update", update)
    return seen


def test_metrics_over_the_same_matrix_update_it_once(updates):
    metrics = MetricCollection({"a": IoU(4), "b": Dice(4), "c": IoU(4, average="none"), "d": Dice(4, average="micro")})
    for seed in range(3):
        metrics.update(*make_batch(seed))
    assert len(updates) == 3
    assert len(set(map(id, updates))) == 1
    figures = metrics.compute()
    for name, alone in (("a", IoU(4)), ("b", Dice(4)), ("d", Dice(4, average="micro"))):
        for seed in range(3):
            alone.update(*make_batch(seed))
        assert figures[name] == alone.compute().item()
    metrics.reset()
    assert all(math.isnan(v) for v in metrics.compute().values())


def test_metrics_over_different_matrices_do_not_share(updates):
    metrics = MetricCollection({"a": IoU(4), "b": IoU(4, ignore_index=0), "c": Dice(4, ignore_index=0)})
    outputs, targets = make_batch()
    metrics.update(outputs, targets)
    assert len(updates) == 2
    alone = IoU(4, ignore_index=0)
    alone.update(outputs, targets)
    figures = metrics.compute()
    assert figures["b"] == alone.compute().item()
    assert figures["a"] != figures["b"]


def test_a_subclass_that_counts_in_its_own_way_is_not_shared_away():
    class Shifted(IoU):
        name = "shifted"

        def update(self, outputs, targets):
            super().update(outputs.roll(1, 1), targets)

    outputs, targets = make_batch()
    metrics = MetricCollection([IoU(4), Shifted(4), Dice(4)])
    metrics.update(outputs, targets)
    figures = metrics.compute()
    alone = IoU(4)
    alone.update(outputs.roll(1, 1), targets)
    assert figures["shifted"] == alone.compute().item() != figures["iou"]
    metrics.reset()
    assert all(math.isnan(v) for v in metrics.compute().values())


def test_the_objects_that_were_passed_stay_as_they_are():
    iou, dice, theirs = IoU(4), Dice(4), torchmetrics.Accuracy(task="multiclass", num_classes=4)
    iou.update(*make_batch(0))
    before, matrices = iou.compute(), (iou.confusion, dice.confusion)
    metrics = MetricCollection([iou, dice, theirs])
    metrics.reset()
    metrics.update(*make_batch(1))
    assert iou.compute() == before != metrics.compute()["iou"]
    assert dice.compute().isnan()
    assert theirs.update_count == 0
    assert (iou.confusion, dice.confusion) == matrices


def test_two_collections_of_the_same_objects_know_nothing_of_each_other():
    given = [IoU(4), Dice(4)]
    first, second = MetricCollection(given), MetricCollection(given)
    first.update(*make_batch())
    assert all(math.isnan(value) for value in second.compute().values())


@pytest.mark.parametrize("ignore_index", [None, 1, 255])
def test_torchmetrics_beside_ours_give_their_own_value(ignore_index):
    def make():
        settings = {"task": "multiclass", "num_classes": 4, "ignore_index": ignore_index}
        return [
            torchmetrics.JaccardIndex(**settings),
            torchmetrics.F1Score(**settings, average="micro"),
            torchmetrics.ConfusionMatrix(**settings),
        ]

    alone = make()
    metrics = MetricCollection([*make(), IoU(4, ignore_index=ignore_index), Dice(4, ignore_index=ignore_index)])
    for seed in range(3):
        outputs, targets = make_batch(seed)
        if ignore_index is not None:
            targets[:, :2] = ignore_index
        metrics.update(outputs, targets)
        for metric in alone:
            metric.update(outputs, targets)
    figures = metrics.compute()
    names = ["multiclass_jaccard_index", "multiclass_f1_score", "multiclass_confusion_matrix"]
    assert metrics.names() == [*names, "iou", "dice"]
    assert figures["multiclass_jaccard_index"] == alone[0].compute().item()
    assert figures["multiclass_f1_score"] == alone[1].compute().item()
    matrix = [figures[f"multiclass_confusion_matrix/{i}"] for i in range(16)]
    assert matrix == alone[2].compute().flatten().tolist()
    if ignore_index != 1:  # torchmetrics leaves a class out of its mean whose index is ignored
        assert figures["iou"] == pytest.approx(figures["multiclass_jaccard_index"], abs=1e-6)
    metrics.reset()
    metrics.update(outputs, targets)
    assert metrics.compute()["multiclass_confusion_matrix/0"] < matrix[0]


def test_torchmetrics_for_anything_else_go_too():
    metrics = MetricCollection([torchmetrics.MeanSquaredError()])
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(2, 3, 5, 5, generator=generator), torch.randn(2, 3, 5, 5, generator=generator)
    metrics.update(outputs[:1], targets[:1])
    metrics.update(outputs[1:], targets[1:])
    assert metrics.compute() == {"mean_squared_error": pytest.approx((outputs - targets).square().mean().item())}
    assert metrics.higher_is_better("mean_squared_error") is False


def test_a_collection_of_torchmetrics_names_its_members():
    theirs = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()])
    metrics = MetricCollection({"error": theirs})
    metrics.update(torch.zeros(2, 3), torch.full((2, 3), 2.0))
    assert metrics.compute() == {"error/MeanSquaredError": 4.0, "error/MeanAbsoluteError": 2.0}


def test_any_object_with_three_methods_is_a_metric():
    class Count:
        def __init__(self):
            self.reset()

        def reset(self):
            self.samples = 0

        def update(self, outputs, targets):
            self.samples += len(targets)

        def compute(self):
            return self.samples

    assert isinstance(Count(), Metric)
    metrics = MetricCollection([Count(), IoU(4)])
    metrics.update(*make_batch())
    assert metrics.compute()["count"] == 3
    assert metrics.higher_is_better("count") is None
    assert metrics.to(torch.device("cpu")) is metrics
    assert MetricCollection([type("RMSEPerBand", (Count,), {})()]).names() == ["rmse_per_band"]
    metrics.reset()
    assert metrics.compute()["count"] == 0


# --- names


def test_names_are_the_keys_of_compute():
    names = ["water", "forest", "town", "field"]
    metrics = MetricCollection(
        {
            "iou": IoU(4),
            "each": IoU(4, average="none", class_names=names),
            "number": Dice(4, average="none"),
            "named": Dice(4, class_names=names),
        }
    )
    metrics.update(*make_batch())
    figures = metrics.compute()
    assert metrics.names() == list(figures)
    assert list(figures) == [
        "iou",
        *(f"each/{name}" for name in names),
        *(f"number/{c}" for c in range(4)),
        "named",
    ]
    assert all(type(value) is float for value in figures.values())
    assert sum(figures[f"each/{name}"] for name in names) / 4 == pytest.approx(figures["iou"])


def test_a_class_that_is_absent_is_nan_in_its_place():
    metrics = MetricCollection([IoU(3, average="none", class_names=["a", "b", "c"])])
    metrics.update(torch.tensor([[0, 2]]), torch.tensor([[0, 2]]))
    figures = metrics.compute()
    assert math.isnan(figures.pop("iou/b"))
    assert figures == {"iou/a": 1.0, "iou/c": 1.0}


def test_what_is_better():
    class Error(IoU):
        higher_is_better = False

    metrics = MetricCollection(
        {"iou": IoU(2), "iou/error": Error(2, average="none", class_names=["a", "b/c"]), "mse": IoU(2, average="none")}
    )
    assert metrics.higher_is_better("iou") is True
    assert metrics.higher_is_better("mse/1") is True
    assert metrics.higher_is_better("iou/error/b/c") is False
    assert metrics.higher_is_better("loss") is None
    assert metrics.higher_is_better("ious") is None


def test_an_empty_collection():
    metrics = MetricCollection([])
    metrics.update(*make_batch())
    assert metrics.compute() == {}
    assert metrics.names() == []
    assert len(metrics) == 0


def test_a_collection_can_be_copied():
    metrics = MetricCollection([IoU(4), Dice(4)])
    metrics.update(*make_batch(0))
    other = copy.deepcopy(metrics)
    before = metrics.compute()
    other.update(*make_batch(1))
    assert metrics.compute() == before != other.compute()


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        ([IoU(3), IoU(3, average="micro")], ValueError, "two metrics are called 'iou': pass a dict"),
        ([IoU], TypeError, "must be an object with update, compute and reset, such as"),
        ([lambda outputs, targets: 0], TypeError, "must be an object with update, compute and reset, such as"),
        ({"a": "iou"}, TypeError, "'a' is 'iou', and must be an object with update"),
    ],
)
def test_what_is_no_metric_is_refused(metrics, error, message):
    with pytest.raises(error, match=message):
        MetricCollection(metrics)


class Plain:
    """A metric with neither state_dict nor modules."""

    def __init__(self):
        self.seen = []

    def update(self, outputs, targets):
        self.seen.append(len(targets))

    def compute(self):
        return float(sum(self.seen))

    def reset(self):
        self.seen = []


def test_counting_goes_on_from_a_state_dict():
    """Ours, torchmetrics' with sums, with lists and nested, and metrics of one's own."""

    def make():
        named = {"iou": IoU(3, ignore_index=255), "dice": Dice(3, ignore_index=255), "plain": Plain()}
        tm = torchmetrics.classification
        named["sums"] = tm.MulticlassJaccardIndex(3, ignore_index=255)
        named["lists"] = tm.MulticlassAUROC(3, ignore_index=255)
        named["nested"] = torchmetrics.MetricCollection([tm.MulticlassAccuracy(3, ignore_index=255)])
        return MetricCollection(named)

    torch.manual_seed(0)
    batches = [(torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))) for _ in range(4)]
    whole, first, second = make(), make(), make()
    for batch in batches:
        whole.update(*batch)
    for batch in batches[:2]:
        first.update(*batch)
    second.update(*batches[3])  # which it forgets
    second.load_state_dict(first.state_dict())
    for batch in batches[2:]:
        second.update(*batch)
    assert second.compute() == whole.compute()


def test_the_state_of_other_metrics_is_refused():
    with pytest.raises(ValueError, match=r"of the metrics \['iou'\], these are \['dice'\]"):
        MetricCollection([Dice(3)]).load_state_dict(MetricCollection([IoU(3)]).state_dict())
    with pytest.raises(ValueError, match="not of num_classes=4"):
        MetricCollection([IoU(4)]).load_state_dict(MetricCollection([IoU(3)]).state_dict())


class Slotted:
    __slots__ = ("seen",)

    def __init__(self):
        self.seen = 0

    update, compute, reset = Plain.update, Plain.compute, Plain.reset


class HalfSlotted(Slotted):
    """With attributes too, among which its count is not."""


class Strange(Plain):
    def __init__(self):
        super().__init__()
        self.seen = {"batches": [(1, {torch.device("cpu")})]}


class StrangeState(Plain):
    def state_dict(self):
        return {"seen": [lambda: 0]}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (Slotted(), "the metric Slotted has __slots__"),
        (HalfSlotted(), "the metric HalfSlotted has __slots__"),
        (Strange(), r"'seen' of the metric Strange is or holds a torch\.device"),
        (StrangeState(), r"'seen' in the state_dict of the metric StrangeState is or holds a builtins\.function"),
    ],
)
def test_a_state_that_no_checkpoint_could_hold_names_the_metric_and_the_remedy(metric, message):
    metrics = MetricCollection({"theirs": metric})
    with pytest.raises(TypeError, match=rf"{message}.*: give it state_dict and load_state_dict"):
        metrics.state_dict()


def test_plain_data_is_what_a_checkpoint_holds():
    metric = Plain()
    metric.seen = [None, True, 1, 2.0, "a", (1,), {2}, frozenset({3}), {"a": {4: [5]}}, Counter("ab"), OrderedDict(a=1)]
    metric.seen += [torch.zeros(2), np.zeros(2), np.float32(1)]
    state = MetricCollection({"plain": metric}).state_dict()
    tensors = {}
    assert len(unpack(pack(state, tensors, "metrics"), tensors)["states"][0]["seen"]) == len(metric.seen)


def test_labels_outside_the_classes_are_an_error_of_the_collection():
    metrics = MetricCollection([IoU(3)])
    metrics.update(torch.tensor([[0, 1]]), torch.tensor([[0, 7]]))
    with pytest.raises(ValueError, match="1 targets lie outside the classes 0 … 2"):
        metrics.compute()
