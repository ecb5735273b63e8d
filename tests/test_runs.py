"""From a configuration file to a map, by the command line."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import sklearn.metrics
import torch
import yaml
from safetensors.torch import load_file

from ununennium import cli
from ununennium.data import Scene, Window
from ununennium.models import create_model
from ununennium.prediction import load_model, predict_scene
from ununennium.runs import ChipSettings, SceneData, SceneFiles, SplitSettings, flip
from ununennium.training.checkpoint import read

SIZE, CHIP = 128, 32
SHOWN = {"report.html", "curves.png", "confusion.png", "previews"}


@pytest.fixture
def scene(tmp_path):
    """Write a scene of two bands, whose sum says the class, with nodata in a corner; return its folder."""
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 3, (SIZE // 8, SIZE // 8)).repeat(8, 0).repeat(8, 1)
    image = np.stack([1000 + 400 * blocks, 3000 - 300 * blocks]) + draw.integers(0, 100, (2, SIZE, SIZE))
    image[:, :9, :9] = 0
    label = np.array([1, 5, 7])[blocks]
    profile = {
        "driver": "GTiff", "height": SIZE, "width": SIZE, "crs": "EPSG:32633",
        "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000),
    }  # fmt: skip
    with rasterio.open(tmp_path / "image.tif", "w", count=2, dtype="uint16", nodata=0, **profile) as target:
        target.write(image.astype(np.uint16))
        target.descriptions = ["B4", "B8"]
    with rasterio.open(tmp_path / "label.tif", "w", count=1, dtype="uint8", **profile) as target:
        target.write(label[None].astype(np.uint8))
    return tmp_path


def write_config(folder, name="run.yaml", **changes):
    config = {
        "output": str(folder / "run"),
        "data": {
            "scenes": [{"image": str(folder / "image.tif"), "label": str(folder / "label.tif")}],
            "classes": {1: "water", 5: "crops", 7: "forest"},
            "chip_size": CHIP,
            "batch_size": 4,
            "split": {"fractions": {"train": 0.6, "val": 0.4}, "block": CHIP},
        },
        "trainer": {"epochs": 2, "device": "cpu", "progress": False},
        **changes,
    }
    (folder / name).write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder / name


def run(*args):
    cli.main([str(arg) for arg in args])


def fails(capsys, *args, code=2):
    """Run the command, see it exit, and return its message, which is short."""
    with pytest.raises(SystemExit) as exit_info:
        run(*args)
    message = capsys.readouterr().err
    assert exit_info.value.code == code, message
    assert "Traceback" not in message
    assert len(message.splitlines()) < 16, message
    return " ".join(message.split())


def test_a_configuration_becomes_a_model_and_a_map(scene, capsys):
    run("fit", "--config", write_config(scene), "--optimizer.lr", "0.003")
    printed = capsys.readouterr().out
    folder = scene / "run"
    assert re.search(r"forest +[\d,]+", printed)  # the report of the split
    assert f"ununennium predict {folder}/checkpoints/best" in printed
    assert {p.name for p in folder.iterdir()} == {"checkpoints", "config.yaml", "split.json", "statistics.json", *SHOWN}
    assert f"the run on one page: {folder}/report.html" in printed
    report = (folder / "report.html").read_text(encoding="utf-8")
    for command in (f"fit --config {folder}/config.yaml", f"predict {folder}/checkpoints/best scene.tif map.tif"):
        assert f"ununennium {command}" in report
    assert {p.name for p in (folder / "previews").iterdir()} == {f"preview-epoch-000{n}.png" for n in (1, 2)}
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert kept["optimizer"]["init_args"]["lr"] == 0.003
    assert kept["early_stopping"] is False

    contents = read(folder / "checkpoints" / "best")
    assert contents.info["config"]["data"]["classes"] in (
        {1: "water", 5: "crops", 7: "forest"},
        {"1": "water", "5": "crops", "7": "forest"},
    )
    known = contents.info["model"]
    assert known["bands"] == ["B4", "B8"]
    assert known["class_names"] == ["water", "crops", "forest"]
    assert known["network"]["name"] == "unet_resnet18"

    run("validate", "--config", folder / "config.yaml")
    figures = dict(line.split() for line in capsys.readouterr().out.split("\n\n")[0].splitlines())
    assert float(figures["val_iou"]) == pytest.approx(contents.info["figures"]["val_iou"], rel=1e-5)

    run("predict", folder / "checkpoints" / "best", scene / "image.tif", scene / "map.tif", "--progress", "false")
    model = load_model(folder / "checkpoints" / "best")
    pixels, valid = Scene(scene / "image.tif").read(Window(0, 0, SIZE, SIZE))
    with torch.no_grad():
        logits = model(torch.from_numpy(pixels)[None])[0]
    with rasterio.open(scene / "map.tif") as written:
        values = written.read(1)
    assert np.array_equal(values, np.where(valid, np.array([1, 5, 7])[logits.argmax(0)], written.nodata))
    predict_scene(
        folder / "checkpoints" / "best", scene / "image.tif", scene / "logits.tif", output="logits", progress=False
    )
    with rasterio.open(scene / "logits.tif") as written:
        raw = written.read()
    np.testing.assert_allclose(raw[:, valid], logits.numpy()[:, valid], rtol=1e-5, atol=1e-5)


def test_validation_tells_of_each_class(scene, capsys):
    """Against scikit-learn, over the pixels of the validation part."""
    run("fit", "--config", write_config(scene, metrics=[{"class_path": "ununennium.metrics.IoU", "init_args": {
        "num_classes": 3, "ignore_index": 255, "class_names": ["water", "crops", "forest"], "per_class": True,
    }}, {"class_path": "ununennium.metrics.CohenKappa", "init_args": {"num_classes": 3, "ignore_index": 255}}]),
        "--checkpoint.monitor", "val_kappa")  # fmt: skip
    capsys.readouterr()
    config = scene / "run" / "config.yaml"
    run("validate", "--config", config, "--json", scene / "out" / "figures.json")
    printed, table = capsys.readouterr().out.split("\n\n")
    figures = {name: float(value) for name, value in (line.split() for line in printed.splitlines())}
    names = ["water", "crops", "forest"]
    assert list(figures) == ["val_loss", "val_iou", *(f"val_iou/{name}" for name in names), "val_kappa"]
    kept = read(scene / "run" / "checkpoints" / "best").info["figures"]
    assert kept["val_kappa"] == pytest.approx(figures["val_kappa"], rel=1e-5)

    data = yaml.safe_load(config.read_text())["data"]
    made = SceneData(ChipSettings(**{
        **data, "classes": {int(value): name for value, name in data["classes"].items()},
        "split": SplitSettings({"train": 0.6, "val": 0.4}, CHIP),
        "scenes": [SceneFiles(str(scene / "image.tif"), str(scene / "label.tif"))],
    }))  # fmt: skip
    model = load_model(scene / "run" / "checkpoints" / "best")
    with torch.no_grad():
        maps = [(chip["mask"], model(chip["image"][None])[0].argmax(0)) for chip in made.val]
    true, predicted = (torch.cat([part.flatten() for part in parts]) for parts in zip(*maps, strict=True))
    true, predicted = true[true != 255].numpy(), predicted[true != 255].numpy()
    precision, recall, dice, support = sklearn.metrics.precision_recall_fscore_support(
        true, predicted, labels=range(3), zero_division=0
    )
    columns = {
        "iou": sklearn.metrics.jaccard_score(true, predicted, labels=range(3), average=None, zero_division=0),
        "dice": dice, "precision": precision, "recall": recall, "support": support,
    }  # fmt: skip
    header, *rows = (line.split() for line in table.splitlines())
    assert header == ["class", *columns]
    written = json.loads((scene / "out" / "figures.json").read_text())
    assert written["figures"] == pytest.approx(figures, rel=1e-5)
    assert list(written["classes"]) == [row[0] for row in rows] == names
    for c, row in enumerate(rows):
        expected = {name: values[c] for name, values in columns.items()}
        assert written["classes"][names[c]] == pytest.approx(expected, abs=1e-9)
        assert row[1:] == [*(f"{expected[name]:.4f}" for name in header[1:-1]), f"{support[c]:,}"]
        assert figures[f"val_iou/{names[c]}"] == pytest.approx(expected["iou"], rel=1e-5)


def test_what_is_not_a_number_is_null_in_json(tmp_path):
    """Which has no NaN; a class that does not occur, say."""
    figures = {"figures": {"val_iou": 0.5, "val_loss": math.inf}, "classes": {"Böden": {"iou": math.nan, "support": 0}}}
    cli._write_json(str(tmp_path / "new" / "figures.json"), figures)
    read_back = json.loads((tmp_path / "new" / "figures.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    expected = {"figures": {"val_iou": 0.5, "val_loss": None}, "classes": {"Böden": {"iou": None, "support": 0}}}
    assert read_back == expected


def test_what_is_no_metric_is_refused(scene, capsys):
    config = write_config(scene, metrics=[{"class_path": "torch.nn.ReLU"}])
    with pytest.raises(SystemExit):
        run("fit", "--config", config)
    assert "torch.nn.ReLU does not implement protocol Metric" in capsys.readouterr().err


def test_the_configuration_that_a_run_kept_makes_the_same_run(scene, capsys):
    run("fit", "--config", write_config(scene), "--seed", 3)
    run("fit", "--config", scene / "run" / "config.yaml", "--output", scene / "again")
    weights = [load_file(scene / name / "checkpoints" / "last" / "model.safetensors") for name in ("run", "again")]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())

    message = fails(capsys, "fit", "--config", scene / "run" / "config.yaml", "--data.chip_size", 16)
    assert "another configuration (data.chip_size was 32 and is 16): choose another output folder" in message
    message = fails(capsys, "fit", "--config", scene / "run" / "config.yaml", "--trainer.epochs", 3)
    assert "trainer.epochs was 2 and is 3" in message  # the schedule spans them


def test_started_anew_a_run_goes_on(scene):
    config = write_config(scene, schedule="constant")
    run("fit", "--config", config, "--trainer.epochs", 1)
    run("fit", "--config", config)
    run("fit", "--config", config, "--output", scene / "whole")
    weights = [load_file(scene / name / "checkpoints" / "last" / "model.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_pictures_may_be_switched_off_and_on_and_change_no_run(scene):
    config = write_config(scene, schedule="constant")
    run("fit", "--config", config, "--trainer.epochs", 1, "--report", "false")
    assert not SHOWN & {p.name for p in (scene / "run").iterdir()}
    run("fit", "--config", config, "--preview.samples", 2, "--preview.rgb", "[B8]")
    assert {p.name for p in (scene / "run").iterdir()} >= SHOWN
    run("fit", "--config", config, "--trainer.epochs", 3, "--report", "false")
    run("fit", "--config", config, "--trainer.epochs", 3, "--output", scene / "whole")
    weights = [load_file(scene / name / "checkpoints" / "last" / "model.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_a_first_attempt_that_failed_leaves_the_folder_free(scene, capsys):
    assert "B9" in fails(capsys, "fit", "--config", write_config(scene), "--data.bands", "[B9]")
    (scene / "run").mkdir()
    (scene / "run" / "config.yaml").write_text("seed: 5")  # of one that ended before its first checkpoint
    run("fit", "--config", write_config(scene), "--trainer.epochs", 1, "--data.bands", "[B8]")
    swapped = '{"5": "crops", "1": "water", "7": "forest"}'  # other targets for the same values
    args = "--data.bands", "[B8]", "--trainer.epochs", 1, "--data.classes", swapped
    assert "data.classes was" in fails(capsys, "fit", "--config", write_config(scene), *args)
    (scene / "run" / "config.yaml").write_text("")
    assert "another configuration" in fails(capsys, "fit", "--config", write_config(scene), "--data.bands", "[B8]")


def test_ctrl_c_says_how_to_go_on(scene, monkeypatch, capsys):
    def interrupted(trainer, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ununennium.training.Trainer.fit", interrupted)
    assert "the same command goes on" in fails(capsys, "fit", "--config", write_config(scene), code=130)


def test_validation_scenes_are_read_by_the_training_bands_names(scene):
    with rasterio.open(scene / "image.tif") as source:
        profile, pixels = source.profile, source.read()
    with rasterio.open(scene / "turned.tif", "w", **profile) as target:
        target.write(pixels[::-1])
        target.descriptions = ["B8", "B4"]
    files = SceneFiles(str(scene / "image.tif"), str(scene / "label.tif"))
    turned = SceneFiles(str(scene / "turned.tif"), str(scene / "label.tif"))
    settings = ChipSettings([files], val_scenes=[turned], classes={1: "a", 5: "b", 7: "c"}, chip_size=48)
    data = SceneData(settings)
    assert data.val.bands == ("B4", "B8")
    sums = sum(chip["image"].to(torch.int64).mul(chip["mask"] != 255).sum((1, 2)) for chip in data.val)
    assert sums.tolist() == pixels.astype(np.int64).sum((1, 2)).tolist()  # each pixel once, though 48 divides no 128


def test_split_and_chips_agree_on_what_is_unlabelled(scene):
    with rasterio.open(scene / "label.tif", "r+") as target:
        values = target.read(1)
        values[40:60] = 99
        target.write(values, 1)
    files = SceneFiles(str(scene / "image.tif"), str(scene / "label.tif"))
    how = SplitSettings({"train": 0.6, "val": 0.4}, block=CHIP)
    settings = ChipSettings(
        [files], split=how, classes={1: "a", 5: "b", 7: "c"}, ignore_index=99, chip_size=CHIP, flips=False
    )
    data = SceneData(settings)
    counted = sum(int((chip["mask"] != 99).sum()) for chips in (data.train, data.val) for chip in chips)
    assert counted == sum(part["pixels"] for part in data.split.report["parts"].values())
    assert counted == SIZE * SIZE - 20 * SIZE - 81


DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_chips_of_every_type_are_flipped_and_turned_with_their_masks(dtype):
    """All eight ways are met, and a pixel keeps its value, the type's least and largest too, and its target."""
    limits = np.iinfo(dtype) if np.dtype(dtype).kind in "ui" else np.finfo(dtype)
    image = np.array([[limits.min, 1, 2], [3, 4, 5], [6, 7, limits.max]], dtype)
    ways = {np.rot90(mirrored, turns).tobytes() for mirrored in (image, image[:, ::-1]) for turns in range(4)}
    torch.manual_seed(0)
    found = set()
    for _ in range(100):
        turned = flip({"image": torch.from_numpy(image)[None], "mask": torch.arange(9).reshape(3, 3)})
        assert turned.keys() == {"image", "mask"}
        assert turned["image"].numpy().dtype == dtype
        assert np.array_equal(turned["image"].numpy()[0], image.flatten()[turned["mask"].numpy()])
        found.add(turned["image"].numpy().tobytes())
    assert found == ways


