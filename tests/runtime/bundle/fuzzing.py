"""Mutations of a bundle, each tried in a child process of its own: python tests/runtime/bundle/fuzzing.py
BUNDLE [--cases N] [--case I] [--backend B]

Case i depends on the number i only. In even cases the hashes and sizes in bundle.json match, so
that the code that reads the files runs. A child loads the bundle and samples two images. It must
succeed, or end in a BundleError.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, TensorProto, helper

sys.path.insert(0, str(Path(__file__).parents[3]))

from runtime import BundleError, Sampler
from runtime.backends.registry import BACKENDS

SECONDS = 30
MEMORY = 6 << 30
GRAPHS = ("fp32/step.onnx", "fp32/step_guided.onnx")
WEIGHTS = "fp32/weights.bin"
RAN, REFUSED, WRONG = 0, 1, 2
STRANGE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        17,
        10**9,
        10**400,
        -(10**9),
        0.5,
        -0.5,
        1e-300,
        1e300,
        "",
        "x",
        "NaN",
        "../x",
    ),
    *(
        [],
        [1],
        [[]],
        {},
        {"x": 1},
        [0] * 1000,
        ["a"] * 3,
        "\0",
        "é" * 300,
        "fp32",
        "/etc/passwd",
        float("inf"),
        float("nan"),
    ),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value; of a long list, the first, the last and one in the middle."""
    found = [at] if at else []
    if isinstance(value, dict):
        keys: Any = list(value)
    elif isinstance(value, list):
        keys = sorted({0, len(value) // 2, len(value) - 1}) if value else []
    else:
        keys = []
    return found + [place for key in keys for place in places(value[key], (*at, key))]


def change_json(text: str, r: random.Random) -> bytes:
    """bundle.json with one to three errors."""
    if r.random() < 0.25:
        return change_bytes(text.encode(), r)
    if r.random() < 0.06:
        return r.choice(
            [
                b"[" * 100000,
                b'{"a":' * 50000,
                b"",
                b"null",
                b"1e999",
                b'{"format":1}',
                b"\xff\xfe",
                b"[1, 2",
                b"{}" * 2,
            ]
        )
    value = json.loads(text)
    for _ in range(r.choice([1, 1, 2, 3])):
        *path, last = r.choice(places(value))
        parent = value
        for key in path:
            parent = parent[key]
        kind = r.randrange(6)
        if kind == 0:
            del parent[last]
        elif kind == 1 and isinstance(parent, dict):
            parent[r.choice(["", "x", "format", last + "_"])] = parent.pop(last)
        elif (
            kind == 2
            and isinstance(parent[last], (int, float))
            and not isinstance(parent[last], bool)
        ):
            parent[last] = parent[last] * r.choice([-1, 0, 2, 1e10, 1 + 1e-9, 0.5]) + r.choice(
                [0, 1, -1, 1e-6]
            )
        elif kind == 3 and isinstance(parent[last], list):
            items = parent[last]
            parent[last] = r.choice([items + items, items[:-1], items[::-1], items[1:], [items]])
        elif kind == 4 and isinstance(parent[last], str):
            parent[last] = r.choice(
                [
                    "",
                    parent[last] + "\0",
                    "../" + parent[last],
                    "/" + parent[last],
                    parent[last][::-1],
                    "𝕏",
                ]
            )
        else:
            parent[last] = copy.deepcopy(r.choice(STRANGE))
    return json.dumps(value, ensure_ascii=r.random() < 0.5).encode("utf-8", "surrogatepass")


def change_bytes(data: bytes, r: random.Random) -> bytes:
    """Flipped, truncated, doubled, zeroed or inserted bytes."""
    if not data:
        return b"\0"
    at, out = r.randrange(len(data)), bytearray(data)
    kind = r.randrange(6)
    if kind == 0:
        for _ in range(r.choice([1, 1, 4, 64])):
            out[r.randrange(len(out))] ^= 1 << r.randrange(8)
    elif kind == 1:
        del out[at:]
    elif kind == 2:
        out[at:at] = r.randbytes(r.choice([1, 8, 1000]))
    elif kind == 3:
        del out[at : at + r.choice([1, 7, 500])]
    elif kind == 4:
        length = r.choice([4, 100, 5000])
        out[at : at + length] = r.choice([b"\0", b"\xff"]) * length
    else:
        out += out[at:]
    return bytes(out)


def change_graph(data: bytes, r: random.Random) -> bytes:
    """An ONNX model with one to three errors."""
    model = onnx.load_model_from_string(data)
    for _ in range(r.choice([1, 1, 2, 3])):
        r.choice(GRAPH_CHANGES)(model, r)
    return model.SerializeToString()


def _external(model: ModelProto, r: random.Random) -> None:
    tensors = [t for t in model.graph.initializer if t.external_data]
    if tensors:
        entry = r.choice(r.choice(tensors).external_data)
        paths = [
            "../weights.bin",
            "/etc/passwd",
            "",
            "step.onnx",
            "weights.bin\0",
            "*/_ORT_MEM_ADDR_/*",
            "x" * 5000,
        ]
        numbers = ["-1", "0", "1", str(2**63), str(2**64), str(10**30), "4096", "abc", "1e3", ""]
        entry.value = r.choice(paths if entry.key == "location" else numbers)


def _tensor(model: ModelProto, r: random.Random) -> None:
    tensor: TensorProto = r.choice(model.graph.initializer)
    kind = r.randrange(5)
    if kind == 0 and tensor.dims:
        tensor.dims[r.randrange(len(tensor.dims))] = r.choice([0, -1, 1, 2, 10**6, 2**40, 2**62])
    elif kind == 1:
        tensor.data_type = r.choice([0, 1, 2, 6, 7, 8, 10, 11, 16, 23, 99])
    elif kind == 2:
        del tensor.dims[:]
    elif kind == 3:
        tensor.raw_data = r.randbytes(r.choice([0, 1, 8, 64]))
    else:
        model.graph.initializer.remove(tensor)


def _node(model: ModelProto, r: random.Random) -> None:
    graph = model.graph
    i = r.randrange(len(graph.node))
    node, kind = graph.node[i], r.randrange(8)
    if kind == 0:
        node.op_type = r.choice(
            [
                "Conv",
                "Add",
                "Loop",
                "If",
                "Scan",
                "NoSuchOp",
                "Identity",
                "MatMul",
                "Reshape",
                "Sqrt",
                "",
            ]
        )
    elif kind == 1:
        node.domain = r.choice(["com.microsoft", "ai.onnx.ml", "evil", "com.microsoft.nchwc"])
    elif kind == 2 and node.input:
        others = (
            [name for n in graph.node for name in n.output]
            + [t.name for t in graph.initializer]
            + ["", "nothing"]
        )
        node.input[r.randrange(len(node.input))] = r.choice(others)
    elif kind == 3:
        del graph.node[i]
    elif kind == 4 and node.attribute:
        attribute = r.choice(node.attribute)
        attribute.i = r.choice([-(2**62), -1, 0, 7, 2**62])
        if attribute.ints:
            attribute.ints[r.randrange(len(attribute.ints))] = r.choice([-5, 0, 10**6, 2**40])
    elif kind == 5:
        graph.node.append(copy.deepcopy(node))
    elif kind == 6:
        graph.node.insert(0, graph.node.pop(i))
    else:
        node.output[0] = r.choice(["state", "next_state", "denoised", "", node.output[0] + "x"])


def _port(model: ModelProto, r: random.Random) -> None:
    graph = model.graph
    ports = r.choice([graph.input, graph.output])
    if not ports:
        return
    port = r.choice(ports)
    kind = r.randrange(5)
    dims = port.type.tensor_type.shape.dim
    if kind == 0:
        port.name = r.choice(["x", "state", "noise", "denoised", ""])
    elif kind == 1 and dims:
        dims[r.randrange(len(dims))].dim_value = r.choice([0, 1, 2, 5, 10**6, 2**40])
    elif kind == 2:
        port.type.tensor_type.elem_type = r.choice([1, 6, 7, 8, 9, 10, 11, 16])
    elif kind == 3:
        ports.remove(port)
    else:
        ports.append(
            helper.make_tensor_value_info("more", r.choice([1, 7, 8]), [r.choice([1, 2**40])])
        )


def _head(model: ModelProto, r: random.Random) -> None:
    kind = r.randrange(4)
    if kind == 0:
        model.opset_import[0].version = r.choice([0, 1, 7, 13, 99, -1])
    elif kind == 1:
        model.ir_version = r.choice([0, 1, 3, 99])
    elif kind == 2:
        del model.opset_import[:]
    else:
        model.opset_import.append(helper.make_opsetid(r.choice(["", "evil", "com.microsoft"]), 1))


def _endless(model: ModelProto, r: random.Random) -> None:
    """A Loop without an end, or with a very large count, whose result the graph needs."""
    value, B = helper.make_tensor_value_info, TensorProto.BOOL
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["go"]), helper.make_node("Identity", ["v"], ["w"])],
        "body",
        [value("i", TensorProto.INT64, []), value("c", B, []), value("v", TensorProto.FLOAT, None)],
        [value("go", B, []), value("w", TensorProto.FLOAT, None)],
    )
    model.graph.initializer.append(helper.make_tensor("far", TensorProto.INT64, [], [2**62]))
    model.graph.initializer.append(helper.make_tensor("yes", B, [], [True]))
    model.graph.node.insert(
        0, helper.make_node("Loop", ["far", "yes", "state"], ["state_looped"], body=body)
    )
    for node in model.graph.node[1:]:
        for i, name in enumerate(node.input):
            if name == "state":
                node.input[i] = "state_looped"


