"""Bad input gets an error that names cause and remedy, and nothing is lost by it."""

import random
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ununennium._arguments import integer
from ununennium.losses import DiceLoss
from ununennium.metrics import IoU
from ununennium.training import (
    BatchError,
    Callback,
    CheckpointCallback,
    EarlyStoppingCallback,
    NonFiniteError,
    Trainer,
    checks,
)
from ununennium.training import trainer as trainer_module
from ununennium.training.explain import explain
from ununennium.training.targets import check_targets

IGNORE = 255
X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 4, (8, 6, 6), generator=torch.Generator().manual_seed(1))
NODATA = torch.where(torch.arange(8)[:, None, None] == 5, IGNORE, Y)  # sample 5: with batches of 2, the third batch
ONE_HOT = F.one_hot(Y, 4)
BINARY = (Y > 1)[:, None]


def net(channels=3, classes=4, *more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, classes, 1), *more)


def batches(images=X, masks=Y, size=2, **kwargs):
    return DataLoader(TensorDataset(images, masks), size, **kwargs)


class CountingSGD(torch.optim.SGD):
    calls = 0

    def step(self, *args, **kwargs):
        self.calls += 1
        return super().step(*args, **kwargs)


class Pairs(nn.Module):
    """A model of several outputs."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = net(), kind

    def forward(self, x):
        return self.kind([("out", self.net(x)), ("aux", self.net(x))])


class Halves(nn.Module):
    """A model with a skip connection over one halving: heights and widths must be even."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return F.interpolate(self.inner(F.max_pool2d(x, 2)), scale_factor=2) + self.outer(x)


class Samples(Dataset):
    """Samples as TorchGeo's datasets give them."""

    def __init__(self, **parts):
        self.parts = parts

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {name: part[i] if isinstance(part, torch.Tensor) else part for name, part in self.parts.items()}


def once(loader):
    yield from loader


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def refused(expected, words, *, runs, model=None, optimizer=None, loss_fn=None, loader=None, **kwargs):
    """See that a Trainer refuses something and leaves everything as it was; return the error."""
    model = net() if model is None else model
    module = model if isinstance(model, nn.Module) else net()
    optimizer = CountingSGD(module.parameters(), lr=0.1, momentum=0.9) if optimizer is None else optimizer
    loader = batches() if loader is None else loader
    fit = {name: kwargs.pop(name) for name in ("epochs", "start_epoch") if name in kwargs}
    trainer_class = kwargs.pop("trainer_class", Trainer)
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    module.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes, states = [m.training for m in module.modules()], random_states()
    with pytest.raises(expected) as caught:
        trainer_class(
            model,
            optimizer,
            nn.CrossEntropyLoss() if loss_fn is None else loss_fn,
            loader,
            **{"device": "cpu", "progress": False, **kwargs},
        ).fit(**{"epochs": 1, **fit})
    assert caught.type is expected
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in: {caught.value}"
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    if isinstance(optimizer, CountingSGD):
        assert optimizer.calls == 0
        assert not optimizer.state
    assert [m.training for m in module.modules()] == modes
    assert random_states() == states
    assert bool(calls) == runs
    return caught.value


class Forgetful(Callback):
    """A callback that says what to remember, and not how to."""

    def state_dict(self):
        return {"best": 1}


def case(name, expected, *words, **kwargs):
    return pytest.param(expected, words, kwargs, id=name)


def stale_head():
    model = net()
    optimizer = CountingSGD(model.parameters(), lr=0.1)
    model[2] = nn.Conv2d(8, 4, 1)
    return {"model": model, "optimizer": optimizer}


NO_VAL = r"no val_loader: pass one"
EMPTY = r"is empty.*no samples.*drop_last=True.*batch_size smaller"


