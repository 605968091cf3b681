"""What commands write: sheets of images, or .npy files of samples."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..backends.base import Float32
from ..bundle.bundle import Bundle
from ..errors import RequestError
from ..errors.arguments import integer
from ..errors.messages import shown_path
from ..files import replacing
from ..images import enlargement, is_image, picture_format, save, sheet_shape, tile, to_uint8
from ..sampler import Sampler


def write(path: Path, samples: Float32, sampler: Sampler, columns: int | None, width: int) -> None:
    """Write samples [n, *S] as one sheet of images, or unchanged into an .npy file."""
    if path.suffix == ".npy":
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, samples)
    else:
        save(path, tile(to_uint8(samples, *sampler.bundle.sample_range), columns), width)


def check_out(
    given: argparse.Namespace,
    bundle: Bundle,
    n: int,
    columns: int | None = None,
    format_of: Callable[[Path, int], str] = picture_format,
) -> None:
    """Check the output options before anything is sampled, for n images on a sheet.

    columns: Images to a row, unless the command line says so.

    Raises:
        RequestError: `write` could not write the file or the sheet, or the samples are not images.
    """
    if given.columns is not None:
        columns = integer("columns", given.columns, 1)
    width = integer("width", given.width, 0)
    _check_place(given.out)
    if given.out.suffix == ".npy":
        return
    shape = bundle.sample_shape
    if not is_image(shape):
        raise RequestError(
            f"the samples of {bundle.name} are {'×'.join(map(str, shape))}, and an image has 1 "
            f"or 3 channels by height by width. Write the samples themselves: --out samples.npy."
        )
    C, H, W = shape
    format_of(given.out, C)
    enlargement(sheet_shape(n, (H, W, C), columns), width)


def _check_place(out: Path) -> None:
    """Raise RequestError if a file cannot be written to a path."""
    if out.is_dir():
        raise RequestError(f"--out {shown_path(out)} is a folder. Name a file in it.")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir():
        raise RequestError(f"--out {shown_path(out)}: {shown_path(parent)} is not a folder.")
    if not os.access(parent, os.W_OK):
        raise RequestError(f"--out {shown_path(out)}: {shown_path(parent)} cannot be written to.")
