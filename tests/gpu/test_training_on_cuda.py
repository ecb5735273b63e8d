"""What only a GPU shows; skipped without one."""

import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ununennium.training import Callback, CheckpointCallback, Trainer
from ununennium.training.loading import EpochLoader
from ununennium.training.transfer import Transfer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def data(samples=16):
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, 32, 32, generator=draw)
    return TensorDataset(images, (images.sum(1) > 0).long())


def make(device="cuda", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 2, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = DataLoader(data(), 4, shuffle=True, pin_memory=device == "cuda")
    return Trainer(
        model, optimizer, nn.CrossEntropyLoss(), loader, loader, device=device, seed=0, progress=False, **options
    )  # fmt: skip


class NoWaiting(Callback):
    """Have CUDA raise when the host waits for the device, from one batch's beginning to its end."""

    def on_batch_start(self, trainer, batch_idx):
        torch.cuda.set_sync_debug_mode("error")

    def on_batch_end(self, trainer, batch_idx, logs):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}])
def test_no_step_waits_for_the_device(options):
    trainer = make(callbacks=[NoWaiting()], **options)
    try:
        assert trainer.fit(2)["train_loss"][-1] > 0
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_losses_are_those_of_the_cpu():
    assert make().fit(2)["train_loss"] == pytest.approx(make("cpu").fit(2)["train_loss"], rel=1e-3)


def test_a_run_left_inside_an_epoch_ends_with_the_same_bits(tmp_path):
    whole = make(callbacks=[CheckpointCallback(tmp_path / "c", every_n_steps=1, keep_last=20)])
    whole.fit(2)
    checkpoint = sorted((tmp_path / "c").glob("step-*"))[2]
    again = make(callbacks=[CheckpointCallback(tmp_path / "d", every_n_steps=1, keep_last=20)])
    again.fit(2, resume=checkpoint)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
from test_training_on_cuda import NoWaiting, make

distributed = "fsdp" if sys.argv[1] == "fsdp" else True
history = make(distributed=distributed, mixed_precision="bf16").fit(2)
print("losses", *history["train_loss"])
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_world_of_one_under_torchrun_with_nccl_gives_what_one_process_gives(tmp_path, request, kind):
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    folder = str(request.path.parent)
    found = subprocess.run(
        [*command, str(tmp_path / "train.py"), kind, folder], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    losses = [
        float(word) for line in found.stdout.splitlines() if line.startswith("losses") for word in line.split()[1:]
    ]
    assert losses == pytest.approx(make(mixed_precision="bf16").fit(2)["train_loss"], rel=1e-2)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_from_pinned_memory_whatever_the_loader_says(workers):
    loader = DataLoader(data(), 4, num_workers=workers)
    batches = EpochLoader(loader, 0, pins=True).epoch(1, 0)
    assert all(tensor.is_pinned() for loaded in batches for tensor in loaded.batch)
    assert not loader.pin_memory


def test_batches_that_are_copied_beside_the_computation_arrive_whole():
    transfer = Transfer(torch.device("cuda"))
    images = torch.arange(2**22, dtype=torch.float32).pin_memory()
    weights = torch.randn(2048, 2048, device="cuda")
    for number in range(30):
        for _ in range(4):
            weights = (weights @ weights).clamp(-1, 1)  # the device has more to do than the host
        moved = transfer({"image": images + number, "more": [images[:7]]})
        assert torch.equal(moved["image"].cpu(), images + number)
        assert moved["more"][0].is_cuda


def test_a_device_that_is_kept_waiting_is_seen():
    class Slow(TensorDataset):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    trainer = make()
    trainer._train_batches.loader.dataset.__class__ = Slow
    trainer.fit(1)
    assert trainer.speed.data_wait > 0.3


def test_compiled_the_losses_are_the_same():
    assert make(compile=True).fit(2)["train_loss"] == pytest.approx(make().fit(2)["train_loss"], rel=1e-2)