@pytest.mark.parametrize(
    ("expected", "words", "kwargs"),
    [
        case("metrics, no val", ValueError, "metrics need a val_loader", "pass one", metrics=[IoU(4)]),
        case("monitor, no val", ValueError, "EarlyStopping", "'val_loss'", NO_VAL, callbacks=[EarlyStoppingCallback()]),
        case(
            "checkpoint, no val", ValueError, "Checkpoint", "'val_iou'", NO_VAL, r"\['train_loss'\]",
            callbacks=[CheckpointCallback("/nowhere", monitor="val_iou")],
        ),
        case(
            "monitor unknown", ValueError, "'accuracy', which is not in the logs", r"\['train_loss', 'val_loss'\]",
            r"metrics=\[", metrics=[], val_loader=batches(), callbacks=[EarlyStoppingCallback("accuracy")],
        ),
        case(
            "monitor misspelt", ValueError, "'val_lss'", "Is 'val_loss' meant", metrics=[IoU(4)], val_loader=batches(),
            callbacks=[EarlyStoppingCallback("val_lss")],
        ),
        case(
            "monitor without prefix", ValueError, "'iou'", "Is 'val_iou' meant", metrics=[IoU(4)],
            val_loader=batches(), callbacks=[EarlyStoppingCallback("iou")],
        ),
        case("epochs 0", ValueError, "epochs must be at least 1, got 0", epochs=0),
        case("epochs 2.5", TypeError, "epochs must be an integer of at least 1, got 2.5", epochs=2.5),
        case("epochs '3'", TypeError, "epochs must be an integer of at least 1, got '3'", epochs="3"),
        case("epochs True", TypeError, "epochs must be an integer", epochs=True),
        case("start_epoch -1", ValueError, "start_epoch must be at least 0, got -1", start_epoch=-1),
        case("start_epoch = epochs", ValueError, "final count", "epochs=8", epochs=4, start_epoch=4),
        case("accumulation 0", ValueError, "accumulation_steps must be at least 1", gradient_accumulation_steps=0),
        case("accumulation 1.5", TypeError, "accumulation_steps must be an int", gradient_accumulation_steps=1.5),
        *(
            case(f"clip {v!r}", ValueError, "gradient_clip_norm", "number above 0, or None", gradient_clip_norm=v)
            for v in (0, -1.0, float("nan"), float("inf"), "1e-3", True)
        ),
        case("a seed below", ValueError, "seed must be at least 0, got -1", seed=-1),
        case("a seed too large", ValueError, r"seed must be below 2\*\*63", "a smaller one", seed=2**63),
        case("a list as config", TypeError, "config must be a mapping", "give a dict", config=[1, 2]),
        case("no samples", ValueError, "train_loader", EMPTY, loader=[]),
        case("drop_last", ValueError, "train_loader", EMPTY, loader=batches(size=9, drop_last=True)),
        case("no val samples", ValueError, "val_loader", EMPTY, val_loader=batches(size=9, drop_last=True)),
        case("no batch shows", ValueError, "gave no batch", "pass a DataLoader", loader=iter(())),
        case("a dataset", TypeError, "train_loader", r"DataLoader\(dataset", loader=TensorDataset(X, Y)),
        case("a loader class", TypeError, "train_loader", "the class DataLoader and not an object", loader=DataLoader),
        case("a number", TypeError, "val_loader must be a DataLoader", "got 3", val_loader=3),
        case("generator", ValueError, "train_loader", "generator", "only once", "2 epochs", epochs=2, loader=once([1])),
        case("val generator", ValueError, "val_loader", "only once", "DataLoader", epochs=2, val_loader=once([1])),
        case("a loss class", TypeError, "loss_fn", "the class DiceLoss", r"DiceLoss\(…\)", loss_fn=DiceLoss),
        case("a loss name", TypeError, "loss_fn must be callable", "'dice'", loss_fn="dice"),
        case("a sum", ValueError, "'sum'", "reduction='mean'", loss_fn=nn.CrossEntropyLoss(reduction="sum")),
        case("a model class", TypeError, "model must be", "class ReLU and not", model=nn.ReLU, optimizer=0),
        case("an optimizer class", TypeError, "optimizer must be", "class SGD and not", optimizer=torch.optim.SGD),
        case("no optimizer", TypeError, "optimizer must be a torch.optim.Optimizer, got 0.1", optimizer=0.1),
        case(
            "another model's optimizer", ValueError, "4 of the optimizer's 4 parameters are not the model's",
            "lacks the model's '0.weight', '0.bias'", r"from model.parameters\(\)",
            optimizer=CountingSGD(net().parameters(), lr=0.1),
        ),
        case("an older head", ValueError, "2 of the optimizer's 4", "'2.weight', '2.bias'", "head", **stale_head()),
        case("all frozen", ValueError, "no parameter .* gradient: unfreeze", model=net().requires_grad_(False)),
        case("no such device", ValueError, "'gpu' is no device", '"cuda:1"', device="gpu"),
        case("no device at all", ValueError, r"\[\] is no device", device=[]),
        case("a device elsewhere", ValueError, "'cuda:99' is not on this machine", "cpu:0", device="cuda:99"),
        case("another device elsewhere", ValueError, "'xpu:99' is not on this machine", "cpu:0", device="xpu:99"),
        case("no such precision", ValueError, "mixed_precision must be", "'float16'", mixed_precision="float16"),
        case("precision 1", ValueError, "mixed_precision must be", "got 1", mixed_precision=1),
        case("a callback class", TypeError, "callbacks", "an instance", callbacks=[EarlyStoppingCallback]),
        case("half a memory", TypeError, "Forgetful has no load_state_dict", "another run", callbacks=[Forgetful()]),
        case("one callback", TypeError, "callbacks must be a list", r"=\[Callback\(…\)\]", callbacks=Callback()),
        case("one metric", TypeError, "metrics must be a list", r"=\[IoU\(", metrics=IoU(4), val_loader=batches()),
        case("one metric class", TypeError, "metrics must be a list", "IoU", metrics=IoU, val_loader=batches()),
        case("a metric class", TypeError, "'iou'", "an object with update", metrics=[IoU], val_loader=batches()),
    ],
)  # fmt: skip
def test_what_can_be_known_is_refused_before_the_model_runs(expected, words, kwargs):
    refused(expected, words, runs=False, **kwargs)


