"""DiceLoss, forward and backward, against cross-entropy and the Dice losses of peers on the same logits.

Memory is the greatest sum of what PyTorch's allocator gave and had not got back between the start of the forward
pass and the end of the backward pass, as its profiler records it: the logits' gradient is in it.
"""

from collections.abc import Callable

import torch
from monai.losses import DiceLoss as MonaiDiceLoss
from segmentation_models_pytorch.losses import DiceLoss as SmpDiceLoss
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from _timing import Row, interleaved, main, row
from ununennium.losses import DiceLoss

PART = "losses"
CLASSES, BATCH = 10, 4
LAYOUTS = {
    "float32": (torch.float32, torch.contiguous_format),
    "float32 channels_last": (torch.float32, torch.channels_last),
    "bf16 channels_last": (torch.bfloat16, torch.channels_last),
}
LIMITS = {
    (512, "float32", "DiceLoss"): 1.3,
    (512, "float32", "DiceLoss, compiled"): 0.6,
    (512, "bf16 channels_last", "DiceLoss, compiled"): 0.9,
    (128, "float32", "DiceLoss, compiled"): 1.2,
}
PEER = "cross-entropy"


def contenders() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    compiled = DiceLoss()
    compiled.compile()
    monai = MonaiDiceLoss(softmax=True, to_onehot_y=True)
    return {
        PEER: nn.functional.cross_entropy,
        "DiceLoss": DiceLoss(),
        "DiceLoss, compiled": compiled,
        "smp": SmpDiceLoss("multiclass"),
        "MONAI": lambda logits, targets: monai(logits, targets.unsqueeze(1)),
    }


def batch(size: int, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, CLASSES, size, size, generator=generator).to(dtype).contiguous(memory_format=layout)
    return logits.requires_grad_(), torch.randint(CLASSES, (BATCH, size, size), generator=generator)


def step(loss_fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Callable[[], None]:
    def run() -> None:
        logits.grad = None
        loss_fn(logits, targets).backward()

    return run


def times(size: int, kind: str, rounds: int, budget: float) -> list[Row]:
    logits, targets = batch(size, *LAYOUTS[kind])
    suffix = f" {kind} {size}²"
    timings = interleaved(
        {name + suffix: step(loss_fn, logits, targets) for name, loss_fn in contenders().items()},
        rounds,
        warmup=2,
        budget=budget,
    )
    return [
        row(PART, name, timings, None if name == PEER + suffix else PEER + suffix, limit)
        for name in timings
        for limit in [LIMITS.get((size, kind, name.removesuffix(suffix)))]
    ]


def peak(run: Callable[[], None], logits: Tensor) -> int:
    run()
    logits.grad = None  # else its end is counted, and its beginning was before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def memory() -> list[Row]:
    rows = []
    for kind, form in LAYOUTS.items():
        logits, targets = batch(512, *form)
        for name, loss_fn in contenders().items():
            run = step(loss_fn, logits, targets)
            ratio = peak(run, logits) / logits.nbytes
            limit = 1.25 if name.startswith("DiceLoss") and kind.startswith("float32") else None
            rows.append(Row(PART, f"{name} {kind} memory", ratio, "x logits", None, None, limit, float("nan")))
    return rows


def measure() -> list[Row]:
    """Time and memory of the losses."""
    rows = []
    for size in (512, 128):
        for kind in LAYOUTS:
            rows += times(size, kind, rounds=30 if size == 512 else 150, budget=20)
    return rows + memory()


if __name__ == "__main__":
    main(PART, measure)
