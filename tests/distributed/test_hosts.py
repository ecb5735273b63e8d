"""Two hosts, one of them cut off in the middle: training ends on both in bounded time, and started anew the run ends
with the same bits. Hosts are network namespaces joined by a veth pair, with a torchrun agent in each."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ADDRESSES = ["10.77.0.1", "10.77.0.2"]  # inside the namespaces only
LINK, PORT = "veth0", 29400
STEPS = 4 * 6
TIMEOUT = 15  # seconds that a collective waits, instead of gloo's half an hour
BOUND = 60  # seconds from the cut to the end of both training processes, and then to that of the first host's agent

SCRIPT = """
import hashlib, os, random, sys, time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ununennium.training import Callback, CheckpointCallback, LRSchedulerCallback, Trainer

FOLDER, SECONDS = sys.argv[1], float(sys.argv[2])


class Scenes(Dataset):
    def __len__(self):
        return 47

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(12, 16, 16, generator=generator) * (1 + 0.1 * random.random())
        mask = torch.randint(0, 10, (16, 16), generator=generator)
        mask[:, : index % 12] = 255
        return {"image": image, "mask": mask}


class Slow(Callback):
    def on_train_start(self, trainer):
        if trainer.rank == 0:
            print(f"from {trainer.state.optimizer_steps}", flush=True)

    def on_batch_end(self, trainer, batch_idx, logs):
        time.sleep(SECONDS)


dist.init_process_group("gloo", timeout=timedelta(seconds=float(sys.argv[3])))
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(16, 10, 1)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
trainer = Trainer(
    model, optimizer, nn.CrossEntropyLoss(ignore_index=255),
    DataLoader(Scenes(), 2, shuffle=True), DataLoader(Scenes(), 4),
    callbacks=[
        LRSchedulerCallback(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), step_on="batch"),
        CheckpointCallback(FOLDER, monitor="val_iou", every_n_steps=1, keep_last=3),
        Slow(),
    ],
    gradient_accumulation_steps=2, distributed=True, device="cpu", progress=False, seed=1,
)
history = trainer.fit(4, resume="auto")
digest = hashlib.sha256(repr(sorted(history.items())).encode())
for value in [*model.state_dict().values(), *(v for s in optimizer.state.values() for v in s.values())]:
    digest.update(value.numpy().tobytes())
print(f"digest {digest.hexdigest()} after {trainer.state.optimizer_steps} on {trainer.world_size}", flush=True)
dist.destroy_process_group()
"""


def ip(*args):
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


def can_make_namespaces():
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"un{os.getpid()}x"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        ip("netns", "del", name)
    return made


@contextmanager
def two_hosts():
    """Join two namespaces; at the end kill what is left in them, and delete them."""
    hosts = [f"un{os.getpid()}{letter}" for letter in "ab"]
    made = []
    try:
        for host in hosts:
            ip("netns", "add", host)
            made.append(host)
            ip("-n", host, "link", "set", "lo", "up")
        ip("link", "add", LINK, "netns", hosts[0], "type", "veth", "peer", "name", LINK, "netns", hosts[1])
        for host, address in zip(hosts, ADDRESSES, strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", LINK)
            ip("-n", host, "link", "set", LINK, "up")
        yield hosts
    finally:
        for host in made:
            kill_all_in(host)
            ip("netns", "del", host)  # the link goes with it


def processes_in(host, word=""):
    """Return the processes of a host that have a word in their command line, by id."""
    found = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=False)
    commands = {}
    for pid in map(int, found.stdout.split()):
        with suppress(FileNotFoundError, ProcessLookupError):
            commands[pid] = Path(f"/proc/{pid}/cmdline").read_text()
    return [pid for pid, command in commands.items() if word in command]


def kill_all_in(host):
    for pid in processes_in(host):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def training_in(host, script):
    """Return the processes that train, without the agent that has the script among its arguments."""
    return set(processes_in(host, str(script))) - set(processes_in(host, "torch.distributed.run"))


class Run:
    """One start of the run: an agent on each host."""

    def __init__(self, hosts, script, folder, logs, seconds):
        logs.mkdir()
        self.outputs = [logs / address for address in ADDRESSES]
        self.agents = []
        for number, (host, address) in enumerate(zip(hosts, ADDRESSES, strict=True)):
            command = [
                "ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES[0]}:{PORT}",
                f"--rdzv_id={logs.name}", f"--local_addr={address}", "--max_restarts=3",
                f"--rdzv_conf=is_host={int(number == 0)},join_timeout=30,read_timeout=20", str(script), str(folder),
                str(seconds), str(TIMEOUT),
            ]  # fmt: skip
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK}
            with self.outputs[number].open("w") as output:
                agent = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            self.agents.append(agent)

    def wait(self, seconds):
        """Return how the agents ended, and None for one that has not in so many seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(agent.poll() is None for agent in self.agents):
            time.sleep(0.2)
        return [agent.poll() for agent in self.agents]

    def text(self):
        return "\n".join(f"--- {output.name}\n{output.read_text()}" for output in self.outputs)

    def said(self, word):
        """Return what follows a word at the beginning of a line, each time."""
        return [line[len(word) :].strip() for line in self.text().splitlines() if line.startswith(word)]


