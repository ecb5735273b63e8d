"""NaN and infinity end the run, or are left out and counted, and are never saved (trap 7)."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ununennium.training import (
    Callback,
    CheckpointCallback,
    CheckpointError,
    LRSchedulerCallback,
    NonFiniteError,
    Trainer,
)
from ununennium.training.checkpoint import newest
from ununennium.training.step import Stepper


def make_trainer(model, loader, loss_fn=None, **kwargs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    kwargs = {"device": "cpu", "progress": False, "seed": 0, **kwargs}
    return Trainer(model, optimizer, loss_fn or nn.CrossEntropyLoss(), loader, **kwargs)


def with_bad(data, *samples, value=torch.nan):
    for sample in samples:
        data.tensors[0][sample, 0, 0, 0] = value
    return data


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_error_names_the_samples_of_the_step(make_model, make_data, accumulation):
    data = with_bad(make_data(12), 7)
    loader = DataLoader(data, 2, shuffle=True)
    trainer = make_trainer(make_model(), loader, gradient_accumulation_steps=accumulation)
    seen = []

    class Watch(Callback):
        def on_batch_start(self, trainer, batch_idx):
            seen.append(batch_idx)

    trainer.callbacks.batch_start.append(Watch().on_batch_start.__func__.__get__(Watch()))
    order = [loaded.indices for loaded in trainer._train_batches.epoch(0, 0)]
    bad = next(i for i, indices in enumerate(order) if 7 in indices)
    window = range(bad // accumulation * accumulation, bad // accumulation * accumulation + accumulation)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(1)
    assert f"the loss is nan at optimizer step {bad // accumulation} (epoch 0, batch {bad})" in str(caught.value)
    assert str(caught.value).endswith("; ".join(f"batch {n}: {order[n]}" for n in window) + ".")


def test_a_bad_gradient_is_named_as_such_with_its_samples(make_model, make_data):
    loss_fn = nn.CrossEntropyLoss()

    def kinked(outputs, targets):
        return loss_fn(outputs, targets) + (outputs - outputs.detach()).abs().sum().sqrt()

    trainer = make_trainer(make_model(), DataLoader(make_data(4), 2), kinked, gradient_clip_norm=1.0)
    with pytest.raises(NonFiniteError, match=r"norm of the gradient is nan.*by their indices: batch 0: \[0, 1\]\."):
        trainer.fit(1)


def test_weights_ruined_by_an_earlier_gradient_name_the_step_before(make_model, make_data):
    calls = []

    def ruins_later(outputs, targets):
        calls.append(1)
        kink = (outputs - outputs.detach()).abs().sum().sqrt() if len(calls) == 2 else 0
        return nn.functional.cross_entropy(outputs, targets) + kink

    trainer = make_trainer(make_model(), DataLoader(make_data(8), 2), ruins_later)
    with pytest.raises(NonFiniteError, match=r"weights were not finite before this step.*indices: batch 1: \[2, 3\]\."):
        trainer.fit(1)


def test_an_iterable_whose_samples_nobody_knows_says_so(make_model, make_data):
    batches = [tuple(torch.stack(t) for t in zip(*[with_bad(make_data(2), 1)[i] for i in range(2)], strict=True))]
    with pytest.raises(NonFiniteError, match="not known of this loader"):
        make_trainer(make_model(), batches).fit(1)


@pytest.mark.parametrize("looks", [True, False], ids=["cpu", "as on an accelerator"])
def test_nothing_that_is_not_finite_is_saved(make_model, make_data, monkeypatch, tmp_path, looks):
    """Also where nobody looks at the loss before the step: the copy is looked at before it is written."""
    begin = Stepper.begin
    monkeypatch.setattr(Stepper, "begin", lambda self, *p: begin(self, *p) or setattr(self, "looks", looks))
    saver = CheckpointCallback(tmp_path, monitor="train_loss", every_n_steps=1, keep_last=100)
    trainer = make_trainer(make_model(), DataLoader(with_bad(make_data(20), 8), 2), callbacks=[saver])
    with pytest.raises(NonFiniteError, match=r"batch 4: \[8, 9\]"):
        trainer.fit(1)
    path, contents = newest(tmp_path)
    assert contents.info["position"]["optimizer_steps"] == 4
    assert all(bool(v.isfinite().all()) for v in contents.model.values())
    assert (tmp_path / "last").resolve() == path


def test_weights_that_the_loss_scaler_has_kept_are_not_called_lost(make_model, make_data, as_on_an_accelerator):
    trainer = make_trainer(
        make_model().float(), DataLoader(single(with_bad(make_data(8), 4)), 2), mixed_precision="fp16"
    )
    with pytest.raises(
        NonFiniteError, match=r"from batch 2 on.*The weights are finite, as the loss scaler left"
    ) as caught:
        trainer.fit(1)
    assert (trainer.state.optimizer_steps, trainer.state.skipped_steps) == (3, 1)
    assert "went with it" not in str(caught.value)
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_weights_that_are_lost_are_called_so(make_model, make_data, as_on_an_accelerator):
    trainer = make_trainer(make_model(), DataLoader(with_bad(make_data(8), 4), 2))
    with pytest.raises(NonFiniteError, match=r"from batch 2 on.*The weights went with it.*fit\(\.\.\., resume="):
        trainer.fit(1)


def single(data):
    return TensorDataset(data.tensors[0].float(), data.tensors[1])


class BatchNormed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))


def without(data, samples):
    keep = [i for i in range(len(data)) if i not in samples]
    return TensorDataset(*(t[keep] for t in data.tensors))


@pytest.mark.parametrize(("accumulation", "window"), [(1, [4, 5]), (2, [4, 5, 6, 7])])
def test_skipping_leaves_the_model_as_if_the_step_had_not_been(make_data, accumulation, window):
    """Weights, optimizer, schedule and BatchNorm's statistics are those of a run without these samples."""

    def run(data, **kwargs):
        torch.manual_seed(0)
        model = BatchNormed().double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedule = LRSchedulerCallback(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), step_on="batch")
        trainer = Trainer(
            model, optimizer, nn.CrossEntropyLoss(), DataLoader(data, 2), callbacks=[schedule], device="cpu",
            progress=False, gradient_accumulation_steps=accumulation, metrics=None, **kwargs,
        )  # fmt: skip
        return trainer, trainer.fit(2)

    data = make_data(12)
    skipping, history = run(with_bad(make_data(12), 4), on_nonfinite="skip")
    reference, _ = run(without(data, window))
    for key, value in skipping.model.state_dict().items():
        assert torch.equal(value, reference.model.state_dict()[key]), key
    assert skipping.optimizer.param_groups[0]["lr"] == reference.optimizer.param_groups[0]["lr"]
    assert skipping.state.optimizer_steps == reference.state.optimizer_steps
    assert skipping.state.nonfinite_steps == 2
    assert history["nonfinite_steps"] == [1.0, 2.0]
    assert all(math.isfinite(value) for value in history["train_loss"])


