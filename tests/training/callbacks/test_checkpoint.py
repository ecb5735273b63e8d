"""Best and last (trap 19), in the folder's layout."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ununennium.training import Callback, CheckpointCallback


class Weights(Callback):
    """Keep each epoch's weights; comes before the checkpoint."""

    def __init__(self):
        self.seen = []

    def on_epoch_end(self, trainer, epoch, logs):
        self.seen.append({k: v.clone() for k, v in trainer.model.state_dict().items()})


def epoch_of(path, weights):
    stored = load_file(path / "model.safetensors")
    return next(i for i, w in enumerate(weights.seen) if all(torch.equal(w[k], stored[k]) for k in w))


def folders(path):
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.is_symlink())


@pytest.mark.parametrize(
    ("values", "mode", "best"),
    [
        ([3.0, 1.0, 2.0], "min", 1),
        ([3.0, 1.0, 2.0], "max", 0),
        ([1.0, 0.0, 0.5], "min", 1),  # 0.0 is a value
        ([0.0, -1.0, -2.0], "max", 0),
        ([math.nan, 1.0, math.nan], "min", 1),  # NaN is never best
        ([1.0, 1.0, 1.0], "min", 0),
    ],
)
def test_best_and_last_hold_the_weights_of_their_epochs(scripted, tmp_path, values, mode, best):
    """The score belongs to those weights."""
    weights = Weights()
    callback = CheckpointCallback(tmp_path, "figure", mode)
    scripted(values, [callback, weights]).fit(3)
    assert epoch_of(tmp_path / "best", weights) == best
    assert epoch_of(tmp_path / "last", weights) == 2
    assert callback.best == values[best]
    manifest = json.loads((tmp_path / "best" / "manifest.json").read_text())
    assert manifest["figures"]["figure"] == values[best]
    assert len(folders(tmp_path)) == (1 if best == 2 else 2)


def test_layout(scripted, tmp_path):
    scripted([1.0, 2.0], [CheckpointCallback(tmp_path, "figure")]).fit(2)
    assert sorted(os.listdir(tmp_path)) == ["best", "last", *folders(tmp_path)]
    assert all(name.startswith("step-0000000") for name in folders(tmp_path))
    for pointer in ("best", "last"):
        assert (tmp_path / pointer).is_symlink()
        assert not os.path.isabs(os.readlink(tmp_path / pointer))
        assert sorted(os.listdir(tmp_path / pointer)) == [
            "manifest.json",
            "model.safetensors",
            "training.json",
            "training.safetensors",
        ]


def test_the_folder_can_be_moved(scripted, tmp_path):
    scripted([1.0], [CheckpointCallback(tmp_path / "here", "figure")]).fit(1)
    (tmp_path / "here").rename(tmp_path / "there")
    assert (tmp_path / "there" / "best" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("save_best_only", "save_last", "count", "pointers"),
    [
        (True, True, 2, {"best", "last"}),
        (True, False, 1, {"best"}),
        (False, True, 4, {"best", "last"}),
        (False, False, 4, {"best"}),
    ],
)
def test_what_is_kept(scripted, tmp_path, save_best_only, save_last, count, pointers):
    callback = CheckpointCallback(tmp_path, "figure", "min", save_best_only, save_last)
    scripted([3.0, 1.0, 2.0, 2.0], [callback]).fit(4)
    assert len(folders(tmp_path)) == count
    assert {p.name for p in tmp_path.iterdir() if p.is_symlink()} == pointers


def test_after_a_resume_a_worse_epoch_does_not_become_the_best(scripted, tmp_path):
    """Trap 12."""
    values = [3.0, 1.0, 2.0, 1.5]
    scripted(values, [CheckpointCallback(tmp_path, "figure")]).fit(2)
    best = os.readlink(tmp_path / "best")
    trainer = scripted(values, [CheckpointCallback(tmp_path, "figure")])
    trainer.load(tmp_path / "last")
    assert trainer.fit(4)["figure"] == values
    assert os.readlink(tmp_path / "best") == best
    assert len(folders(tmp_path)) == 2


def test_another_runs_checkpoints_are_not_deleted(scripted, tmp_path):
    scripted([1.0], [CheckpointCallback(tmp_path, "figure")]).fit(1)
    earlier = folders(tmp_path)
    scripted([2.0, 1.5, 1.0], [CheckpointCallback(tmp_path, "figure")]).fit(3)
    assert set(earlier) < set(folders(tmp_path))
    assert len(folders(tmp_path)) == 2


def test_auto_is_max_for_a_metric_and_min_for_a_loss(tmp_path, make_model, loader):
    from ununennium.training import Trainer

    def best(monitor, values):
        model = make_model()
        callback = CheckpointCallback(tmp_path / monitor, monitor)

        class Dictated(Trainer):
            def validate(self):
                return super().validate() | {monitor: values[self.state.epoch]}

        Dictated(
            model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), loader, loader,
            callbacks=[callback], progress=False,
        ).fit(3)  # fmt: skip
        return callback.best

    assert best("val_iou", [0.1, 0.3, 0.2]) == 0.3
    assert best("val_loss", [0.1, 0.3, 0.2]) == 0.1


def test_weights_that_are_not_finite_never_replace_a_checkpoint(scripted, tmp_path):
    class Ruin(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            if epoch == 1:
                with torch.no_grad():
                    trainer.model.weight.fill_(torch.nan)

    trainer = scripted([2.0, 1.0], [Ruin(), CheckpointCallback(tmp_path, "figure")])
    with pytest.raises(FloatingPointError, match="weight holds NaN"):
        trainer.fit(2)
    assert epoch_count(tmp_path / "last") == 1


def epoch_count(path):
    return json.loads((path / "manifest.json").read_text())["position"]["epoch"]


def test_a_save_that_fails_leaves_best_what_it_was(scripted, tmp_path, monkeypatch):
    callback = CheckpointCallback(tmp_path, "figure")
    trainer = scripted([3.0, 1.0, 2.0], [callback])
    trainer.fit(1)
    save = trainer.save
    monkeypatch.setattr(trainer, "save", lambda path, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        trainer.fit(2, start_epoch=1)
    assert callback.best == 3.0
    monkeypatch.setattr(trainer, "save", save)
    trainer.fit(3, start_epoch=2)
    assert callback.best == 2.0
    assert epoch_count(tmp_path / "best") == 3


def test_two_callbacks_on_one_folder_are_refused(scripted, tmp_path):
    callbacks = [CheckpointCallback(tmp_path, "figure"), CheckpointCallback(f"{tmp_path}/.", "train_loss")]
    with pytest.raises(ValueError, match="give each a folder of its own"):
        scripted([1.0], callbacks).fit(1)


def test_a_folder_where_a_pointer_should_be_is_found_at_the_start(scripted, tmp_path):
    (tmp_path / "best").mkdir()
    trainer = scripted([1.0], [CheckpointCallback(tmp_path, "figure")])
    with pytest.raises(FileExistsError, match="choose another folder"):
        trainer.fit(1)
    assert trainer.state.optimizer_steps == 0
