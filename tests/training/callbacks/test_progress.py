"""What a user sees while it runs."""

import io
import os
import pty
import re
import subprocess
import sys
import termios
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ununennium.training import Callback, CheckpointCallback, EarlyStoppingCallback, Trainer
from ununennium.training.callbacks import progress
from ununennium.training.callbacks.progress import ProgressCallback, _fitting, _number, _rate
from ununennium.training.speed import Speed

SCRIPT = textwrap.dedent("""
    import torch, time
    from ununennium.training import Trainer
    class Slow(Trainer):
        def compute_loss(self, batch):
            time.sleep(0.06)
            return super().compute_loss(batch)
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    batches = [(torch.ones(2, 2), torch.ones(2, 1))] * 10
    Slow(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.MSELoss(), batches, device="cpu").fit(2)
""")
VALIDATES = SCRIPT.replace('batches, device="cpu"', 'batches, batches, device="cpu"')


def test_a_table_without_a_terminal_and_nothing_else():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert re.fullmatch(r"seed \d+", lines[0])
    assert lines[1].split() == ["epoch", "train_loss", "lr", "chips/s", "wait", "time"]
    assert re.fullmatch(r" +1/2 +\d\.\d{4} 1\.0e-01 +\d+\.\d +\d+% +\d+\.\ds \*", lines[2])
    assert [line.split()[0] for line in lines[2:4]] == ["1/2", "2/2"]
    assert re.fullmatch(r"best train_loss \S+ in epoch 2", lines[4])
    assert len(lines) == 5
    assert run.stderr == ""


def shown_on_a_terminal(script, columns=100):
    """Run a script on a pseudo-terminal; return its exit status and all that it wrote."""
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, columns))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=side, stderr=side)
    os.close(side)
    chunks = []
    try:
        while chunk := os.read(main, 4096):
            chunks.append(chunk)
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(main)
    return process.wait(), b"".join(chunks).decode()


def test_a_bar_with_loss_rate_and_chips_on_a_terminal():
    status, text = shown_on_a_terminal(VALIDATES)
    assert status == 0
    assert re.search(r"epoch 1/2: +\d+%\|", text)
    bars = re.findall(r"loss \S+ lr 1\.0e-01 (\d+\.\d) chips/s", text)
    assert bars
    assert all(0 < float(rate) < 2 / 0.06 for rate in bars)
    assert "epoch 2/2, validating: 100%" in text
    assert len(re.findall(r"(?m)^.*? \d/2 +\S+ +\S+ +1\.0e-01", text)) == 2


def test_a_bar_over_a_loader_without_a_length():
    script = SCRIPT.replace("batches = [", "rows = [").replace("Slow(model", "batches = iter([])\nSlow(model")
    script = script.replace(
        "batches = iter([])",
        "class Stream:\n    def __iter__(self):\n        return iter(rows)\nbatches = Stream()",
    )
    status, text = shown_on_a_terminal(script)
    assert status == 0
    assert re.search(r"epoch 1/2: .*\d/\? \[.*loss \S+ lr", text)


@pytest.mark.parametrize(("columns", "shown"), [(80, False), (140, True)])
def test_the_table_fits_the_terminal(columns, shown):
    script = VALIDATES.replace("torch.nn.Linear(2, 1)", "torch.nn.Linear(2, 3)").replace("torch.nn.MSELoss", "Loss")
    script = script.replace("torch.ones(2, 1)", "torch.zeros(2).long()")
    script = script.replace("class Slow", "Loss = torch.nn.CrossEntropyLoss\nclass Slow").replace("0.06", "0.01")
    _, text = shown_on_a_terminal(script, columns)
    lines = [line for line in re.split(r"[\r\n]+", text) if "train_loss" in line or re.match(r" *\d/2 ", line)]
    assert len(lines) == 3
    assert all(len(line) < columns for line in lines)
    assert ("train_dice" in lines[0]) == shown
    assert {"epoch", "train_loss", "val_loss", "val_iou", "wait", "time"} <= set(lines[0].split())


