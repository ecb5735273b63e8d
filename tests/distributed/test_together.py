"""Processes decide together, fail together, and only one of them speaks (traps 6, 20, 21)."""

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from processes import free_port, run, torchrun, watch_collectives
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from victim_ddp import EPOCHS, STEPS, Augmented, Exact, build, exact_network, failing, network, train

from ununennium.metrics import IoU
from ununennium.training import Callback, CheckpointCallback, EarlyStoppingCallback, NonFiniteError, Preempted, Trainer
from ununennium.training import distributed as processes_together
from ununennium.training import trainer as trainer_module
from ununennium.training.checkpoint import newest, writer
from ununennium.training.step import Stepper

SCRIPT = Path(__file__).with_name("victim_ddp.py")
STOPS = {"every_n_steps": None}  # nothing but epochs is saved, were it not for a signal


def checkpoints_in(folder):
    return sorted((p for p in folder.glob("step-*")), key=lambda p: p.name.split("-")[2])


def position(folder):
    return tuple(json.loads((folder / "last" / "manifest.json").read_text())["position"].values())


# A signal to one process


class Sends(Callback):
    """Send SIGTERM to one process at a place in the run."""

    def __init__(self, rank, hook, *at):
        self.rank, self.place = rank, (hook, *at)

    def _maybe(self, trainer, *place):
        if (trainer.rank, *place) == (self.rank, *self.place):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # the handler runs

    def on_batch_start(self, trainer, batch_idx):
        self._maybe(trainer, "batch_start", trainer.state.epoch, batch_idx)

    def on_batch_end(self, trainer, batch_idx, logs):
        self._maybe(trainer, "batch_end", trainer.state.epoch, batch_idx)

    def on_epoch_end(self, trainer, epoch, logs):
        self._maybe(trainer, "epoch_end", epoch)


class SendsInValidation(Augmented):
    def __getitem__(self, index):
        if os.environ.get("RANK") == "1" and len(self.loaded) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def left(rank, world, folder, place, to=1):
    where = {"val_data": SendsInValidation(7)} if place == "validation" else {"callbacks": [Sends(to, *place)]}
    trainer = build(folder, world, checkpoints=STOPS, **where)
    with pytest.raises(Preempted) as caught:
        trainer.fit(EPOCHS)
    state = trainer.state
    return caught.value.code, state.optimizer_steps, state.epoch, state.batch, len(checkpoints_in(folder))


@pytest.mark.parametrize(
    ("place", "steps", "saved"),
    [
        (("batch_start", 1, 0), 4, (1, 2, 4)),  # the window is closed first
        (("batch_end", 1, 0), 4, (1, 2, 4)),
        (("batch_end", 1, 1), 5, (1, 4, 5)),  # after the vote of this step: at the next
        (("batch_end", 1, 4), 6, (2, 0, 6)),  # no vote is left in this epoch
        ("validation", 3, (1, 0, 3)),  # the epoch is closed first
        (("epoch_end", 0), 3, (1, 0, 3)),
    ],
    ids=str,
)
def test_a_signal_to_one_process_ends_all_at_one_step_with_one_checkpoint(tmp_path, place, steps, saved):
    results = run(2, left, tmp_path / "p", tmp_path / "c", place, limit=60)
    assert [r[:2] for r in results] == [(143, steps)] * 2
    assert results[0][2:4] == results[1][2:4] == saved[:2]
    assert position(tmp_path / "c") == saved
    names = [c.name.split("-")[1] for c in checkpoints_in(tmp_path / "c")]
    assert names.count(f"{steps:08d}") == 1


def left_by_process_0(rank, world, folder, places):
    return [left(rank, world, folder / str(steps), place, 0) for place, steps, _ in places]


