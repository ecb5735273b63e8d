"""An exponential moving average: what it is, when it moves, who sees it, and how it is kept."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from ununennium.export import export_model
from ununennium.models import create_model, register_model
from ununennium.prediction import load_model
from ununennium.training import (
    Callback,
    CheckpointCallback,
    CheckpointError,
    EarlyStoppingCallback,
    EMACallback,
    SWACallback,
    Trainer,
    export_weights,
)
from ununennium.training import checkpoint as package


class Net(nn.Sequential):
    """With BatchNorm, a tied weight, a mask of infinities, and a buffer that no file holds."""

    def __init__(self, dtype=torch.float32, in_channels=3, num_classes=4):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            first, second = nn.Conv2d(in_channels, 4, 1), nn.Conv2d(4, 4, 1)
            super().__init__(first, nn.BatchNorm2d(4), nn.Tanh(), second, nn.Conv2d(4, num_classes, 1))
        self[4].weight = second.weight
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.to(dtype)

    def forward(self, x):
        if self.training:
            self.calls += 1
        return super().forward(x)


def data(samples=12, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, 5, 5, generator=generator).to(dtype)
    return TensorDataset(images, torch.randint(0, 4, (samples, 5, 5), generator=generator))


def trainer_of(callbacks, model=None, dtype=torch.float32, validates=True, **kwargs):
    model = Net(dtype) if model is None else model
    optimizer = kwargs.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train, val = (DataLoader(data(n, dtype, seed), 2) for n, seed in ((12, 0), (4, 9)))
    return Trainer(
        model, optimizer, kwargs.pop("loss_fn", nn.CrossEntropyLoss()), kwargs.pop("train", train),
        val if validates else None, callbacks=callbacks, device="cpu", progress=False, seed=0, **kwargs,
    )  # fmt: skip


class Watch(Callback):
    """Copies of the raw weights after every batch; placed before the average."""

    def __init__(self):
        self.weights, self.steps = [], []

    def on_batch_end(self, trainer, batch_idx, logs):
        self.weights.append(copy.deepcopy(trainer.model.state_dict()))
        self.steps.append(trainer.state.optimizer_steps)


def by_hand(first, watched, decay, warmup):
    """The definition, in float64, over the weights after each step that really happened."""
    average = {k: v.double() for k, v in first.items()}
    before, count = 0, 0
    for weights, step in zip(watched.weights, watched.steps, strict=True):
        if step == before:
            continue
        before = step
        now = min(decay, (1 + count) / (warmup + count)) if warmup else decay
        for name, value in weights.items():
            floating = value.is_floating_point() and value.isfinite().all()
            average[name] = now * average[name] + (1 - now) * value.double() if floating else value.double()
        count += 1
    return average, count


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, 0), (0.99, 10), (0.7, 2), (0.0, 0)])
def test_it_is_the_average_of_the_weights_after_each_step(decay, warmup):
    """Parameters and BatchNorm's statistics; integers and infinities are copied; accumulation is one step a window."""
    watch, ema = Watch(), EMACallback(decay, warmup)
    model = Net()
    first = copy.deepcopy(model.state_dict())
    trainer_of([watch, ema], model, gradient_accumulation_steps=4).fit(3)
    expected, count = by_hand(first, watch, decay, warmup)
    assert (count, ema.num_averaged) == (6, 6)  # 6 batches an epoch: windows of 4 and 2
    found = ema.state_dict()["averaged"]
    assert found.keys() == model.state_dict().keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)
    assert found["1.num_batches_tracked"] == 18
    assert found["mask"].tolist() == [0.0, -torch.inf]
    assert found["3.weight"] is found["4.weight"]