GRAPH_CHANGES: tuple[Callable[[ModelProto, random.Random], None], ...] = (
    *(_external, _tensor, _tensor, _node, _node, _node, _port, _port, _head),
    lambda model, r: _endless(model, r) if r.random() < 0.3 else _node(model, r),
)


def mutate(folder: Path, case: int) -> str:
    """Change the bundle in `folder` for case `case`; return a description of the change."""
    r = random.Random(case)
    matching = case % 2 == 0
    manifest = folder / "bundle.json"
    if r.random() < 0.45:
        manifest.write_bytes(change_json(manifest.read_text(encoding="utf-8"), r))
        return "bundle.json"
    nulls = sorted(str(path.relative_to(folder)) for path in folder.glob("nulls/*"))
    name = r.choice([*GRAPHS, *GRAPHS, WEIGHTS, *nulls])
    path = folder / name
    data = path.read_bytes()
    if name in GRAPHS and r.random() < 0.7:
        changed, what = change_graph(data, r), "parts"
    else:
        changed, what = change_bytes(data, r), "bytes"
    path.unlink()
    if r.random() > 0.02:
        path.write_bytes(changed)
    if matching and path.exists():
        value = json.loads(manifest.read_text(encoding="utf-8"))
        value["files"][name] = {"sha256": hashlib.sha256(changed).hexdigest(), "size": len(changed)}
        manifest.write_text(json.dumps(value), encoding="utf-8")
    return f"{what} of {name}{', hashes match' if matching else ''}"


