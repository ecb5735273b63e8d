"""FSDP2 gives what one process gives, and its checkpoints are anybody's."""

import hashlib
import json
import os
import signal
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # here, and not in each forked process: it takes a second
from processes import run, watch_collectives
from safetensors.torch import load_file
from test_same_result import Tiles, assert_same, one, train
from test_together import Sends
from torch import nn
from torch.utils.data import DataLoader

from ununennium.training import Callback, CheckpointCallback, CheckpointError, Preempted, Trainer, export_weights
from ununennium.training.checkpoint import Share, Writer, newest, read
from ununennium.training.checkpoint import format as files
from ununennium.training.distributed import whole
from ununennium.training.errors import ProcessError

GLOBAL, EPOCHS = 6, 3


@pytest.mark.parametrize(("world", "samples"), [(1, 53), (2, 53), (2, 49), (3, 49)])
def test_sharded_training_takes_the_steps_of_one_process(tmp_path, world, samples):
    assert_same(run(world, train, tmp_path, samples, 7, {"distributed": "fsdp"}), one(samples, 7))


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 4, 1)
        )


class StopsAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_batch_end(self, trainer, batch_idx, logs):
        if trainer.state.optimizer_steps == self.step and not trainer.state.open_batches:
            raise KeyboardInterrupt  # without a signal: nothing is saved on the way out