STRUCTURE = r"\(inputs, targets\) or a mapping with 'image' and 'mask'"
CLASSES = r"the loss takes classes: integers \(torch.int64\) of shape \(2, 6, 6\)"
LABEL = r"the label 255, outside the classes 0 … 3"
NUMBERS = "the loss compares them number by number"
SIZE = r"outputs of shape \(2, 4, 6, 6\) and targets of shape \(2, 5, 5\) differ in size: targets must be \(2, 6, 6\)"


@pytest.mark.filterwarnings("ignore:Using a (target|input) size")  # the user sees a warning and a loss that falls
@pytest.mark.parametrize(
    ("expected", "words", "kwargs"),
    [
        case(
            "monitor of default metrics", ValueError, "'val_f1'", "'val_iou', 'val_loss'", val_loader=batches(),
            callbacks=[EarlyStoppingCallback("val_f1")],
        ),
        case("list of samples", BatchError, "list of 2 samples", "collate_fn", loader=batches(collate_fn=list)),
        case(
            "list of mappings", BatchError, "list of 2 samples", "collate_fn",
            loader=DataLoader(Samples(image=X, mask=Y), 2, collate_fn=list),
        ),
        case("NumPy images", BatchError, r"numpy.ndarray \(8, 3, 6, 6\)", "from_numpy", loader=[(X.numpy(), Y)]),
        case("NumPy masks", BatchError, r"targets are a numpy.ndarray", "give a tensor", loader=[(X, Y.numpy())]),
        case("uint8 images", BatchError, "uint8.*weights are torch.float32", "/ 255", loader=batches(X.byte())),
        case("uint16 images", BatchError, "uint16", "/ 10000", loader=batches(X.abs().to(torch.uint16))),
        case("int16 images", BatchError, "int16", "/ 10000", loader=batches(X.short())),
        case("float64 images", BatchError, "float64 is NumPy's", r"\.float\(\)", loader=batches(X.double())),
        case("float64 model", BatchError, "inputs are torch.float32", r"model with \.to\(", model=net().double()),
        case("channels", BatchError, "inputs have 3 channels", "takes 12", "12 bands", "in_channels=3", model=net(12)),
        case(
            "features", BatchError, r"inputs have 10 channels \(shape \(2, 10\)\)", "in_channels=10",
            model=nn.Linear(12, 4), loader=batches(torch.zeros(8, 10), Y[:, 0, 0]),
        ),
        case("channels last", BatchError, "channels last", r"permute\(2", loader=batches(X.permute(0, 2, 3, 1))),
        case("uint8, last", BatchError, "channels last", loader=batches(X.permute(0, 2, 3, 1).byte())),
        case("no batches", BatchError, r"\(3, 6, 6\), without a batch dim", "batch_size", loader=batches(size=None)),
        case(
            "no batches, refused by the model", BatchError, r"\(3, 6, 6\), without a batch dim", "batch_size",
            loader=batches(size=None), model=nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), net()),
        ),
        case(
            "50 pixels", BatchError, "7 x 7 pixels", "32 x 32 it can", "pad or crop", "multiples of 32", model=Halves(),
            loader=batches(torch.zeros(4, 3, 7, 7), torch.zeros(4, 7, 7).long()),
        ),
        case(
            "nodata", BatchError, LABEL, "36 of 288", "sample 5 of", "ignore_index=255",
            loader=batches(masks=NODATA, size=8),
        ),
        case("nodata, uint8", BatchError, LABEL, "sample 5", loader=batches(masks=NODATA.byte(), size=8)),
        case("nodata, Dice", BatchError, LABEL, loss_fn=DiceLoss(), loader=batches(masks=NODATA, size=8)),
        case(
            "nodata, own loss", BatchError, LABEL, r"quantities .* \.float\(\)", loader=batches(masks=NODATA, size=8),
            loss_fn=lambda outputs, targets: F.cross_entropy(outputs, targets),
        ),
        case(
            "nodata, a loss that says nothing", BatchError, LABEL, "sample 5", loader=batches(masks=NODATA, size=8),
            loss_fn=lambda outputs, targets: F.cross_entropy(outputs, targets.clamp(0, 3)),
        ),
        case("labels from 1", BatchError, "the label 4", "start at 1", loader=batches(masks=Y + 1, size=8)),
        case("several labels", BatchError, "labels 4, 6", "num_classes", loader=batches(masks=Y * 2, size=8)),
        case("a label below", BatchError, "the label -1", "ignore_index=-1", loader=batches(masks=Y - 1, size=8)),
        case("classes of a smaller model", BatchError, "labels 2, 3", "0 … 1", "num_classes", model=net(3, 2)),
        case("float masks", BatchError, "torch.float32", CLASSES, r"\.long\(\)", loader=batches(masks=Y.float())),
        case("float masks, Dice", BatchError, CLASSES, loss_fn=DiceLoss(), loader=batches(masks=Y.float())),
        case(
            "float masks, a loss that says nothing", BatchError, "torch.float32", r"\.long\(\)",
            loader=batches(masks=Y.float()), loss_fn=partial(lambda o, t, ignore_index: o.mean(), ignore_index=255),
        ),
        case("uint8 masks", BatchError, "torch.uint8", CLASSES, r"\.long\(\)", loader=batches(masks=Y.byte())),
        case("uint16 masks", BatchError, "torch.uint16", CLASSES, loader=batches(masks=Y.to(torch.uint16))),
        case("int32 masks", BatchError, "torch.int32", CLASSES, r"\.long\(\)", loader=batches(masks=Y.int())),
        case("masks (B, 1, H, W)", BatchError, CLASSES, r"\.squeeze\(1\)$", loader=batches(masks=Y[:, None])),
        case("float (B, 1, H, W)", BatchError, r"squeeze\(1\)\.long\(\)", loader=batches(masks=Y[:, None].float())),
        case("one-hot", BatchError, CLASSES, r"argmax\(1\)", loader=batches(masks=ONE_HOT.permute(0, 3, 1, 2))),
        case("one-hot last", BatchError, CLASSES, r"argmax\(-1\)", loader=batches(masks=ONE_HOT)),
        case("size", BatchError, SIZE, "[Cc]rop or resize", loader=batches(masks=Y[:, :5, :5])),
        case("size, Dice", BatchError, SIZE, loss_fn=DiceLoss(), loader=batches(masks=Y[:, :5, :5])),
        case("shrinking", BatchError, r"targets must be \(2, 3, 3\)", "interpolate", model=nn.Conv2d(3, 4, 2, 2)),
        case("fewer inputs", BatchError, "differ in size", "as many targets as inputs", loader=[(X[:2], Y[:3])]),
        case("scene labels", BatchError, "for each pixel and one for each sample", loader=batches(masks=Y[:, 0, 0])),
        case(
            "broadcast", BatchError, r"outputs \(2, 1, 6, 6\) and targets \(2, 6, 6\)", "broadcast", r"unsqueeze\(1\)",
            model=net(3, 1), loss_fn=nn.MSELoss(), loader=batches(masks=Y.float()),
        ),
        case(
            "broadcast, partial", BatchError, "broadcast", model=net(3, 1), loss_fn=partial(F.l1_loss),
            loader=batches(masks=Y.float()),
        ),
        case(
            "no broadcast", BatchError, NUMBERS, "same shape", model=net(3, 1), loss_fn=nn.MSELoss(),
            loader=batches(masks=X[:, :1, :5, :5]),
        ),
        case(
            "binary, shape and type", BatchError, NUMBERS, r"targets\.unsqueeze\(1\)\.float\(\)", model=net(3, 1),
            loss_fn=nn.BCEWithLogitsLoss(), loader=batches(masks=BINARY[:, 0].byte()),
        ),
        case(
            "binary, type", BatchError, "torch.int64", NUMBERS, r"targets\.float\(\)", model=net(3, 1),
            loss_fn=nn.BCEWithLogitsLoss(), loader=batches(masks=BINARY.long()),
        ),
        case(
            "binary, 0 and 255", BatchError, "values from 0 to 255", r"\(masks > 0\)\.float\(\)", model=net(3, 1),
            loss_fn=nn.BCEWithLogitsLoss(), loader=batches(masks=BINARY.float() * 255, size=8),
        ),
        case("binary, classes", BatchError, "CrossEntropyLoss", loss_fn=nn.BCEWithLogitsLoss()),
        case("one class", BatchError, "single channel", "num_classes=2", "BCEWithLogitsLoss", model=net(3, 1)),
        case(
            "probabilities", BatchError, "as probabilities do", "leave it out of the model",
            model=nn.Sequential(net(3, 4), nn.Softmax(1)),
        ),
        case("one class, silent", BatchError, "single channel", model=net(3, 1), loader=batches(masks=Y * 0)),
        case(
            "Dice of the wrong rank", ValueError, r"logits \(B, C, H, W\)", r"\(2, 6, 6\)", r"unsqueeze\(1\)",
            model=net(3, 1, nn.Flatten(1, 2)), loss_fn=DiceLoss(), loader=batches(masks=BINARY[:, 0].long()),
        ),
        case("Dice of probabilities", ValueError, "softmax", model=net(3, 4, nn.Softmax(1)), loss_fn=DiceLoss()),
        case("num_classes", ValueError, "4 channels", "num_classes=10", metrics=[IoU(10)], val_loader=batches()),
        case("a model's dict", BatchError, "dict with the keys 'out', 'aux'", "compute_loss", model=Pairs(dict)),
        case("a model's tuple", BatchError, "returns a tuple of 2", "return one tensor", model=Pairs(tuple)),
        *(
            case(
                f"a loss of {kind}, accumulation {steps}", BatchError, *words, gradient_accumulation_steps=steps,
                loss_fn=lambda o, t, change=change: change(F.cross_entropy(o, t, reduction="none")),
            )
            for steps in (1, 2)
            for kind, change, *words in (
                ("pixels", lambda loss: loss, "must be one number", r"tensor \(2, 6, 6\)", r"\.mean\(\)"),
                ("shape (1,)", lambda loss: loss.mean().reshape(1), "must be one number", r"\(1,\)"),
                ("a float", lambda loss: loss.mean().item(), "must be a tensor", r"without \.item\(\)"),
                ("nothing", lambda loss: None, "must be a tensor", "gave None"),
                ("a dict", lambda loss: {"loss": loss.mean()}, "must be a tensor", "dict with the keys 'loss'"),
                ("no gradient", lambda loss: loss.mean().detach(), "does not depend on", r"\.detach\(\)"),
            )
        ),
        case(
            "NaN", NonFiniteError, "loss is nan at optimizer step 0", "epoch 0, batch 0", "nodata",
            loader=batches(X * torch.nan),
        ),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_fit_is_explained_before_the_first_step(expected, words, kwargs):
    error = refused(expected, words, runs=True, **kwargs)
    if expected is not NonFiniteError:
        assert error.__notes__ == ["This happened in epoch 0, batch 0."]


