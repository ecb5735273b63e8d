"""Averaged weights, the largest batch and the profiler, on a GPU; skipped without one."""

import json

import pytest
import torch
from test_training_on_cuda import NoWaiting, make
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ununennium.training import EMACallback, ProfilerCallback, Trainer, largest_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}])
def test_averaging_waits_for_nothing(options):
    ema = EMACallback()
    trainer = make(callbacks=[ema, NoWaiting()], **options)
    try:
        trainer.fit(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ema.num_averaged == trainer.state.optimizer_steps


def test_the_largest_batch_trains_and_twice_as_much_does_not():
    model = nn.Sequential(nn.Conv2d(3, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 2, 1))
    images = torch.randn(4, 3, 256, 256)
    loader = DataLoader(TensorDataset(images, images.sum(1).gt(0).long()), 1024)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), loader, device="cuda", progress=False)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(4e9 / total)
    try:
        found = largest_batch(trainer)
        held = torch.cuda.memory_allocated()
        less = largest_batch(trainer, limit_bytes=10**9)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert found.batch_size * found.gradient_accumulation_steps == 1024
    assert 1 < less.batch_size < found.batch_size < 1024
    assert held < 10**8


def test_the_trace_has_kernels(tmp_path):
    make(callbacks=[ProfilerCallback(tmp_path, 1, 2)]).fit(1)
    events = json.loads((tmp_path / "trace-0.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert "Self CUDA" in (tmp_path / "trace-0.txt").read_text()
