"""Every metric in a run: monitored by its direction, classes and channels beside their mean, gone on with."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ununennium.metrics import (
    F1,
    MAE,
    R2,
    RMSE,
    AverageAccuracy,
    CohenKappa,
    Dice,
    IoU,
    OverallAccuracy,
    Precision,
    Recall,
)
from ununennium.training import CheckpointCallback, EarlyStoppingCallback, Trainer
from ununennium.training.checkpoint import read

OF_CLASSES = [IoU, Dice, F1, Precision, Recall]
OF_ALL = [OverallAccuracy, AverageAccuracy, CohenKappa]
OF_NUMBERS = [MAE, RMSE, R2]
NAMES = ["water", "forest", "town", "field"]
LEVEL = 1e6


@pytest.fixture
def classifies(make_model, make_data):
    def make(metrics, callbacks=(), **options):
        model = make_model()
        return Trainer(
            model, torch.optim.SGD(model.parameters(), lr=1.0), nn.CrossEntropyLoss(ignore_index=255),
            DataLoader(make_data(ignored=0.5), batch_size=4, shuffle=True), DataLoader(make_data(seed=1), batch_size=3),
            list(callbacks), device="cpu", seed=0, metrics=metrics, **{"progress": False, **options},
        )  # fmt: skip

    return make


def masked(outputs, targets):
    there = targets != -9999
    return (outputs[there] - targets[there]).square().mean()


@pytest.fixture
def regresses(make_model):
    def make(metrics, callbacks=(), start=0, **options):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(20, 3, 6, 6, generator=generator, dtype=torch.float64)
        heights = LEVEL + images[:, :2].cumsum(1) + 0.1 * torch.randn(20, 2, 6, 6, generator=generator)
        heights[torch.rand(heights.shape, generator=generator) < 0.3] = -9999
        with torch.random.fork_rng():
            torch.manual_seed(start)
            model = make_model(classes=2)
        model[-1].bias.data += LEVEL + start
        data = TensorDataset(images, heights)
        return Trainer(
            model, torch.optim.Adam(model.parameters(), lr=0.05), masked, DataLoader(data, batch_size=4, shuffle=True),
            DataLoader(data, batch_size=3), list(callbacks), device="cpu", seed=0, metrics=metrics,
            **{"progress": False, **options},
        )  # fmt: skip

    return make


@pytest.mark.parametrize("kind", [*OF_CLASSES, *OF_ALL])
def test_the_best_of_a_metric_of_classes_is_the_greatest(tmp_path, classifies, kind):
    saves = CheckpointCallback(tmp_path, monitor=f"val_{kind.name}")
    history = classifies([kind(4, ignore_index=255)], [saves]).fit(4)[f"val_{kind.name}"]
    assert len(set(history)) > 1
    assert saves.best == max(history)
    assert read(tmp_path / "best").info["figures"][f"val_{kind.name}"] == max(history)


@pytest.mark.parametrize("kind", OF_NUMBERS)
def test_the_best_of_a_metric_of_numbers_is_the_least_error_and_the_greatest_r2(tmp_path, regresses, kind):
    better = max if kind is R2 else min
    for monitor in (f"val_{kind.name}", f"val_{kind.name}/cover"):
        saves = CheckpointCallback(tmp_path / monitor.replace("/", "-"), monitor=monitor)
        metrics = [kind(ignore_value=-9999, channel_names=["height", "cover"])]
        history = regresses(metrics, [saves]).fit(4)[monitor]
        assert len(set(history)) > 1
        assert saves.best == better(history)


def test_a_class_beside_the_mean_is_in_the_history_and_may_be_monitored(tmp_path, classifies, capsys):
    saves = CheckpointCallback(tmp_path, monitor="val_iou/forest")
    metrics = [IoU(4, ignore_index=255, class_names=NAMES, per_class=True), CohenKappa(4, ignore_index=255)]
    trainer = classifies(metrics, [saves], progress=True)
    history = trainer.fit(3)
    names = ["loss", "iou", *(f"iou/{name}" for name in NAMES), "kappa"]
    assert list(history) == [*(f"train_{name}" for name in names), *(f"val_{name}" for name in names)]
    for epoch in range(3):
        each = [history[f"val_iou/{name}"][epoch] for name in NAMES]
        assert history["val_iou"][epoch] == pytest.approx(sum(each) / 4, abs=1e-12)
    assert saves.best == max(history["val_iou/forest"])
    (columns,) = (row.split() for row in capsys.readouterr().out.splitlines() if row.split()[:1] == ["epoch"])
    assert "val_iou" in columns
    assert {column for column in columns if "iou/" in column} <= {"val_iou/forest"}  # what is monitored may be shown
    assert trainer.val_metrics.class_names == NAMES


def test_a_class_that_there_is_not_is_found_before_the_first_step(tmp_path, classifies):
    trainer = classifies([IoU(4, class_names=NAMES, per_class=True)], [CheckpointCallback(tmp_path, "val_iou/forrest")])
    with pytest.raises(ValueError, match="Is 'val_iou/forest' meant"):
        trainer.fit(1)
    assert trainer.state.optimizer_steps == 0


def test_figures_of_a_run_are_those_over_all_its_targets(regresses):
    """Trap 15, far from zero."""
    trainer = regresses([kind(ignore_value=-9999) for kind in OF_NUMBERS])
    history = trainer.fit(2)
    images, heights = trainer.val_loader.dataset.tensors
    with torch.no_grad():
        outputs = trainer.model.eval()(images)
    there = heights != -9999
    error, truth = (outputs - heights)[there], heights[there]
    assert history["val_mae"][-1] == pytest.approx(error.abs().mean().item(), rel=1e-12)
    assert history["val_rmse"][-1] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-12)
    expected = 1 - error.square().sum() / (truth - truth.mean()).square().sum()
    assert history["val_r2"][-1] == pytest.approx(expected.item(), rel=1e-9)
    assert not any(math.isnan(value) for values in history.values() for value in values)


def test_a_run_goes_on_inside_an_epoch_to_the_bit(tmp_path, regresses):
    def metrics():
        return [kind(ignore_value=-9999, channel_names=["height", "cover"]) for kind in OF_NUMBERS]

    saves = CheckpointCallback(tmp_path / "whole", monitor="val_r2", every_n_steps=1, keep_last=100)
    expected = regresses(metrics(), [saves]).fit(2)
    inside = [path for path in (tmp_path / "whole").glob("step-*") if int(path.name.split("-")[1]) % 5]
    assert len(inside) == 8
    for number, path in enumerate(inside):
        callback = CheckpointCallback(tmp_path / f"{number}", monitor="val_r2")
        assert regresses(metrics(), [callback], start=number + 1).fit(2, resume=path) == expected


def test_other_channels_than_before_are_refused_inside_an_epoch(tmp_path, regresses):
    saves = CheckpointCallback(tmp_path / "c", monitor="val_loss", every_n_steps=1, keep_last=100)
    regresses([MAE(ignore_value=-9999)], [saves]).fit(1)
    inside = min((tmp_path / "c").glob("step-*"), key=lambda path: path.name)
    other = regresses([MAE(ignore_value=-9999, channel_names=["a", "b"])], [CheckpointCallback(tmp_path / "d")])
    with pytest.raises(Exception, match=r"metrics can't go on here.*are of 1 channels, these of 2"):
        other.fit(2, resume=inside)


class Shares:
    """Share of the pixels predicted as each class, as a user would write it: a dict, whose keys show at the end."""

    name = "share"

    def __init__(self):
        self.reset()

    def reset(self):
        self.counts = torch.zeros(4)

    def update(self, outputs, targets):
        self.counts = self.counts + torch.bincount(outputs.argmax(1).flatten(), minlength=4)

    def compute(self):
        return dict(zip(NAMES, self.counts / self.counts.sum(), strict=True))


def test_a_figure_that_shows_at_the_end_of_an_epoch_can_be_monitored(tmp_path, classifies):
    callback = CheckpointCallback(tmp_path, monitor="val_share/forest", mode="max")
    history = classifies([Shares()], [callback]).fit(3)
    assert read(tmp_path / "best").info["figures"]["val_share/forest"] == max(history["val_share/forest"])


@pytest.mark.parametrize("monitor", ["val_share/sea", "val_share"])
@pytest.mark.parametrize("kind", [partial(CheckpointCallback, "checkpoints"), EarlyStoppingCallback])
def test_one_that_does_not_show_is_an_error_that_lists_what_does(tmp_path, monkeypatch, classifies, kind, monitor):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"monitors '{monitor}', which is not in the logs.*'val_share/forest'"):
        classifies([Shares()], [kind(monitor=monitor)]).fit(1)