def test_columns_give_way_in_order():
    names = ["epoch", "train_loss", "val_loss", "train_iou", "val_iou", "val_f1", "lr", "chips/s", "wait", "time"]
    widths = dict.fromkeys(names, 9)
    needed = ["epoch", "train_loss", "val_loss", "time", "val_f1"]
    assert _fitting(widths, needed, None) == names
    assert _fitting(widths, needed, 10 * 10 + 1) == names
    gone = []
    for room in range(100, 40, -10):
        shown = _fitting(widths, needed, room)
        gone += [name for name in names if name not in shown and name not in gone]
    assert gone == ["train_iou", "lr", "val_iou", "chips/s", "wait"]
    assert _fitting(widths, needed, 10) == [name for name in names if name in needed]  # never less


def test_numbers_are_short_whatever_their_size():
    assert [_number(x) for x in (0.0, 0.12345, 12.0, 1e-7, 123456.0, float("nan"))] == [
        "0.0000", "0.1235", "12.0000", "1e-07", "1.23e+05", "nan",
    ]  # fmt: skip
    assert [_rate(x) for x in (0.5, 99.94, 12345.6)] == ["0.5", "99.9", "12,346"]


def test_an_error_begins_on_a_line_of_its_own():
    status, text = shown_on_a_terminal(SCRIPT.replace("time.sleep(0.06)", "time.sleep(0.06); batch[2]"))
    assert status == 1
    before = text[: text.index("Traceback")]
    assert "epoch 1/2" in before
    assert before[-1] in "\r\n"


def test_silence(scripted, capsys, tmp_path):
    scripted([1.0], [CheckpointCallback(tmp_path, "figure")]).fit(1)
    assert capsys.readouterr() == ("", "")


def rows(out):
    """Return the rows of a table as (cells by column, whether it has a star)."""
    lines = out.splitlines()
    head = next(line for line in lines if line.split()[:1] == ["epoch"]).split()
    cells = [line.split() for line in lines if re.match(r" *\d+/\d+ ", line)]
    return [(dict(zip(head, row, strict=False)), row[-1] == "*") for row in cells]


@pytest.mark.parametrize(
    ("make", "stars", "best"),
    [
        (lambda path: [CheckpointCallback(path, "figure", "max")], [1, 0, 1, 0], "best figure 0.9000 in epoch 3"),
        (lambda path: [CheckpointCallback(path, "figure")], [1, 1, 0, 0], "best figure 0.3000 in epoch 2"),
        (lambda path: [EarlyStoppingCallback("figure", mode="max")], [1, 0, 1, 0], "best figure 0.9000 in epoch 3"),
        (lambda path: [], [1, 1, 1, 1], "best train_loss"),
    ],
    ids=["max", "min", "without a CheckpointCallback", "nothing monitored"],
)
def test_the_best_epoch_by_then_has_a_star(scripted, capsys, tmp_path, make, stars, best):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)  # the loss falls
    figures = [0.5, 0.3, 0.9, float("nan")]
    scripted(figures, [*make(tmp_path), ProgressCallback()], model=model, optimizer=optimizer).fit(4)
    out = capsys.readouterr().out
    assert [star for _, star in rows(out)] == [bool(star) for star in stars]
    assert out.splitlines()[-1].startswith(best)


def test_a_resumed_run_knows_the_best_of_before(scripted, capsys, tmp_path):
    def callbacks():
        return [CheckpointCallback(tmp_path, "figure", "max"), ProgressCallback()]

    scripted([0.9, 0.1, 0.1], callbacks()).fit(1)
    capsys.readouterr()
    scripted([0.9, 0.5, 0.95], callbacks()).fit(3, resume="auto")
    out = capsys.readouterr().out
    assert [star for _, star in rows(out)] == [False, True]
    assert out.splitlines()[-1] == "best figure 0.9500 in epoch 3"


class SlowData(Dataset):
    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return torch.ones(2), torch.ones(1)


def trained(loader, capsys, epochs=2, callbacks=()):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.MSELoss(), loader, callbacks=callbacks, device="cpu", seed=1)
    trainer.fit(epochs)
    return capsys.readouterr().out