def attempt(folder: Path, backend: str, precision: str) -> int:
    """What a user does with a downloaded bundle."""
    try:
        sampler = Sampler.load(folder, backend, precision, threads=1)
        labels = sampler.bundle.labels
        settings = {"label": 0} if labels and labels.names else {}
        if labels and labels.null_trained and settings:
            settings["guidance"] = 2.0
        if sampler.bundle.conditions:
            settings["conditions"] = sampler.bundle.draw_conditions(2)
            if sampler.bundle.can_guide:
                settings["guidance"] = 2.0
        samples = sampler.sample(2, 0, steps=min(2, len(sampler.bundle.schedule)), **settings)
        assert samples.shape == (2, *sampler.bundle.sample_shape)
    except BundleError:
        return REFUSED
    return RAN


def child(bundle: Path, case: int, work: Path, backend: str, precision: str) -> None:
    """Runs one case and ends the process with its outcome."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(SECONDS)
    outcome = WRONG
    try:
        folder = Path(shutil.copytree(bundle, work / str(case)))
        mutate(folder, case)
        log = os.open(work / f"{case}.log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        outcome = attempt(folder, backend, precision)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(outcome)


def run(
    bundle: Path, cases: list[int], backend: str, precision: str
) -> tuple[Counter[str], list[str]]:
    """Run every case in a child, two at a time. Returns the number of each outcome, and the
    failures."""
    __import__(backend)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        work, running, waiting = Path(name), {}, list(reversed(cases))
        while waiting or running:
            while waiting and len(running) < 2:
                case = waiting.pop()
                pid = os.fork()
                if pid == 0:
                    child(bundle, case, work, backend, precision)
                running[pid] = case
            pid, status = os.wait()
            case = running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            ended = {RAN: "ran", REFUSED: "refused", WRONG: "another exception"}.get(
                code, "hung" if code == -signal.SIGALRM else "crashed"
            )
            counts[ended] += 1
            if code not in (RAN, REFUSED):
                log = work / f"{case}.log"
                text = (
                    log.read_text(errors="replace").strip().splitlines()[-1:]
                    if log.exists()
                    else []
                )
                wrong.append(f"case {case}: {ended} (exit {code}) {' '.join(text)[:300]}")
            shutil.rmtree(work / str(case), ignore_errors=True)
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--case", type=int, action="append")
    parser.add_argument("--backend", default="onnxruntime", choices=BACKENDS)
    parser.add_argument("--precision", default="fp32")
    given = parser.parse_args()
    counts, wrong = run(
        given.bundle, given.case or list(range(given.cases)), given.backend, given.precision
    )
    print(json.dumps({"counts": counts, "wrong": wrong}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