@pytest.mark.parametrize(
    ("loader", "found"),
    [
        (DataLoader(X, 2), r"a tensor \(2, 3, 6, 6\)"),
        (DataLoader(TensorDataset(X), 2), "a list of 1"),
        (DataLoader(TensorDataset(X, Y, Y), 2), "a list of 3"),
        (DataLoader(Samples(image=X, crs="EPSG:32633"), 2), "a dict with the keys 'image', 'crs'"),
        (DataLoader(Samples(images=X, masks=Y), 2), "a dict with the keys 'images', 'masks'"),
    ],
    ids=["images alone", "list of images alone", "three parts", "no mask", "other keys"],
)
def test_a_batch_of_unknown_structure(loader, found):
    error = refused(TypeError, [STRUCTURE, found, r"override Trainer.compute_loss\(batch\)"], runs=False, loader=loader)
    assert error.__notes__ == ["This happened in epoch 0, batch 0."]


class BrokenError(Exception):
    """What the user's own code raises."""


def fails(*_):
    raise BrokenError("my own")


class Fails(nn.Module):
    forward = fails


@pytest.mark.parametrize("kwargs", [{"model": net(3, 4, Fails())}, {"loss_fn": fails}], ids=["model", "loss"])
def test_errors_of_the_users_own_keep_type_and_message_and_say_where(kwargs):
    error = refused(BrokenError, [], runs=True, **kwargs)
    assert str(error) == "my own"
    assert error.__notes__ == ["This happened in epoch 0, batch 0."]