def test_waiting_for_data_is_told_once_with_what_to_change(capsys):
    out = trained(DataLoader(SlowData(0.3), 2), capsys)
    advice = [line for line in out.splitlines() if "waiting for data" in line]
    assert len(advice) == 1
    assert re.fullmatch(
        r"waiting for data took \d+% of epoch 1: give the training DataLoader num_workers=\d \(it has 0\)",
        advice[0],
    )
    assert all(int(cells["wait"][:-1]) > 30 for cells, _ in rows(out))
    assert all(0 < float(cells["chips/s"]) < 3.4 for cells, _ in rows(out))


class Pretends(Callback):
    """Puts a speed in place of the measured one."""

    def __init__(self, *speed):
        self.speed = Speed(*speed)

    def on_epoch_end(self, trainer, epoch, logs):
        trainer.speed = self.speed


@pytest.mark.parametrize(
    ("speed", "told"),
    [((10, 10.0, 3.1), True), ((10, 10.0, 2.9), False), ((10, 1.0, 0.9), False), ((10, 1.2, 1.1), True)],
    ids=["more than 30 %", "less", "not a second", "just a second"],
)
def test_only_waiting_that_matters_is_told(capsys, speed, told):
    loader = DataLoader(TensorDataset(torch.ones(4, 2), torch.ones(4, 1)), 2)
    assert ("waiting for data" in trained(loader, capsys, callbacks=[Pretends(*speed)])) == told


@pytest.mark.parametrize(
    ("workers", "remedy"),
    [
        (0, "give the training DataLoader num_workers=4 (it has 0)"),
        (2, "raise num_workers (2 of 8 cores), or store chips to be read faster (tiled, ZSTD or LZ4, local disk)"),
        (8, "store chips to be read faster (tiled, ZSTD or LZ4, local disk); num_workers=8 takes all 8 cores"),
        (None, "prepare the training batches in the background, as a DataLoader with num_workers does"),
    ],
)
def test_the_remedy_fits_the_loader(workers, remedy):
    loader = [] if workers is None else SimpleNamespace(num_workers=workers)
    line = progress._advice(Speed(1, 4.0, 2.0), 4, loader, cores=8)
    assert line == f"waiting for data took 50% of epoch 5: {remedy}"


def test_in_a_notebook_the_bar_is_its_widget(monkeypatch, scripted):
    import tqdm.auto

    made = []

    class tqdm_notebook:  # noqa: N801
        disable = False
        desc = ""

        def __init__(self, **options):
            made.append(options)

        def update(self, n):
            pass

        set_postfix_str = set_description = set_description_str = close = lambda self, *a, **k: None

    monkeypatch.setattr(tqdm.auto, "tqdm", tqdm_notebook)
    scripted([1.0], [ProgressCallback()]).fit(1)
    assert made[0]["disable"] is False


def test_the_bar_costs_a_look_at_the_clock_between_two_drawings(monkeypatch, scripted):
    """All batches are on the bar in the end, and it was told of few of them."""
    import tqdm.auto

    told = []

    class Watched(tqdm.auto.tqdm):
        def __init__(self, **options):
            super().__init__(**{**options, "disable": False, "file": io.StringIO()})

        def update(self, n=1):
            told.append(n)
            return super().update(n)

    monkeypatch.setattr(tqdm.auto, "tqdm", Watched)
    batches = [(torch.zeros(2, 2), torch.zeros(2, 1))] * 200
    trainer = scripted([1.0], [ProgressCallback()], batches=batches, val_loader=batches[:1])
    trainer.optimizer.param_groups[0]["lr"] = 0.01
    trainer.fit(1)
    assert sum(told) == 200
    assert len(told) < 100


def test_a_run_that_goes_on_says_where_and_one_that_is_finished_says_so(tmp_path, capsys):
    for epochs in (1, 2, 2):
        model = nn.Linear(2, 1)
        batches = [(torch.ones(2, 2), torch.ones(2, 1))] * 3
        saver = CheckpointCallback(tmp_path, "train_loss")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Trainer(model, optimizer, nn.MSELoss(), batches, callbacks=[saver], device="cpu", seed=5).fit(
            epochs, resume="auto"
        )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("seed")]
    assert lines == [
        "seed 5",
        "seed 5, going on after optimizer step 3 in epoch 2",
        "seed 5, finished: 2 of 2 epochs are trained",
    ]
