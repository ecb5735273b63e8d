"""The report: what it says of a run, whenever it is read, and that it is a page of its own."""

import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import sklearn.metrics
import torch
from browser import Page, needs_chromium
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ununennium.models import RasterModel, create_model
from ununennium.training import (
    Callback,
    CheckpointCallback,
    EarlyStoppingCallback,
    PreviewCallback,
    ReportCallback,
    Trainer,
)

UNKNOWN = "\N{EN DASH}"
NASTY = ["<script>alert(1)</script>", 'quote" onload="x', "Wälder & Wiesen", "{{ 7 * 7 }}"]


class Reader(HTMLParser):
    """The texts, tables and addresses of a page, and whether all that is opened is closed."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.rows, self.scripts = [], [], [], [], 0
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            assert "url(" not in data
            assert "@import" not in data
            return
        self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()

    def table(self, head):
        """Rows of the table whose head begins with a word, by their first cell; the numbers of that head too."""
        start = next(number for number, row in enumerate(self.rows) if row and row[0] == head)
        width = len(self.rows[start])
        found = {}
        for row in self.rows[start + 1 :]:
            if len(row) != width:
                break
            found[row[0]] = dict(zip(self.rows[start], row, strict=True))
        return found


def read(path):
    return Reader(path.read_text(encoding="utf-8"))


def network(classes=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, classes, 1))


def data(samples=10, classes=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(samples, 3, 16, 16, generator=generator)
    masks = (images[:, 0] > 0).long() + 2 * (images[:, 1] > 1).long() * (classes > 2)
    masks[:, 0] = 255
    return images, masks


def trainer(folder, callbacks=(), *, model=None, validates=True, saves=True, report=None, best=None, **kwargs):
    if model is None:
        model = RasterModel(network(), ["B2", "B3", "B4"], class_names=NASTY)
    dataset = TensorDataset(*data())
    saver = (
        [CheckpointCallback(folder / "checkpoints", best or ("val_iou" if validates else "train_loss"), "max")]
        if saves
        else []
    )
    loader = DataLoader(dataset, batch_size=3, shuffle=True)
    return Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=0.01),
        kwargs.pop("loss_fn", None) or nn.CrossEntropyLoss(ignore_index=255),
        loader,
        DataLoader(dataset, batch_size=4) if validates else None,
        callbacks=[*callbacks, report or ReportCallback(folder / "report.html"), *saver],
        device="cpu",
        progress=False,
        seed=3,
        **kwargs,
    )


def test_a_finished_run_on_one_page(tmp_path):
    training = trainer(
        tmp_path, [PreviewCallback(tmp_path / "previews")], config={"note": "<b>bold</b>", "classes": NASTY}
    )
    history = training.fit(3)
    page = read(tmp_path / "report.html")
    assert "finished · written" in page.text
    best = int(np.argmax(history["val_iou"]))
    assert f"Best val_iou{history['val_iou'][best]:.4f}epoch {best + 1}" in re.sub(r"\s*\n\s*", "", page.text)
    assert "3 of 3" in page.text
    epochs = page.table("Epoch")
    assert list(epochs) == [f"{n + 1}" + (" ★" if n == best else "") for n in range(3)]
    for number, row in enumerate(epochs.values()):
        for name, values in history.items():
            assert row[name] == f"{values[number]:.4f}"
        assert row["lr"] == "1.00e-02"
        assert re.fullmatch(r"\d+\.\d\ss", row["waiting"])
    settings = {row[0]: row[1] for row in page.rows if len(row) == 2}
    expected = {"optimizer": "Adam", "seed": "3", "train_loader.samples": "10", "model.bands": "B2, B3, B4"}
    assert expected.items() <= settings.items()
    assert {"python", "torch", "ununennium", "device"} <= settings.keys()
    assert '"note": "<b>bold</b>"' in page.text
    assert sum(tag == "img" for tag, _ in page.tags) >= 3
    assert {p.name for p in tmp_path.iterdir()} >= {"report.html", "curves.png", "confusion.png"}


def test_the_figures_of_classes_are_those_of_scikit_learn_in_the_best_epoch(tmp_path):
    class Scores(Callback):
        log_names = ("score",)

        def on_epoch_end(self, trainer, epoch, logs):
            logs["score"] = [0.1, 0.9, 0.2, 0.3][epoch]

    training = trainer(tmp_path, [Scores()], best="score")
    history = training.fit(4)
    training.load_weights(tmp_path / "checkpoints/best")
    images, masks = data()
    with torch.no_grad():
        said = training.model.eval()(images).argmax(1)
    true, said = masks[masks != 255].numpy(), said[masks != 255].numpy()
    options = {"labels": range(4), "average": None, "zero_division": np.nan}
    with np.errstate(invalid="ignore"):
        precision, recall, _, support = sklearn.metrics.precision_recall_fscore_support(true, said, **options)
        ious = sklearn.metrics.jaccard_score(true, said, labels=range(4), average=None, zero_division=0)
    page = read(tmp_path / "report.html")
    table = page.table("Class")
    assert list(table)[:4] == NASTY
    for number, name in enumerate(NASTY):
        row = table[name]
        assert row["Support"] == f"{support[number]:,}"
        assert row["Predicted"] == f"{(said == number).sum():,}"
        for head, value in (("IoU", ious[number]), ("Precision", precision[number]), ("Recall", recall[number])):
            occurs = support[number] or (said == number).any()
            if head == "IoU":
                assert row[head] == (f"{value:.4f}" if occurs else UNKNOWN)
            elif not np.isnan(value) and occurs:
                assert row[head] == f"{value:.4f}"
    assert table["Mean over classes"]["IoU"] == f"{history['val_iou'][1]:.4f}"
    assert "after epoch 2, the best so far" in page.text
    assert f"Overall accuracy {(true == said).mean():.4f}" in page.text


def test_it_asks_no_network_and_runs_no_script(tmp_path):
    training = trainer(tmp_path, [PreviewCallback(tmp_path / "previews")], config={"title": NASTY[0]})
    training.fit(1)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert all(address.startswith("data:") for address in page.addresses)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "form", "video", "audio"}
    assert html.escape(NASTY[0]) in text
    assert NASTY[0] not in text
    assert "49" not in page.table("Class")


# How it ends


class Ends(Callback):
    def __init__(self, error, batch):
        self.error, self.batch = error, batch

    def on_batch_end(self, trainer, batch_idx, logs):
        if (trainer.state.epoch, batch_idx) == (2, self.batch):
            raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "interrupted by Ctrl-C"),
        (RuntimeError("the <disk> is gone"), "ended by RuntimeError: the <disk> is gone"),
    ],
)
def test_how_a_run_ended_is_said_and_all_epochs_are_there_after_it_went_on(tmp_path, error, said):
    with pytest.raises(type(error)):
        trainer(tmp_path, [Ends(error, 1)]).fit(5)
    page = read(tmp_path / "report.html")
    assert said in page.text
    assert len(page.table("Epoch")) == 2
    before = {number.strip(" ★"): row for number, row in page.table("Epoch").items()}

    training = trainer(tmp_path, [Ends(error, -1)])
    training.fit(5, resume="auto")
    page = read(tmp_path / "report.html")
    after = {number.strip(" ★"): row for number, row in page.table("Epoch").items()}
    assert list(after) == ["1", "2", "3", "4", "5"]
    for number in ("1", "2"):
        assert [after[number][k] for k in ("time", "waiting", "rest", "chips/s")] == [
            before[number][k] for k in ("time", "waiting", "rest", "chips/s")
        ]
    assert all(row["time"] != UNKNOWN for row in after.values())
    assert "finished · written" in page.text
    assert said not in page.text


def test_while_it_runs_the_page_is_that_of_the_last_epoch(tmp_path):
    pages = []

    class Reads(Callback):
        def on_epoch_start(self, trainer, epoch):
            pages.append(read(tmp_path / "report.html"))

    trainer(tmp_path, [Reads()]).fit(2)
    assert [("running" in p.text, "No epoch is finished yet" in p.text) for p in pages] == [
        (True, True),
        (True, False),
    ]
    assert [f"{n} of 2" in p.text for n, p in enumerate(pages)] == [True, True]


def test_a_run_that_a_callback_stopped(tmp_path):
    trainer(tmp_path, [EarlyStoppingCallback(patience=1, min_delta=1e9)]).fit(9)
    assert "stopped early" in read(tmp_path / "report.html").text


def test_a_fit_inside_an_except_block_is_not_a_failure(tmp_path):
    try:
        raise ValueError("something before")
    except ValueError:
        trainer(tmp_path).fit(1)
    assert "finished · written" in read(tmp_path / "report.html").text


def test_the_page_is_whole_or_as_before(tmp_path, monkeypatch):
    report = ReportCallback(tmp_path / "report.html", pictures=False)
    training = trainer(tmp_path, report=report)
    training.fit(1)
    assert not (tmp_path / "curves.png").exists()
    before = (tmp_path / "report.html").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        report.on_train_end(training)
    assert (tmp_path / "report.html").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.endswith("-report.html")]


def test_a_folder_that_can_not_be_written_to_shows_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    training = trainer(tmp_path, report=ReportCallback(tmp_path / "file" / "report.html"))
    with pytest.raises(OSError, match="file"):
        training.fit(1)
    assert training.state.optimizer_steps == 0


@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_with_or_without_a_report(tmp_path, first):
    def build(reports):
        training = trainer(tmp_path)
        if not reports:
            training = Trainer(
                training.model, training.optimizer, training.loss_fn, training.train_loader, training.val_loader,
                callbacks=[CheckpointCallback(tmp_path / "checkpoints", "val_iou")], device="cpu", progress=False,
            )  # fmt: skip
        return training

    build(first).fit(1, resume="auto")
    training = build(not first)
    training.fit(3, resume="auto")
    assert len(training.history["val_iou"]) == 3
    if not first:
        epochs = read(tmp_path / "report.html").table("Epoch")
        assert [row["time"] == UNKNOWN for row in epochs.values()] == [True, False, False]


def test_epochs_that_are_run_anew_are_forgotten(tmp_path):
    report = ReportCallback(tmp_path / "report.html")
    training = trainer(tmp_path, report=report, saves=False)
    training.fit(3)
    training.fit(2, start_epoch=1)
    assert [number.strip(" ★") for number in read(tmp_path / "report.html").table("Epoch")] == ["1", "2"]
    assert list(report.state_dict()["epochs"]) == [0, 1]


# What there is and what there is not


def test_without_validation_metrics_or_checkpoints(tmp_path):
    trainer(tmp_path, validates=False, saves=False).fit(1)
    page = read(tmp_path / "report.html")
    assert "On the training data after epoch 1" in page.text
    assert "keeps no checkpoints" in page.text
    trainer(tmp_path, metrics=[], saves=False).fit(1)
    assert "No metric of the run is read from a confusion matrix" in read(tmp_path / "report.html").text


def test_figures_that_are_no_numbers(tmp_path):
    class Bad(Callback):
        log_names = ("val_odd", "val_huge")

        def on_epoch_end(self, trainer, epoch, logs):
            logs |= {"val_odd": float("nan"), "val_huge": float("inf") if epoch else 1e20, "val_iou": float("nan")}

    trainer(tmp_path, [Bad()]).fit(2)
    page = read(tmp_path / "report.html")
    assert [row["val_odd"] for row in page.table("Epoch").values()] == [UNKNOWN, UNKNOWN]
    assert [row["val_huge"] for row in page.table("Epoch").values()] == ["1.000e+20", "inf"]
    assert "Best val_iou" not in page.text


def test_steps_that_were_left_out(tmp_path):
    class Breaks(nn.Module):
        calls, ignore_index = 0, 255

        def forward(self, outputs, targets):
            Breaks.calls += outputs.requires_grad
            loss = nn.functional.cross_entropy(outputs, targets, ignore_index=255)
            return loss * (torch.nan if outputs.requires_grad and Breaks.calls in (2, 6, 7) else 1)

    trainer(tmp_path, loss_fn=Breaks(), on_nonfinite="skip").fit(2)
    page = read(tmp_path / "report.html")
    assert "3 left out as not finite" in page.text
    assert [row["left out"] for row in page.table("Epoch").values()] == ["1", "2"]


MODELS = {
    "known": lambda: RasterModel(create_model("unet_mobilenet_v2", 3, 4), ["B2", "B3", "B4"], class_names=list("abcd")),
    "bare": lambda: create_model("unet_mobilenet_v2", 3, 4),
    "own network": lambda: RasterModel(network(), ["B2", "B3", "B4"], class_names=list("abcd")),
    "own": network,
}


@pytest.mark.parametrize("kind", MODELS)
def test_how_to_predict_is_said_where_it_can_work(tmp_path, kind):
    folder = tmp_path / "a run's folder"
    training = trainer(folder, model=MODELS[kind]())
    training.callbacks.callbacks[0]._write(training, "running")
    text = read(folder / "report.html").text
    assert (
        f"ununennium predict '{tmp_path}/a run'\"'\"'s folder/checkpoints/best' scene.tif map.tif" in text
        or kind.startswith("own")
    )
    assert ("load_model(" in text) == kind.startswith("own")
    assert 'trainer.fit(0, resume="auto")' in text


def test_a_command_that_goes_on(tmp_path):
    report = ReportCallback(tmp_path / "report.html", resume_command="ununennium fit --config run/config.yaml")
    trainer(tmp_path, report=report).fit(1)
    text = read(tmp_path / "report.html").text
    assert "ununennium fit --config run/config.yaml" in text
    assert "resume=" not in text


# In a browser


class Padded(Callback):
    """Long names, and figures in numbers."""

    log_names = tuple(f"val_figure_with_a_long_name_{n}" for n in range(12))

    def on_epoch_end(self, trainer, epoch, logs):
        logs |= dict.fromkeys(self.log_names, 0.123)


@needs_chromium
def test_a_browser_shows_it_without_errors_requests_or_sideways_scrolling(tmp_path):
    names = [f"class number {n} of many {'x' * n}" for n in range(50)]
    model = RasterModel(network(50), ["B2", "B3", "B4"], class_names=names)
    config = {"title": NASTY[0], "long": "y" * 400}
    trainer(tmp_path, [Padded(), PreviewCallback(tmp_path / "previews")], model=model, config=config).fit(3)
    with Page(tmp_path / "report.html") as page:
        assert page.errors == []
        assert page.requests == []
        assert page.evaluate("[...document.images].map(i => i.naturalWidth > 0).join()") == "true,true,true"
        assert page.evaluate("document.querySelectorAll('tbody tr').length") > 60
        for width in (1200, 420):
            page.resize(width)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            wide = "[...document.querySelectorAll('.wide')].some(e => e.scrollWidth > e.clientWidth)"
            assert page.evaluate(wide)  # in a frame of its own
        light, dark = (page.colors(scheme) for scheme in ("light", "dark"))
        assert light != dark
        for paper, ink in (light, dark):
            assert abs(sum(paper) - sum(ink)) > 450


@needs_chromium
def test_the_browser_would_tell(tmp_path):
    """Of a request, and of an error: else the test before could not fail."""
    path = tmp_path / "page.html"
    path.write_text(
        '<img src="http://127.0.0.1:9/none.png"><link rel=stylesheet href="other.css"><script>nothing()</script>'
    )
    with Page(path) as page:
        assert {url.rpartition("/")[2] for url in page.requests} == {"none.png", "other.css"}
        assert any("nothing" in error for error in page.errors)
