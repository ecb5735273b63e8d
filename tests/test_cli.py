"""The command line: its messages and exit codes."""

import subprocess
import sys

import numpy as np
import pytest
import rasterio

import ununennium
from ununennium import cli

TRANSFORM = rasterio.Affine(10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0)


def write(path, array, crs="EPSG:32633", transform=TRANSFORM):
    shape = dict(zip(("count", "height", "width"), array.shape, strict=True))
    with rasterio.open(path, "w", driver="GTiff", dtype=array.dtype, crs=crs, transform=transform, **shape) as target:
        target.write(array)


def label(shape=(1, 80, 70), dtype="uint8"):
    values = np.indices(shape)[1] % 3
    return values.astype(dtype)


def fails(capsys, *args):
    """Run the command, see it exit with code 2, and return the message."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main([str(arg) for arg in args])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return " ".join(message.split())


def fails_on(capsys, folder, labels, *args, **georeference):
    write(folder / "image.tif", np.indices((80, 70)).sum(0, keepdims=True).astype(np.uint16))
    write(folder / "label.tif", labels, **georeference)
    return fails(
        capsys,
        "demo",
        "--image",
        folder / "image.tif",
        "--label",
        folder / "label.tif",
        "--output",
        folder / "run",
        *args,
    )


def only(*values):
    return np.resize(np.array(values, dtype=np.int16), (1, 80, 70))


BAD_LABELS = {
    "another size": (label((1, 80, 71)), "size (80, 70)"),
    "several bands": (label((2, 80, 70)), "has 2 bands"),
    "float": (label(dtype="float32"), "holds float32; classes are integers"),
    "negative": (only(-3, 1, 2), "labels from -3 to 2"),
    "too high": (only(1, 300), "labels from 1 to 300"),
    "one class": (only(4, 255), "only the class 4"),
    "no class": (only(255), "no class at all"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels_that_are_none(kind, tmp_path, capsys):
    labels, complaint = BAD_LABELS[kind]
    assert complaint in fails_on(capsys, tmp_path, labels)


def test_labels_on_another_grid(tmp_path, capsys):
    assert "coordinate system EPSG:32633" in fails_on(capsys, tmp_path, label(), crs="EPSG:32634")
    shifted = rasterio.Affine(10.0, 0.0, 500_005.0, 0.0, -10.0, 5_000_000.0)
    assert "transform (10.0, 0.0, 500000.0" in fails_on(capsys, tmp_path, label(), transform=shifted)
    nearly = rasterio.Affine(10.0, 0.0, 500_000.001, 0.0, -10.0, 5_000_000.0)
    assert "no name for" in fails_on(capsys, tmp_path, label(), "--classes=a", transform=nearly)  # the grid will do


def test_options_that_do_not_suit_the_scene(tmp_path, capsys):
    assert "no training block has a label" in fails_on(capsys, tmp_path, label(), "--block=100")
    labels = label()
    labels[:, :40, :40] = 255
    assert "no validation block has a label" in fails_on(capsys, tmp_path, labels, "--block=40")
    assert "no name for the label values [2]" in fails_on(capsys, tmp_path, label(), "--classes=a,b")
    assert "Unknown model 'unet_resnet19'" in fails_on(capsys, tmp_path, label(), "--model=unet_resnet19")
    write(tmp_path / "image.tif", np.ones((1, 80, 70), dtype=np.uint8))
    small = label((1, 80, 60))
    write(tmp_path / "small.tif", small)
    files = (f"--image={tmp_path}/small.tif", f"--label={tmp_path}/small.tif", f"--output={tmp_path}/run")
    message = fails(capsys, "demo", *files)
    assert "80 x 60 pixels, but a chip 64 x 64" in message


def test_an_image_of_one_value(tmp_path, capsys):
    write(tmp_path / "image.tif", np.ones((1, 80, 70), dtype=np.uint8))
    write(tmp_path / "label.tif", label())
    paths = (f"--image={tmp_path}/image.tif", f"--label={tmp_path}/label.tif", f"--output={tmp_path}/run")
    assert "same value everywhere" in fails(capsys, "demo", *paths)


def test_files_that_are_not_there(tmp_path, capsys):
    output = f"--output={tmp_path / 'run'}"
    missing, text = tmp_path / "missing.tif", tmp_path / "text.tif"
    text.write_text("no raster")
    assert f"there is no file {missing}" in fails(capsys, "demo", output, "--image", missing, "--label", text)
    assert "can be read" in fails(capsys, "demo", output, "--image", text, "--label", text)
    assert "give both" in fails(capsys, "demo", output, "--image", text)
    assert "give both" in fails(capsys, "demo", output, "--label", text)


def test_the_scene_without_tensorly(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorly.datasets", None)
    assert 'pip install "ununennium[demo]"' in fails(capsys, "demo", "--output", tmp_path / "run")


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["demo", "--epochs=0"], "epochs"),
        (["demo", "--block=big"], "block"),
        (["demo", "--wings=2"], "--wings"),
        (["dance"], "dance"),
        ([], "command"),
    ],
)
def test_wrong_options(args, complaint, capsys):
    assert complaint in fails(capsys, *args)


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.split() == ["ununennium", ununennium.__version__]


def test_help_needs_nothing_heavy():
    code = "import sys; from ununennium.cli import main\ntry: main(['demo', '--help'])\nexcept SystemExit: pass\n"
    code += "print('heavy:', {'torch', 'rasterio', 'matplotlib', 'numpy'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--image TIF" in process.stdout
    assert "heavy: set()" in process.stdout
