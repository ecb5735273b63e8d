"""Killed and begun again, in as many processes as before or in others, a run goes on as if nothing had happened."""

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from processes import free_port, run, torchrun
from safetensors.torch import load_file
from torch.distributed import TCPStore
from victim_ddp import EPOCHS, Exact, build, exact_network, network, train

from ununennium.training import Callback, Preempted
from ununennium.training.distributed import _name_of_start

SCRIPT = Path(__file__).with_name("victim_ddp.py")


def checkpoints_in(folder):
    return sorted((p for p in folder.glob("step-*")), key=lambda p: p.name.split("-")[2])


def position(checkpoint):
    return tuple(json.loads((checkpoint / "manifest.json").read_text())["position"].values())


# Killed, and begun again by torchrun


def run_killed(folder, kills, draw):
    """Train under torchrun, which starts the group again after every kill; return digests by rank."""
    agent = torchrun(SCRIPT, folder, options=["--max-restarts=3"], SECONDS="0.05")
    digests, pids, met = {}, {}, 0
    with agent, (folder.parent / f"{folder.name}-errors").open("w+") as errors:
        drain = threading.Thread(target=shutil.copyfileobj, args=(agent.stderr, errors))
        drain.start()
        try:
            for line in agent.stdout:
                if line.startswith("started"):
                    _, rank, pid = line.split()
                    pids[int(rank)] = int(pid)
                elif line.startswith("{"):
                    found = json.loads(line)
                    digests[found["rank"]] = found["digest"]
                if len(pids) == 2 and met < kills:
                    time.sleep(draw.uniform(0, 1))  # it trains for a second or so
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pids[draw.randrange(2)], signal.SIGKILL)
                        met += 1
                    pids = {}
            code = agent.wait(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            drain.join()
        errors.seek(0)
        assert code == 0, errors.read()
    return [digests[0], digests[1]], met


def test_killed_processes_are_started_again_by_torchrun_and_end_with_the_same_bits(tmp_path):
    killed_by_chance(tmp_path, kills=2)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_fifty_times_under_torchrun(tmp_path):
    killed_by_chance(tmp_path, kills=50)


def killed_by_chance(tmp_path, kills):
    draw = random.Random(kills)
    expected = run(2, train, tmp_path / "p", tmp_path / "whole")
    met = 0
    while met < kills:
        found, killed = run_killed(tmp_path / f"{met}", min(kills - met, 3), draw)
        assert found == expected
        met += max(killed, 1)


def resumed_from_each(rank, world, folder, checkpoints):
    return [train(rank, world, folder / f"{n}", checkpoint, start=n + 9) for n, checkpoint in enumerate(checkpoints)]


def whole(rank, world, folder):
    return train(rank, world, folder, checkpoints={"keep_last": 1000})


def test_every_checkpoint_leads_to_the_same_bits(tmp_path):
    expected = run(2, whole, tmp_path / "p", tmp_path / "whole")
    assert expected[0] != expected[1]  # each has random states of its own
    checkpoints = checkpoints_in(tmp_path / "whole")
    assert len(checkpoints) == EPOCHS * 4
    found = run(2, resumed_from_each, tmp_path / "r", tmp_path, checkpoints)
    for rank in range(2):
        assert found[rank] == [expected[rank]] * len(checkpoints)


@pytest.mark.parametrize("forgotten", ["random", "figures"])
def test_what_another_process_had_is_compared(tmp_path, forgotten):
    """The control: a checkpoint without the second process's part ends elsewhere."""
    from ununennium.training import checkpoint as package

    expected = run(2, whole, tmp_path / "p", tmp_path / "whole")
    contents = package.read(checkpoints_in(tmp_path / "whole")[1])
    if forgotten == "random":
        contents.training["others"][0]["random"] = contents.training["random"]
    else:
        contents.training["others"][0]["figures"] = contents.training["figures"]
    package.write(tmp_path / "less", contents)
    assert run(2, resumed_from_each, tmp_path / "r", tmp_path, [tmp_path / "less"]) != [[e] for e in expected]


def begun(rank, world, port, starts):
    """Begin so many times on one store, as torchrun lets its processes; in the first, one is gone too soon."""
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    names = []
    for start in range(starts):
        if start == 0 and rank == world - 1:
            continue
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(start * rank)  # each host counts for itself
        if start == 0:
            if rank:  # process 0 waits for the one that is gone, and is ended
                store.set(f"call/{rank}", "of one that is gone")
            continue
        time.sleep(0.05 * ((rank + start) % world))
        names.append(_name_of_start(store, rank, world))
    return names


def test_processes_that_start_again_on_one_store_never_meet_those_of_an_earlier_start(tmp_path):
    server = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    names = run(3, begun, tmp_path, server.port, 4, limit=60)
    assert names[0] == names[1] == names[2]
    assert len(set(names[0])) == 3


# In other numbers of processes


class Leaves(Callback):
    """Have process 0 told to leave, so many optimizer steps into the run, or at the end of an epoch."""

    def __init__(self, step=None, epoch=None):
        self.step, self.epoch = step, epoch

    def on_batch_start(self, trainer, batch_idx):
        if trainer.rank == 0 and trainer.state.optimizer_steps + 1 == self.step and not trainer.state.open_batches:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_epoch_end(self, trainer, epoch, logs):
        if trainer.rank == 0 and epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGTERM)


