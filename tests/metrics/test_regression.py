"""MAE, RMSE and R²: scikit-learn's and torchmetrics' values, nodata, numbers far from zero, sums put together."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics

from ununennium.metrics import MAE, R2, RMSE, Metric, MetricCollection
from ununennium.metrics.regression import RegressionSums

NODATA = -9999.0
KINDS = [MAE, RMSE, R2]
ORACLES = {
    MAE: sklearn.metrics.mean_absolute_error,
    RMSE: sklearn.metrics.root_mean_squared_error,
    R2: sklearn.metrics.r2_score,
}


def make_batch(seed=0, shape=(4, 3, 6, 7), level=20.0, nodata=0.3, dtype=torch.float32):
    """Predictions and targets; each sample has a level of its own, and a share of its targets is no data."""
    generator = torch.Generator().manual_seed(seed)
    levels = level + 5 * torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    targets = (levels + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    outputs = (targets.double() + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) - 0.2).to(dtype)
    targets[torch.rand(shape, generator=generator) < nodata] = NODATA
    return outputs, targets


def valid(outputs, targets):
    """As scikit-learn takes them."""
    there = (targets != NODATA) & ~targets.isnan()
    return targets[there].double().numpy(), outputs[there].double().numpy()


def computed(metric, *batches):
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


def split(batch, *sizes):
    return list(zip(*(tensor.split(sizes) for tensor in batch), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 3, 6, 7), (4, 1, 6, 7), (4, 6, 7), (50, 2), (50,), (2, 2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("nodata", [0.0, 0.3, 0.9])
def test_figures_equal_scikit_learn(kind, shape, nodata):
    """Over batches of different sizes and levels; every target counts once (trap 15)."""
    outputs, targets = make_batch(0, shape, nodata=nodata)
    sizes = (1, shape[0] - 1)
    figure = computed(kind(ignore_value=NODATA), *split((outputs, targets), *sizes))
    assert figure.dtype == torch.float64
    assert figure.ndim == 0
    assert figure.item() == pytest.approx(ORACLES[kind](*valid(outputs, targets)), rel=1e-12)


@pytest.mark.parametrize("nodata", [0.0, 0.3])
def test_figures_of_channels_equal_scikit_learn(nodata):
    outputs, targets = make_batch(1, nodata=nodata)
    for kind in KINDS:
        metric = kind(ignore_value=NODATA, channel_names=["height", "volume", "cover"])
        figures = MetricCollection([metric])
        for batch in split((outputs, targets), 3, 1):
            figures.update(*batch)
        each = [ORACLES[kind](*valid(outputs[:, k], targets[:, k])) for k in range(3)]
        names = [kind.name, *(f"{kind.name}/{name}" for name in ("height", "volume", "cover"))]
        assert figures.compute() == pytest.approx(dict(zip(names, [np.mean(each), *each], strict=True)), rel=1e-12)
        assert figures.names() == names
        if not nodata:
            table = [tensor.movedim(1, -1).reshape(-1, 3).double().numpy() for tensor in (targets, outputs)]
            assert figures.compute()[kind.name] == pytest.approx(ORACLES[kind](*table), rel=1e-12)


def test_figures_equal_torchmetrics():
    table = [tensor.movedim(1, -1).reshape(-1, 3).double() for tensor in make_batch(nodata=0)]
    theirs = {
        MAE: torchmetrics.MeanAbsoluteError(num_outputs=3),
        RMSE: torchmetrics.MeanSquaredError(squared=False, num_outputs=3),
        R2: torchmetrics.R2Score(multioutput="raw_values"),
    }
    for kind, oracle in theirs.items():
        oracle.set_dtype(torch.float64).update(*table)
        metric = kind(channel_names=["a", "b", "c"])
        metric.update(*table)
        torch.testing.assert_close(metric.compute_each(), oracle.compute(), rtol=1e-9, atol=0)


def test_integers_are_numbers():
    outputs, targets = torch.tensor([3, 5, 9], dtype=torch.int16), torch.tensor([1, 5, 7], dtype=torch.uint8)
    assert computed(MAE(), (outputs, targets)).item() == 4 / 3
    assert computed(R2(), (outputs, targets)).item() == pytest.approx(sklearn.metrics.r2_score(targets, outputs))


# --- nodata


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("nodata", [NODATA, math.nan])
@pytest.mark.parametrize("channel_names", [None, ["a", "b", "c"]])
def test_what_a_prediction_says_where_there_is_no_target_changes_no_bit(kind, value, nodata, channel_names):
    """Trap 17."""
    outputs, targets = make_batch()
    gone = targets == NODATA
    metrics = [kind(ignore_value=NODATA, channel_names=channel_names) for _ in range(2)]
    expected = computed(metrics[0], (outputs, targets))
    assert not expected.isnan()
    changed = torch.where(gone, value, outputs), torch.where(gone, nodata, targets)
    assert computed(metrics[1], changed) == expected
    for name, tensor in metrics[0].state_dict().items():
        assert torch.equal(tensor, metrics[1].state_dict()[name])


def test_nan_is_no_target_without_being_told():
    outputs, targets = make_batch(nodata=0)
    targets[0] = math.nan
    for kind in KINDS:
        assert computed(kind(), (outputs, targets)).item() == pytest.approx(ORACLES[kind](*valid(outputs, targets)))
        assert computed(kind(ignore_value=math.nan), (outputs, targets)) == computed(kind(), (outputs, targets))


@pytest.mark.parametrize(
    ("dtype", "value", "stored"),
    [
        (torch.float32, -3.4028234663852886e38, -3.4028234663852886e38),
        (torch.float32, -3.4e38, float(np.float32(-3.4e38))),
        (torch.float16, -99999.0, -math.inf),
        (torch.bfloat16, -9999.0, -9984.0),
        (torch.int16, -9999, -9999),
        (torch.uint16, 65535, 65535),
        (torch.uint8, 255, 255),
    ],
)
def test_nodata_is_known_in_every_type_that_holds_it(dtype, value, stored):
    targets = torch.tensor([1.0, stored, 3.0], dtype=torch.float64).to(dtype)
    assert computed(MAE(ignore_value=value), (torch.tensor([1.0, 7.0, 4.0]), targets)) == 0.5


def test_nodata_is_not_taken_for_its_neighbour():
    """Which it has in float32."""
    targets = torch.tensor([1 << 24, (1 << 24) + 1, 1], dtype=torch.int32)
    assert computed(MAE(ignore_value=(1 << 24) + 1), (torch.ones(3), targets)) == ((1 << 24) - 1) / 2


@pytest.mark.parametrize("value", [-100, 256 + 5, 4.5])
def test_nodata_that_integers_can_not_hold_is_nowhere(value):
    """In eight bits, -100 is 156."""
    targets = torch.tensor([156, 5, 4], dtype=torch.uint8)
    assert computed(MAE(ignore_value=value), (torch.zeros(3), targets)) == 55


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channel_names", [None, ["a", "b", "c"]])
def test_no_targets_are_nan(kind, channel_names):
    metric = kind(ignore_value=NODATA, channel_names=channel_names)
    assert metric.compute().isnan()
    outputs, targets = make_batch()
    metric.update(outputs, torch.full_like(targets, NODATA))
    metric.update(outputs[:0], targets[:0])
    assert metric.compute().isnan()
    assert metric.compute_each().isnan().all()
    assert computed(metric, (outputs, targets)) == computed(
        kind(ignore_value=NODATA, channel_names=channel_names), (outputs, targets)
    )


def test_a_channel_without_targets_is_nan_and_left_out_of_the_mean():
    outputs, targets = make_batch()
    targets[:, 1] = math.nan
    for kind in KINDS:
        metric = kind(ignore_value=NODATA, channel_names=["a", "b", "c"])
        each = (metric.update(outputs, targets), metric.compute_each())[1]
        assert each.isnan().tolist() == [False, True, False]
        assert metric.compute() == (each[0] + each[2]) / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_prediction_that_is_no_number_shows(kind, value):
    outputs, targets = make_batch(nodata=0)
    outputs[0, 0, 0, 0] = value
    assert not computed(kind(), (outputs, targets)).isfinite()


# --- numbers far from zero


@pytest.mark.parametrize("level", [0.0, 1e6, -1e6, 2.0**40])
@pytest.mark.parametrize("sizes", [(64,), (1,) * 64, (3, 60, 1)], ids=["one", "each", "uneven"])
def test_r2_is_the_same_wherever_the_targets_are(level, sizes):
    """Against exact fractions; a sum of squares less the square of a sum has no digit left at 2⁴⁰."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(-4096, 4096, (64, 50), generator=generator).double() / 1024  # exact at every level
    targets += torch.linspace(-8, 8, 64, dtype=torch.float64).mul(64).round().div(64)[:, None]
    outputs = targets + torch.randint(-512, 512, (64, 50), generator=generator).double() / 1024
    exact = [Fraction(value) for value in targets.flatten().tolist()]
    mean = sum(exact) / len(exact)
    errors = sum((Fraction(o) - t) ** 2 for o, t in zip(outputs.flatten().tolist(), exact, strict=True))
    expected = float(1 - errors / sum((value - mean) ** 2 for value in exact))
    figure = computed(R2(), *split((outputs + level, targets + level), *sizes))
    assert figure.item() == pytest.approx(expected, abs=1e-10 if level < 1e9 else 1e-7)


