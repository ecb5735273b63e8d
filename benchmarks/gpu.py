"""Steps of a U-Net ResNet-50 on one CUDA GPU: the specification's own call against peers, and against a loop by hand.

Twelve bands, ten classes, 512², batches of 16, bf16, AdamW; batches lie on the device, so that no data loader counts.
An epoch of 24 steps trains, then validates 2 batches and writes the best and the last checkpoint. Images a second are
of the steps alone, timed by the device from the third to the last one. The share of the matrix peak takes the
convolutions' operations as PyTorch counts them over the peak for dense bf16. Peers' memory is what PyTorch's allocator
had given at most. For the loss and the confusion matrix, the bytes that must at least be moved over the bandwidth.

``--device cpu --small`` tries all of it on a CPU, with figures that mean nothing.
"""

import argparse
import gc
import inspect
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from _contenders import HandTuned, Levers, Lightning, OurTrainer, Setting, TorchGeo, network, prepared
from _timing import Row, Timing, main

PART, ROUNDS, LIMIT = "gpu", 3, 1.05
LARGE = Setting(encoder="resnet50", side=512, batch=16, train=24 * 16, val=2 * 16, device="cuda", on_device=True)
SMALL = Setting(encoder="resnet18", side=64, batch=2, train=6 * 2, val=2 * 2, device="cpu", on_device=True)
BF16_PEAK = {"H100": 989e12, "H200": 989e12}  # dense, of the SXM boards
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}
SKIPPED = 2  # steps at the beginning of an epoch, which are not timed


class Steps:
    """Notes when each training batch is asked for: on the device's own clock where it has one."""

    def __init__(self, device: str) -> None:
        self.device, self.marks = device, []

    def watch(self, loader: Any) -> None:
        """Have a loader's dataset tell of the batches that it gives."""
        dataset, get = loader.dataset, type(loader.dataset).__getitem__
        steps = self

        class Watched(type(dataset)):
            def __getitem__(self, index: int) -> Any:
                steps.mark()
                return get(self, index)

        dataset.__class__ = Watched

    def mark(self) -> None:
        if self.device != "cuda":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def take(self) -> float:
        """Return the mean seconds of a step, and forget them."""
        marks, self.marks = self.marks[SKIPPED:], []
        if self.device != "cuda":
            return (marks[-1] - marks[0]) / (len(marks) - 1)
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[-1]) / 1e3 / (len(marks) - 1)


def contenders(setting: Setting, compiled: bool) -> dict[str, tuple[type, dict[str, Any]]]:
    found: dict[str, tuple[type, dict[str, Any]]] = {
        HandTuned.title: (HandTuned, {}),
        OurTrainer.title: (OurTrainer, {}),
    }
    if compiled:
        found[f"{HandTuned.title}, compiled"] = HandTuned, {"levers": Levers(compile=True)}
        if "compile" in trainers_parameters():
            found[f"{OurTrainer.title}, compile=True"] = OurTrainer, {"compile": True}
    return found | {Lightning.title: (Lightning, {}), TorchGeo.title: (TorchGeo, {})}


def trainers_parameters() -> set[str]:
    from ununennium.training import Trainer

    return set(inspect.signature(Trainer).parameters)


def train_loader(run: Any) -> Any:
    return run.trainer.train_loader if isinstance(run, OurTrainer) else run.loaders[0]


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def training(setting: Setting, flops: float, peak: float | None, compiled: bool) -> list[Row]:
    """Compare steps, whole epochs and memory; a contender has the device for itself, and they take turns."""
    steps: dict[str, list[float]] = {}
    epochs: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    for _ in range(ROUNDS):
        for title, (make, options) in contenders(setting, compiled).items():
            free(setting.device)
            with tempfile.TemporaryDirectory() as folder:
                watch = Steps(setting.device)
                run = prepared(make, setting, Path(folder) / "run", **options)
                watch.watch(train_loader(run))
                run()  # compiles, chooses algorithms
                watch.marks.clear()
                start = time.perf_counter()
                run()
                if setting.device == "cuda":
                    torch.cuda.synchronize()
                    memory[title] = torch.cuda.max_memory_allocated() / 1e6
                epochs.setdefault(title, []).append(time.perf_counter() - start)
                steps.setdefault(title, []).append(watch.take())
                del run
    peer = HandTuned.title
    limits = {OurTrainer.title: LIMIT}
    rows = []
    for title, seconds in steps.items():
        timing, theirs = Timing.of(seconds), min(steps[peer])
        rate = setting.batch / timing.minimum
        rows += [
            Row(
                PART,
                f"{title}: images",
                rate,
                "images/s",
                *compared(title, theirs / timing.minimum),
                timing.spread,
                True,
            ),
            versus(f"{title}: a step", timing, 1e3, "ms", title, theirs, limits.get(title)),
            versus(f"{title}: an epoch", Timing.of(epochs[title]), 1e3, "ms", title, min(epochs[peer])),
        ]
        if peak is not None:
            share = flops / timing.minimum / peak * 100
            rows.append(Row(PART, f"{title}: share of the matrix peak", share, "%", None, None, None, None, True))
        if title in memory:
            rows.append(
                Row(
                    PART,
                    f"{title}: peak memory",
                    memory[title],
                    "MB",
                    *compared(title, memory[title] / memory[peer]),
                    None,
                )
            )
    return rows


