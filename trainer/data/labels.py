"""Class names and labels of data files: checked, sorted and numbered."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..config.text import printable, text_fault
from ..errors import DataError


def class_name(name: str, where: str) -> str:
    """Return `name` if it can name a class. `where` says what file, row or folder it is from.

    Raises:
        DataError: The name is blank, is not UTF-8 text, or contains a control character.
    """
    fault = text_fault(name) or ("" if name.strip() else "is blank")
    if fault:
        raise DataError(
            f"{where}: the class name {name!a} {fault}. Class names are stored as JSON text, so "
            f"rename this class."
        )
    return name


def label_name(value: object, where: str) -> str:
    """Return the class that a label of a data file names: text, a whole number from 0, or a
    boolean.

    Raises:
        DataError: The label is something else, such as null, a fraction or a list.
    """
    if isinstance(value, bytes):
        value = utf8(value, where)
    if not isinstance(value, (str, int)):
        raise DataError(
            f"{where}: a label must be text or a whole number, got {ascii(value)[:80]} "
            f"({type(value).__name__}). Give every image a label, or use --no-labels."
        )
    name = class_name(str(value), where)
    if re.fullmatch(r"-\d+", name):
        raise DataError(
            f"{where}: the label {name} is negative, which usually means that there is no label. "
            "Give every image a label from 0, or use --no-labels."
        )
    return name


def utf8(data: bytes, where: str) -> str:
    """Decode UTF-8 text, with or without a byte order mark.

    Raises:
        DataError: The bytes are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: the label {data[:80]!a} is not valid UTF-8 text. Save it as UTF-8."
        ) from error


def whole_number(name: str) -> int | None:
    """Return the number that a name spells in ASCII digits, or None."""
    # 18 digits fit in int64, which labels are.
    return int(name) if re.fullmatch(r"[0-9]{1,18}", name) else None


def numbered(values: Iterable[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the class names, sorted, and the index of each value among them, [N].

    Names that are whole numbers come first, by size.
    """
    listed = list(values)

    # Numbers by size and before words, so that "10" follows "9".
    def order(name: str) -> tuple[bool, int, str]:
        number = whole_number(name)
        return number is None, number or 0, name

    names = sorted(set(listed), key=order)
    index = {name: i for i, name in enumerate(names)}
    return tuple(names), np.array([index[name] for name in listed], np.int64)


def named(values: Sequence[object], where: Callable[[int], str]) -> list[str]:
    """Return `label_name` of every value. where(i) says what row or file value i is from."""
    # Each distinct value is checked once: there may be millions of rows, and few classes. The type
    # is part of the key, because True equals 1. `label_name` rejects labels without a hash.
    names: dict[tuple[type, object], str] = {}
    found = []
    for i, value in enumerate(values):
        key = (type(value), value if isinstance(value, (str, int, bytes)) else None)
        if key not in names:
            names[key] = label_name(value, where(i))
        found.append(names[key])
    return found


def unused(classes: Sequence[str], labels: NDArray[np.int64]) -> list[str]:
    """Return the classes that have no image. labels: [N], indices into `classes`."""
    counts = np.bincount(labels, minlength=len(classes))
    return [name for name, count in zip(classes, counts, strict=True) if not count]


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first names and how many follow, for a message. Bytes that are not UTF-8 are
    escaped.
    """
    shown = ", ".join(printable(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