def test_without_warmup_it_is_pytorchs_to_the_bit():
    model = Net()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)

    class Theirs(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            theirs.update_parameters(trainer.model)

    ema = EMACallback(0.9, warmup=0)
    trainer_of([Theirs(), ema], model).fit(2)
    found = ema.state_dict()["averaged"]
    for name, value in theirs.module.named_parameters():
        assert torch.equal(found[name], value)


def test_steps_that_did_not_happen_do_not_move_it():
    """Trap 5: left out by the loss scaler, or for NaN; BatchNorm's statistics of such a window are no statistics."""
    watch, ema = Watch(), EMACallback(0.5, 0)

    class Overflows(nn.CrossEntropyLoss):
        calls = 0

        def forward(self, outputs, targets):
            self.calls += 1
            return super().forward(outputs, targets) * (1e30 if self.calls == 3 else 1)

    trainer = trainer_of([watch, ema], mixed_precision="fp16", loss_fn=Overflows(), validates=False)
    trainer.precision.scaler._init_scale = 8.0
    first = copy.deepcopy(trainer.model.state_dict())
    trainer.fit(1)
    assert trainer.state.skipped_steps == 1
    expected, count = by_hand(first, watch, 0.5, 0)
    assert ema.num_averaged == count == 5
    for name, value in expected.items():
        torch.testing.assert_close(ema.state_dict()["averaged"][name].double(), value, rtol=1e-5, atol=1e-6)


def test_steps_that_were_left_out_for_nan_do_not_move_it():
    watch, ema = Watch(), EMACallback(0.5, 0)
    bad = data()
    bad.tensors[0][4] = torch.nan
    trainer = trainer_of([watch, ema], train=DataLoader(bad, 2), on_nonfinite="skip")
    trainer.fit(1)
    assert trainer.state.nonfinite_steps == 1
    assert ema.num_averaged == 5
    assert all(v.isfinite().all() for k, v in ema.state_dict()["averaged"].items() if k != "mask")


def test_bfloat16_weights_are_averaged_in_float32():
    """Where (1 - decay) · change is below bfloat16's resolution, an average in bfloat16 would never move."""
    ema = EMACallback(0.999, 0)
    trainer = trainer_of([ema], dtype=torch.bfloat16)
    first = copy.deepcopy(trainer.model.state_dict())
    trainer.fit(2)
    found = ema.state_dict()["averaged"]["0.weight"]
    assert found.dtype is torch.float32
    assert not torch.equal(found, first["0.weight"].float())
    raw = trainer.model[0].weight.detach().clone()
    with trainer.evaluating():
        assert torch.equal(trainer.model[0].weight, found.bfloat16())
    assert torch.equal(trainer.model[0].weight, raw)
    assert torch.equal(ema.state_dict()["averaged"]["0.weight"], found)


def test_validation_is_of_the_averaged_model_and_the_raw_one_is_put_back():
    ema = EMACallback(0.9, 0)
    trainer = trainer_of([ema])
    history = trainer.fit(2)
    raw = copy.deepcopy(trainer.model.state_dict())
    averaged = Net()
    averaged.load_state_dict(ema.state_dict()["averaged"])
    figures = trainer_of([], averaged).validate()
    assert {k: v[-1] for k, v in history.items() if k.startswith("val_")} == figures
    assert trainer.validate() == figures
    assert all(torch.equal(v, raw[k]) for k, v in trainer.model.state_dict().items())
    with trainer.evaluating(), trainer.evaluating():  # as when a callback looks at images
        assert torch.equal(trainer.model[0].weight, averaged[0].weight)
    assert torch.equal(trainer.model[0].weight, raw["0.weight"])
    assert not any(torch.equal(averaged[0].weight, w) for w in [raw["0.weight"]])


def test_an_error_in_validation_leaves_the_raw_weights():
    trainer = trainer_of([EMACallback(0.9)])
    trainer.fit(1)
    raw = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ZeroDivisionError), trainer.evaluating():
        raise ZeroDivisionError
    assert all(torch.equal(v, raw[k]) for k, v in trainer.model.state_dict().items())


