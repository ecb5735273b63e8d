"""Losses of segmentation_models_pytorch and MONAI, metrics of torchmetrics, a scheduler of timm."""

import pytest
import torch
from interop import IGNORE, network, run_resumed, run_whole, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ununennium.metrics import Dice, IoU
from ununennium.training import Callback, LRSchedulerCallback


def data(samples=10, lowest=0.0, seed=0):
    """Return images whose brightness tells one of 3 classes; the later a sample, the more nodata."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 3, (samples, 16, 16), generator=generator)
    images = masks[:, None] + 0.3 * torch.randn(samples, 3, 16, 16, generator=generator)
    share = torch.linspace(lowest, 0.8, samples)[:, None, None]
    masks[torch.rand(masks.shape, generator=generator) < share] = IGNORE
    return TensorDataset(images, masks)


def training_with(loss_fn, dataset=None, **kwargs):
    dataset = dataset or data()
    loaders = DataLoader(dataset, batch_size=2, shuffle=True), DataLoader(dataset, batch_size=3)
    return trainer(*loaders, loss_fn=loss_fn, **{"seed": 0, **kwargs})


def smp_losses():
    losses = pytest.importorskip("segmentation_models_pytorch").losses
    return {
        "dice": losses.DiceLoss("multiclass", ignore_index=IGNORE),
        "jaccard": losses.JaccardLoss("multiclass", ignore_index=IGNORE),
        "tversky": losses.TverskyLoss("multiclass", ignore_index=IGNORE),
        "focal": losses.FocalLoss("multiclass", ignore_index=IGNORE),
        "lovasz": losses.LovaszLoss("multiclass", ignore_index=IGNORE),
        "soft cross-entropy": losses.SoftCrossEntropyLoss(smooth_factor=0.1, ignore_index=IGNORE),
    }


SMP = pytest.mark.parametrize("name", ["dice", "jaccard", "tversky", "focal", "lovasz", "soft cross-entropy"])


@SMP
def test_a_loss_of_smp_trains_and_nodata_is_told_to_the_metrics(name):
    """With the class's own ignore_index, which IoU and Dice take over."""
    training = training_with(smp_losses()[name])
    history = training.fit(5)
    assert history["val_iou"][-1] > history["val_iou"][0]
    assert history["val_loss"][-1] < history["val_loss"][0]
    model, (images, masks) = training.model.eval(), data().tensors
    own = IoU(3, ignore_index=IGNORE)
    with torch.no_grad():
        own.update(model(images), masks)
    assert history["val_iou"][-1] == pytest.approx(float(own.compute()), abs=1e-6)


@SMP
def test_the_validation_loss_of_smp_weights_batches_by_their_valid_pixels(name):
    loss_fn = smp_losses()[name]
    training = training_with(loss_fn)
    history = training.fit(1)
    model, total, pixels = training.model.eval(), 0.0, 0
    with torch.no_grad():
        for images, masks in DataLoader(data(), batch_size=3):
            valid = int((masks != IGNORE).sum())
            total, pixels = total + float(loss_fn(model(images), masks)) * valid, pixels + valid
    assert history["val_loss"][0] == pytest.approx(total / pixels, rel=1e-5)


