"""Errors that name their cause and the remedy."""


class BatchError(ValueError):
    """A batch that does not fit the model or the loss."""


class NonFiniteError(FloatingPointError):
    """A loss, gradient or weight that is NaN or infinite."""


class DataOrderError(RuntimeError):
    """An order of samples that is not the one the run was left in."""


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, of another kind, or of another run."""
