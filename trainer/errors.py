"""The trainer's errors; a caller's mistakes are `runtime.errors.RequestError`."""

from runtime.errors import UnnoiseError


class DataError(UnnoiseError):
    """The training pictures are missing, unreadable, or not alike."""


class CheckpointError(UnnoiseError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class TrainingError(UnnoiseError):
    """Training cannot go on: the loss is not finite."""