def test_a_bad_gradient_is_skipped_too(make_model, make_data):
    calls = []

    def kinked(outputs, targets):
        calls.append(1)
        kink = (outputs - outputs.detach()).abs().sum().sqrt() if len(calls) == 2 else 0
        return nn.functional.cross_entropy(outputs, targets) + kink

    trainer = make_trainer(make_model(), DataLoader(make_data(8), 2), kinked, on_nonfinite="skip")
    trainer.fit(1)
    assert (trainer.state.optimizer_steps, trainer.state.nonfinite_steps) == (3, 1)
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_skipping_does_not_go_on_with_ruined_weights(make_model, make_data):
    class Ruins(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            with torch.no_grad():
                trainer.model[0].weight.fill_(torch.nan)

    trainer = make_trainer(make_model(), DataLoader(make_data(8), 2), callbacks=[Ruins()], on_nonfinite="skip")
    with pytest.raises(NonFiniteError, match="weights were not finite before this step"):
        trainer.fit(1)


def test_an_overflow_in_fp16_is_the_scalers_business(make_data):
    model = BatchNormed()
    data = make_data(8)
    loader = DataLoader(TensorDataset(data.tensors[0].float(), data.tensors[1]), 2)
    trainer = make_trainer(model, loader, mixed_precision="fp16", on_nonfinite="skip")
    trainer.precision.scaler._init_scale = 2.0**40
    trainer.fit(1)
    assert trainer.state.skipped_steps > 0
    assert trainer.state.nonfinite_steps == 0


def test_only_two_words_are_known(make_model, loader):
    with pytest.raises(ValueError, match="on_nonfinite must be 'raise' or 'skip', got 'ignore'"):
        make_trainer(make_model(), loader, on_nonfinite="ignore")


def test_a_write_that_fails_is_heard_after_the_next_step_and_the_one_before_stays(
    make_model, loader, tmp_path, monkeypatch
):
    from ununennium.training.checkpoint import writer

    commit, saved = writer.commit, []

    def full(aside, path, described, info):
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        commit(aside, path, described, info)
        saved.append(path.name)

    monkeypatch.setattr(writer, "commit", full)
    saver = CheckpointCallback(tmp_path, monitor="train_loss", every_n_steps=1)
    trainer = make_trainer(make_model(), loader, callbacks=[saver])
    with pytest.raises(CheckpointError, match=r"step-00000003-0003 could not be written \(No space left.*Make room"):
        trainer.fit(1)
    assert trainer.state.optimizer_steps in (3, 4)
    assert newest(tmp_path)[0].name == saved[-1]