def test_the_seed_is_that_of_a_network_of_ones_own(scene, monkeypatch):
    (scene / "mine2.py").write_text(OWN)
    monkeypatch.syspath_prepend(scene)
    found = []
    for seed in (0, 1, 0):
        args = "--network", "mine2.Network", "--datamodule", "mine2.Module", "--data", "null", "--seed", seed
        folder = scene / f"seeded-{len(found)}"
        run(
            "fit",
            "--config",
            write_config(scene),
            *args,
            "--output",
            folder,
            "--optimizer.lr",
            0,
            "--trainer.epochs",
            1,
        )
        found.append(load_file(folder / "checkpoints" / "last" / "model.safetensors")["weight"])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


MISTAKES = {
    "an unknown key": (["--data.chipsize", 64], "data.chipsize is no option: is chip_size meant?"),
    "an unknown option": (["--trainer.epoch", 3], "--trainer.epoch is no option: is --trainer.epochs meant?"),
    "a wrong type": (["--trainer.epochs", "many"], "trainer.epochs must be a whole number above 0, got 'many'"),
    "an unknown class": (["--optimizer", "torch.optim.Adan"], "optimizer: torch.optim has no Adan: is Adam meant?"),
    "a class without its module": (["--loss", "DiceLos"], "loss: DiceLos is no class: is ununennium.losses.DiceLoss m"),
    "an unknown argument": (["--optimizer.lrr", 1], "optimizer.lrr is no option: is lr meant?"),
    "a model as a network": (["--network", "unet_resnet18"], "is a model's name: give model.name=unet_resnet18"),
    "nearly a model as a network": (
        ["--network", "unet_resnt18"],
        "like a model's name, unet_resnet18: give model.name=",
    ),
    "an unknown network": (["--network", "segmentation_models_pytorch.Unett"], "is Unet meant?"),
    "no such module": (["--network", "nets.Unet"], "network: there is no module 'nets' for nets.Unet"),
    "no data": (["--data", "null"], "give either data, with its scenes, or a datamodule: neither is given"),
    "no such file": (
        ["--data.scenes", '[{"image": "nowhere.tif", "label": "l.tif"}]'],
        f"data.scenes[0]: nowhere.tif: there is no such file in {Path.cwd()}: correct the path",
    ),
    "stopping that is off": (
        ["--early_stop.patience", 3],
        "early_stop.patience=3 without early_stopping: set it to true",
    ),
    "chips on a grid and at random": (
        ["--data.stride", 8, "--data.chips_per_epoch", 8],
        "data.stride is for chips on a grid: leave it or data.chips_per_epoch out",
    ),
    "no label": (["--data.scenes", '[{"image": "a.tif", "label": null}]'], "data.scenes has no label for scene 0"),
    "no classes": (["--data.classes", "[]"], "data.classes is missing: name the classes"),
    "no validation": (["--data.split.fractions", '{"train": 1.0}'], "data.split.fractions has no val"),
    "labels without a class": (["--data.classes", '{"1": "water", "5": "crops"}'], "7"),
    "an unknown model": (["--model.name", "unet_resnet19"], "unet_resnet18"),
    "an unknown band": (["--data.bands", "[B4, B11]"], "no band 'B11'; its bands are B4, B8"),
    "focus on a grid": (["--data.focus", 0.5], "set data.chips_per_epoch"),
    "a schedule twice": (
        ["--scheduler", "torch.optim.lr_scheduler.ExponentialLR", "--scheduler.gamma", "0.9"],
        'set schedule to "constant"',
    ),
    "a pace without a scheduler": (["--step_on", "batch"], "name a scheduler, or leave step_on out"),
    "a model beside a network": (
        ["--network", "torch.nn.Identity", "--model.name", "unet_resnet34"],
        "model.name beside a network of your own, used as it is: leave one out",
    ),
    "a monitor that is not there": (["--checkpoint.monitor", "val_acc"], "val_acc"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_short_message(scene, capsys, mistake):
    args, expected = MISTAKES[mistake]
    code = 1 if mistake == "a monitor that is not there" else 2  # found with the first batch's metrics
    message = fails(capsys, "fit", "--config", write_config(scene), *args, code=code)
    assert message.startswith("ununennium fit: error: ")
    assert expected in message


IN_THE_FILE = {
    "a misspelt key": ({"chipsize": 64}, "data.chipsize is no option: is chip_size meant?"),
    "a key like none": ({"qqq": 64}, "data.qqq is no option; there are scenes, val_scenes, split, bands, classes,"),
    "a misspelt scene key": ({"scenes": [{"image": "i.tif", "lable": "l.tif"}]}, "data.scenes.lable is no option: is"),
    "a misspelt key of the split": ({"split": {"blok": 3}}, "data.split.blok is no option: is block meant?"),
    "a scene without an image": ({"scenes": [{"label": "l.tif"}]}, "data.scenes.image must be given"),
    "no scene": ({"scenes": []}, "data.scenes is empty: name a scene, as {image: FILE, label: FILE}"),
    "a scene alone": ({"scenes": "i.tif"}, "data.scenes must be a list, got i.tif: write [i.tif]"),
    "a band alone": ({"bands": "B4"}, "data.bands must be a list, got B4: write [B4]"),
    "a band that is not there": ({"bands": ["B4", "B11"]}, "data.bands: Scene("),
    "no number": ({"chip_size": "big"}, "data.chip_size must be a whole number above 0, got 'big'"),
    "no size": ({"chip_size": 0}, "data.chip_size must be a whole number above 0, got 0"),
    "no whole number": ({"split": {"block": 8.5}}, "data.split.block must be a whole number, got 8.5"),
    "neither true nor false": ({"flips": "maybe"}, "data.flips must be true or false, got maybe"),
    "classes without values": ({"classes": "water"}, "data.classes must be a mapping or a list, got water"),
    "shares above 1": ({"split": {"fractions": {"train": 0.9, "val": 0.4}}}, "data.split: fractions must be positive"),
    "a fill that is no value": ({"fill": -1}, "data: fill=-1.0 is no value of the rasters' type, uint16"),
    "a share above 1": ({"min_valid": 2}, "data: min_valid must be a share, from 0 to 1, got 2.0"),
    "large chips": ({"chip_size": 64}, "data: chips of 64 x 64 pixels are larger than the split's blocks"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", IN_THE_FILE)
def test_a_mistake_in_the_data_of_a_configuration_is_a_line(scene, capsys, mistake):
    change, expected = IN_THE_FILE[mistake]
    config = yaml.safe_load(write_config(scene).read_text())
    write_config(scene, data={**config["data"], **change})
    with pytest.raises(SystemExit) as exit_info:
        run("fit", "--config", scene / "run.yaml")
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"ununennium fit: error: {expected}")
    assert len(message.splitlines()) == 1


def test_data_that_is_no_mapping(scene, capsys):
    for data, shown in (("image.tif", "image.tif"), (["image.tif"], "['image.tif']")):
        message = fails(capsys, "fit", "--config", write_config(scene, data=data))
        assert "data must be a mapping with scenes, val_scenes, " in message
        assert message.endswith(f"got {shown}")


def test_settings_of_early_stopping_may_wait_for_it(scene):
    """``--early_stopping false`` says so; without it nobody would notice that the settings do nothing."""
    config = write_config(scene, early_stop={"patience": 3})
    run("fit", "--config", config, "--trainer.epochs", 1, "--early_stopping", "false")
    kept = yaml.safe_load((scene / "run" / "config.yaml").read_text())
    assert (kept["early_stopping"], kept["early_stop"]["patience"]) == (False, 3)
    run("validate", "--config", scene / "run" / "config.yaml")


def test_help_can_be_read_and_has_every_option(capsys):
    with pytest.raises(SystemExit):
        run("fit", "--help")
    brief = capsys.readouterr().out
    assert len(brief.splitlines()) <= 230
    options = {name for action in cli.fit_parser()._actions for name in action.option_strings if name[-1] != "+"} - {
        "-h"
    }
    assert len(options) > 50
    assert {name for name in options if not re.search(rf"^ .*{re.escape(name)}( |$)", brief, re.MULTILINE)} == set()
    with pytest.raises(SystemExit):
        run("fit", "--trainer.help")
    full = " ".join(capsys.readouterr().out.split())
    assert "An overflow in fp16 is neither" in full
    assert "An overflow in fp16 is neither" not in " ".join(brief.split())
    assert "--trainer.epochs" in full
    assert "--checkpoint" not in full


def read_options(*args):
    """Return what a command line and its configuration say, as plain data."""
    args = cli.replacing([str(arg) for arg in args])
    parser = cli.fit_parser()
    return yaml.safe_load(parser.dump(parser.parse_args(args)))


def test_lists_of_the_command_line_take_the_place_of_the_configurations(scene):
    """Entries of a list of the same length keep nothing of those that were there."""
    ema, iou = "ununennium.training.EMACallback", "ununennium.metrics.IoU"
    config = write_config(
        scene,
        callbacks=[{"class_path": ema, "init_args": {"decay": 0.9}}],
        metrics=[{"class_path": iou, "init_args": {"num_classes": 3, "per_class": True}}],
        preview={"rgb": ["B8"]},
    )
    options = read_options(
        "--config", config, "--callbacks", f"[{ema}]", "--data.scenes", '[{"image": "other.tif"}]',
        f'--metrics=[{{"class_path": "{iou}", "init_args": {{"num_classes": 4}}}}]', "--preview.rgb", "[B4]",
    )  # fmt: skip
    assert options["callbacks"][0]["init_args"]["decay"] == 0.999
    assert options["data"]["scenes"] == [{"image": "other.tif"}]
    assert options["metrics"][0]["init_args"]["per_class"] is False
    assert options["preview"]["rgb"] == ["B4"]
    added = read_options("--config", config, "--callbacks+", "ununennium.training.ProgressCallback")["callbacks"]
    assert [each["class_path"].rpartition(".")[2] for each in added] == ["EMACallback", "ProgressCallback"]
    assert added[0]["init_args"]["decay"] == 0.9


def test_a_tilde_is_the_home_in_every_path(scene, monkeypatch):
    monkeypatch.setenv("HOME", str(scene))
    config = yaml.safe_load(write_config(scene).read_text())
    data = {**config["data"], "scenes": [{"image": ["~/image.tif"], "label": "~/label.tif"}]}
    logger = {"class_path": "ununennium.training.CSVLogger", "init_args": {"path": "~/log"}}
    (scene / "away").mkdir()
    monkeypatch.chdir(scene / "away")
    write_config(scene, data=data, output="~/run", callbacks=[logger])
    run("fit", "--config=~/run.yaml", "--trainer.epochs", 1)
    assert (scene / "log").exists()
    best = "~/run/checkpoints/best"
    run("validate", "--config=~/run/config.yaml", "--weights", best, "--json", "~/figures.json")
    assert (scene / "figures.json").exists()
    run("predict", best, "~/image.tif", "~/map.tif", "--progress", "false")
    assert (scene / "map.tif").exists()
    run("export", best, "~/model.safetensors")
    assert (scene / "model.safetensors").exists()
    for weights in (best, "~/model.safetensors"):
        assert create_model("unet_resnet18", 2, 3, weights=weights) is not None
    assert not list((scene / "away").iterdir())


def test_print_config_gives_a_file_that_is_taken(scene, capsys):
    with pytest.raises(SystemExit):
        run("fit", "--config", write_config(scene), "--print_config")
    (scene / "printed.yaml").write_text(capsys.readouterr().out)
    run("fit", "--config", scene / "printed.yaml", "--trainer.epochs", 1)
    assert (scene / "run" / "checkpoints" / "last").exists()


OWN = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Network(nn.Conv2d):
    def __init__(self, width: int = 4):
        super().__init__(2, 3, 1)


class Module:
    def __init__(self, chips: int = 8):
        self.chips, self.trainer = chips, None

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.chips, 2, 8, 8, generator=generator)
        self.data = TensorDataset(images, (images.sum(1) > 0).long())

    def train_dataloader(self):
        return DataLoader(self.data, 2, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, 2)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, masks = batch
        if self.trainer.training:
            images = images + 0.1
        return images * 2, masks
"""


def test_networks_losses_and_datamodules_of_ones_own(scene, monkeypatch, capsys):
    (scene / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(scene)
    config = {
        "output": str(scene / "own"),
        "datamodule": {"class_path": "mine.Module", "init_args": {"chips": 6}},
        "network": {"class_path": "mine.Network"},
        "loss": {"class_path": "ununennium.losses.DiceLoss"},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "callbacks": [{"class_path": "ununennium.training.EarlyStoppingCallback", "init_args": {"patience": 1}}],
        "trainer": {"epochs": 2, "device": "cpu", "progress": False},
    }
    (scene / "own.yaml").write_text(yaml.safe_dump(config))
    run("fit", "--config", scene / "own.yaml")
    weights = load_file(scene / "own" / "checkpoints" / "last" / "model.safetensors")
    assert set(weights) == {"weight", "bias"}
    capsys.readouterr()
    last = scene / "own" / "checkpoints" / "last"
    run("validate", "--config", scene / "own" / "config.yaml", "--weights", last, "--json", scene / "own.json")
    classes = json.loads((scene / "own.json").read_text())["classes"]
    assert {name: row["support"] > 0 for name, row in classes.items()} == {"0": True, "1": True, "2": False}
    assert "val_loss" in capsys.readouterr().out


HEIGHTS = """
import torch
from torch.utils.data import DataLoader, TensorDataset


class Heights:
    def __init__(self):
        images = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        self.data = TensorDataset(images, 100 + images.sum(1, keepdim=True))

    def train_dataloader(self):
        return DataLoader(self.data, 2, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, 2)
"""


def test_regression_by_a_configuration(scene, monkeypatch, capsys):
    """Metrics with names of their own, and no table of classes."""
    (scene / "heights.py").write_text(HEIGHTS)
    monkeypatch.syspath_prepend(scene)
    metrics = {"error": {"class_path": "ununennium.metrics.MAE"}, "r2": {"class_path": "ununennium.metrics.R2"}}
    config = {
        "output": str(scene / "heights"),
        "datamodule": {"class_path": "heights.Heights"},
        "network": {"class_path": "torch.nn.Conv2d", "init_args": dict.fromkeys(["out_channels", "kernel_size"], 1)},
        "loss": {"class_path": "torch.nn.MSELoss"},
        "metrics": metrics,
        "checkpoint": {"monitor": "val_r2"},
        "trainer": {"epochs": 2, "device": "cpu", "progress": False},
    }
    config["network"]["init_args"]["in_channels"] = 2
    (scene / "heights.yaml").write_text(yaml.safe_dump(config))
    run("fit", "--config", scene / "heights.yaml")
    capsys.readouterr()
    run("validate", "--config", scene / "heights" / "config.yaml", "--json", scene / "heights.json")
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["val_loss", "val_error", "val_r2"]
    written = json.loads((scene / "heights.json").read_text())
    assert written["classes"] == {}
    assert 0 < written["figures"]["val_error"] ** 2 <= written["figures"]["val_loss"]


@pytest.mark.parametrize("ending", ["safetensors", "pt2", "onnx"])
def test_a_model_is_exported_and_compared(scene, capsys, ending):
    run("fit", "--config", write_config(scene), "--trainer.epochs", 1)
    destination = scene / "out" / f"model.{ending}"
    run("export", scene / "run" / "checkpoints" / "best", destination, "--size", 64)
    assert f"written: {destination}" in capsys.readouterr().out
    assert [p.name for p in destination.parent.iterdir()] == [destination.name]
    assert "exists: name another file" in fails(capsys, "export", scene / "run" / "checkpoints" / "best", destination)
    model = load_model(scene / "run" / "checkpoints" / "best")
    if ending == "safetensors":
        assert load_file(destination).keys() == model.state_dict().keys()
    if ending == "pt2":
        images = torch.rand(3, 2, 64, 64) * 3000  # another number than it was made with
        with torch.no_grad():
            torch.testing.assert_close(torch.export.load(destination).module()(images), model(images))


def test_an_export_that_gives_something_else_is_not_written(scene, monkeypatch, capsys):
    from ununennium import export

    def wrong(model, images, path):
        path.write_bytes(b"")
        return model(images).detach() + 1

    run("fit", "--config", write_config(scene), "--trainer.epochs", 1)
    monkeypatch.setattr(export, "_write_program", wrong)
    message = fails(capsys, "export", scene / "run" / "checkpoints" / "best", scene / "model.pt2", "--size", 64)
    assert "nothing was written" in message
    assert not list(scene.glob("*.pt2"))
    assert "ending says what to write" in fails(
        capsys, "export", scene / "run" / "checkpoints" / "best", scene / "m.pt"
    )


def test_exported_weights_begin_another_run_with_more_bands_by_name(scene):
    run("fit", "--config", write_config(scene), "--trainer.epochs", 1)
    run("export", scene / "run" / "checkpoints" / "best", scene / "weights.safetensors")
    filters = load_file(scene / "weights.safetensors")["network.encoder.conv1.weight"]  # of B4 and B8
    torch.manual_seed(1)
    model = create_model(
        "unet_resnet18", 3, 3, weights=scene / "weights.safetensors", bands=["B8", "B11", "B4"], unmatched="zero"
    )
    found = dict(model.named_parameters())["encoder.conv1.weight"]
    assert torch.equal(found[:, 0], filters[:, 1])
    assert torch.equal(found[:, 2], filters[:, 0])
    assert not found[:, 1].any()


def test_torchrun_trains_the_same_in_two_processes(scene):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, world, batch in (("one", 1, 4), ("two", 2, 2)):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "-m",
            "ununennium", "fit", "--config", write_config(scene), "--output", scene / name, "--data.batch_size", batch,
            "--data.flips", "false", "--data.chips_per_epoch", 16,
        ]  # fmt: skip
        found = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        assert found.stdout.count("to map a scene") == 1
    options = ["--output", scene / "two", "--data.batch_size", 4, "--data.flips", "false", "--data.chips_per_epoch", 16]
    alone = [sys.executable, "-m", "ununennium", "fit", "--config", write_config(scene), *options]
    found = subprocess.run(list(map(str, alone)), env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr  # in another number of processes it goes on: here to its end
    losses = [read(scene / name / "checkpoints" / "last").info["figures"]["train_loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)  # BatchNorm sees other batches
