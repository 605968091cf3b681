"""Hypothesis strategies for arbitrary values: every type that a caller might pass by mistake."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

from runtime import Request, make_schedule
from runtime.errors.messages import shown

# No integer between 4 and a million: those would be valid work that takes long.
INTEGERS = [-(10**400), -(2**64), -(2**31), -5, -1, 0, 1, 2, 3, 4]
INTEGERS += [10**6 + 1, 2**31, 2**32 + 1, 2**63, 2**64 - 1, 2**64, 10**400]
FLOATS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 0.5, 1.0, 2.0, -1.5, 1e-320, 1e300, -1e300, 5.0]
TEXTS = [
    "",
    " ",
    "x",
    "0",
    "1",
    "-1",
    "٣",
    "²",
    "1e999",
    "nan",
    "None",
    "\0",
    "a\0b",
    "\ud800",
    "\x1b[2J",
]
TEXTS += [
    "\n",
    "..",
    ".",
    "é" * 300,
    "x" * 100_000,
    "9" * 5000,
    "ddim",
    "trailing",
    "fp32",
    "auto",
    "one",
]
TEXTS += [
    "[" * 3000,
    "{}",
    "1,2",
    "3,2,1",
    "0,inf",
    "karras(1e999)",
    "leading(nan)",
    "log_snr(-1)",
    "a=b",
]
NAMES = [
    "setps",
    "gudance",
    "labl",
    "self",
    "what",
    "function",
    "schedule",
    "prediction",
    "clip",
    "up",
]
NAMES += [
    "eta",
    "steps",
    "seed",
    "n",
    "picture",
    "known",
    "mask",
    "on_step",
    "order",
    "resample",
    "x\0",
]
BIG = np.zeros((1000, 1000))
SPECIAL = (
    "__repr__",
    "__len__",
    "__iter__",
    "__eq__",
    "__float__",
    "__index__",
    "__array__",
    "__bool__",
)
SPECIAL += (
    "__str__",
    "__hash__",
    "__getattr__",
    "__fspath__",
    "__contains__",
    "__getitem__",
    "__lt__",
)


def _raise(*_: Any, **__: Any) -> Any:
    raise RuntimeError("this object raises")


def hostile(*names: str) -> Any:
    """An object whose special methods of these names raise."""
    return type("Hostile", (), dict.fromkeys(names, _raise))()


class HostileList(list):  # type: ignore[type-arg]
    """A list that cannot be read."""

    __len__ = __iter__ = __repr__ = __getitem__ = _raise


class HostileText(str):
    """A string that cannot be printed."""

    __repr__ = _raise


def _raising_generator() -> Any:
    yield Request(0)
    raise RuntimeError("this generator raises")


def _tensors() -> list[Callable[[], Any]]:
    try:
        import torch
    except ImportError:
        return []
    return [
        lambda: torch.tensor(1),
        lambda: torch.tensor(0.5),
        lambda: torch.tensor(True),
        lambda: torch.tensor([1]),
        lambda: torch.tensor([[1, 2], [3, 4]]),
        lambda: torch.zeros(1, 4, 4, requires_grad=True),
        lambda: torch.zeros(2, 1, 4, 4, dtype=torch.float16),
        lambda: torch.tensor(1 + 2j),
    ]


SCALARS = (math.nan, math.inf, "one", b"one", "ddim", None, 1 + 2j)
ARRAYS: list[Callable[[], Any]] = [
    *(lambda kind=kind: np.array(0, kind) for kind in "?bBhiqQefdgFDSUO"),
    *(lambda kind=kind: np.array(1, kind) for kind in "?bBhiqQefdgFDSUO"),
    *(lambda kind=kind: np.ones((1, 4, 4), kind) for kind in "?BiqefdFUO"),
    *(lambda kind=kind: np.ones((2, 1, 4, 4), kind) for kind in "?BfdFO"),
    *(lambda value=value: np.array(value) for value in SCALARS),
    lambda: np.array([1]),
    lambda: np.array([1, 2]),
    lambda: np.array(["zero", "one"]),
    lambda: np.array([[1, 2], [3, 4]]),
    lambda: np.array([3.0, 2.0, 1.0]),
    lambda: np.array([], np.float32),
    lambda: np.zeros((0, 1, 4, 4), np.float32),
    lambda: np.zeros((0, 4, 4, 1), np.uint8),
    lambda: np.zeros((2, 0, 0)),
    lambda: np.full((1, 4, 4), math.nan, np.float32),
    lambda: np.full((1, 4, 4), 1e300),
    lambda: np.full((2, 1, 4, 4), np.inf, np.float32),
    lambda: np.full((4, 4), 1e300),
    lambda: np.zeros((4, 4), np.uint8),
    lambda: np.zeros((4, 4, 1), np.uint8),
    lambda: np.zeros((2, 4, 4, 1), np.uint8),
    lambda: np.zeros((1, 4, 4, 2), np.uint8),
    lambda: np.zeros((4, 4, 7), np.uint8),
    lambda: np.array([None, "x", 1], object),
    lambda: np.array([10**400, 1], object),
    lambda: np.zeros(3, [("a", "f4"), ("b", "i4")]),
    lambda: np.zeros((), [("a", "f4")]),
    lambda: np.datetime64("2020-01-01"),
    lambda: np.timedelta64(5, "s"),
    lambda: np.array([np.datetime64("2020-01-01")]),
    lambda: np.float32(0.5),
    lambda: np.float64(math.nan),
    lambda: np.int64(1),
    lambda: np.uint8(2),
    lambda: np.bool_(True),
    lambda: np.str_("one"),
    lambda: np.bytes_(b"one"),
    lambda: np.complex128(1 + 2j),
    lambda: np.longdouble(1),
    lambda: np.ma.masked,
    lambda: np.ma.masked_array([1.0, 2.0], [True, False]),
    lambda: BIG,
]
OBJECTS: list[Callable[[], Any]] = [
    *(lambda name=name: hostile(name) for name in SPECIAL),
    lambda: hostile(*(name for name in SPECIAL if name != "__getattr__")),
    HostileList,
    lambda: HostileText("one"),
    object,
    lambda: int,
    lambda: lambda *_: None,
    lambda: len,
    lambda: NotImplemented,
    lambda: ...,
    lambda: Path("nowhere"),
    lambda: Path("\0"),
    lambda: bytearray(b"ab"),
    lambda: memoryview(b"ab"),
    lambda: range(3),
    lambda: range(10**9),
    lambda: slice(1),
    lambda: Fraction(1, 2),
    lambda: (i for i in range(2)),
    lambda: iter([Request(0)]),
    _raising_generator,
    lambda: Request(0),
    lambda: Request(None),  # type: ignore[arg-type]
    lambda: [Request(0, options=None)],  # type: ignore[arg-type]
    lambda: make_schedule("cosine", T=4),
    lambda: Image.new("L", (4, 4)),
    lambda: Image.new("RGBA", (4, 4)),
    lambda: Image.new("I", (4, 4)),
    lambda: Image.new("F", (2, 9)),
    lambda: Image.new("L", (0, 4)),
    lambda: ValueError("x"),
    *_tensors(),
]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(INTEGERS),
    st.sampled_from(FLOATS),
    st.floats(),
    st.just(1 + 2j),
    st.sampled_from(TEXTS),
    st.text(st.characters(exclude_categories=()), max_size=6),
    st.binary(max_size=3),
    st.sampled_from([*ARRAYS, *OBJECTS]).map(lambda make: make()),
)
keys = st.one_of(st.sampled_from(NAMES), st.text(max_size=3), st.integers(0, 2), st.none())
containers = st.one_of(
    st.lists(scalars, max_size=3),
    st.lists(scalars, max_size=3).map(tuple),
    st.dictionaries(keys, scalars, max_size=2),
    st.sampled_from([set(), {1}, {"one"}, frozenset({2}), [[1, 2]], [[]], [None], [5.0, 4.0], {}]),
)
anything = st.one_of(scalars, scalars, containers)
"""Any value of any type."""

texts = st.one_of(
    st.sampled_from(TEXTS),
    st.sampled_from([str(value) for value in (*FLOATS, *INTEGERS)]),
    st.text(st.characters(exclude_categories=()), max_size=8),
)
"""The value of an option on a command line."""


def fuzz(count: int) -> settings:
    """Hypothesis's settings for `count` cases, the same in every run.

    UNNOISE_FUZZ_CASES=20000 tries that many, different ones in every run.
    """
    asked = os.environ.get("UNNOISE_FUZZ_CASES")
    return settings(
        max_examples=int(asked or count),
        deadline=None,
        database=None,
        derandomize=not asked,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def bounded_memory(size: int = 6 << 30) -> Iterator[None]:
    """Let the block allocate at most `size` bytes, on Linux. A request for more raises
    MemoryError."""
    status = Path("/proc/self/statm")
    if not status.exists():
        yield
        return
    used = int(status.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def one_of(strategies: list[st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """One of these, with a short name in what hypothesis prints."""

    @st.composite
    def case(draw: st.DrawFn) -> Any:
        return draw(draw(st.sampled_from(strategies)))

    return case()


class Case:
    """A call to try. Its repr never raises."""

    def __init__(self, name: str, call: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self.name = name
        self.call = call
        self.arguments = arguments

    def run(self) -> Any:
        return self.call(**self.arguments)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={shown(v)}' for k, v in self.arguments.items())})"


@st.composite
def cases(
    draw: st.DrawFn,
    name: str,
    call: Callable[..., Any],
    valid: dict[str, Any],
    required: tuple[str, ...] = (),
    more: bool = False,
) -> Case:
    """Calls with some valid arguments, of which one or two are replaced by anything.

    valid: a list of values that are valid for each argument. more: add keywords of any name.
    """
    wrong = draw(st.lists(st.sampled_from(sorted(valid)), min_size=1, max_size=2, unique=True))
    others = draw(st.lists(st.sampled_from(sorted(valid)), max_size=3))
    given = {*wrong, *required, *others}
    arguments = {
        argument: draw(anything) if argument in wrong else draw(st.sampled_from(valid[argument]))
        for argument in sorted(given)
    }
    if more and draw(st.integers(0, 3)) == 0:
        extra = draw(st.sampled_from([n for n in NAMES if n != "self"]))
        arguments.setdefault(extra, draw(anything))
    return Case(name, call, arguments)
