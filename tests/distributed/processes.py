"""Real processes over gloo, forked from the test's own, and torchrun."""

import faulthandler
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch.distributed as dist


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(world, function, folder, *args, limit=120, killed=()):
    """Call ``function(rank, world, *args)`` in so many processes that share a group; return what each gave, by rank.

    One that takes longer than ``limit`` seconds is ended, and fails: with what it was at a little before. Those in
    ``killed`` have to end by SIGKILL, and give None.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    port, children = free_port(), []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        hung = (folder / f"{rank}.hung").open("w")
        faulthandler.dump_traceback_later(0.9 * limit, file=hung)
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(limit)  # nobody else ends a child that hangs
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }  # fmt: skip
            (folder / f"{rank}").write_bytes(pickle.dumps(function(rank, world, *args)))
            if dist.is_initialized():
                dist.destroy_process_group()
            status = 0
        except BaseException:
            (folder / f"{rank}").write_bytes(pickle.dumps(traceback.format_exc()))
        finally:
            os._exit(status)
    results = []
    failed = []
    for rank, child in enumerate(children):
        _, status = os.waitpid(child, 0)
        result = pickle.loads((folder / f"{rank}").read_bytes()) if (folder / f"{rank}").exists() else None
        results.append(result)
        if status != (signal.SIGKILL if rank in killed else 0):
            failed.append(f"process {rank} ended with {status}:\n{result}\n{(folder / f'{rank}.hung').read_text()}")
    assert not failed, "\n".join(failed)
    return results


def torchrun(script, *args, world=2, options=(), **environment):
    """Start a script with torchrun, in a process group of its own."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--master_addr=127.0.0.1",
            f"--master_port={free_port()}", *options, str(script), *map(str, args),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )  # fmt: skip


def watch_collectives(names, seen):
    """Have ``seen()`` called with every call of these functions of torch.distributed."""

    def watched(function):
        def call(*args, **kwargs):
            seen()
            return function(*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, watched(getattr(dist, name)))
