"""A signal leaves between two steps, saves, and costs nothing (trap 21, for one process)."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
import torch
from victim import EPOCHS, Augmented, build, digest, network, start_victim

from ununennium.training import Callback, Preempted, Trainer
from ununennium.training.loading import _leave_signals_to_the_parent

HANDLERS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


class Sends(Callback):
    """Send this process a signal at a place in the run."""

    def __init__(self, number, hook, at, times=1):
        self.number, self.hook, self.at, self.times = number, hook, at, times

    def _maybe(self, hook, trainer, *numbers):
        if (hook, trainer.state.epoch, *numbers) == (self.hook, *self.at):
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
                time.sleep(0)  # the handler runs

    def on_batch_start(self, trainer, batch_idx):
        self._maybe("batch_start", trainer, batch_idx)

    def on_batch_end(self, trainer, batch_idx, logs):
        self._maybe("batch_end", trainer, batch_idx)

    def on_epoch_end(self, trainer, epoch, logs):
        self._maybe("epoch_end", trainer)


def expected_digest(folder, **kwargs):
    random.seed(1), np.random.seed(1)
    trainer = build(folder, seed=3, unseeded=False, **kwargs)
    trainer.fit(EPOCHS)
    return digest(trainer)


def position(folder):
    manifest = json.loads((folder / "last" / "manifest.json").read_text())
    return tuple(manifest["position"].values())


@pytest.mark.parametrize(
    ("hook", "at", "saved"),
    [
        ("batch_start", (1, 5), (1, 8, 6)),  # the window is closed first
        ("batch_end", (1, 7), (1, 8, 6)),
        ("batch_end", (0, 13), (0, 14, 4)),  # the last window of an epoch, before its validation
        ("epoch_end", (2,), (2, 0, 8)),
    ],
)
@pytest.mark.parametrize(
    ("number", "error", "code"),
    [(signal.SIGTERM, Preempted, 143), (signal.SIGUSR1, Preempted, 143), (signal.SIGINT, KeyboardInterrupt, None)],
    ids=["SIGTERM", "SIGUSR1", "Ctrl-C"],
)
def test_it_is_left_between_two_steps_and_nothing_is_lost(tmp_path, hook, at, saved, number, error, code):
    expected = expected_digest(tmp_path / "whole")
    before = [signal.getsignal(n) for n in HANDLERS]
    random.seed(1), np.random.seed(1)
    checkpoints = {"every_n_steps": None}  # nothing but epochs is saved, were it not for the signal
    sends = Sends(number, hook, at, times=3)  # at once, as a group and a launcher may: one request
    first = build(tmp_path / "c", seed=3, unseeded=False, checkpoints=checkpoints, callbacks=[sends])
    with pytest.raises(error) as caught:
        first.fit(EPOCHS)
    assert getattr(caught.value, "code", None) == code
    assert [signal.getsignal(n) for n in HANDLERS] == before
    assert position(tmp_path / "c") == saved
    second = build(tmp_path / "c", checkpoints=checkpoints)
    second.fit(EPOCHS, resume="auto")
    assert digest(second) == expected


def test_left_in_a_validation_it_validates_again_and_trains_nothing_again(tmp_path):
    expected = expected_digest(tmp_path / "whole")

    class SendsInValidation(torch.nn.Sequential):
        seen = 0

        def forward(self, x):
            self.seen += not self.training
            if self.seen == 7:  # of five an epoch
                self.seen += 1
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(x)

    random.seed(1), np.random.seed(1)
    torch.manual_seed(0)
    model = SendsInValidation(*network())
    first = build(tmp_path / "c", seed=3, unseeded=False, model=model, checkpoints={"every_n_steps": None})
    model.load_state_dict(build(tmp_path / "same", unseeded=False).model.state_dict())
    random.seed(1), np.random.seed(1)
    with pytest.raises(Preempted):
        first.fit(EPOCHS)
    assert position(tmp_path / "c") == (1, 14, 8)
    assert first.state.validating
    data = Augmented()
    second = build(tmp_path / "c", data=data, checkpoints={"every_n_steps": None})
    second.fit(EPOCHS, resume="auto")
    assert len(data.loaded) == 2 * len(data)  # the last two epochs
    assert digest(second) == expected


def test_without_a_callback_that_saves_it_leaves_all_the_same():
    class Asks(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            os.kill(os.getpid(), signal.SIGTERM)

    model = torch.nn.Linear(2, 1)
    batches = [(torch.ones(2, 2), torch.ones(2, 1))] * 3
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = Trainer(model, optimizer, torch.nn.MSELoss(), batches, callbacks=[Asks()], progress=False)
    with pytest.raises(Preempted):
        trainer.fit(1)
    assert trainer.state.optimizer_steps == 1


def test_a_handler_that_was_there_before_is_called_after_the_save(tmp_path):
    """Those of schedulers and launchers, which requeue, say."""
    calls = []

    def requeue(number, frame):
        calls.append((number, position(tmp_path)))

    before = signal.signal(signal.SIGUSR1, requeue)
    try:
        trainer = build(tmp_path, callbacks=[Sends(signal.SIGUSR1, "batch_end", (0, 3))])
        with pytest.raises(Preempted):
            trainer.fit(1)
        assert signal.getsignal(signal.SIGUSR1) is requeue
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert calls == [(signal.SIGUSR1, (0, 4, 1))]


def test_a_signal_that_was_ignored_before_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        build(tmp_path, callbacks=[Sends(signal.SIGUSR1, "batch_end", (0, 3))]).fit(1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_last_save_that_fails_is_what_the_user_hears(tmp_path):
    class Full(Callback):
        saves_state = True

        def save(self, trainer):
            raise OSError("disk full")

    trainer = build(tmp_path, callbacks=[Full(), Sends(signal.SIGTERM, "batch_end", (0, 3))])
    with pytest.raises(OSError, match="disk full"):
        trainer.fit(1)
    assert position(tmp_path) == (0, 4, 1)  # the others have saved all the same
    assert trainer._checkpoints.writer._thread is None


@pytest.mark.parametrize("hook", ["on_train_end", "on_epoch_end"])
def test_a_signal_at_the_very_end_is_not_swallowed(tmp_path, hook):
    """Else the script would go on to its tests and exports as if nobody had asked."""

    class Late(Callback):
        pass

    def send(self, trainer, *args):
        if trainer.state.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    setattr(Late, hook, send)
    trainer = build(tmp_path, callbacks=[Late()])
    with pytest.raises(Preempted):
        trainer.fit(1)
    assert position(tmp_path) == (1, 0, 4)


def test_in_another_thread_it_trains_and_leaves_signals_alone(tmp_path):
    trainer = build(tmp_path)
    thread = threading.Thread(target=trainer.fit, args=(1,))
    before = [signal.getsignal(n) for n in HANDLERS]
    thread.start()
    thread.join()
    assert [signal.getsignal(n) for n in HANDLERS] == before
    assert trainer.state.epoch == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_to_the_whole_group_leaves_the_workers_their_work(tmp_path, number, code):
    """As a terminal's Ctrl-C, or a scheduler's signal to every process of a job."""
    victim = start_victim(tmp_path / "c", 2, SECONDS="0.05")
    victim.stdout.readline()
    while not (tmp_path / "c" / "last").exists():
        time.sleep(0.01)
    os.killpg(victim.pid, number)
    _, errors = victim.communicate(timeout=60)
    assert victim.returncode == code, errors
    assert "leaving after this optimizer step" in errors
    assert "worker" not in errors
    first = position(tmp_path / "c")
    assert first[1] % 4 == 0 or first[1] == 14
    out, errors = start_victim(tmp_path / "c", 0).communicate(timeout=60)
    expected, _ = start_victim(tmp_path / "whole", 0).communicate(timeout=60)
    assert json.loads(out.splitlines()[-1]) == json.loads(expected.splitlines()[-1]), errors


def test_a_second_signal_stops_at_once(tmp_path):
    victim = start_victim(tmp_path, 0, SECONDS="30")
    victim.stdout.readline()
    time.sleep(1)
    victim.send_signal(signal.SIGTERM)
    assert "leaving after this optimizer step" in victim.stderr.readline() + victim.stderr.readline()
    time.sleep(1.1)
    victim.send_signal(signal.SIGTERM)
    assert victim.wait(timeout=10) == -signal.SIGTERM
    victim.communicate()


def _worker(ready):
    _leave_signals_to_the_parent()
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS has no sigwaitinfo")
def test_a_worker_is_ended_by_its_parent_and_by_nobody_else():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_worker, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(10)
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0