def test_r2_of_float32_targets_around_a_million_equals_scikit_learn():
    outputs, targets = make_batch(level=1e6, shape=(16, 1, 64, 64))
    figure = computed(R2(ignore_value=NODATA), *split((outputs, targets), 5, 1, 10))
    assert figure.item() == pytest.approx(sklearn.metrics.r2_score(*valid(outputs, targets)), rel=1e-10)


@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1, 1e-30, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_that_are_all_alike_have_no_r2(value, dtype):
    """And no -10³⁰ of rounding errors."""
    targets = torch.full((7, 101), value, dtype=dtype)
    for outputs in (targets, targets + 1):
        assert computed(R2(), *split((outputs, targets), 1, 4, 2)).isnan()
    assert computed(R2(), (targets[:1, :1], targets[:1, :1])).isnan()
    varied = targets.clone()
    varied[0, 0] += max(abs(value), 1e-30) / 1000
    assert computed(R2(), *split((varied, varied), 1, 4, 2)) == 1


def test_many_small_batches_are_exact():
    """3·2²⁰ targets of 0.1: in float32 the sums would be wrong in the fourth digit."""
    metric, ones = MAE(), torch.ones(3 << 12)
    for _ in range(256):
        metric.update(ones + 0.1, ones)
    assert metric.compute().item() == pytest.approx(float(np.float32(1.1)) - 1, rel=1e-12)


