"""Errors that name their cause and the remedy."""


class BatchError(ValueError):
    """A batch that does not fit the model or the loss."""


class NonFiniteError(FloatingPointError):
    """A loss, gradient or weight that is NaN or infinite."""


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, of another kind, or of another run."""
