"""Accumulation windows give the gradient of the one big batch (traps 1, 2)."""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset
from waiting import NoSynchronisation

from ununennium.losses import DiceLoss
from ununennium.training import Callback, Trainer
from ununennium.training.step import Stepper
from ununennium.training.windows import target_counter, windows

IGNORE = 255


class Recorder(Callback):
    """Keep the weights after every optimizer step, and the gradient that made it."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def on_batch_end(self, trainer, batch_idx, logs):
        if trainer.state.optimizer_steps > len(self.weights):
            self.weights.append([p.detach().clone() for p in trainer.model.parameters()])
            self.gradients.append([p.grad.clone() for p in trainer.model.parameters()])


def run(model, loss_fn, loader, accumulation=1, epochs=1, optimizer=None, **kwargs):
    recorder = Recorder()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(
        model,
        optimizer,
        loss_fn,
        loader,
        callbacks=[recorder],
        gradient_accumulation_steps=accumulation,
        device="cpu",
        metrics=[],
        progress=False,
        **kwargs,
    )
    history = trainer.fit(epochs)
    return trainer, recorder, history


def assert_close(actual, expected, tolerance=1e-12):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (0, 4, []),
        (1, 4, ["OC"]),
        (10, 4, ["O", "", "", "C", "O", "", "", "C", "O", "C"]),
        (4, 2, ["O", "C", "O", "C"]),
        (3, 1, ["OC", "OC", "OC"]),
    ],
)
def test_windows_open_and_close(count, size, expected):
    marks = ["O" * opens + "C" * closes for _, opens, closes in windows(range(count), size)]
    assert marks == expected


@pytest.mark.parametrize(("size", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [2, 2, 4, 4, 5]), (5, [2, 3, 4, 5, 5])])
def test_windows_read_ahead_only_inside_a_window(size, expected):
    read = []

    def source():
        for i in range(5):
            read.append(i)
            yield i

    assert [len(read) for _ in windows(source(), size)] == expected


def test_short_last_window_equals_a_loop_that_divides_by_true_counts(make_model, make_data):
    """Trap 1: 10 batches at accumulation 4 make 3 steps, the last over 2 batches; the last batch is short, too."""
    data = make_data(samples=19)
    trainer, recorder, _ = run(make_model(), nn.CrossEntropyLoss(), DataLoader(data, batch_size=2), accumulation=4)
    assert trainer.state.optimizer_steps == 3

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, masks = data.tensors
    for window in (slice(0, 8), slice(8, 16), slice(16, 19)):
        optimizer.zero_grad()
        total = 0.0
        for image, mask in zip(images[window], masks[window], strict=True):  # one by one: sums, divided once
            total = total + F.cross_entropy(model(image[None]), mask[None], reduction="sum")
        (total / masks[window].numel()).backward()
        optimizer.step()
    assert_close(recorder.weights[-1], list(model.parameters()))


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(ignore_index=IGNORE),
        nn.CrossEntropyLoss(ignore_index=IGNORE, weight=torch.tensor([1.0, 5.0, 0.25, 2.0], dtype=torch.float64)),
        nn.CrossEntropyLoss(ignore_index=IGNORE, label_smoothing=0.1),
        partial(F.cross_entropy, ignore_index=IGNORE),
        DiceLoss(ignore_index=IGNORE),
        DiceLoss(ignore_index=IGNORE, weight=[1.0, 5.0, 0.25, 2.0], smooth=1.0),
    ],
    ids=["cross-entropy", "class weights", "label smoothing", "partial", "dice", "dice weights"],
)
def test_ignored_pixels_weigh_nothing(make_model, make_data, loss_fn):
    """Trap 2: 4 × batch 2 with 0–90 % of the pixels ignored has the gradient of batch 8."""
    data = make_data(samples=8, ignored=0.9)
    data.tensors[1][5] = IGNORE  # and one image with nothing valid at all
    _, small, small_history = run(make_model(), loss_fn, DataLoader(data, batch_size=2), accumulation=4)
    _, big, big_history = run(make_model(), loss_fn, DataLoader(data, batch_size=8))
    assert_close(small.gradients[0], big.gradients[0])
    assert small_history["train_loss"] == pytest.approx(big_history["train_loss"], rel=1e-12)


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(ignore_index=IGNORE), DiceLoss(ignore_index=IGNORE)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_window_with_nothing_valid_has_gradient_zero(make_model, make_data, loss_fn, accumulation):
    data = make_data(samples=4)
    data.tensors[1][:] = IGNORE
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer, recorder, _ = run(model, loss_fn, DataLoader(data, batch_size=2), accumulation, optimizer=optimizer)
    assert trainer.state.optimizer_steps == 2 // accumulation
    for gradients in recorder.gradients:
        assert_close(gradients, [torch.zeros_like(g) for g in gradients], tolerance=0)
    assert_close(list(model.parameters()), before, tolerance=0)


def test_an_empty_batch_in_a_window_changes_nothing(make_model, make_data):
    data = make_data(samples=6)
    data.tensors[1][2:4] = IGNORE
    loss_fn = nn.CrossEntropyLoss(ignore_index=IGNORE)
    _, three, history = run(make_model(), loss_fn, DataLoader(data, batch_size=2), accumulation=3)
    valid = Subset(data, [0, 1, 4, 5])
    _, two, expected = run(make_model(), loss_fn, DataLoader(valid, batch_size=2), accumulation=2)
    assert_close(three.gradients[0], two.gradients[0])
    assert history["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-12)


def test_samples_are_counted_where_the_loss_says_nothing(make_model, make_data):
    data = make_data(samples=7)
    data.tensors = (data.tensors[0], torch.randn(7, 4, 6, 6, dtype=torch.float64))
    _, small, small_history = run(make_model(), nn.MSELoss(), DataLoader(data, batch_size=3), accumulation=3)
    _, big, big_history = run(make_model(), nn.MSELoss(), DataLoader(data, batch_size=7))
    assert_close(small.gradients[0], big.gradients[0])
    assert small_history["train_loss"] == pytest.approx(big_history["train_loss"], rel=1e-12)


def test_clipping_sees_the_whole_windows_gradient_once(make_model, make_data, monkeypatch):
    data = make_data(samples=8, ignored=0.9)
    loss_fn = nn.CrossEntropyLoss(ignore_index=IGNORE)
    calls = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, **k: calls.append(1) or clip(*a, **k))
    _, small, _ = run(make_model(), loss_fn, DataLoader(data, batch_size=2), 4, gradient_clip_norm=0.01)
    assert len(calls) == 1
    _, big, _ = run(make_model(), loss_fn, DataLoader(data, batch_size=8), gradient_clip_norm=0.01)
    assert_close(small.gradients[0], big.gradients[0])
    norm = torch.stack([g.norm() for g in small.gradients[0]]).norm()
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_without_accumulation_the_steps_are_a_hand_written_loops_bit_for_bit(make_model, make_data):
    data = make_data(samples=9, ignored=0.5)
    loss_fn = nn.CrossEntropyLoss(ignore_index=IGNORE)
    loader = DataLoader(data, batch_size=2)
    trainer, _, _ = run(make_model(), loss_fn, loader, epochs=2)
    model = make_model().to(memory_format=torch.channels_last)  # the Trainer's levers, pulled by hand
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    for _ in range(2):
        for images, masks in loader:
            optimizer.zero_grad()
            loss_fn(model(images), masks).backward()
            optimizer.step()
    assert_close(list(trainer.model.parameters()), list(model.parameters()), tolerance=0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_that_is_no_mean_is_refused(make_model, loader, reduction):
    model = make_model()
    with pytest.raises(ValueError, match="reduction='mean'"):
        run(model, nn.CrossEntropyLoss(reduction=reduction), loader)


def test_functional_cross_entropy_has_pytorchs_ignore_index():
    targets = torch.tensor([[0, -100], [1, 1]])
    assert target_counter(F.cross_entropy)(torch.zeros(2, 2, 2), targets, None) == 3
    assert target_counter(partial(F.cross_entropy, ignore_index=1))(torch.zeros(2, 2, 2), targets, None) == 2


def test_masks_in_uint8_are_compared_as_numbers():
    targets = torch.tensor([[0, 156]], dtype=torch.uint8)
    assert target_counter(nn.CrossEntropyLoss())(torch.zeros(1, 200, 2), targets, None) == 2


def test_class_probabilities_are_counted_by_sample():
    targets = torch.rand(3, 4, 5, 5)
    assert target_counter(nn.CrossEntropyLoss())(targets, targets, (targets, targets)) == 3


def test_gradients_of_frozen_heads_do_not_pile_up(make_model, loader):
    """What the optimizer does not hold is cleared every window, and does not grow into the clipped norm."""
    model = make_model()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.0)
    trainer, recorder, _ = run(model, nn.CrossEntropyLoss(), loader, epochs=2, optimizer=optimizer, seed=0)
    half = len(recorder.gradients) // 2
    assert_close(recorder.gradients[half - 1], recorder.gradients[-1], tolerance=0)
    assert trainer.state.optimizer_steps == 20


@pytest.mark.parametrize("looks", [True, False], ids=["cpu", "as on an accelerator"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_of_classes_that_weigh_nothing_is_nothing(make_model, make_data, monkeypatch, looks, accumulation):
    """Its loss and its gradient are 0 / 0 in PyTorch."""
    data = make_data(samples=8)
    data.tensors[1][2:4] = 0
    weight = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    begin = Stepper.begin
    monkeypatch.setattr(Stepper, "begin", lambda self, *p: begin(self, *p) or setattr(self, "looks", looks))
    model = make_model()
    loss_fn = nn.CrossEntropyLoss(weight=weight)
    trainer, recorder, history = run(model, loss_fn, DataLoader(data, batch_size=2), accumulation)
    assert trainer.state.optimizer_steps == 4 // accumulation
    assert np.isfinite(history["train_loss"]).all()
    if accumulation == 1:
        assert_close(recorder.gradients[1], [torch.zeros_like(g) for g in recorder.gradients[1]], tolerance=0)
    else:
        _, alone, _ = run(make_model(), loss_fn, DataLoader(Subset(data, [0, 1]), batch_size=2))
        assert_close(recorder.gradients[0], alone.gradients[0])


@pytest.mark.parametrize("looks", [True, False], ids=["cpu", "as on an accelerator"])
def test_a_batch_without_samples_may_open_a_window(make_model, monkeypatch, looks):
    begin = Stepper.begin
    monkeypatch.setattr(Stepper, "begin", lambda self, *p: begin(self, *p) or setattr(self, "looks", looks))
    images, masks = torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.randint(0, 4, (4, 6, 6))
    batches = [(images[:0], masks[:0]), (images, masks)]
    _, with_empty, _ = run(make_model(), nn.CrossEntropyLoss(), batches, 2)
    _, without, _ = run(make_model(), nn.CrossEntropyLoss(), batches[1:])
    assert_close(with_empty.gradients[0], without.gradients[0])


def test_ignore_index_may_be_a_numpy_integer():
    count = target_counter(nn.CrossEntropyLoss(ignore_index=np.int64(255)))
    assert count(torch.zeros(1, 2, 3), torch.tensor([[0, 255, 255]]), None) == 1


def test_a_step_without_targets_counts_samples_whatever_the_loss():
    assert target_counter(DiceLoss())(None, None, torch.zeros(5, 3)) == 5


@pytest.mark.parametrize(
    "loss_fn", [nn.CrossEntropyLoss(ignore_index=IGNORE), DiceLoss(ignore_index=IGNORE), nn.MSELoss()]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_on_an_accelerator_no_step_waits_for_the_device(
    make_model, make_data, monkeypatch, as_on_an_accelerator, loss_fn, accumulation
):
    """Run on the CPU with the looking left out, which only a CPU does."""
    data = make_data(samples=8, ignored=0.5)
    if isinstance(loss_fn, nn.MSELoss):
        data.tensors = (data.tensors[0], torch.randn(8, 4, 6, 6, dtype=torch.float64))
    train, step = Stepper.train, Stepper.step

    def guarded(function):
        def call(*args):
            with NoSynchronisation() if calls else nullcontext():
                calls.append(1)
                return function(*args)

        return call

    calls = []  # the first batch is looked at by DiceLoss, once
    monkeypatch.setattr(Stepper, "train", guarded(train))
    monkeypatch.setattr(Stepper, "step", guarded(step))
    run(make_model(), loss_fn, DataLoader(data, batch_size=2), accumulation, gradient_clip_norm=1.0)
    assert len(calls) == 4 + 4 // accumulation