@SMP
def test_a_loss_of_smp_ignores_what_is_predicted_at_nodata(name):
    """What the ignore_index of others is worth, where it is relied on."""
    loss_fn = smp_losses()[name]
    _, masks = data().tensors
    outputs = torch.randn(len(masks), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    changed = torch.where((masks == IGNORE)[:, None], 5 * outputs.flip(1) + 1, outputs)
    torch.testing.assert_close(loss_fn(changed, masks), loss_fn(outputs, masks), rtol=1e-5, atol=1e-6)


def with_channel(batch):
    """Give masks the channel that MONAI's losses take."""
    images, masks = batch
    return images, masks[:, None]


CHANNELS = {"train_transform": with_channel, "val_transform": with_channel}


def test_a_loss_of_monai_with_an_ignore_index_takes_masks_with_a_channel():
    losses = pytest.importorskip("monai.losses")
    loss_fn = losses.DiceLoss(to_onehot_y=True, softmax=True, ignore_index=IGNORE)
    history = training_with(loss_fn, **CHANNELS).fit(4)
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert set(history) == {"train_loss", "val_loss"}  # (B, 1, H, W) masks for 3 classes: no metrics of ours unasked


class DiceAndCrossEntropy(nn.Module):
    """MONAI's, which knows no nodata: both sides are put to class 0 there, for as little as that costs."""

    def __init__(self):
        super().__init__()
        losses = pytest.importorskip("monai.losses")
        self.ignore_index = IGNORE
        self.loss_fn = losses.DiceCELoss(to_onehot_y=True, softmax=True)

    def forward(self, outputs, masks):
        valid = (masks != IGNORE)[:, None]
        sure = nn.functional.one_hot(torch.zeros_like(masks), outputs.shape[1]).movedim(-1, 1) * 100.0
        return self.loss_fn(torch.where(valid, outputs, sure), torch.where(valid, masks[:, None], 0))


def test_a_loss_of_monai_in_a_module_of_ones_own_keeps_metrics_and_nodata():
    training = training_with(DiceAndCrossEntropy())
    history = training.fit(4)
    assert history["val_iou"][-1] > history["val_iou"][0]
    assert {"val_loss", "val_iou", "val_dice"} <= set(history)
    _, masks = data().tensors
    outputs = torch.randn(len(masks), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    changed = torch.where((masks == IGNORE)[:, None], outputs + torch.arange(3)[:, None, None], outputs)
    assert torch.equal(training.loss_fn(changed, masks), training.loss_fn(outputs, masks))


def test_figures_of_torchmetrics_beside_ours_are_the_same():
    """Over batches of unequal numbers of valid pixels, in training and in validation."""
    classification = pytest.importorskip("torchmetrics.classification")
    of_classes = {"num_classes": 3, "ignore_index": IGNORE}
    training = training_with(
        None,
        metrics={
            "iou": IoU(**of_classes),
            "jaccard": classification.MulticlassJaccardIndex(**of_classes),
            "dice": Dice(**of_classes),
            "f1": classification.MulticlassF1Score(**of_classes),
            "per_class": IoU(**of_classes, average="none"),
            "jaccard_of": classification.MulticlassJaccardIndex(**of_classes, average="none"),
        },
    )
    history = training.fit(3)
    for split in ("train", "val"):
        assert history[f"{split}_jaccard"] == pytest.approx(history[f"{split}_iou"], abs=1e-6)
        assert history[f"{split}_f1"] == pytest.approx(history[f"{split}_dice"], abs=1e-6)
        for number in range(3):
            of_class = history[f"{split}_jaccard_of/{number}"]
            assert of_class == pytest.approx(history[f"{split}_per_class/{number}"], abs=1e-6)
    assert 0.3 < history["val_iou"][-1] < 1


def test_torchmetrics_go_on_exactly_inside_an_epoch(tmp_path):
    classification = pytest.importorskip("torchmetrics.classification")

    def build(**kwargs):
        jaccard = classification.MulticlassJaccardIndex(3, ignore_index=IGNORE)
        accuracy = classification.MulticlassAccuracy(3, ignore_index=IGNORE)
        return training_with(None, metrics={"jaccard": jaccard, "accuracy": accuracy}, **{"seed": None, **kwargs})

    expected, inside = run_whole(build, tmp_path / "whole")
    for number in (0, 3, 5):
        assert run_resumed(build, inside[number], tmp_path / f"{number}") == expected


class TimmScheduler(Callback):
    """timm's schedulers are told the epoch, and what they give depends on nothing else."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def on_epoch_end(self, trainer, epoch, logs):
        self.scheduler.step(epoch + 1)


def test_a_scheduler_of_timm_is_a_callback_of_a_few_lines(tmp_path):
    schedulers = pytest.importorskip("timm.scheduler")
    rates = []

    class Watch(Callback):
        def on_epoch_start(self, trainer, epoch):
            rates.append(trainer.optimizer.param_groups[0]["lr"])

    def build(callbacks=(), **kwargs):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        schedule = schedulers.CosineLRScheduler(optimizer, t_initial=6, warmup_t=2, warmup_lr_init=0.001)
        callbacks = [TimmScheduler(schedule), Watch(), *callbacks]
        return training_with(None, model=model, optimizer=optimizer, callbacks=callbacks, **{"seed": None, **kwargs})

    expected, inside = run_whole(build, tmp_path / "whole", epochs=4)
    optimizer = torch.optim.SGD(network().parameters(), lr=0.02)
    schedule = schedulers.CosineLRScheduler(optimizer, t_initial=6, warmup_t=2, warmup_lr_init=0.001)
    by_hand = []
    for epoch in range(4):
        schedule.step(epoch)
        by_hand.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(by_hand)
    assert len(set(rates)) == 4
    assert run_resumed(build, inside[9], tmp_path / "resumed", epochs=4) == expected


def test_a_scheduler_of_timm_is_refused_where_pytorchs_are_meant():
    schedulers = pytest.importorskip("timm.scheduler")
    schedule = schedulers.CosineLRScheduler(torch.optim.SGD(network().parameters(), lr=0.1), t_initial=3)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.lr_scheduler\.LRScheduler"):
        LRSchedulerCallback(schedule)