def test_a_signal_to_process_0_does_so_too(tmp_path):
    """It is the one that writes."""
    places = [
        (("batch_start", 1, 0), 4, (1, 2, 4)),
        (("batch_end", 1, 1), 5, (1, 4, 5)),
        (("batch_end", 1, 4), 6, (2, 0, 6)),
        (("epoch_end", 0), 3, (1, 0, 3)),
    ]
    for results in run(2, left_by_process_0, tmp_path / "p", tmp_path, places, limit=60):
        assert [r[:4] for r in results] == [(143, steps, *saved[:2]) for _, steps, saved in places]
    for _, steps, saved in places:
        assert position(tmp_path / str(steps)) == saved
        names = [c.name.split("-")[1] for c in checkpoints_in(tmp_path / str(steps))]
        assert names.count(f"{steps:08d}") == 1


def train_both(rank, world, folder, *args):
    return train(rank, world, folder, *args)


def test_a_run_that_a_signal_to_one_process_ended_goes_on_to_the_same_bits(tmp_path):
    expected = run(2, train_both, tmp_path / "w", tmp_path / "whole", limit=60)
    run(2, left, tmp_path / "p", tmp_path / "c", ("batch_start", 1, 1), limit=60)
    assert run(2, train_both, tmp_path / "r", tmp_path / "c", "auto", 7, limit=60) == expected


def left_while_saving_is_slow(rank, world, folder):
    honest = writer.commit
    writer.commit = lambda *args: (time.sleep(1.5), honest(*args))
    left(rank, world, folder, ("batch_start", 1, 0))
    return position(folder)


def test_no_process_leaves_before_the_checkpoint_is_written(tmp_path):
    """Torchrun ends all others once one has left, and a second signal stops at once."""
    assert run(2, left_while_saving_is_slow, tmp_path / "p", tmp_path / "c", limit=60) == [(1, 2, 4)] * 2