def test_errors_of_the_dataset_say_where():
    loader = batches(collate_fn=fails)
    error = refused(BrokenError, [], runs=False, loader=loader)
    assert "batch 0" in error.__notes__[0]
    model = net()
    trainer = Trainer(model, CountingSGD(model.parameters()), F.cross_entropy, batches(), loader, progress=False)
    with pytest.raises(BrokenError) as caught:
        trainer.validate()
    assert "batch 0" in caught.value.__notes__[0]


class Weights(Callback):
    """Keep the weights after the last batch that went well."""

    def __init__(self):
        self.kept = None

    def on_batch_end(self, trainer, batch_idx, logs):
        self.kept = [p.detach().clone() for p in trainer.model.parameters()]


def later(loss_fn=F.cross_entropy, **kwargs):
    """Train until the third batch, which holds a wrong label; return error, Trainer and the weights before it."""
    model, weights = net(), Weights()
    loader = batches(masks=NODATA, num_workers=kwargs.pop("num_workers", 0))
    optimizer = CountingSGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(model, optimizer, loss_fn, loader, callbacks=[weights], device="cpu", progress=False, **kwargs)
    with pytest.raises(BatchError) as caught:
        trainer.fit(2)
    assert optimizer.calls == trainer.state.optimizer_steps
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights.kept, strict=True))
    return caught.value, trainer


