"""A run for TensorBoard."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ununennium.training.callbacks.logger import Logger, check_installed, flattened, set_aside

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer


class TensorBoardLogger(Logger):
    """Write what TensorBoard shows: scalars (float32, as its format has them), images, the set-up as text.

    Event files of an earlier run in the folder are moved to ``earlier-1``, ``earlier-2`` … in it, which TensorBoard
    shows as runs of their own. Needs the extra ``tensorboard``.

    Parameters
    ----------
    path : str or Path
        The folder of the run; that above it is what ``tensorboard --logdir`` is given to compare runs.
    every_n_steps : int, default 10
        Which optimizer steps to log.

    Raises
    ------
    ModuleNotFoundError
        If TensorBoard is not installed.
    """

    run_id: str | None

    def __init__(self, path: str | Path, every_n_steps: int = 10) -> None:
        super().__init__(every_n_steps)
        check_installed(self, "tensorboard", "tensorboard")
        self.path: Path = Path(path).expanduser().absolute()  # wherever the process goes meanwhile
        self._writer: Any = None

    def open(self, trainer: Trainer) -> None:
        """Begin an event file."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # imported where it is used

        self.path.mkdir(parents=True, exist_ok=True)
        if self.run_id is None:
            set_aside(self.path, "events.out.tfevents.*")
            self.run_id = trainer.state.run
        _wait_for_a_later_second(self.path)
        self._writer = EventFileWriter(str(self.path), max_queue_size=1000)

    def rewind(self, step: int) -> Mapping[str, int]:
        """Have TensorBoard drop what earlier files hold after a step; the set-up, at step 0, stays."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._add(max(step, 0) + 1, session_log=SessionLog(status=SessionLog.START))
        self.flush()
        return {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add scalars."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, summary=Summary(value=scalars))

    def flush(self) -> None:
        """Hand what was written to the system."""
        self._writer.flush()

    def close(self, finished: bool) -> None:
        """Close the event file."""
        self._writer.close()

    def write_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Add them as a table, for the text page."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.plugins.text.metadata import create_summary_metadata

        rows = (f"| {name} | {_cell(value)} |\n" for name, value in flattened(values).items())
        text = "| setting | value |\n|---|---|\n" + "".join(rows)
        value = Summary.Value(
            tag="hyperparameters",
            metadata=create_summary_metadata("hyperparameters", ""),
            tensor=TensorProto(dtype="DT_STRING", string_val=[text.encode()]),
        )
        self._add(0, summary=Summary(value=[value]))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Add an image."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "PNG")
        height, width, _ = image.shape
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue())
        self._add(step, summary=Summary(value=[Summary.Value(tag=name, image=picture)]))

    def _add(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **what))


def _wait_for_a_later_second(path: Path) -> None:
    """Let TensorBoard, which reads event files in the order of their names, find the next one last.

    Names begin with the second in which a file was begun; what follows is in no order.
    """
    seconds = [name.name.split(".")[3] for name in path.glob("events.out.tfevents.*")]
    latest = max((int(second) for second in seconds if second.isdigit()), default=0)
    if 0 <= latest + 1 - time.time() <= 1:
        time.sleep(latest + 1 - time.time())


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
