"""IoU and Dice together from logits, one confusion matrix for both, against torchmetrics' Jaccard index and F1 score.

Compiled as ``Trainer(compile=True)`` does it, once, before the first round.
Logits (4, 10, 512, 512) in float32, with the channels first or last in memory, and a tenth of the pixels ignored.
"""

import torch
from torchmetrics import MetricCollection as Collection
from torchmetrics.classification import MulticlassF1Score, MulticlassJaccardIndex

from _timing import Row, interleaved, main, row
from ununennium.metrics import Dice, IoU, MetricCollection

CLASSES, IGNORED = 10, 255


def measure() -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(4, CLASSES, 512, 512, generator=draw)
    targets = torch.randint(0, CLASSES, (4, 512, 512), generator=draw)
    targets[torch.rand(targets.shape, generator=draw) < 0.1] = IGNORED
    ours = MetricCollection([IoU(CLASSES, ignore_index=IGNORED), Dice(CLASSES, ignore_index=IGNORED)])
    options = {"num_classes": CLASSES, "average": "macro", "ignore_index": IGNORED}
    compiled = MetricCollection([IoU(CLASSES, ignore_index=IGNORED), Dice(CLASSES, ignore_index=IGNORED)])
    compiled.compile()
    theirs = Collection([MulticlassJaccardIndex(**options), MulticlassF1Score(**options)])
    rows = []
    for name, form, limit in (("NCHW", torch.contiguous_format, 0.04), ("channels last", torch.channels_last, 0.10)):
        outputs = logits.to(memory_format=form)
        contenders = {
            f"torchmetrics, {name}": lambda outputs=outputs: theirs.update(outputs, targets),
            f"IoU and Dice, {name}": lambda outputs=outputs: ours.update(outputs, targets),
            f"IoU and Dice, compiled, {name}": lambda outputs=outputs: compiled.update(outputs, targets),
        }
        timings = interleaved(contenders, rounds=15)
        rows.append(row("metrics", f"torchmetrics, {name}", timings))
        rows += [
            row("metrics", own, timings, peer=f"torchmetrics, {name}", limit=limit)
            for own in (f"IoU and Dice, {name}", f"IoU and Dice, compiled, {name}")
        ]
    return rows


if __name__ == "__main__":
    main("metrics", measure)