# --- sums that are shared, kept and put together


def test_metrics_of_the_same_nodata_and_channels_share_their_sums(monkeypatch):
    seen = []
    original = RegressionSums.update
    monkeypatch.setattr(RegressionSums, "update", lambda self, *batch: seen.append(self) or original(self, *batch))
    names = ["a", "b", "c"]
    given = {
        "mae": MAE(ignore_value=NODATA), "rmse": RMSE(ignore_value=-9999), "r2": R2(ignore_value=NODATA),
        "all": MAE(), "nan": MAE(ignore_value=math.nan),
        "each": MAE(ignore_value=NODATA, channel_names=names), "r2_each": R2(ignore_value=NODATA, channel_names=names),
        "named": MAE(ignore_value=NODATA, channel_names=["x", "y", "z"]),
    }  # fmt: skip
    metrics = MetricCollection(given)
    for seed in range(2):
        metrics.update(*make_batch(seed))
    assert len(seen) == 2 * 3
    figures = metrics.compute()
    for name, metric in given.items():
        assert metric.compute().isnan()  # the caller's stay as they are
        assert figures[name] == computed(metric, make_batch(0), make_batch(1)).item()
    assert figures["named/x"] == figures["each/a"]
    better = {name: metrics.higher_is_better(name) for name in ("mae", "rmse", "r2", "each/b", "r2_each/c")}
    assert better == {"mae": False, "rmse": False, "r2": True, "each/b": False, "r2_each/c": True}
    assert metrics.confusion is None


def test_they_are_metrics_of_anybodys_loop():
    for kind in KINDS:
        metric = kind()
        assert isinstance(metric, Metric)
        metric.update(*make_batch(0))
        metric.reset()
        assert computed(metric, make_batch(1)) == computed(kind(), make_batch(1))


def state_of(*batches):
    sums = RegressionSums(NODATA, 3)
    for batch in batches:
        sums.update(*batch)
    return sums.state_dict()


