"""A trained model written for use elsewhere, and compared with itself."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ununennium.models import RasterModel
from ununennium.prediction import load_model
from ununennium.training import export_weights
from ununennium.training.checkpoint import whole_or_absent

TOLERANCE = 1e-4  # of the largest output


def export_model(
    checkpoint: str | Path, destination: str | Path, *, size: int = 256, averaged: bool | None = None
) -> str:
    """Write the model of a checkpoint to a file, whole or not at all.

    Parameters
    ----------
    checkpoint : str or Path
        A checkpoint, or a link to one.
    destination : str or Path
        ``.safetensors`` for its weights; ``.pt2`` for a program of `torch.export`, ``.onnx`` for ONNX. Programs take
        images (B, C, size, size) in float32: in the raster's own values, if the model is a `RasterModel`.
    size : int, default 256
        Side of a program's input, pixels.
    averaged : bool, optional
        Whether to take averaged weights, or the raw ones. By default those with which the run was validated.

    Returns
    -------
    str
        What was written, and how far a program's outputs for noise are from the model's.

    Raises
    ------
    FileExistsError
        If there is a file at ``destination``.
    ImportError
        If ONNX is asked for and not installed.
    ValueError
        If the ending is another, or a program does not give what the model gives.
    CheckpointError
        If there is no checkpoint, or it does not tell how its model is made.
    """
    destination = Path(destination).expanduser()
    writers = {".safetensors": None, ".pt2": _write_program, ".onnx": _write_onnx}
    if destination.suffix not in writers:
        raise ValueError(f"{destination}: the ending says what to write, {', '.join(writers)}")
    if destination.exists():
        raise FileExistsError(f"{destination} exists: name another file, or remove it")
    write = writers[destination.suffix]
    if write is None:
        export_weights(checkpoint, destination, averaged=averaged)
        return f"written: {destination}, the weights"
    model = load_model(checkpoint, averaged=averaged)
    images = _noise(model, size)
    with whole_or_absent(destination) as aside:
        outputs = write(model, images, aside)
        with torch.no_grad():
            expected = model(images)
        scale = float(expected.abs().max())
        distance = float((outputs - expected).abs().max()) / max(scale, 1e-12)
        if not distance <= TOLERANCE:
            raise ValueError(
                f"the program's outputs are {distance:.2g} of the largest away from the model's (limit {TOLERANCE}), "
                "so nothing was written: export the weights (.safetensors), or try another ending or size"
            )
    return f"written: {destination}, whose outputs are {distance:.1g} of the largest away from the model's"


def _noise(model: nn.Module, size: int) -> Tensor:
    """Return two images such as the model is used to."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, RasterModel):
        shape = 2, len(model.bands), size, size
        return torch.randn(shape, generator=generator) * model.std[:, None, None] + model.mean[:, None, None]
    config: Any = getattr(model, "model_config", None) or {}
    return torch.randn(2, config.get("in_channels", 3), size, size, generator=generator)


def _write_program(model: nn.Module, images: Tensor, path: Path) -> Tensor:
    """Write a program for PyTorch, read it back, and return what it gives."""
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    with torch.no_grad():
        outputs: Tensor = torch.export.load(path).module()(images)
    return outputs


def _write_onnx(model: nn.Module, images: Tensor, path: Path) -> Tensor:
    """Write ONNX, run it with what is installed, and return what it gives."""
    try:
        import onnx
        import onnxscript  # noqa: F401 (the exporter needs it)
    except ImportError as error:
        raise ImportError(f'ONNX needs {error.name}: pip install "ununennium[export]"') from error
    torch.onnx.export(
        model, (images,), path, dynamo=True, external_data=False, verbose=False, input_names=["image"],
        output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        session: Any = ReferenceEvaluator(onnx.load(path))
    else:
        session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
