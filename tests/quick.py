"""Exports of tests that look at neither the figure of a proof nor its checks on OpenVINO."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from PIL import Image


@contextlib.contextmanager
def quick_proof() -> Iterator[None]:
    """Have exports draw no figure, and compare ONNX Runtime alone with the model.

    Both are half of the work on a small network. A difference on ONNX Runtime fails an export; on
    OpenVINO it decides only whether OpenVINO is offered.
    """
    from export.proof import check, documents

    def blank(path: Path, *_: object) -> None:
        Image.new("L", (1, 1)).save(path)

    with (
        mock.patch.object(documents, "draw", blank),
        # A proof adds the reference to the backends that it finds here.
        mock.patch.object(check, "BACKENDS", {}),
    ):
        yield
