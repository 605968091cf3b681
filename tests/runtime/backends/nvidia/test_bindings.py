"""The fakes of TensorRT's classes take their signatures from tensorrt_rtx. What they define is the
same in the bindings of `tensorrt`, which import without a GPU and without its libraries: small
stubs take the libraries' places."""

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import fake_tensorrt
from .fake_tensorrt import RTX_ONLY, Strict, real

pytestmark = pytest.mark.slow
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
ENUMS = ("ExecutionContextAllocationStrategy", "TensorIOMode", "DataType", "TensorLocation")
READ = r"""
import ctypes, importlib, json, sys
for path in sys.argv[2:]:
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
module = importlib.import_module("tensorrt_bindings.tensorrt")
wanted, found = json.loads(sys.argv[1]), {}
for kind, names in wanted.items():
    known = getattr(module, kind)
    found[kind] = {n: getattr(getattr(known, n), "__doc__", None) if hasattr(known, n) else 0 for n in names}
print(json.dumps(found))
"""
"""Prints the docstrings of members; 0 for one that does not exist."""


def undefined(library: Path) -> set[str]:
    """The functions of TensorRT's libraries that the bindings call."""
    said = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", str(library)], capture_output=True, text=True
    )
    names = {line.split()[-1].partition("@")[0] for line in said.stdout.splitlines()}
    return {n for n in names if re.match(r"create\w+_INTERNAL|get\w+|initLib\w+", n)}


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Libraries whose functions return null."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    if spec is None or spec.submodule_search_locations is None or not shutil.which("cc"):
        pytest.skip("needs tensorrt-cu13-bindings and a C compiler")
    folder = tmp_path_factory.mktemp("stubs")
    (binding,) = Path(spec.submodule_search_locations[0]).glob("tensorrt*.so")
    names = sorted(n for n in undefined(binding) if not hasattr(ctypes_libc(), n))
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
    made = []
    for library in LIBRARIES:
        path = folder / f"{library}.so.11"
        soname = f"-Wl,-soname,{path.name}"
        subprocess.run(["cc", "-shared", "-fPIC", soname, "-o", path, source], check=True)
        made.append(str(path))
    return made


def ctypes_libc() -> Any:
    import ctypes

    return ctypes.CDLL(None)


def plain(doc: str | None) -> list[str]:
    """The signatures in a docstring, without the module's name."""
    doc = re.sub(r"tensorrt_\w+\.tensorrt(_rtx)?\.|tensorrt_rtx\.", "", doc or "")
    return [line for line in doc.splitlines() if "->" in line]


def test_what_the_fakes_define_has_the_same_signatures_in_tensorrt(stubs: list[str]) -> None:
    fakes = [
        kind
        for _, kind in inspect.getmembers(fake_tensorrt, inspect.isclass)
        if issubclass(kind, Strict)
        and kind is not Strict
        and kind.like.__name__ not in {*RTX_ONLY, "IRuntimeConfig"}
    ]
    wanted = dict[str, set[str]]()
    for fake in fakes:
        names = {n for n in vars(fake) if not n.startswith("_") and n not in ("like", "failing")}
        wanted.setdefault(fake.like.__name__, set()).update(names)
    wanted["IExecutionContext"].discard("is_stream_capturable")  # TensorRT-RTX alone has it
    assert wanted.keys() == {"Runtime", "ICudaEngine", "IExecutionContext"}
    for name in ENUMS:
        wanted[name] = set(getattr(real, name).__members__)
    words = json.dumps({kind: sorted(names) for kind, names in wanted.items()})
    paths = os.environ | {"LD_LIBRARY_PATH": str(Path(stubs[0]).parent)}
    said = subprocess.run(
        [sys.executable, "-c", READ, words, *stubs],
        env=paths, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    for kind, members in found.items():
        for name, doc in members.items():
            assert doc != 0, f"tensorrt's {kind} has no {name}"
            if kind in ENUMS:
                continue
            ours = plain(getattr(getattr(real, kind), name).__doc__)
            # tensorrt's create_execution_context has the overload that takes a strategy, too.
            assert set(ours) <= set(plain(doc)) or name == "create_execution_context", (kind, name)
