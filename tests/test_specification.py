"""The specification, word for word: its names, parameters, defaults and examples."""

import inspect
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ununennium.losses
import ununennium.metrics
import ununennium.models
import ununennium.training
from ununennium.losses import DiceLoss
from ununennium.metrics import Dice, IoU
from ununennium.models import create_model
from ununennium.training import Callback, CheckpointCallback, EarlyStoppingCallback, LRSchedulerCallback, Trainer

pytestmark = pytest.mark.timeout(300)
REQUIRED = inspect.Parameter.empty


def parameters(function):
    return {n: p.default for n, p in inspect.signature(function).parameters.items() if n != "self"}


SIGNATURES = [
    (
        Trainer,
        {
            "model": REQUIRED, "optimizer": REQUIRED, "loss_fn": REQUIRED, "train_loader": REQUIRED, "val_loader": None,
            "callbacks": None, "mixed_precision": False, "gradient_accumulation_steps": 1, "gradient_clip_norm": None,
            "distributed": False, "device": None,
        },
        {"metrics": None, "backend": None, "find_unused_params": False},
    ),
    (Trainer.fit, {"epochs": REQUIRED, "start_epoch": 0}, {}),
    (Trainer.validate, {}, {}),
    (
        CheckpointCallback,
        {"path": REQUIRED, "monitor": "val_loss", "mode": "auto", "save_best_only": True, "save_last": True},
        {},
    ),
    (EarlyStoppingCallback, {"monitor": "val_loss", "patience": 10, "mode": "auto", "min_delta": 1e-4}, {}),
    (LRSchedulerCallback, {"scheduler": REQUIRED, "step_on": "epoch"}, {}),
    (
        create_model, {"name": REQUIRED, "in_channels": REQUIRED, "num_classes": REQUIRED},
        {"weights": None, "bands": None},
    ),
    (Callback.on_train_start, {"trainer": REQUIRED}, {}),
    (Callback.on_train_end, {"trainer": REQUIRED}, {}),
    (Callback.on_epoch_start, {"trainer": REQUIRED, "epoch": REQUIRED}, {}),
    (Callback.on_epoch_end, {"trainer": REQUIRED, "epoch": REQUIRED, "logs": REQUIRED}, {}),
    (Callback.on_batch_start, {"trainer": REQUIRED, "batch_idx": REQUIRED}, {}),
    (Callback.on_batch_end, {"trainer": REQUIRED, "batch_idx": REQUIRED, "logs": REQUIRED}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("function", "positional", "named"), SIGNATURES, ids=lambda x: getattr(x, "__qualname__", ""))
def test_signatures_and_defaults(function, positional, named):
    found = parameters(function)
    assert list(found.items())[: len(positional)] == list(positional.items())
    kinds = inspect.signature(function).parameters
    for name, default in found.items():
        if name in positional or kinds[name].kind is inspect.Parameter.VAR_KEYWORD:
            continue
        assert default is not REQUIRED, f"{name} is new and needs a default"
        assert kinds[name].kind is inspect.Parameter.KEYWORD_ONLY or name in named
    assert {n: found[n] for n in named} == named


def test_simple_constructors():
    assert isinstance(DiceLoss(), torch.nn.Module)
    assert IoU(num_classes=10).name == "iou"
    assert Dice(num_classes=10).name == "dice"


@pytest.mark.parametrize("module", ["training", "losses", "metrics", "models"])
def test_exports_are_explicit(module):
    package = getattr(ununennium, module)
    assert all(hasattr(package, name) for name in package.__all__)
    assert package.__all__ == sorted(package.__all__, key=lambda name: (not name.isupper(), name))


@pytest.fixture
def loaders():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 12, 32, 32, generator=generator)
    masks = (images[:, :10].argmax(1) * 1).long()
    data = TensorDataset(images, masks)
    return DataLoader(data, batch_size=2, shuffle=True), DataLoader(data, batch_size=2)


def test_the_first_example(loaders, tmp_path, monkeypatch, capsys):
    """Only the number of epochs differs: 2 for 100."""
    monkeypatch.chdir(tmp_path)
    train_loader, val_loader = loaders
    # --- the specification's text
    model = create_model("unet_resnet50", in_channels=12, num_classes=10)

    trainer = Trainer(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4),
        loss_fn=DiceLoss(),
        train_loader=train_loader,
        val_loader=val_loader,
        callbacks=[
            CheckpointCallback("checkpoints/", monitor="val_iou"),
        ],
        mixed_precision=True,
        gradient_accumulation_steps=4,
    )

    history = trainer.fit(epochs=2)
    # ---
    assert set(history) == {"train_loss", "train_iou", "train_dice", "val_loss", "val_iou", "val_dice"}
    assert all(len(values) == 2 for values in history.values())
    assert trainer.state.optimizer_steps == 4
    assert Path("checkpoints/best/model.safetensors").is_file()
    assert Path("checkpoints/last/model.safetensors").is_file()
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 5  # the seed, the columns, two epochs, the best
    assert "val_iou" in table[1]


def test_the_callback_example(loaders, capsys):
    # --- the specification's text
    class LoggingCallback(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            print(f"Epoch {epoch}: loss={logs['train_loss']:.4f}")

    # ---
    model = torch.nn.Conv2d(12, 10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = Trainer(model, optimizer, DiceLoss(), loaders[0], callbacks=[LoggingCallback()], progress=False).fit(1)
    assert capsys.readouterr().out == f"Epoch 0: loss={history['train_loss'][0]:.4f}\n"


def test_the_scheduler_and_metrics_examples(loaders):
    import torch.optim.lr_scheduler as sched

    model = torch.nn.Conv2d(12, 10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = sched.CosineAnnealingLR(optimizer, T_max=100)
    callback = LRSchedulerCallback(scheduler)
    trainer = Trainer(
        model,
        optimizer,
        DiceLoss(),
        *loaders,
        callbacks=[callback],
        metrics=[
            IoU(num_classes=10),
            Dice(num_classes=10),
        ],
        progress=False,
    )
    trainer.fit(1)
    assert scheduler.last_epoch == 1


@pytest.mark.parametrize(
    ("distributed", "error", "message"),
    [
        (True, RuntimeError, r"process that torchrun has started.*\n *torchrun --nproc_per_node="),
        ("fsdp", RuntimeError, "process that torchrun has started"),
        ("ddp", ValueError, "must be False, True or \"fsdp\", got 'ddp'"),
    ],
)
def test_distribution_in_a_plain_process_says_what_to_do(loaders, distributed, error, message):
    model = torch.nn.Conv2d(12, 10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        Trainer(model, optimizer, DiceLoss(), *loaders, distributed=distributed)
