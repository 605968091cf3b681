"""The trainer's errors; a caller's mistakes are `runtime.errors.RequestError`."""

from runtime.errors import UnnoiseError


class DataError(UnnoiseError):
    """The training images are missing, unreadable, or differ in size or mode."""


class CheckpointError(UnnoiseError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class TrainingError(UnnoiseError):
    """Training cannot continue: the loss is not finite."""