def by_hand(folder, world=2, **environment):
    """Start the victim in processes that nobody watches over, as mpirun might."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment,
            },
            start_new_session=True,
        )
        for rank in range(world)
    ]  # fmt: skip


@pytest.mark.parametrize("to", [0, 1])
def test_sigterm_from_outside_to_one_process_lets_all_exit_with_143(tmp_path, to):
    victims = by_hand(tmp_path, SECONDS="0.2", SAVING="0.3")
    try:
        victims[to].stdout.readline()
        while not (tmp_path / "last").exists():
            assert victims[to].poll() is None, victims[to].communicate()
            time.sleep(0.02)
        victims[to].send_signal(signal.SIGTERM)
        errors = [victim.communicate(timeout=60)[1] for victim in victims]
        assert [victim.returncode for victim in victims] == [143, 143], errors
        assert ["leaving after this optimizer step" in text for text in errors] == [to == 0, to == 1]
        assert newest(tmp_path)[0].name == (tmp_path / "last").resolve().name
        assert not list(tmp_path.glob(".tmp-*"))
    finally:
        for victim in victims:
            victim.kill()


# stop() in one process


class Stops(Callback):
    def __init__(self, rank, hook, at):
        self.rank, self.place = rank, (hook, at)

    def _maybe(self, trainer, *place):
        if trainer.rank == self.rank and place == self.place:
            trainer.stop()

    def on_batch_start(self, trainer, batch_idx):
        self._maybe(trainer, "batch_start", trainer.state.optimizer_steps)

    def on_batch_end(self, trainer, batch_idx, logs):
        self._maybe(trainer, "batch_end", trainer.state.optimizer_steps)

    def on_epoch_end(self, trainer, epoch, logs):
        self._maybe(trainer, "epoch_end", epoch)


def stopped(rank, world, folder, place, resume=None):
    stops = [] if place is None else [Stops(world - 1, *place)]
    trainer = build(folder, world, callbacks=stops, checkpoints={"keep_last": 1000})
    history = trainer.fit(EPOCHS, resume=resume)
    return trainer.state.optimizer_steps, trainer.state.epoch, len(history["val_loss"])


@pytest.mark.parametrize(
    ("place", "steps", "epochs"),
    [
        (("batch_start", 3), 4, 2),
        (("batch_end", 4), 5, 2),  # after the vote of step 4: at the next
        (("epoch_end", 0), 3, 1),
    ],
)
def test_a_stop_in_the_last_process_ends_all_at_one_step(tmp_path, place, steps, epochs):
    assert run(3, stopped, tmp_path, None, place, limit=60) == [(steps, epochs, epochs)] * 3


def stopped_on_an_accelerator(rank, world, folder, place):
    Stepper.looks = property(lambda self: False, lambda self, value: None)  # in this process only
    return stopped(rank, world, folder, place)


@pytest.mark.parametrize(
    ("place", "steps", "epochs"), [(("batch_start", 1), 3, 1), (("batch_start", 3), 5, 2), (("batch_start", 5), 6, 2)]
)
def test_where_the_device_is_not_waited_for_a_vote_counts_a_step_later(tmp_path, place, steps, epochs):
    found = run(3, stopped_on_an_accelerator, tmp_path, None, place, limit=60)
    assert found == [(steps, epochs, epochs)] * 3


def spoiled_on_an_accelerator(rank, world):
    Stepper.looks = property(lambda self: False, lambda self, value: None)  # in this process only
    images = torch.ones(12, 3, 4, 4)
    images[world + 1] = math.nan  # the second batch of process 1
    data = TensorDataset(images, torch.zeros(12, 4, 4, dtype=torch.long))
    model = nn.Conv2d(3, 2, 1)
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), DataLoader(data, 1),
        distributed=True, device="cpu", progress=False, metrics=[],
    )  # fmt: skip
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(1)
    return str(caught.value)


def test_where_the_device_is_not_waited_for_the_epochs_end_tells_of_a_bad_loss(tmp_path):
    for message in run(2, spoiled_on_an_accelerator, tmp_path, limit=60):
        assert "the loss of epoch 0 was not finite from batch 1 on" in message


def test_a_run_killed_after_another_process_has_stopped_it_stays_stopped(tmp_path):
    """All have agreed to stop at step 4, so the checkpoint of step 4 says so."""
    run(2, stopped, tmp_path / "p", tmp_path / "c", ("batch_start", 3), limit=60)
    inside = next(c for c in checkpoints_in(tmp_path / "c") if c.name.startswith("step-00000004"))
    assert json.loads((inside / "manifest.json").read_text())["position"]["batch"] == 2
    results = run(2, stopped, tmp_path / "r", tmp_path / "other", None, inside, limit=60)
    assert results == [(4, 2, 2)] * 2


def stopped_early(rank, world):
    early = EarlyStoppingCallback("train_loss", patience=1, min_delta=1e9)  # the second epoch is no better
    trainer = build(None, world, callbacks=[early])
    trainer.fit(EPOCHS)
    return trainer.state.epoch, early.stopped_epoch


def test_early_stopping_ends_all_in_the_same_epoch(tmp_path):
    assert run(3, stopped_early, tmp_path, limit=60) == [(2, 1)] * 3


def saved_by_the_clock(rank, world, folder):
    clock = time.monotonic
    trainer_module.time = type("Clock", (), {"monotonic": staticmethod(lambda: clock() + 1e6 * rank)})  # another host's
    trainer = build(folder, world, checkpoints={"every_n_steps": None, "every_n_seconds": 1e-9})
    trainer.fit(1)
    return len(checkpoints_in(folder))


def test_saving_by_the_clock_is_decided_together_though_clocks_differ(tmp_path):
    assert run(2, saved_by_the_clock, tmp_path / "p", tmp_path / "c", limit=60)[0] > 0


# An error in one process

ERRORS = {
    "dataset": "LookupError: tile 17 is not in the archive",
    "forward": "ArithmeticError: this model can't go on",
    "batch_start": "OSError: no route to the tracker",
    "batch_end": "OSError: no route to the tracker",
    "epoch_end": "OSError: no route to the tracker",
    "train_start": "OSError: no route to the tracker",
    "validation": "LookupError: tile 17 is not in the archive",
    "validation, forward": "ArithmeticError: this model can't go on",
}
ENDED = "ProcessError: process 0 lost the others: one of this run has ended"


def failed(rank, world, folder, place):
    try:
        train(rank, world, folder / "c", **failing(place))
    except BaseException as error:
        (folder / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)  # as does a process whose error nobody catches: its connections end with it


@pytest.mark.parametrize("place", ERRORS)
def test_an_error_in_one_process_ends_all_and_the_others_say_so(tmp_path, place):
    run(2, failed, tmp_path / "p", tmp_path, place, limit=30)
    assert (tmp_path / "error-1").read_text() == ERRORS[place]
    assert (tmp_path / "error-0").read_text().startswith(ENDED)


@pytest.mark.parametrize("place", ["dataset", "forward", "batch_end"])
def test_under_torchrun_the_error_of_one_process_is_what_the_user_reads_within_seconds(tmp_path, place):
    agent = torchrun(SCRIPT, tmp_path, FAILS=place)
    try:
        agent.stdout.readline()
        start = time.monotonic()
        _, errors = agent.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
    assert agent.returncode == 1
    assert ERRORS[place] in errors
    assert ENDED in errors
    assert time.monotonic() - start < 30


# Who speaks, who writes, whose group it is


def heard(rank, world, folder):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        build(folder / f"{rank}", world, progress=True).fit(1)
    return said.getvalue(), (folder / f"{rank}").exists()


def test_only_process_0_prints_and_writes(tmp_path):
    (said, wrote), *others = run(3, heard, tmp_path / "p", tmp_path, limit=60)
    assert others == [("", False)] * 2
    assert wrote
    assert said.count("seed 3") == said.count("train_loss") == said.count("1/1") == 1


def test_without_torchrun_the_error_shows_the_command_line(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["my_train.py", "--fast"])
    with pytest.raises(RuntimeError, match=r"RANK, .* are not set(.|\n)*torchrun --nproc_per_node=2 my_train\.py\n"):
        build(None, 2)
    assert not dist.is_initialized()


def with_a_group_of_ones_own(rank, world):
    del os.environ["LOCAL_RANK"]  # a Slurm script may know none of torchrun's names
    address = f"tcp://127.0.0.1:{os.environ.pop('MASTER_PORT')}"
    dist.init_process_group("gloo", address, rank=rank, world_size=world)
    mine, left = dist.group.WORLD, []
    processes_together.atexit.register = left.append
    with pytest.raises(ValueError, match=r"backend='nccl', but the process group that is there has 'gloo'"):
        build(None, world, backend="nccl")
    trainer = build(None, world, backend="gloo")
    trainer.fit(1)
    return (trainer.rank, trainer.world_size), dist.group.WORLD is mine, left


def test_a_group_that_the_user_made_is_used_and_left_as_it_is(tmp_path):
    results = run(2, with_a_group_of_ones_own, tmp_path, limit=60)
    assert results == [((rank, 2), True, []) for rank in range(2)]


# What can't be done together


def refused(rank, world, kwargs):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        build(None, world, **kwargs[rank]).fit(1)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"data": Augmented(24)}, "train_loader is {'samples': 25, 'batch_size': 6, 'batches': 5} in process 0"),
        ({"val_data": Augmented(8)}, "val_loader is {'samples': 7, "),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps is 2 in process 0 and 3 in process 1"),
        ({"gradient_clip_norm": None}, "gradient_clip_norm is 0.5 in process 0 and None in process 1"),
    ],
    ids=["samples", "validation samples", "accumulation", "clipping"],
)
def test_processes_that_were_given_different_things_are_told_what_differs(tmp_path, other, named):
    first, second = run(2, refused, tmp_path, [{}, other], limit=30)
    assert named in first
    assert "in process 0" in second
    assert "in process 1" in second


def test_a_callback_that_saves_in_one_process_only_is_refused(tmp_path):
    """All have to call save: as others do not, it would wait for them, or take their numbers for its own."""
    mine = {"callbacks": [CheckpointCallback(tmp_path / "c", "train_loss", every_n_steps=1)]}
    for error in run(2, refused, tmp_path / "p", [mine, {}], limit=30):
        assert "CheckpointCallback" in error


class Stream(IterableDataset):
    def __iter__(self):
        yield from Augmented(8)


def streams(rank, world):
    model = network()
    with pytest.raises(ValueError, match=r"can't be shared out among 2 processes exactly.*__getitem__ and __len__"):
        Trainer(
            model, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss(), DataLoader(Stream(), 2),
            distributed=True, device="cpu",
        )  # fmt: skip


def test_streams_that_nobody_can_share_out_are_refused(tmp_path):
    run(2, streams, tmp_path, limit=30)


@pytest.mark.parametrize("setting", [{"backend": "gloo"}, {"sync_batchnorm": True}])
def test_settings_of_several_processes_are_refused_for_one(setting):
    with pytest.raises(ValueError, match=rf"{next(iter(setting))} is for several processes: .*distributed=True"):
        build(None, 1, **setting)


# Metrics


class Share:
    """Mean of targets of class 1, by somebody who does not know of several processes."""

    def __init__(self, ones=0.0, count=0.0):
        self.ones, self.count = ones, count

    def update(self, outputs, targets):
        self.ones, self.count = self.ones + float((targets == 1).sum()), self.count + targets.numel()

    def compute(self):
        return self.ones / self.count

    def reset(self):
        self.ones = self.count = 0.0


class ReducedShare(Share):
    def reduced(self, total):
        ones, count = total(torch.tensor([self.ones, self.count], dtype=torch.float64)).tolist()
        return ReducedShare(ones, count)


def test_a_metric_that_cant_be_reduced_is_refused_by_name(tmp_path):
    for error in run(2, refused, tmp_path, [{"metrics": {"share": Share()}}] * 2, limit=30):
        assert error.startswith("TypeError: Share can't be computed over several processes: give it a method reduced")


def measured(rank, world, val_samples):
    torchmetrics.utilities.prints.rank_zero_only.rank = rank  # read from the environment where it was imported
    metrics = {
        "share": ReducedShare(),
        "accuracy": torchmetrics.classification.MulticlassAccuracy(3, ignore_index=255, average="micro"),
        "iou": IoU(3, ignore_index=255, average="none"),
    }
    model = exact_network()
    trainer = build(None, world, data=Exact(25), val_data=Exact(val_samples), model=model, metrics=metrics)
    return trainer.fit(2)


@pytest.mark.parametrize("val_samples", [7, 1])  # of 1 a process has none
def test_metrics_of_torchmetrics_and_of_ones_own_are_those_of_one_process(tmp_path, val_samples):
    expected = measured(0, 1, val_samples)
    for history in run(2, measured, tmp_path, val_samples, limit=60):
        assert history.keys() == expected.keys()
        for name, values in expected.items():
            assert history[name] == pytest.approx(values, rel=1e-6), name


def validated(rank, world):
    return build(None, world, val_data=Exact(1), model=exact_network()).validate()


def test_a_process_without_a_batch_validates_with_the_default_metrics(tmp_path):
    """Nothing was trained, so it never saw an output from which to tell how many classes there are."""
    expected = validated(0, 1)
    for figures in run(3, validated, tmp_path, limit=30):
        assert figures == pytest.approx(expected)


# What a step costs and gives


class Counts(Callback):
    """Count the reductions of gradients, and everything else that goes between the processes, batch by batch."""

    def __init__(self):
        self.reductions, self.calls, self.after = 0, 0, []
        watch_collectives(["all_reduce", "all_gather_object", "broadcast", "broadcast_object_list"], self._count)

    def _count(self):
        self.calls += 1

    def _hook(self, state, bucket):
        self.reductions += 1
        return dist.distributed_c10d._get_default_group().allreduce([bucket.buffer().div_(2)]).get_future().then(
            lambda done: done.value()[0]
        )  # fmt: skip

    def on_batch_start(self, trainer, batch_idx):
        if batch_idx == 0:
            trainer._stepper._forward.register_comm_hook(None, self._hook)
            self.reductions, self.calls = 0, 0

    def on_batch_end(self, trainer, batch_idx, logs):
        self.after.append((self.reductions, self.calls))


def counted(rank, world, accumulation):
    counts = Counts()
    model = exact_network()
    build(None, world, model=model, data=Exact(48), val_data=Exact(7), gradient_accumulation_steps=accumulation,
          callbacks=[counts]).fit(1)  # fmt: skip
    return counts.after


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_window_costs_one_reduction_of_the_gradient_and_one_vote(tmp_path, accumulation):
    after, other = run(2, counted, tmp_path, accumulation, limit=60)
    assert after == other
    first = 2  # calls more, once for the run: the order is compared, the unit of counts agreed on
    assert after == [(n // accumulation, n // accumulation + first) for n in range(1, 9)]


class BadInProcess(Exact):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample | {"image": sample["image"] * (math.nan if index in (3, 17) else 1)}


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_batch_end(self, trainer, batch_idx, logs):
        self.rates.append((trainer.state.optimizer_steps, trainer.optimizer.param_groups[0]["lr"]))


def skipped(rank, world):
    rates = Rates()
    options = {"on_nonfinite": "skip", "metrics": []}
    trainer = build(None, world, data=BadInProcess(25), val_data=Exact(7), model=exact_network(), callbacks=[rates],
                    **options)  # fmt: skip
    trainer.fit(EPOCHS)
    return rates.rates, trainer.state.nonfinite_steps


def test_a_step_that_one_process_spoils_moves_no_learning_rate_anywhere(tmp_path):
    expected = skipped(0, 1)
    assert 0 < expected[1] < 9
    assert run(3, skipped, tmp_path, limit=60) == [expected] * 3


class Marked(Exact):
    """Two samples bear a mark."""

    def __getitem__(self, index):
        image = self.images[index].clone()
        image[0, 0, 0] = 9.0 if index in (3, 17) else 0.0
        return {"image": image, "mask": self.masks[index]}


class Overflows(nn.Sequential):
    """Its gradient overflows where a sample bears the mark; its outputs and the loss do not."""

    marks = 0

    def forward(self, x):
        outputs = super().forward(x)
        if outputs.requires_grad and bool((x[:, 0, 0, 0] == 9.0).any()):
            self.marks += 1
            outputs.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
        return outputs


class Scales(Callback):
    def __init__(self):
        self.seen, self.weights = [], []

    def on_batch_end(self, trainer, batch_idx, logs):
        state, (group,) = trainer.state, trainer.optimizer.param_groups
        scale = trainer.precision.scaler.get_scale()
        self.seen.append((state.optimizer_steps, state.skipped_steps, group["lr"], scale))
        if not state.open_batches:
            self.weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))


def overflowed(rank, world):
    scales = Scales()
    torch.manual_seed(0)
    model = Overflows(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 1))
    trainer = build(
        None, world, data=Marked(25), val_data=Marked(7), model=model, callbacks=[scales], mixed_precision="fp16"
    )
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    trainer.fit(EPOCHS)
    return scales.seen, torch.stack(scales.weights), model.marks


def test_an_overflow_in_one_process_has_all_skip_the_same_steps(tmp_path):
    """Trap 5, in several processes: weights, schedule and scale are those of one process, step by step."""
    seen, weights, _ = overflowed(0, 1)
    steps, skipped, *_ = seen[-1]
    assert steps + skipped == STEPS
    assert 0 < skipped < STEPS
    results = run(2, overflowed, tmp_path, limit=60)
    assert sum(marks for *_, marks in results) == 2 * EPOCHS
    assert all(marks < skipped for *_, marks in results)  # each skips steps that are sound in itself
    for (found, found_weights, _), other in zip(results, reversed(results), strict=True):
        assert found == seen
        assert torch.equal(found_weights, other[1])
        torch.testing.assert_close(found_weights, weights, rtol=0, atol=1e-3)


def masks(rank, world):
    model = network()
    seen = []
    dropout = next(m for m in model if isinstance(m, nn.Dropout))
    dropout.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0] != 0, output == 0)))
    build(None, world, model=model).fit(1)
    return seen[:3]


def test_dropout_differs_between_processes_that_were_seeded_alike(tmp_path):
    for (mine, dropped), (theirs, dropped_there) in zip(*run(2, masks, tmp_path, limit=60), strict=True):
        differs = (dropped != dropped_there)[mine & theirs]
        assert differs.float().mean() > 0.2  # of 0.42
