"""The exporter's own error; a caller's mistakes are `runtime.errors.RequestError`."""

from runtime.errors import UnnoiseError


class ExportError(UnnoiseError):
    """There is nothing to export, or the export differs from its source."""