def part(rank, world, folder, leaves, wrap=None):
    """Train on until it is to leave; return weights and history."""
    start = 7 if (folder / "last").exists() else 0  # other weights than those that it is to go on from
    model = exact_network(start)
    model = wrap(model) if wrap is not None else model
    trainer = build(
        folder, world, data=Exact(25), val_data=Exact(7), model=model, callbacks=[Leaves(**leaves)], start=start,
        checkpoints={"every_n_steps": None},
    )  # fmt: skip
    with contextlib.suppress(Preempted):
        trainer.fit(EPOCHS, resume="auto")
    weights = {name.replace("_orig_mod.", ""): value.clone() for name, value in model.state_dict().items()}
    return weights, trainer.history, trainer.state.optimizer_steps


def assert_same(found, expected):
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-10)
    assert found[1].keys() == expected[1].keys()
    for name, values in expected[1].items():
        assert found[1][name] == pytest.approx(values, rel=1e-9, abs=1e-9), name
    assert found[2] == expected[2]


@pytest.mark.parametrize("worlds", [(2, 1, 3), (3, 2, 1), (1, 3, 2)], ids=str)
@pytest.mark.parametrize(
    "places",
    [
        ({"step": 1}, {"step": 5}),  # inside the first epoch, inside the second
        ({"epoch": 0}, {"epoch": 1}),
        ({"step": 4}, {"step": 5}),  # twice inside one epoch
    ],
    ids=["inside", "between", "twice inside"],
)
def test_it_goes_on_in_another_number_of_processes(tmp_path, worlds, places):
    expected = run(1, part, tmp_path / "e", tmp_path / "whole", {})[0]
    assert expected[2] == 9
    for number, (world, place) in enumerate(zip(worlds, [*places, {}], strict=True)):
        results = run(world, part, tmp_path / f"{number}", tmp_path / "c", place)
        steps = place.get("step", 3 * (place.get("epoch", 2) + 1))
        assert [steps] * world == [result[2] for result in results]
    for result in results:
        assert_same(result, expected)


def compiled(model):
    model[0] = torch.compile(model[0], backend="eager")  # a part, and the whole
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wraps", [(None, None), (compiled, None), (None, compiled)], ids=["plain", "to", "from"])
@pytest.mark.parametrize("worlds", [(2, 1), (1, 2)], ids=str)
def test_checkpoints_have_the_models_own_names_whoever_wrapped_it(tmp_path, worlds, wraps):
    """Trap 22: neither DistributedDataParallel nor torch.compile shows in them."""
    expected = run(1, part, tmp_path / "e", tmp_path / "whole", {})[0]
    run(worlds[0], part, tmp_path / "a", tmp_path / "c", {"step": 4}, wraps[0])
    weights = load_file(tmp_path / "c" / "last" / "model.safetensors")
    exact_network().load_state_dict(weights, strict=True)
    for result in run(worlds[1], part, tmp_path / "b", tmp_path / "c", {}, wraps[1]):
        assert_same(result, expected)


def weights_alone(rank, world, path):
    trainer = build(None, world, model=network(), start=5)
    trainer.load_weights(path)
    return dict(trainer.model.state_dict())


def test_weights_are_taken_over_alone_in_any_number_of_processes(tmp_path):
    run(2, train, tmp_path / "a", tmp_path / "c")
    path = tmp_path / "c" / "last"
    expected = load_file(path / "model.safetensors")
    for world in (1, 3):
        for weights in run(world, weights_alone, tmp_path / f"{world}", path):
            assert weights.keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in weights.items())