def test_counting_goes_on_from_a_state_to_the_bit():
    def make():
        return MetricCollection([kind(ignore_value=NODATA, channel_names=["a", "b", "c"]) for kind in KINDS])

    whole, first, second = make(), make(), make()
    for seed in range(5):
        whole.update(*make_batch(seed, level=1e6))
    for seed in range(2):
        first.update(*make_batch(seed, level=1e6))
    second.update(*make_batch(77))  # which it forgets
    second.load_state_dict(first.state_dict())
    kept = {name: tensor.clone() for name, tensor in first.state_dict()["states"][0].items()}
    for seed in range(2, 5):
        second.update(*make_batch(seed, level=1e6))
    assert second.compute() == whole.compute()
    assert all(torch.equal(kept[name], tensor) for name, tensor in first.state_dict()["states"][0].items())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_what_several_processes_have_summed_is_put_together(order):
    """Of one without a batch, too."""
    batches = [make_batch(seed, level=10.0**6 + 100 * seed) for seed in range(3)]
    parts = [state_of(batches[0], batches[1]), state_of(), state_of(batches[2])]
    metrics = MetricCollection([kind(ignore_value=NODATA, channel_names=["a", "b", "c"]) for kind in KINDS])
    metrics.load_state_dict({"names": ["mae", "rmse", "r2"], "states": [parts[order[0]]]})
    for number in order[1:]:
        metrics.absorb({"names": ["mae", "rmse", "r2"], "states": [parts[number]]})
    whole = MetricCollection([kind(ignore_value=NODATA, channel_names=["a", "b", "c"]) for kind in KINDS])
    for batch in batches:
        whole.update(*batch)
    assert metrics.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_a_metric_without_a_way_to_be_put_together_says_what_it_lacks():
    class Plain:
        def update(self, outputs, targets): ...
        def compute(self): ...
        def reset(self): ...

    with pytest.raises(ValueError, match=r"counted for Plain can't be put together without a method absorb\(state\)"):
        MetricCollection([Plain()]).absorb({"names": ["plain"], "states": [{}]})

    class Added(Plain):
        seen = 1

        def compute(self):
            return self.seen

        def absorb(self, state):
            self.seen += state["seen"]

    metrics = MetricCollection([Added()])
    metrics.absorb({"names": ["added"], "states": [{"seen": 4}]})
    assert metrics.compute() == {"added": 5}


# --- bad input


IMAGES = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("outputs", "targets", "names", "message"),
    [
        (IMAGES, IMAGES[:1], None, r"outputs \(2, 3, 4, 4\) and targets \(1, 3, 4, 4\) differ in shape: make them"),
        (IMAGES, IMAGES[:, 0], None, r"\(2, 3, 4, 4\) and targets \(2, 4, 4\) differ in shape"),
        (IMAGES[:, :1], IMAGES, None, "differ in shape"),
        (torch.zeros(4), torch.zeros(4, 4), None, "differ in shape"),  # which a loss would broadcast
        (IMAGES, IMAGES, ["a", "b"], "3 channels, but the metric has channel_names for 2: name each"),
        (IMAGES[:, :1], IMAGES[:, 0], ["a", "b"], "1 channels, but the metric has channel_names for 2"),
        (torch.zeros(4), torch.zeros(4), ["a", "b"], "1 channels, but the metric has channel_names for 2"),
    ],
)
def test_bad_batches_are_refused_with_cause_and_remedy(outputs, targets, names, message):
    metric = MAE(channel_names=names)
    with pytest.raises(ValueError, match=message):
        metric.update(outputs, targets)
    assert metric.compute().isnan()  # nothing was counted


@pytest.mark.parametrize("names", [None, ["height"]])
@pytest.mark.parametrize("axes", [(5, 6), ()])
def test_a_channel_of_one_may_be_left_out(names, axes):
    outputs, targets = make_batch(shape=(4, 1, *axes))
    expected = computed(RMSE(ignore_value=NODATA, channel_names=names), (outputs, targets))
    for batch in ((outputs[:, 0], targets), (outputs, targets[:, 0]), (outputs[:, 0], targets[:, 0])):
        if batch[0].ndim == batch[1].ndim and names and axes:
            continue  # (B, H, W) alone would be H channels
        assert computed(RMSE(ignore_value=NODATA, channel_names=names), batch).item() == pytest.approx(
            expected.item(), rel=1e-14
        )


@pytest.mark.parametrize("names", [[], ["a", "a"], "height"])
def test_channel_names_are_checked(names):
    with pytest.raises(ValueError, match="channel_names must be a list of different names, one a channel"):
        R2(channel_names=names)


def test_the_sums_of_other_channels_are_refused():
    one = MAE()
    with pytest.raises(ValueError, match="are of 3 channels, these of 1: make the metric with the channel_names"):
        one.load_state_dict(MAE(channel_names=["a", "b", "c"]).state_dict())


def test_batches_and_gradients_are_left_alone():
    outputs, targets = make_batch()
    before = outputs.clone(), targets.clone()
    outputs.requires_grad_()
    metric = R2(ignore_value=NODATA)
    metric.update(outputs, targets)
    assert torch.equal(outputs, before[0])
    assert torch.equal(targets, before[1])
    assert not any(tensor.requires_grad for tensor in metric.state_dict().values())


def test_memory_formats_do_the_same():
    outputs, targets = make_batch()
    metrics = [R2(ignore_value=NODATA, channel_names=["a", "b", "c"]) for _ in range(2)]
    expected = computed(metrics[0], (outputs, targets))
    other = computed(metrics[1], (outputs.contiguous(memory_format=torch.channels_last), targets))
    assert other.item() == pytest.approx(expected.item(), rel=1e-13)