def make(folder, world, distributed, callbacks=(), model=None, every_n_steps=1, **kwargs):
    model = model or nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Trainer(
        model, optimizer, nn.CrossEntropyLoss(ignore_index=255), DataLoader(Tiles(32), GLOBAL // world, shuffle=True),
        DataLoader(Tiles(7, turned=False), max(GLOBAL // world, 1)),
        callbacks=[CheckpointCallback(folder, every_n_steps=every_n_steps, keep_last=100), *callbacks], seed=2,
        gradient_accumulation_steps=2, gradient_clip_norm=0.5, distributed=distributed, progress=False, device="cpu",
        **kwargs,
    )  # fmt: skip


def result(trainer):
    trainer._checkpoints.writer.wait()
    state = trainer.optimizer.state_dict()["state"]
    moments = {i: {k: whole(v).clone() for k, v in s.items()} for i, s in state.items()}
    weights = {k: whole(v).clone() for k, v in trainer.model.state_dict().items()}
    return {"weights": weights, "moments": moments, "history": trainer.history}


def fit(rank, world, folder, distributed, epochs=EPOCHS, resume="auto", stop=None):
    torch.manual_seed(0)
    callbacks = [StopsAt(stop)] if stop else []
    trainer = make(folder, world, distributed, callbacks)
    with suppress(KeyboardInterrupt):
        trainer.fit(epochs, resume=resume)
    return result(trainer)


def step(folder, number):
    return next(folder.glob(f"step-{number:08d}-*"))


def close(a, b):
    for name, value in a["weights"].items():
        torch.testing.assert_close(b["weights"][name], value, rtol=0, atol=1e-10)
    for name, values in a["history"].items():
        assert b["history"][name] == pytest.approx(values, rel=1e-9)


def test_a_run_goes_on_in_any_other_kind_of_run(tmp_path):
    """From inside an epoch: sharded over two, then over three, then in DDP, then alone, and sharded again."""
    expected = fit(0, 1, tmp_path / "whole", False)
    folder = tmp_path / "moving"
    run(2, fit, tmp_path / "a", folder, "fsdp", EPOCHS, "auto", 2)
    run(3, fit, tmp_path / "b", folder, "fsdp", EPOCHS, "auto", 4)
    run(2, fit, tmp_path / "c", folder, True, EPOCHS, "auto", 5)
    fit(0, 1, folder, False, EPOCHS, "auto", 7)
    for found in run(2, fit, tmp_path / "d", folder, "fsdp"):
        close(expected, found)


def test_a_sharded_checkpoint_holds_the_bits_and_is_read_anywhere(tmp_path):
    results = run(2, fit, tmp_path / "a", tmp_path / "c", "fsdp", 1)
    path = (tmp_path / "c" / "last").resolve()
    names = sorted(p.name for p in path.iterdir())
    assert names == [
        "manifest.json", "model.0.safetensors", "model.1.safetensors", "training.0.safetensors",
        "training.1.safetensors", "training.json",
    ]  # fmt: skip
    contents = read(path)
    for name, value in results[0]["weights"].items():
        assert torch.equal(contents.model[name], value)
    alone = make(tmp_path / "other", 1, False)
    alone.load(path)
    found = result(alone)
    for number, moments in results[0]["moments"].items():
        for name, value in moments.items():
            assert torch.equal(found["moments"][number][name], value)
    for found in run(2, loaded, tmp_path / "b", path):
        for name, value in results[0]["weights"].items():
            assert torch.equal(found["weights"][name], value)
        for number, moments in results[0]["moments"].items():
            for name, value in moments.items():
                assert torch.equal(found["moments"][number][name], value)


def loaded(rank, world, path):
    trainer = make(path.parent / "unused", world, "fsdp")
    trainer.load(path)
    return result(trainer)


def test_weights_are_exported_to_one_file(tmp_path):
    results = run(2, fit, tmp_path / "a", tmp_path / "c", "fsdp", 1)
    weights = results[0]["weights"]
    export_weights(tmp_path / "c" / "last", tmp_path / "out" / "weights.safetensors")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["weights.safetensors"]
    exported = load_file(tmp_path / "out" / "weights.safetensors")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[k], v) for k, v in weights.items())
    with pytest.raises(FileExistsError, match=r"weights\.safetensors exists"):
        export_weights(tmp_path / "c" / "last", tmp_path / "out" / "weights.safetensors")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pytorchs_own_reader_reads_the_shards(tmp_path):
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    results = run(2, fit, tmp_path / "a", tmp_path / "c", "fsdp", 1)
    state = {name: torch.zeros_like(value) for name, value in results[0]["weights"].items()}
    load(state, storage_reader=HuggingFaceStorageReader(str((tmp_path / "c" / "last").resolve())), no_dist=True)
    assert all(torch.equal(state[name], value) for name, value in results[0]["weights"].items())


def test_a_shard_that_is_missing_or_damaged_is_named(tmp_path):
    run(2, fit, tmp_path / "a", tmp_path / "c", "fsdp", 1)
    path = (tmp_path / "c" / "last").resolve()
    shard = path / "model.1.safetensors"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.1\.safetensors is damaged"):
        read(path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model\.1\.safetensors can't be read"):
        read(path)


def normed(rank, world, folder, callbacks=(), **kwargs):
    torch.manual_seed(0)
    torch.manual_seed(rank)
    return make(folder, world, "fsdp", callbacks, model=Normed().double(), **kwargs)


def bits(trainer):
    """Return SHA-256 of what a run has come to; before another draws from the generators."""
    torch.set_printoptions(precision=17, threshold=10**7)
    found = result(trainer)
    parts = [found["weights"], found["moments"], found["history"], torch.get_rng_state().tolist()]
    return hashlib.sha256(repr([str(part) for part in parts]).encode()).hexdigest()


def same_bits(rank, world, folder, stop, epochs=EPOCHS):
    trainer = normed(rank, world, folder, [StopsAt(stop)] if stop else [])
    try:
        trainer.fit(epochs, resume="auto")
    except KeyboardInterrupt:
        return None
    return bits(trainer)


def same_bits_of_many(rank, world, folders, epochs):
    return [same_bits(rank, world, folder, None, epochs) for folder in folders]


def test_a_sharded_run_that_was_left_inside_an_epoch_ends_with_the_same_bits(tmp_path):
    """With BatchNorm, whose statistics follow process 0, and dropout, which each process draws for itself."""
    expected = run(2, same_bits, tmp_path / "a", tmp_path / "whole", None)
    for stop in (1, 4):
        folder = tmp_path / f"{stop}"
        run(2, same_bits, tmp_path / f"{stop}a", folder, stop)
        assert run(2, same_bits, tmp_path / f"{stop}b", folder, None) == expected


class Reductions(Callback):
    """Count the reductions of gradients from batch to batch; PyTorch has several names for one."""

    def __init__(self):
        self.calls, self.after = 0, []
        watch_collectives([name for name in dir(dist) if name.startswith("reduce_scatter")], self._count)

    def _count(self):
        self.calls += 1

    def on_batch_start(self, trainer, batch_idx):
        self.calls = 0

    def on_batch_end(self, trainer, batch_idx, logs):
        self.after.append(self.calls)


def signalled(rank, world, folder):
    """Train one run to its end, and two more that a signal to process 0, and to process 1, ends."""
    trainer = normed(rank, world, folder / "whole", [reductions := Reductions()], every_n_steps=None)
    trainer.fit(2)
    expected = bits(trainer)
    blocks = sum(any(True for _ in module.parameters(recurse=False)) for module in trainer.model.modules())
    codes = []
    for to in range(world):
        trainer = normed(rank, world, folder / f"{to}", [Sends(to, "batch_start", 1, 0)], every_n_steps=None)
        with pytest.raises(Preempted) as caught:
            trainer.fit(2)
        codes.append((caught.value.code, trainer.state.optimizer_steps, trainer.state.batch))
    return expected, codes, (reductions.after, blocks)


@pytest.fixture(scope="module")
def left_by_signals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    return folder, run(2, signalled, folder / "p", folder)


def test_a_sharded_window_costs_one_reduction_of_each_block(left_by_signals):
    _, results = left_by_signals
    for _, _, (after, blocks) in results:
        assert blocks == 3
        assert after == [0, blocks] * 6


def test_a_signal_to_any_process_of_a_sharded_run_ends_all_with_a_whole_checkpoint(tmp_path, left_by_signals):
    folder, results = left_by_signals
    assert [codes for _, codes, _ in results] == [[(143, 4, 2)] * 2] * 2
    for to in range(2):
        names = sorted(p.name.split("-")[1] for p in (folder / f"{to}").glob("step-*"))
        assert names == ["00000003", "00000004"]  # of the epoch's end, and of the signal
        assert not list((folder / f"{to}").glob(".tmp-*"))
        last = folder / f"{to}" / "last"
        assert {f"{stem}.{rank}.safetensors" for stem in ("model", "training") for rank in range(2)} < set(
            os.listdir(last)
        )
        assert read(last).info["position"] == {"epoch": 1, "batch": 2, "optimizer_steps": 4}
    found = run(2, same_bits_of_many, tmp_path, [folder / "0", folder / "1"], 2)
    assert found == [[expected] * 2 for expected, _, _ in results]


# A process that is killed while shards are written

PLACES = [(rank, place) for rank in range(2) for place in ("in a shard", "before the last step")]
STEP = "step-00000002"


def dies(rank, world, folder, victim, place):
    """Be killed while the second step is saved, if this is the victim; else return what the others' death gives."""
    write, save, wait = files._write, Writer.save, Writer.wait

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def write_half(path, parts):
        if STEP in path.parent.name and path.name.startswith("model."):
            data = b"".join(bytes(memoryview(part).cast("B")) for part in parts)
            path.write_bytes(data[: len(data) // 2])
            die()
        return write(path, parts)

    def save_and_stay(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        if STEP in path.name:
            wait(self)  # until it dies: the others can't be further than this step

    if rank == victim:
        Writer.save = save_and_stay
        rename, tell = os.rename, Share.tell
        if place == "in a shard":
            files._write = write_half
        elif rank == 0:
            os.rename = lambda source, path: die() if STEP in str(path) else rename(source, path)
        else:
            Share.tell = lambda self, message: die() if STEP in str(self.aside) else tell(self, message)
    Writer.wait = lambda self, patience=None: wait(self) if patience is None else wait(self, 0.2)  # for a dead one
    with pytest.raises(ProcessError) as caught:
        normed(rank, world, folder).fit(1)
    return str(caught.value)


def test_a_process_killed_while_shards_are_written_leaves_the_checkpoint_before(tmp_path):
    folders = [tmp_path / f"{victim}, {place}" for victim, place in PLACES]
    for folder, (victim, place) in zip(folders, PLACES, strict=True):
        results = run(2, dies, folder / "p", folder / "c", victim, place, limit=60, killed=[victim])
        assert "lost the others" in results[1 - victim]
        names = [p.name for p in (folder / "c").glob("step-*")]
        assert [name[: len(STEP)] for name in names] == ["step-00000001"], (victim, place)
        assert newest(folder / "c")[0].name == (folder / "c" / "last").resolve().name == names[0]
        begun = list((folder / "c").glob(f".tmp-{STEP}-*"))  # which process 0 takes away, if it can
        assert len(begun) == (victim == 0), (victim, place)
    others = [folder / "c" for folder in folders]
    for uncut, *found in run(2, same_bits_of_many, tmp_path / "p", [tmp_path / "whole", *others], 1):
        assert found == [uncut] * len(PLACES)
    for folder in others:
        assert not list(folder.glob(".tmp-*"))
        assert newest(folder)[0].name.startswith("step-00000003")


def dies_while_another_waits(rank, world, folder):
    """Process 1 dies before it tells of its part in the last checkpoint, for which process 0 does nothing but wait."""
    if rank == 1:
        tell = Share.tell
        Share.tell = lambda self, message: (
            os.kill(os.getpid(), signal.SIGKILL) if "step-00000003" in self.aside.name else tell(self, message)
        )
    with pytest.raises((CheckpointError, ProcessError)) as caught:
        normed(rank, world, folder).fit(1)
    return str(caught.value) + "".join(getattr(caught.value, "__notes__", []))


def test_nobody_waits_for_the_part_of_a_process_that_is_dead(tmp_path):
    said, _ = run(2, dies_while_another_waits, tmp_path / "p", tmp_path / "c", limit=60, killed=[1])
    assert "process 1 did not write its part" in said
    assert newest(tmp_path / "c")[0].name.startswith("step-00000002")


def in_bf16(rank, world):
    torch.manual_seed(0)
    model = Normed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    data = Tiles(24, turned=False)
    data.images = data.images.float()
    loader = DataLoader(data, 4, shuffle=True)
    trainer = Trainer(
        model, optimizer, nn.CrossEntropyLoss(ignore_index=255), loader, loader, distributed="fsdp", device="cpu",
        mixed_precision="bf16", progress=False, seed=0, metrics=[],
    )  # fmt: skip
    gathered = {}
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda m, _, name=name: gathered.update({name: m.weight.dtype}))
    history = trainer.fit(6)
    return history["train_loss"], {p.dtype for p in trainer.model.parameters()}, gathered


def test_bf16_gathers_in_bf16_what_autocast_lowers_and_keeps_parameters_in_float32(tmp_path):
    losses = run(2, in_bf16, tmp_path)
    assert losses[0] == losses[1]
    assert losses[0][0][-1] < losses[0][0][0]
    assert losses[0][1] == {torch.float32}
    assert losses[0][2] == {"0": torch.bfloat16, "1": torch.float32, "4": torch.bfloat16}


def bf16_losses(rank, world, distributed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 4, 1))
    data = Tiles(24, turned=False)
    data.images = data.images.float()
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.5), nn.CrossEntropyLoss(ignore_index=255),
        DataLoader(data, 4 // world, shuffle=True), distributed=distributed, device="cpu", mixed_precision="bf16",
        gradient_accumulation_steps=2, progress=False, seed=0, metrics=[],
    )  # fmt: skip
    return trainer.fit(4)["train_loss"]


def test_bf16_sharded_is_bf16_of_one_process_to_its_rounding(tmp_path):
    alone = bf16_losses(0, 1, False)
    for losses in run(2, bf16_losses, tmp_path, "fsdp"):
        assert losses == pytest.approx(alone, rel=4e-3)


def refusals(rank, world):
    messages = []

    class Learning(nn.CrossEntropyLoss):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    def attempt(loss_fn=None, step=False, **kwargs):
        model = nn.Conv2d(3, 4, 1)
        optimizer = torch.optim.Adam([*model.parameters(), *(loss_fn.parameters() if loss_fn else ())])
        if step:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
        loader = DataLoader(Tiles(4), 2)
        loss_fn = loss_fn or nn.CrossEntropyLoss()
        try:
            Trainer(model, optimizer, loss_fn, loader, distributed="fsdp", device="cpu", progress=False, **kwargs)
        except ValueError as error:
            messages.append(str(error))

    attempt(mixed_precision="fp16")
    attempt(Learning())
    attempt(step=True)
    return messages


def test_what_sharding_can_not_do_is_refused_with_the_reason(tmp_path):
    for messages in run(2, refusals, tmp_path):
        assert len(messages) == 3, json.dumps(messages)
        assert "would skip different steps" in messages[0]
        assert "loss has parameters of its own" in messages[1]
        assert "an optimizer that has not stepped" in messages[2]