@pytest.mark.parametrize(
    ("kwargs", "steps"),
    [
        ({}, 2),
        ({"loss_fn": nn.CrossEntropyLoss()}, 2),
        ({"loss_fn": DiceLoss()}, 2),
        ({"mixed_precision": True}, 2),
        ({"gradient_accumulation_steps": 2}, 1),
        ({"gradient_accumulation_steps": 3, "gradient_clip_norm": 1.0}, 0),
        ({"num_workers": 2}, 2),
    ],
    ids=["function", "cross-entropy", "Dice", "mixed precision", "window opens", "window closes", "workers"],
)
def test_a_wrong_label_in_a_later_batch_stops_before_its_window(kwargs, steps):
    error, trainer = later(**kwargs)
    assert re.search(LABEL + r".*36 of 72 values, in sample 1 of the batch", str(error))
    assert error.__notes__ == ["This happened in epoch 0, batch 2."]
    assert trainer.state.optimizer_steps == steps


def test_losses_of_smp_are_explained_too():
    losses = pytest.importorskip("segmentation_models_pytorch").losses
    error, _ = later(loss_fn=losses.DiceLoss("multiclass"))
    assert "sample 1 of the batch" in str(error)
    focal = losses.FocalLoss("multiclass")  # leaves such labels out and says nothing
    refused(BatchError, [LABEL, "sample 5"], runs=True, loss_fn=focal, loader=batches(masks=NODATA, size=8))
    refused(BatchError, [CLASSES], runs=True, loss_fn=losses.DiceLoss("multiclass"), loader=batches(masks=Y.float()))


def validation(masks, loss_fn, classes=4, trained=Y):
    model = net(3, classes)
    optimizer = CountingSGD(model.parameters(), lr=0.1)
    return Trainer(model, optimizer, loss_fn, batches(masks=trained), batches(masks=masks), progress=False)


def test_a_wrong_label_in_validation_only():
    trainer = validation(NODATA, nn.CrossEntropyLoss())
    trainer.model[1].eval()
    modes, states = [m.training for m in trainer.model.modules()], random_states()
    with pytest.raises(BatchError, match=LABEL) as caught:
        trainer.validate()
    assert caught.value.__notes__ == ["This happened in validation batch 2."]
    assert [m.training for m in trainer.model.modules()] == modes
    assert random_states() == states
    with pytest.raises(BatchError, match=LABEL):
        trainer.fit(1)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_broadcast_in_validation_only():
    with pytest.raises(BatchError, match="broadcast"):
        validation(Y.float(), nn.MSELoss(), classes=1, trained=Y[:, None].float()).fit(1)


