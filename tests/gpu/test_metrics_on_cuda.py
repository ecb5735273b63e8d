"""Counting on a GPU; skipped without one."""

import pytest
import torch

from ununennium.metrics import MAE, R2, RMSE, CohenKappa, IoU, MetricCollection

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def of_classes():
    return [IoU(3, ignore_index=255, per_class=True), CohenKappa(3, ignore_index=255)]


def of_numbers():
    return [kind(ignore_value=-9999, channel_names=["a", "b", "c"]) for kind in (MAE, RMSE, R2)]


def batches(make):
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        outputs = torch.randn(4, 3, 32, 32, generator=draw)
        if make is of_classes:
            yield outputs, torch.randint(0, 3, (4, 32, 32), generator=draw)
        else:
            yield outputs, outputs + torch.randn(4, 3, 32, 32, generator=draw)


@pytest.mark.parametrize("make", [of_classes, of_numbers])
def test_counting_does_not_wait_for_the_device_and_counts_what_the_cpu_does(make):
    on_cuda, on_cpu = MetricCollection(make()), MetricCollection(make())
    for number, (outputs, targets) in enumerate(batches(make)):
        targets[0, 0] = 255 if make is of_classes else -9999
        on_cpu.update(outputs, targets)
        outputs, targets = outputs.cuda(), targets.cuda()
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first brings the counts to the device
        try:
            on_cuda.update(outputs, targets)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert on_cuda.compute() == pytest.approx(on_cpu.compute(), rel=1e-12)
