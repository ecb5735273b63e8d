"""Where a run is."""

import math
import secrets
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Position and record of a run. Counters advance before the hook that announces them fires.

    Attributes
    ----------
    seed : int
        What the order of the samples is drawn from, together with the epoch.
    epoch : int
        Epochs finished; also the number of the epoch that is running.
    batch : int
        Batches finished in the running epoch.
    optimizer_steps : int
        Optimizer steps that really happened.
    skipped_steps : int
        Optimizer steps that the loss scaler left out because a gradient overflowed.
    nonfinite_steps : int
        Optimizer steps that ``on_nonfinite="skip"`` left out because loss or gradient was not finite.
    unit : int
        What counts of targets are measured in where several processes train, to keep fp16 in range; 0 until known.
    open_batches : int
        Batches since the last optimizer step. Where it is 0, between two windows, a run can be saved and left.
    validating : bool
        Whether the running epoch has been trained, so that its validation is next.
    stopping : bool
        Whether somebody asked for the end: of the running epoch with what it has, and of the run.
    digest : str
        Of the indices of the batches finished in the running epoch.
    run : str
        Tells this run from others; it goes on under the same name after it was resumed.
    records : list of (int, dict)
        Number and figures of each finished epoch.
    """

    seed: int
    epoch: int = 0
    batch: int = 0
    optimizer_steps: int = 0
    skipped_steps: int = 0
    nonfinite_steps: int = 0
    unit: int = 0
    open_batches: int = 0
    validating: bool = False
    stopping: bool = False
    digest: str = ""
    run: str = field(default_factory=lambda: secrets.token_hex(8), compare=False)
    records: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def begin_epoch(self, epoch: int) -> None:
        """Enter an epoch; figures of it or later ones, from an earlier run over them, are dropped."""
        self.epoch, self.batch, self.open_batches = epoch, 0, 0
        self.validating, self.digest = False, ""
        self.records = [record for record in self.records if record[0] < epoch]

    def finish_epoch(self, logs: dict[str, float]) -> None:
        """Record the figures of the running epoch and step to the next."""
        self.records.append((self.epoch, logs))
        self.epoch, self.batch, self.validating, self.digest = self.epoch + 1, 0, False, ""

    @property
    def inside_epoch(self) -> bool:
        """Whether an epoch is under way, so that its sums belong to what has to be kept."""
        return self.batch > 0 or self.validating

    def history(self) -> dict[str, list[float]]:
        """Return the figures by name, one for each finished epoch; NaN where an epoch lacks one."""
        names = dict.fromkeys(name for _, logs in self.records for name in logs)
        return {name: [float(logs.get(name, math.nan)) for _, logs in self.records] for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        for name, value in state.items():
            setattr(self, name, value)
