"""The OpenVINO backend keeps the promises of ONNX Runtime's in fp32, bf16 and int8, reads from
memory only, and survives a damaged cache."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import external_data_helper

from runtime import BackendError, Bundle, BundleError, RequestError, Sampler
from runtime.backends import cache as cache_module
from runtime.backends import openvino as openvino_backend
from runtime.backends.onnxfile import check_graph, with_weights
from runtime.backends.openvino import Compiled, OpenVino, lacks
from runtime.backends.openvino_parts import split
from runtime.backends.openvino_phases import join_phases
from runtime.backends.ports import shapes
from runtime.backends.registry import offered, open_backend
from runtime.bundle.format import step_file
from runtime.diffusion.program import R

openvino = pytest.importorskip("openvino")
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
PRECISIONS = [
    pytest.param(p, marks=pytest.mark.skipif(bool(lacks(p, openvino)), reason=lacks(p, openvino)))
    for p in ("fp32", "bf16", "int8")
]


STATE = np.random.default_rng(0).normal(size=(3, R, 1, 8, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNNOISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=PRECISIONS)
def opened(request: pytest.FixtureRequest, precise: Path) -> OpenVino:
    return open_backend(Bundle.load(precise), "openvino", request.param)


def one_row(
    backend: OpenVino, state: np.ndarray, guided: bool, time: float = 999
) -> tuple[np.ndarray, np.ndarray]:
    buffers = backend.bind(len(state))
    buffers.state[:], buffers.label[:] = state, np.arange(len(state))
    buffers.call[:], buffers.update[:] = (time, 1, 0, 1, np.inf, 2), np.eye(R, R + 2)
    buffers.step(guided)
    return buffers.state.copy(), buffers.denoised.copy()


@pytest.mark.parametrize("guided", [False, True])
def test_an_identity_row_returns_the_state_bit_for_bit(opened: OpenVino, guided: bool) -> None:
    state = np.random.default_rng(0).normal(size=(3, R, 1, 8, 8)).astype(np.float32) * 1e4
    assert one_row(opened, state, guided)[0].tobytes() == state.tobytes()


def test_a_sample_keeps_its_bytes_whatever_its_batch(opened: OpenVino) -> None:
    sampler = Sampler(opened.bundle, opened)
    labels = [3, None, 7, 0, 3, 3, 9]
    batch = sampler.sample(7, 20, label=labels, solver="dpmpp_2m", steps=6)
    for i in (0, 1, 4, 6):
        assert (
            sampler.sample(1, 20 + i, label=labels[i], solver="dpmpp_2m", steps=6).tobytes()
            == batch[i].tobytes()
        )
    mixed = sampler.sample(
        3, 20, label=labels[:3], guidance=[2.0, None, 1.0], solver="dpmpp_2m", steps=6
    )
    assert mixed[0].tobytes() == batch[0].tobytes()


def test_the_time_is_not_rounded_to_bf16(precise: Path) -> None:
    """bf16 cannot represent 999 or 1001: the difference between such times must be that of
    float32."""
    if not BF16:
        pytest.skip("this processor has no bf16")
    state = np.random.default_rng(1).normal(size=(2, R, 1, 8, 8)).astype(np.float32)
    exact, rounded = (OpenVino(Bundle.load(precise), p, 1) for p in ("fp32", "bf16"))
    answers = {t: one_row(rounded, state, False, t)[1] for t in (996.0, 998.0, 1000.0)}
    assert len({a.tobytes() for a in answers.values()}) == 3, (
        "bf16 would round all three times to 1000 or 996"
    )
    error = np.abs(answers[998.0] - one_row(exact, state, False, 998.0)[1]).max()
    assert 0 < error < 0.05


def test_float32_agrees_with_onnx_runtime(precise: Path, sampler: Sampler) -> None:
    other = Sampler.load(precise, "openvino")
    settings = {"label": [1, 2, 3, None], "solver": "ddpm", "steps": 20}
    assert np.abs(other.sample(4, 0, **settings) - sampler.sample(4, 0, **settings)).max() < 2e-3


def checked_on_openvino(folder: Path) -> Bundle:
    """A bundle whose int8 was checked on OpenVINO, on any processor."""
    bundle = Bundle.load(folder)
    checked = {**bundle.report["int8"], "openvino": bundle.report["int8"]["onnxruntime"]}
    object.__setattr__(bundle, "report", {**bundle.report, "int8": checked})
    return bundle


def test_int8_is_offered_where_it_was_checked_and_nowhere_else(precise: Path, edited) -> None:
    bundle = checked_on_openvino(precise)
    assert ("openvino", "int8") in offered(bundle)
    unchecked = {
        p: {b: w for b, w in entry.items() if b != "openvino"} for p, entry in bundle.report.items()
    }
    object.__setattr__(bundle, "report", unchecked)
    with pytest.raises(
        RequestError,
        match="int8 of tiny was not checked on openvino; export it where openvino is installed and the processor computes int8",
    ):
        open_backend(bundle, "openvino", "int8")
    with pytest.raises(RequestError, match="openvino does not compute int8-trt, which is for GPUs"):
        open_backend(bundle, "openvino", "int8-trt")


def test_a_processor_without_bf16_is_told(precise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "Core", Core)
    with pytest.raises(BackendError, match=r"does not compute in bf16 .*: use fp32"):
        open_backend(Bundle.load(precise), "openvino", "bf16")


@pytest.mark.parametrize(
    ("found", "exact"),
    [
        ("fpu sse2 avx2 fma", False),
        ("fpu sse2 avx2 avx512f avx512bw", False),
        ("fpu sse2 avx2 avx_vnni", True),
        ("fpu sse2 avx2 avx512f avx512_vnni", True),
        ("fpu sse2 avx2 avx512f amx_tile amx_int8", True),
        ("fp asimd asimddp", True),
        ("", True),
    ],
)
def test_int8_needs_a_processor_that_adds_its_products_exactly(
    precise: Path, monkeypatch: pytest.MonkeyPatch, found: str, exact: bool
) -> None:
    """On one with AVX2 alone, 64·9 products of 1 · 1 added up to 291 instead of 576."""
    monkeypatch.setattr(openvino_backend, "flags", lambda: frozenset(found.split()))
    assert not lacks("fp32", openvino)
    assert bool(lacks("int8", openvino)) is not exact
    bundle = checked_on_openvino(precise)
    if exact:
        open_backend(bundle, "openvino", "int8")
    else:
        with pytest.raises(BackendError, match=r"does not compute int8 exactly .*: use fp32, or"):
            open_backend(bundle, "openvino", "int8")


def test_a_missing_library_says_how_to_install_it(
    precise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"pip install 'unnoise\[openvino\]'"):
        Sampler.load(precise, "openvino")


def test_what_was_compiled_is_kept_and_gives_the_same_bytes(opened: OpenVino, cache: Path) -> None:
    expected = one_row(opened, STATE, True)
    kept = {entry: entry.read_bytes() for entry in cache.iterdir()}
    assert len(kept) == 2  # that the plain graph was read, and the guided one for this batch
    again = open_backend(opened.bundle, "openvino", opened.precision)
    again._compile = lambda *_: pytest.fail("compiled again")
    again._model = lambda *_: pytest.fail("read again")
    assert [a.tobytes() for a in one_row(again, STATE, True)] == [e.tobytes() for e in expected]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_a_damaged_cache_changes_nothing(precise: Path, cache: Path, damage: str) -> None:
    """OpenVINO itself would not notice a flipped bit of a weight; it would sample other images."""
    expected = Sampler.load(precise, "openvino").sample(1, label=0, steps=2)
    entries = list(cache.iterdir())
    for entry in entries:
        data = bytearray(entry.read_bytes())
        data[len(data) // 2] ^= 1
        if damage == "foreign":
            cache_module.store(entry.stem, [b"what no OpenVINO has written"])
        else:
            entry.write_bytes(
                {"flip": bytes(data), "cut": data[: len(data) // 2], "empty": b""}[damage]
            )
    assert (
        Sampler.load(precise, "openvino").sample(1, label=0, steps=2).tobytes()
        == expected.tobytes()
    )
    assert sorted(cache.iterdir()) == sorted(entries)


def test_two_processes_may_fill_the_cache_at_once(precise: Path, cache: Path, root: Path) -> None:
    code = (
        "import sys; from runtime import Sampler\n"
        f"sampler = Sampler.load({str(precise)!r}, 'openvino', threads=1)\n"
        "sys.stdout.buffer.write(b''.join(sampler.sample(n, label=0, steps=2)[0].tobytes() for n "
        "in (1, 2, 3)))"
    )
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) for _ in range(2)]
    first, second = (process.communicate()[0] for process in running)
    assert first == second
    assert len(first) == 3 * 64 * 4
    assert all(process.returncode == 0 for process in running)
    assert not [entry for entry in cache.iterdir() if entry.suffix != cache_module.SUFFIX]


@pytest.mark.skipif(sys.platform != "linux", reason="stack_t is Linux's")
def test_the_stack_for_signals_stays_the_threads_own(precise: Path, root: Path) -> None:
    """OpenVINO installs a signal stack and frees it later; the next signal would then end the
    process. This happens once per process."""
    code = (
        "import ctypes; from runtime import Sampler; from runtime.backends.openvino import "
        "_SignalStack\n"
        "def now():\n    s = _SignalStack(); ctypes.CDLL(None).sigaltstack(None, "
        "ctypes.byref(s)); return s.start, s.flags\n"
        "before = now()\n"
        f"sampler = Sampler.load({str(precise)!r}, 'openvino', threads=1)\n"
        "sampler.sample(2, 0, label=0, steps=2, guidance=2.0)\n"
        "assert now() == before, (now(), before)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


@pytest.mark.parametrize("guided", [False, True])
def test_the_parts_together_are_the_whole(precise: Path, guided: bool) -> None:
    """Each part in float32 gives the same D and state, bit for bit. The network gets neither the
    time nor a register."""
    backend = OpenVino(Bundle.load(precise), "fp32", 1)
    whole = one_row(backend, STATE, guided)
    model = backend._model(step_file(guided)).clone()
    model.reshape(
        {i.any_name: list(shapes(backend.bundle, len(STATE))[i.any_name]) for i in model.inputs}
    )
    head, network, tail = split(model)
    assert {i.any_name for i in head.inputs} == {"state", "call", "label"}
    assert all(i.any_name.startswith("cut") for i in network.inputs)
    assert [o.shape for o in network.outputs] == [[(1 + guided) * len(STATE), 1, 8, 8]]
    assert "Convolution" not in {n.get_type_name() for part in (head, tail) for n in part.get_ops()}
    parts = [
        backend._core.compile_model(part, "CPU", config)
        for part, config in zip((head, network, tail), backend._configs(3, 1), strict=True)
    ]
    backend._compiled[step_file(guided), len(STATE), 1] = Compiled(parts)
    assert [a.tobytes() for a in one_row(backend, STATE, guided)] == [w.tobytes() for w in whole]


@pytest.mark.parametrize(
    ("phases", "joined"), [((12, 6, 4), True), ((12, 4, 6), False), ((6, 12, 4), False)]
)
def test_phases_become_one_operation_with_the_same_bytes(
    phases: tuple[int, int, int], joined: bool
) -> None:
    """The transposes of `export.graph.folding` for three channels of 12×8, and what is cut alike."""
    from openvino import opset13 as operations

    given = operations.parameter([-1, *phases], np.float32)
    value = given
    for shape, order in (([-1, 2, 72], [0, 2, 1]), ([-1, 2, 18, 8], [0, 2, 1, 3])):
        value = operations.reshape(value, np.array(shape), False)
        value = operations.transpose(value, np.array(order))
    image = operations.reshape(value, np.array([-1, 3, 12, 8]), False)
    model = openvino.Model([operations.result(image)], [given], "phases")
    x = np.random.default_rng(0).normal(size=(2, *phases)).astype(np.float32)
    core = openvino.Core()
    before = core.compile_model(model, "CPU")(x)[0].tobytes()
    join_phases(model)
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    assert kinds.count("DepthToSpace") == joined
    assert kinds.count("Transpose") == 2 * (not joined)
    assert core.compile_model(model, "CPU")(x)[0].tobytes() == before


def test_weights_are_put_inside_byte_for_byte(precise: Path) -> None:
    """Also in the body of a Loop. onnx reads the external data itself, and records each tensor's
    new place."""
    for folder, name in (
        ("fp32", "step.onnx"),
        ("int8", "step.onnx"),
        ("fp32", "sampler_guided.onnx"),
    ):
        path = precise / folder / name
        inside = onnx.load_model_from_string(
            with_weights(path.read_bytes(), (path.parent / "weights.bin").read_bytes())
        )
        expected = onnx.load(path)
        for tensor in external_data_helper._get_all_tensors(expected):
            tensor.ClearField("data_location")
        assert inside == expected


def test_a_graph_that_may_never_be_read_to_its_end_is_refused(precise: Path) -> None:
    """A node before its input, on which OpenVINO hangs; a node that reads itself; a Loop, also
    inside an If."""
    model = onnx.load(precise / "fp32" / "step.onnx", load_external_data=False)
    check_graph(model.SerializeToString())
    early = onnx.ModelProto.FromString(model.SerializeToString())
    early.graph.node.insert(0, early.graph.node.pop())
    own = onnx.ModelProto.FromString(model.SerializeToString())
    own.graph.node[-1].input[0] = own.graph.node[-1].output[0]
    for bad in (early, own):
        with pytest.raises(BundleError, match="read before it is made"):
            check_graph(bad.SerializeToString())
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Loop", ["n", "go"], ["x"])], "then", [], []
    )
    branch = onnx.helper.make_node("If", ["yes"], ["x"], then_branch=body)
    model.graph.node.append(branch)
    with pytest.raises(BundleError, match="it has a Loop"):
        check_graph(model.SerializeToString())


def in_file(**more: Any) -> onnx.TensorProto:
    """A tensor whose bytes are in a file that libraries would look for in the working folder."""
    tensor = onnx.TensorProto(name="t", dims=[1], data_type=onnx.TensorProto.UINT8, **more)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="a")
    return tensor


@pytest.mark.parametrize("place", ["constant", "branch", "sparse", "function"])
def test_a_tensor_in_a_file_is_refused_wherever_a_library_would_read_it(
    precise: Path, place: str
) -> None:
    model = onnx.load(precise / "fp32" / "step.onnx", load_external_data=False)
    constant = onnx.helper.make_node("Constant", [], ["c"], value=in_file())
    if place == "constant":
        model.graph.node.append(constant)
    elif place == "function":
        model.functions.add(name="f", domain="d").node.append(constant)
    elif place == "branch":
        body = onnx.helper.make_graph([], "then", [], [], initializer=[in_file()])
        model.graph.node.append(onnx.helper.make_node("If", ["yes"], ["x"], then_branch=body))
    else:
        model.graph.sparse_initializer.add().values.CopyFrom(in_file())
    with pytest.raises(BundleError, match="stored in a file"):
        check_graph(model.SerializeToString())


def test_a_tag_that_other_readers_would_cut_is_refused(precise: Path) -> None:
    """They read 32 bits of it: field 13 + 2^29 would be field 13, the tensor's file."""
    large = ((13 + 2**29) << 3) | 2
    tag = bytes([large >> 7 * i & 127 | (128 if i < 4 else 0) for i in range(5)])
    entry = in_file().SerializeToString()
    tensor = entry[: entry.index(b"\x6a")] + tag + entry[entry.index(b"\x6a") + 1 :]
    graph = onnx.GraphProto(name="g").SerializeToString()
    graph += bytes([5 << 3 | 2, len(tensor)]) + tensor
    model = bytes([7 << 3 | 2, len(graph)]) + graph
    with pytest.raises(BundleError, match="number is too large"):
        with_weights(model, b"")
    node = onnx.helper.make_node("Constant", [], ["c"], value=onnx.TensorProto())
    hidden = node.SerializeToString() + tag + b"\x00"
    graph = bytes([1 << 3 | 2, len(hidden)]) + hidden
    with pytest.raises(BundleError, match="number is too large"):
        check_graph(bytes([7 << 3 | 2, len(graph)]) + graph)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../secret", "is stored in the file '../secret'"),
        ("location", "/etc/passwd", "keep weights in 'weights.bin' alone"),
        (
            "location",
            "*/_ORT_MEM_ADDR_/*",
            "keep weights in 'weights.bin' alone",
        ),  # to OpenVINO: at that address
        ("offset", str(10**12), "which has"),
        ("length", "-1", "has offset"),
    ],
)
def test_no_path_in_a_graph_is_followed(precise: Path, key: str, value: str, message: str) -> None:
    model = onnx.load(precise / "fp32" / "step.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    with pytest.raises(BundleError, match=message):
        with_weights(model.SerializeToString(), (precise / "fp32" / "weights.bin").read_bytes())


@pytest.mark.parametrize(
    "data", [b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"\x3a\x7f\x00", bytes(range(1, 200))]
)
def test_what_is_no_onnx_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="no step graph"):
        with_weights(data, b"")


def test_what_missed_its_bounds_is_not_offered(precise: Path) -> None:
    bundle = Bundle.load(precise)
    report = {p: {b: dict(e) for b, e in entries.items()} for p, entries in bundle.report.items()}
    report["int8"]["openvino"] = {**report["int8"]["onnxruntime"], "missed": 2}
    object.__setattr__(bundle, "report", report)
    assert ("openvino", "int8") not in offered(bundle)
    with pytest.raises(
        RequestError, match=r"int8 of tiny missed its bounds on openvino when it was exported"
    ):
        open_backend(bundle, "openvino", "int8")


def test_compiled_models_depend_on_the_instructions(
    precise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = OpenVino(Bundle.load(precise), "fp32", 1)
    before = backend._key("step.onnx", 1, 1)
    monkeypatch.setattr(openvino_backend, "flags", lambda: frozenset({"sse2"}))
    assert backend._key("step.onnx", 1, 1) != before
