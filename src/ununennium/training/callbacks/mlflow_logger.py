"""A run for MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ununennium.training.callbacks.logger import Logger, check_installed, flattened

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer

_REFUSED = re.compile(r"[^\w\-./: ]")  # in names
_LONGEST = 6000  # characters of a parameter
_AT_ONCE = 1000  # metrics that one call takes


class MLflowLogger(Logger):
    """Log to an MLflow tracking server or to a local store.

    A resumed run goes on in the same MLflow run, which is asked what it has: a step that is there is not logged again.
    Needs the extra ``mlflow``.

    Parameters
    ----------
    experiment : str, default "ununennium"
        Made if it is not there.
    name : str, optional
        Of the run; by default MLflow makes one up.
    tracking_uri : str, optional
        By default what MLflow takes: ``MLFLOW_TRACKING_URI``, else a database in the working directory.
    tags : mapping of str to str, optional
        Of the run.
    every_n_steps : int, default 10
        Which optimizer steps to log.

    Raises
    ------
    ModuleNotFoundError
        If MLflow is not installed.
    """

    run_id: str | None

    def __init__(
        self,
        experiment: str = "ununennium",
        name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, str] | None = None,
        every_n_steps: int = 10,
    ) -> None:
        super().__init__(every_n_steps)
        check_installed(self, "mlflow", "mlflow")
        self.experiment = experiment
        self.name = name
        self.tracking_uri = tracking_uri
        self.tags: dict[str, str] = dict(tags or {})
        self._client: Any = None
        self._metrics: list[Any] = []

    def open(self, trainer: Trainer) -> None:
        """Create the run, or go on with it."""
        from mlflow.tracking import MlflowClient  # it takes seconds

        self._client = MlflowClient(self.tracking_uri)
        self._metrics = []
        if self.run_id is None:
            known = self._client.get_experiment_by_name(self.experiment)
            experiment = known.experiment_id if known else self._client.create_experiment(self.experiment)
            self.run_id = self._client.create_run(experiment, run_name=self.name, tags=self.tags).info.run_id
        else:
            self._client.update_run(self.run_id, status="RUNNING")

    def rewind(self, step: int) -> Mapping[str, int]:
        """Return what is there: MLflow forgets nothing."""
        histories = {
            kind: self._client.get_metric_history(self.run_id, f"{kind}/train_loss") for kind in ("step", "epoch")
        }
        return {kind: max(metric.step for metric in history) for kind, history in histories.items() if history}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take metrics along; they are sent together."""
        from mlflow.entities import Metric

        if len(self._metrics) + len(values) > _AT_ONCE:
            self.flush()
        now = time.time_ns() // 1_000_000
        self._metrics += [Metric(_REFUSED.sub("_", name), value, now, step) for name, value in values.items()]

    def flush(self) -> None:
        """Send the metrics; those of one step go together or not at all."""
        if self._metrics:
            self._client.log_batch(self.run_id, metrics=self._metrics, synchronous=True)
            self._metrics = []

    def close(self, finished: bool) -> None:
        """End the run."""
        self._client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")

    def write_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Log them as parameters."""
        from mlflow.entities import Param

        flat = flattened(values).items()
        parameters = [Param(_REFUSED.sub("_", name), str(value)[:_LONGEST]) for name, value in flat]
        for first in range(0, len(parameters), 100):  # as many as one call takes
            self._client.log_batch(self.run_id, params=parameters[first : first + 100], synchronous=True)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Store an image as an artifact."""
        self._client.log_image(self.run_id, image, f"{_REFUSED.sub('_', name)}/step-{step:08}.png")