def steps_saved(folder):
    try:
        return json.loads((folder / "last" / "manifest.json").read_text())["position"]["optimizer_steps"]
    except (FileNotFoundError, KeyError):
        return 0


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_host_that_is_cut_off_ends_the_run_and_a_new_start_goes_on(tmp_path):
    if not can_make_namespaces():
        pytest.skip("two hosts are two network namespaces, which need Linux, root and iproute2")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with two_hosts() as hosts:
        whole = Run(hosts, script, tmp_path / "whole", tmp_path / "never-cut", 0)
        assert whole.wait(120) == [0, 0], whole.text()
        expected = whole.said("digest")
        assert len(expected) == 2
        assert expected[0] == expected[1]
        assert expected[0].endswith(f"after {STEPS} on 2")

        folder = tmp_path / "killed"
        killed = Run(hosts, script, folder, tmp_path / "one-killed", 0.1)
        for number in (1, 2):  # each host's agent counts restarts for itself
            deadline = time.monotonic() + 120
            while steps_saved(folder) < number * STEPS // 3:
                assert time.monotonic() < deadline, killed.text()
                time.sleep(0.05)
            os.kill(min(training_in(hosts[1], script)), signal.SIGKILL)
        assert killed.wait(180) == [0, 0], killed.text()
        assert killed.said("digest") == expected

        folder = tmp_path / "run"
        cut = Run(hosts, script, folder, tmp_path / "cut", 0.25)
        deadline = time.monotonic() + 120
        while steps_saved(folder) < STEPS // 3:
            assert time.monotonic() < deadline, cut.text()
            assert cut.wait(0) == [None, None], cut.text()
            time.sleep(0.05)
        ip("-n", hosts[1], "link", "set", LINK, "down")
        start = time.monotonic()
        while training_in(hosts[1], script) or not cut.said("[rank0]: Traceback"):
            assert time.monotonic() < start + BOUND, cut.text()
            time.sleep(0.2)
        trained = time.monotonic() - start
        cut.agents[0].wait(BOUND)  # it waits for the other host to join anew, and gives up
        print(f"cut after step {steps_saved(folder)}: training ended after {trained:.0f} s,", end=" ")
        print(f"the first agent with {cut.agents[0].returncode} after {time.monotonic() - start:.0f} s,", end=" ")
        print("the other", "waits for its store" if cut.agents[1].poll() is None else "ended, too")
        kill_all_in(hosts[1])  # as a scheduler would: an agent may wait long for the store that it can't reach
        assert 0 not in cut.wait(10), cut.text()
        assert not cut.said("digest")
        saved = steps_saved(folder)
        assert STEPS // 3 <= saved < STEPS

        ip("-n", hosts[1], "link", "set", LINK, "up")
        again = Run(hosts, script, folder, tmp_path / "again", 0)
        assert again.wait(120) == [0, 0], again.text()
        assert again.said("from") == [str(saved)]
        assert again.said("digest") == expected
