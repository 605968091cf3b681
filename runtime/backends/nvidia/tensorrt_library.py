"""The modules of TensorRT and TensorRT-RTX, and a logger for them."""

from __future__ import annotations

import importlib
import logging
from typing import cast

from ..base import missing
from .engine_cache import LIBRARIES
from .tensorrt_api import Log, TensorRtLibrary

_LOG = logging.getLogger("unnoise.tensorrt")


def load_library(name: str) -> TensorRtLibrary:
    """Import the module of an engine's library.

    Raises:
        BackendError: It is not installed.
    """
    try:
        return cast(TensorRtLibrary, importlib.import_module(LIBRARIES[name]))
    # An OSError: the module is there, and a shared library that it loads is not.
    except (ImportError, OSError) as error:
        extra = "rtx" if name == "tensorrt-rtx" else "tensorrt"
        raise missing(LIBRARIES[name], extra, error) from error


def logger(trt: TensorRtLibrary) -> Log:
    """Make a logger for the library.

    It passes warnings on to Python's log, and keeps the last errors for our own messages.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            # Without this call the binding has no C++ object to pass to the library.
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: object, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors = [*self.errors[-2:], message]
            elif severity == trt.ILogger.Severity.WARNING:
                _LOG.info("%s", message)

        def said(self) -> str:
            return " ".join(self.errors)[:600]

        def clear(self) -> None:
            self.errors = []

    return Logger()