def test_a_loss_that_is_no_number_in_validation_alone():
    with pytest.raises(BatchError, match="must be one number"):
        validation(Y, lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none")).validate()


def test_checkpoints_of_earlier_epochs_stay_whole_and_nothing_half_made(tmp_path):
    class Worse:  # good in the first epoch, not in the second
        masks = iter([Y, NODATA])

        def __iter__(self):
            return iter(batches(masks=next(self.masks)))

    model = net()
    callback = CheckpointCallback(tmp_path / "run", monitor="train_loss")
    trainer = Trainer(
        model, CountingSGD(model.parameters(), lr=0.1), F.cross_entropy, Worse(), callbacks=[callback], progress=False
    )
    with pytest.raises(BatchError) as caught:
        trainer.fit(2)
    assert caught.value.__notes__ == ["This happened in epoch 1, batch 2."]
    assert sorted(re.sub("-.*", "", path.name) for path in (tmp_path / "run").iterdir()) == ["best", "last", "step"]
    trainer.load(tmp_path / "run" / "last")
    assert trainer.state.epoch == 1


@pytest.mark.parametrize("folder", ["file", "file/inside", "file/deep/inside"])
def test_a_folder_that_cannot_be_written(tmp_path, folder):
    (tmp_path / "file").write_text("kept")
    callback = CheckpointCallback(tmp_path / folder, monitor="train_loss")
    expected = FileExistsError if folder == "file" else NotADirectoryError
    error = refused(expected, ["checkpoints can't be written", "choose another"], runs=False, callbacks=[callback])
    assert error.filename == str(tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_validation_without_a_loader():
    model = net()
    with pytest.raises(ValueError, match="pass a val_loader"):
        Trainer(model, CountingSGD(model.parameters()), F.cross_entropy, batches(), progress=False).validate()


def gaussian(outputs, targets):
    return F.gaussian_nll_loss(outputs[:, 0], targets, outputs[:, 1].exp())


def upsampling(outputs, targets):
    return F.cross_entropy(F.interpolate(outputs, scale_factor=2), targets)


@pytest.mark.parametrize(
    ("loss_fn", "model", "masks"),
    [
        (gaussian, net(3, 2), X[:, 0]),
        (upsampling, nn.Conv2d(3, 4, 2, 2), Y),
        (nn.CrossEntropyLoss(), net(), X.softmax(1)[:, [0, 1, 2, 2]]),
        (nn.CrossEntropyLoss(ignore_index=IGNORE), net(), NODATA[[5, 0, 1, 2, 3, 4, 6, 7]]),
        (nn.BCEWithLogitsLoss(), net(), ONE_HOT.permute(0, 3, 1, 2).float()),
        (lambda outputs, targets: F.cross_entropy(outputs, targets.squeeze(1).long()), net(), Y[:, None].float()),
        (nn.MSELoss(), net(3, 3), X * 300),
        (nn.MSELoss(), net(3, 1), Y[:, None] * 300),
        (F.cross_entropy, net(), Y),
    ],
    ids=["parameters", "upsampling", "probabilities", "nodata", "labels", "conversion", "values", "counts", "plain"],
)
def test_what_a_loss_rightly_takes_is_not_refused(loss_fn, model, masks):
    trainer = Trainer(model, CountingSGD(model.parameters(), lr=1e-9), loss_fn, batches(masks=masks), progress=False)
    trainer.fit(1)
    assert trainer.state.optimizer_steps == 4


def test_a_step_of_the_users_own_is_not_judged_by_what_the_loss_would_say():
    class Own(Trainer):
        def compute_loss(self, batch):
            outputs = self.model(batch[0])
            return self.loss_fn(outputs.squeeze(1), batch[1]), outputs, batch[1]

    model, loader = net(3, 1), batches(masks=Y.float())
    trainer = Own(model, CountingSGD(model.parameters(), lr=0.1), nn.MSELoss(), loader, progress=False)
    trainer.fit(1)
    assert trainer.state.optimizer_steps == 4


def test_a_normal_step_explains_nothing_and_looks_at_the_first_batch_alone(monkeypatch):
    looked = []
    monkeypatch.setattr(trainer_module, "explain", lambda *_: pytest.fail("nothing was to be explained"))
    monkeypatch.setattr(trainer_module, "check_targets", lambda *_: looked.append(1))
    model = net()
    Trainer(model, CountingSGD(model.parameters(), lr=0.1), F.cross_entropy, batches(), progress=False).fit(3)
    assert len(looked) == 1


class Restless(nn.Module):
    """A model with all that an explanation could disturb."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.BatchNorm2d(4).eval())

    def forward(self, x):
        return self.layers(x + torch.rand(1) + random.random() + np.random.rand())


class CountingLoss(nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs, targets):
        self.calls += 1
        return super().forward(outputs, targets)


def test_an_explanation_disturbs_nothing():
    model, loss_fn = Restless(), CountingLoss()
    with torch.random.fork_rng():
        F.cross_entropy(model(X), Y).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    modes, states = [m.training for m in model.modules()], random_states()
    found = explain(IndexError(), (X, NODATA), model, loss_fn, torch.device("cpu"))
    assert re.search(LABEL, str(found))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kept = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert random_states() == states
    assert loss_fn.calls == 0


class Evil(dict):
    def __contains__(self, key):
        raise BrokenError


@pytest.mark.parametrize(
    ("error", "batch", "loss_fn"),
    [
        (BatchError("said already"), (X, NODATA), F.cross_entropy),
        (MemoryError(), (X, NODATA), F.cross_entropy),
        (torch.OutOfMemoryError("8 GiB"), (X, NODATA), F.cross_entropy),
        (KeyError("another"), (X, NODATA), F.cross_entropy),
        (KeyError("another"), (X.byte(), Y), F.cross_entropy),
        (RuntimeError("CUDA error: an illegal memory access"), (X, NODATA), F.cross_entropy),
        (TypeError("no batch"), X, F.cross_entropy),
        (BrokenError(), Evil(image=X, mask=Y), F.cross_entropy),
        (BrokenError("my own"), (X, NODATA), fails),
        (BrokenError("my own"), (X, Y.float()), fails),
        (BrokenError("a metric's"), (X, Y), F.cross_entropy),
        (RuntimeError("a metric's"), (X, Y), lambda o, t: F.cross_entropy(o, t, reduction="none")),
    ],
)
def test_what_does_not_show_is_not_explained(error, batch, loss_fn):
    assert explain(error, batch, net(), loss_fn, torch.device("cpu")) is None


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("8 GiB"), NonFiniteError("said already")])
def test_a_batch_is_not_run_again_where_that_cannot_help(error):
    model = net()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the batch was run again"))
    assert explain(error, (X, NODATA), model, F.cross_entropy, torch.device("cpu")) is None


def test_an_assertion_on_the_device_is_explained_without_asking_the_device():
    error = RuntimeError("CUDA error: device-side assert triggered")
    found = explain(error, (X, NODATA), nn.Identity(), nn.CrossEntropyLoss(), torch.device("cuda"))
    assert re.search(r"labels 0, 1, 2, 3, 255; .*ignore_index=-100.*start the process anew", str(found))
    assert explain(error, (X, X), nn.Identity(), nn.MSELoss(), torch.device("cuda")) is None


@pytest.mark.parametrize("value", [1, 0.5, np.float32(2.0), None])
def test_clip_norms_that_are_right(value):
    checks.check_clip_norm(value)


def test_integers_of_numpy_are_integers():
    assert integer("epochs", np.int64(3), minimum=1) == 3


def test_a_collection_of_metrics_is_to_be_put_in_a_list():
    class MetricCollection(dict):  # as torchmetrics' is: iterable, and a metric
        def compute(self):
            return {}

    with pytest.raises(TypeError, match=r"metrics must be a list, .*write metrics=\[MetricCollection\("):
        checks.check_list("metrics", MetricCollection())
    checks.check_list("metrics", [MetricCollection()])
    checks.check_list("metrics", {"all": MetricCollection()})
    checks.check_list("metrics", None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type_are_compared_as_numbers(dtype):
    outputs, targets = torch.zeros(2, 4, 6, 6), Y[:2].to(dtype)
    check_targets(outputs, targets, nn.CrossEntropyLoss())
    targets[1, 0, 0] = 156  # what -100, the default of ignore_index, is among uint8
    with pytest.raises(BatchError, match=r"label 156.* 1 of 72 values, in sample 1"):
        check_targets(outputs, targets, nn.CrossEntropyLoss())
    check_targets(outputs, targets, nn.CrossEntropyLoss(ignore_index=156))