def compared(title: str, ratio: float, limit: float | None = None) -> tuple[str | None, float | None, float | None]:
    return (None, None, None) if title == HandTuned.title else (HandTuned.title, ratio, limit)


def versus(
    name: str, own: Timing, scale: float, unit: str, title: str, theirs: float, limit: float | None = None
) -> Row:
    return Row(PART, name, own.minimum * scale, unit, *compared(title, own.minimum / theirs, limit), own.spread)


def operations(setting: Setting) -> float:
    """Count the operations of a step, forward and back."""
    model = network(setting._replace(device="meta")) if setting.device == "cuda" else network(setting)
    images = torch.randn(
        setting.batch, setting.bands, setting.side, setting.side, device=next(model.parameters()).device
    )
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return float(counter.get_total_flops())


def synchronisations(setting: Setting) -> Row:
    """Tell whether the host waited for the device in a step: the first time is an error, and ends the run."""
    from ununennium.training import Callback

    def forbid(on: bool) -> None:
        if setting.device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if on else "default")

    class Guard(Callback):
        active = False

        def on_batch_end(self, trainer: Any, batch_idx: int, logs: Any) -> None:
            # Between the first steps, at whose end the checkpoint's memory is made, and the epoch's end.
            forbid(self.active and SKIPPED <= batch_idx < setting.train // setting.batch - 1)

    guard, waits = Guard(), 0
    with tempfile.TemporaryDirectory() as folder:
        run = prepared(OurTrainer, setting, Path(folder) / "run", watching=[guard])
        run()  # what waits once, waits now
        guard.active = True
        try:
            run()
        except Exception as error:
            forbid(False)
            if not any("synchroniz" in str(cause) for cause in (error, error.__cause__)):
                raise
            waits = 1
            traceback.print_exception(error)
        forbid(False)
    limit = 0 if setting.device == "cuda" else None  # a CPU never waits: that would be kept by nothing
    return Row(
        PART, "waits of the host for the device in steps (ends at the first)", waits, "", None, None, limit, None
    )


def seconds_on(device: str, run: Callable[[], object], calls: int = 20) -> Timing:
    """Time a call, on the device's clock where it has one."""
    for _ in range(3):
        run()
    rounds = []
    for _ in range(5):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                run()
            end.record()
            torch.cuda.synchronize()
            rounds.append(start.elapsed_time(end) / 1e3 / calls)
        else:
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            rounds.append((time.perf_counter() - begin) / calls)
    return Timing.of(rounds)


def kernels(setting: Setting, bandwidth: float | None) -> list[Row]:
    """Time the loss, forward and back, and the confusion matrix, against the bytes that they have to read and write."""
    from ununennium.losses import DiceLoss
    from ununennium.metrics import ConfusionMatrix

    shape = setting.batch, setting.classes, setting.side, setting.side
    logits = torch.randn(shape, device=setting.device, dtype=torch.bfloat16)
    logits = logits.to(memory_format=torch.channels_last).requires_grad_()
    masks = torch.randint(0, setting.classes, (shape[0], *shape[2:]), device=setting.device)
    loss_fn, matrix = DiceLoss(), ConfusionMatrix(setting.classes)

    def loss() -> None:
        logits.grad = None
        loss_fn(logits, masks).backward()

    def confusion() -> None:
        matrix.update(logits.detach(), masks)

    # Logits and masks are read forward and, for the gradient, again; the gradient is written.
    moved = {"DiceLoss, forward and back": (loss, 2 * (logits.nbytes + masks.nbytes) + logits.nbytes)}
    moved["ConfusionMatrix.update"] = confusion, logits.nbytes + masks.nbytes
    rows = []
    for name, (run, size) in moved.items():
        timing = seconds_on(setting.device, run)
        least = None if bandwidth is None else timing.minimum / (size / bandwidth)
        peer = None if least is None else "its bytes over the bandwidth"
        rows.append(Row(PART, name, timing.minimum * 1e6, "µs", peer, least, None, timing.spread))
    return rows


def of_board(table: dict[str, float], device: str) -> float | None:
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((value for board, value in table.items() if board in name), None)


def measure(device: str = "cuda", small: bool = False, compiled: bool = True) -> list[Row]:
    setting = (SMALL if small else LARGE)._replace(device=device)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True  # for all
        torch.set_float32_matmul_precision("high")
    warnings.simplefilter("ignore")
    flops = operations(setting)
    rows = [Row(PART, "operations of a step", flops / 1e12, "TFLOP", None, None, None, None)]
    rows += kernels(setting, of_board(BANDWIDTH, device))
    rows.append(synchronisations(setting))
    return rows + training(setting, flops, of_board(BF16_PEAK, device), compiled)


def options() -> tuple[dict[str, Any], list[str]]:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--eager", action="store_true", help="nothing compiled, which takes minutes")
    own, rest = parser.parse_known_args()
    return {"device": own.device, "small": own.small, "compiled": not own.eager}, rest


if __name__ == "__main__":
    chosen, others = options()
    if chosen["device"] == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here: try --device cpu --small --eager")
    main(PART, lambda: measure(**chosen), arguments=others)
