"""Previews and the report of several processes: one draws and writes, the others do not wait for it."""

from pathlib import Path

import pytest
import torch
from processes import run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ununennium.training import PreviewCallback, ReportCallback, Trainer


def train(rank, world, folder, distributed, pictures):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(14, 3, 8, 8, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, 3, (14, 8, 8), generator=generator)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)).double()
    loader = DataLoader(TensorDataset(images, masks), batch_size=4 // world, shuffle=True)
    folder = Path(folder) / f"{rank}"
    callbacks = [PreviewCallback(folder / "previews"), ReportCallback(folder / "report.html")] if pictures else []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model, optimizer, nn.CrossEntropyLoss(), loader, loader, callbacks, distributed=distributed, device="cpu",
        seed=2, progress=False,
    )  # fmt: skip
    history = trainer.fit(2)
    written = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) if folder.exists() else []
    report = (folder / "report.html").read_text() if written else ""
    return history, written, report


@pytest.mark.parametrize("distributed", [True, "fsdp"])
def test_one_process_draws_and_nothing_changes(tmp_path, distributed):
    without = run(2, train, tmp_path / "without", tmp_path / "a", distributed, False)
    (history, written, report), (other, nothing, _) = run(
        2, train, tmp_path / "with", tmp_path / "b", distributed, True
    )
    pictures = ["previews/preview-epoch-0001.png", "previews/preview-epoch-0002.png"]
    assert written == ["confusion.png", "curves.png", *pictures, "report.html"]
    assert nothing == []
    assert history == other == without[0][0]
    assert f"{14 * 64:,}" in report  # every target counts once