def test_training_is_the_same_with_and_without_it():
    plain, averaged = trainer_of([]), trainer_of([EMACallback()])
    one, other = plain.fit(3), averaged.fit(3)
    assert one["train_loss"] == other["train_loss"]
    for a, b in zip(plain.model.parameters(), averaged.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluate_false_leaves_validation_to_the_raw_weights():
    plain, ema = trainer_of([]), trainer_of([EMACallback(evaluate=False)])
    assert plain.fit(2) == ema.fit(2)


def test_frozen_layers_stay_to_the_bit():
    model = Net()
    model[0].weight.requires_grad_(False)
    first = model[0].weight.detach().clone()
    ema = EMACallback(0.97)
    trainer_of([ema], model).fit(2)
    assert torch.equal(ema.state_dict()["averaged"]["0.weight"], first)


def test_the_layout_in_memory_is_the_models_own():
    ema = EMACallback()
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    trainer = trainer_of([ema], model.to(memory_format=torch.channels_last))
    trainer.fit(1)
    assert ema.state_dict()["averaged"]["1.weight"].is_contiguous(memory_format=torch.channels_last)
    with trainer.evaluating():
        assert trainer.model[1].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("compiled", ["in place", "wrapped"])
def test_compiled_models_have_the_same_names_and_the_same_averages(compiled):
    plain, ema = EMACallback(0.9), EMACallback(0.9)
    trainer_of([plain]).fit(1)
    model = Net()
    if compiled == "in place":
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    trainer = trainer_of([ema], model)
    trainer.fit(1)
    found, expected = ema.state_dict()["averaged"], plain.state_dict()["averaged"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    with trainer.evaluating():
        assert all(torch.equal(v, expected[k.replace("_orig_mod.", "")]) for k, v in model.state_dict().items())


def test_a_step_waits_for_nothing():
    """On the meta device there is nothing to wait for: reading a number from it raises."""
    ema = EMACallback()
    trainer = trainer_of([ema])
    ema.on_train_start(trainer)
    trainer.model.to("meta")
    ema._averages = {k: v.to("meta") for k, v in ema._averages.items()}
    ema.on_epoch_start(trainer, 0)
    trainer.state.optimizer_steps += 1
    ema.on_batch_end(trainer, 0, {})
    assert ema.num_averaged == 1


# --- In checkpoints


def manifest(path):
    return json.loads((path / "manifest.json").read_text())


def test_a_checkpoint_holds_both_and_anybody_can_load_either_strictly(tmp_path):
    """Trap 23: raw and averaged are both kept."""
    ema = EMACallback(0.9)
    trainer = trainer_of([CheckpointCallback(tmp_path), ema])
    trainer.fit(2)
    last = tmp_path / "last"
    assert manifest(last)["averaged"] == {"callback": "EMACallback", "default": True}
    assert "averaged.safetensors" in manifest(last)["files"]
    raw, averaged = load_file(last / "model.safetensors"), load_file(last / "averaged.safetensors")
    assert raw.keys() == averaged.keys() == trainer.model.state_dict().keys()
    assert all(torch.equal(v, raw[k]) for k, v in trainer.model.state_dict().items())
    for name, value in ema.state_dict()["averaged"].items():
        assert torch.equal(averaged[name], value)
    assert not torch.equal(raw["0.weight"], averaged["0.weight"])
    Net().load_state_dict(averaged, strict=True)
    figures = manifest(last)["figures"]
    fresh = Net()
    fresh.load_state_dict(averaged)
    assert figures["val_loss"] == trainer_of([], fresh).validate()["val_loss"]


def test_weights_mutated_right_after_a_save_are_not_in_the_file(tmp_path):
    """Trap 23, for the averages."""
    ema = EMACallback(0.9)
    trainer = trainer_of([ema])
    trainer.fit(1)
    expected = copy.deepcopy(ema.state_dict()["averaged"])
    trainer.save(tmp_path / "c", wait=False)
    for value in ema.state_dict()["averaged"].values():
        value.zero_()
    trainer._checkpoints.writer.wait()
    found = load_file(tmp_path / "c" / "averaged.safetensors")
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_a_save_in_a_validation_holds_raw_weights_as_raw(tmp_path):
    ema = EMACallback(0.9)
    trainer = trainer_of([ema])
    trainer.fit(1)
    raw = copy.deepcopy(trainer.model.state_dict())
    with trainer.evaluating():
        trainer.save(tmp_path / "c")
    found = load_file(tmp_path / "c" / "model.safetensors")
    assert all(torch.equal(found[k], v) for k, v in raw.items())
    found = load_file(tmp_path / "c" / "averaged.safetensors")
    assert all(torch.equal(found[k], v) for k, v in ema.state_dict()["averaged"].items())


@pytest.fixture
def registered():
    def make(in_channels, num_classes, weights=None, **kwargs):
        network = Net(in_channels=in_channels, num_classes=num_classes)
        network.model_config = {"name": "test_net", "in_channels": in_channels, "num_classes": num_classes}
        return network

    register_model("test_net", make, overwrite=True)


@pytest.mark.parametrize("evaluate", [True, False])
def test_whoever_reads_weights_gets_those_that_were_validated_or_those_that_are_asked_for(
    tmp_path, registered, evaluate
):
    ema = EMACallback(0.9, evaluate=evaluate)
    trainer = trainer_of([CheckpointCallback(tmp_path / "c"), ema], create_model("test_net", 3, 4))
    trainer.fit(1)
    last = tmp_path / "c" / "last"
    raw, averaged = trainer.model[0].weight, ema.state_dict()["averaged"]["0.weight"]
    expected = {None: averaged if evaluate else raw, True: averaged, False: raw}
    for choice, weight in expected.items():
        assert torch.equal(load_model(last, averaged=choice)[0].weight, weight)
        other = trainer_of([], create_model("test_net", 3, 4))
        other.load_weights(last, averaged=choice)
        assert torch.equal(other.model[0].weight, weight)
        for write in (export_weights, export_model):
            file = tmp_path / f"{choice}-{write.__name__}.safetensors"
            write(last, file, averaged=choice)
            assert torch.equal(load_file(file)["0.weight"], weight)
    assert torch.equal(create_model("test_net", 3, 4, weights=str(last))[0].weight, expected[None])
    for choice, file in {True: "averaged", False: "model"}.items():
        made = create_model("test_net", 3, 4, weights=str(last.resolve() / f"{file}.safetensors"))
        assert torch.equal(made[0].weight, expected[choice])


def test_averaged_weights_of_a_checkpoint_that_has_none_are_refused(tmp_path, registered):
    trainer_of([CheckpointCallback(tmp_path)], create_model("test_net", 3, 4)).fit(1)
    assert manifest(tmp_path / "last")["format"] == 2  # which versions without averages read
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        load_model(tmp_path / "last", averaged=True)
    assert load_model(tmp_path / "last", averaged=False) is not None


def test_predicting_takes_a_choice_for_a_checkpoint_alone(tmp_path):
    from ununennium.prediction import predict_scene

    with pytest.raises(ValueError, match="averaged chooses among a checkpoint's weights"):
        predict_scene(Net(), tmp_path / "scene.tif", tmp_path / "map.tif", averaged=True)


def test_a_damaged_file_of_averages_is_found_out(tmp_path):
    trainer = trainer_of([EMACallback()])
    trainer.fit(1)
    path = trainer.save(tmp_path / "c")
    sound = (path / "averaged.safetensors").read_bytes()
    (path / "averaged.safetensors").write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"averaged\.safetensors is damaged"):
        package.read(path)


def test_an_average_that_is_not_finite_is_not_saved(tmp_path):
    ema = EMACallback()
    trainer = trainer_of([ema])
    trainer.fit(1)
    ema.state_dict()["averaged"]["0.bias"][0] = torch.inf
    with pytest.raises(ArithmeticError, match=r"0\.bias holds NaN or infinite"):
        trainer.save(tmp_path / "c")


# --- Resumed


def averages(trainer):
    ema = next(c for c in trainer.callbacks.callbacks if isinstance(c, EMACallback))
    return ema.state_dict()["averaged"], ema.num_averaged, ema.state_dict()["copied"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", [False, "bf16"])
def test_from_every_checkpoint_it_goes_on_with_the_same_bits(tmp_path, dtype, precision):
    if dtype is torch.bfloat16 and precision:
        pytest.skip("bfloat16 weights need no autocast")

    def make(folder):
        save = CheckpointCallback(folder, every_n_steps=1, keep_last=100)
        return trainer_of(
            [EMACallback(0.9, 3), save], dtype=dtype, gradient_accumulation_steps=4, mixed_precision=precision
        )

    whole = make(tmp_path / "whole")
    history = whole.fit(2)
    expected = averages(whole)
    for path in sorted(p for p in (tmp_path / "whole").glob("step-*")):
        again = make(tmp_path / f"from-{path.name}")
        again.fit(2, resume=path)
        found = averages(again)
        assert again.history == history
        assert found[1:] == expected[1:]
        for name, value in expected[0].items():
            assert found[0][name].dtype == value.dtype
            assert torch.equal(found[0][name], value), name


def test_a_checkpoint_that_was_loaded_and_not_gone_on_from_can_be_validated_and_saved(tmp_path):
    first = trainer_of([EMACallback(0.9)])
    first.fit(1)
    first.save(tmp_path / "a")
    second = trainer_of([EMACallback(0.9)])
    second.load(tmp_path / "a")
    second.save(tmp_path / "b")
    ours, theirs = (load_file(tmp_path / name / "averaged.safetensors") for name in "ab")
    assert all(torch.equal(theirs[k], v) for k, v in ours.items())
    assert second.validate() == first.validate()
    assert torch.equal(second.model[0].weight, first.model[0].weight)


def test_it_goes_on_in_a_later_fit():
    one, two = trainer_of([EMACallback(0.9)]), trainer_of([EMACallback(0.9)])
    one.fit(3)
    two.fit(1)
    two.fit(3, start_epoch=1)
    found, expected = averages(two), averages(one)
    assert found[1] == expected[1]
    assert all(torch.equal(found[0][k], v) for k, v in expected[0].items())


def test_given_other_weights_it_begins_anew(tmp_path):
    first = trainer_of([EMACallback(0.9)])
    first.fit(1)
    first.save(tmp_path / "c")
    trainer = trainer_of([EMACallback(0.9)])
    trainer.fit(2)
    trainer.load_weights(tmp_path / "c", averaged=False)
    plain = trainer_of([])
    plain.load_weights(tmp_path / "c", averaged=False)
    assert trainer.validate() == plain.validate()  # and not the averages of before
    assert averages(trainer)[:2] == ({}, 0)


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ([EMACallback(0.9)], [EMACallback(0.8)], "EMACallback had decay=0.9, this one has 0.8"),
        ([EMACallback(0.9, 3)], [EMACallback(0.9)], "EMACallback had warmup=3, this one has 10"),
        ([EMACallback(0.9)], [EMACallback(0.9, evaluate=False)], "had evaluate=True, this one has False"),
        ([], [EMACallback()], "callbacks with a memory are .*, the Trainer's .*EMACallback"),
        ([EMACallback()], [], "callbacks with a memory are .*EMACallback.*, the Trainer's"),
    ],
)
def test_what_would_not_go_on_alike_is_refused_with_the_reason(tmp_path, there, here, message):
    first = trainer_of(copy.deepcopy(there))
    first.fit(1)
    first.save(tmp_path / "c")
    second = trainer_of(copy.deepcopy(here))
    before = copy.deepcopy(second.model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        second.fit(2, resume=tmp_path / "c")
    assert all(torch.equal(v, before[k]) for k, v in second.model.state_dict().items())


def test_two_averages_are_one_too_many():
    trainer = trainer_of([EMACallback(), SWACallback(0.1, 0)])
    with pytest.raises(ValueError, match="EMACallback and SWACallback would each"):
        trainer.fit(1)
    assert trainer.state.optimizer_steps == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"decay": 1.0}, ValueError, "decay must be at least 0 and below 1, got 1.0"),
        ({"decay": -0.1}, ValueError, "decay must be"),
        ({"warmup": 2.5}, TypeError, "warmup must be an integer"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        EMACallback(**arguments)


def test_the_monitor_judges_the_averaged_model(tmp_path):
    """The score belongs to those weights (trap 19)."""
    save = CheckpointCallback(tmp_path, monitor="val_loss")
    trainer = trainer_of([EMACallback(0.9), EarlyStoppingCallback(patience=9), save])
    trainer.fit(3)
    model = Net()
    model.load_state_dict(load_file(tmp_path / "best" / "averaged.safetensors"))
    assert trainer_of([], model).validate()["val_loss"] == save.best
