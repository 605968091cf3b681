"""TensorRT-RTX parses and builds real engines, which needs no GPU; a cache stores them.

Deserialising needs a driver. So the tests read an engine's inputs from the parsed network, its
profiles, and the strings in the plan.
"""

import itertools
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from export import engines as builder
from export.errors import ExportError
from export.graph.cached_engines import Order, build, build_all, choose, ensure
from export.graph.precision import to_float16
from export.graph.quantization import Range, layers, quantize
from export.graph.tensorrt import Chosen
from runtime import BackendError, Bundle, RequestError
from runtime.backends.nvidia import engine_cache as engines
from runtime.backends.nvidia.engine_cache import Entry
from runtime.backends.onnxfile import with_weights
from runtime.backends.ports import shapes
from runtime.errors import EngineError, NoDriverError, NoGpuError

from ..traces import traced_step

ADA = Order("tensorrt-rtx", "8.9", (2,))
trt: Any = pytest.importorskip("tensorrt_rtx")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNNOISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


class Recorded:
    """The library, with a record of each call's arguments and result."""

    def __init__(self, module: Any, returns: dict[str, Any] | None = None) -> None:
        self._module, self._returns, self.seen = module, returns or {}, {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return (
            self.wrapped(name, found)
            if name in ("Builder", "OnnxParser", "IBuilderConfig")
            else found
        )

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            plain = [a._thing if isinstance(a, Spy) else a for a in arguments]
            answer = self._returns.get(name, function)
            found = answer(*plain, **named) if callable(answer) else answer
            self.seen.setdefault(name, []).append((plain, found))
            kinds = (self._module.Builder, self._module.OnnxParser, self._module.IBuilderConfig)
            return Spy(found, self) if isinstance(found, kinds) else found

        return call


class Spy:
    def __init__(self, thing: Any, recorded: Recorded) -> None:
        object.__setattr__(self, "_thing", thing)
        object.__setattr__(self, "_recorded", recorded)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._thing, name)
        return self._recorded.wrapped(name, found) if callable(found) else found

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._thing, name, value)


def spying(returns: dict[str, Any] | None = None) -> tuple[Chosen, Recorded]:
    recorded = Recorded(trt, returns)
    recorded.__name__, recorded.__version__ = trt.__name__, trt.__version__
    return Chosen(recorded, choose(ADA).gpu), recorded


def as_tensorrt(returns: dict[str, Any]) -> Chosen:
    """The same library under TensorRT's name, without what only TensorRT-RTX has. Its builder
    cannot run here."""
    _, recorded = spying({"build_serialized_network": b"plan", **returns})
    recorded.__name__, recorded.__version__ = "tensorrt", "11.4.0"
    recorded.BuilderFlag = SimpleNamespace(TF32=trt.BuilderFlag.TF32)
    return Chosen(recorded, engines.Gpu("L4", "8.9", "CUDA 13.0"))


def check_network(
    recorded: Recorded, wanted: dict[str, tuple[int, ...]], buckets: tuple[int, ...]
) -> None:
    """The parsed network's inputs and outputs, their types and shapes, and each profile, are those
    of a step graph."""
    (_, network), *_ = recorded.seen["create_network"]
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    assert {p.name for p in inputs} == wanted.keys() - {"next_state", "denoised"}
    assert {p.name for p in outputs} == {"next_state", "denoised"}
    for port in (*inputs, *outputs):
        assert tuple(port.shape) == (-1, *wanted[port.name][1:])
        assert port.dtype == (trt.int64 if port.name == "label" else trt.float32)
    profiles = [given[0] for given, _ in recorded.seen["add_optimization_profile"]]
    assert [index for _, index in recorded.seen["add_optimization_profile"]] == list(
        range(len(buckets))
    )
    for bucket, profile in zip(buckets, profiles, strict=True):
        for port in inputs:
            assert [tuple(s) for s in profile.get_shape(port.name)] == [
                (bucket, *wanted[port.name][1:])
            ] * 3
    (_, config), *_ = recorded.seen["create_builder_config"]
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM89
    assert config.max_aux_streams == 0


QUICK = {("fp32", "step_guided.onnx"), ("int8-trt", "step.onnx")}


@pytest.mark.parametrize(
    ("precision", "graph"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK else [pytest.mark.slow])
        for pair in itertools.product(
            ["fp32", "fp16", "int8-trt"], ["step.onnx", "step_guided.onnx"]
        )
    ],
)
def test_the_shipped_bundle_builds(shipped: Bundle, precision: str, graph: str) -> None:
    chosen, recorded = spying()
    entry = ensure(shipped, precision, graph, chosen, ADA)
    check_network(recorded, shapes(shipped, 2), (2,))
    plan = engines.load(entry)
    assert len(plan) == entry.size > 1e6
    for name in ("state", "noise", "call", "update", "label", "next_state", "denoised"):
        assert name.encode() in plan


@pytest.mark.slow
def test_every_bucket_is_a_static_profile(small: Bundle) -> None:
    chosen, recorded = spying()
    ensure(small, "fp32", "step_guided.onnx", chosen, Order("tensorrt-rtx", "8.9"))
    check_network(recorded, shapes(small, 2), (1, 2, 4, 8, 16))


@pytest.mark.slow
def test_a_network_of_cifars_shape_builds_in_every_precision(root: Path) -> None:
    """google/ddpm-cifar10-32's published shape, 35.7 M parameters, random weights; int8 over
    made-up ranges."""
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DModel

    from export.sources.module import from_module

    sys.path.insert(0, str(root / "benchmarks"))
    try:
        from backends import CIFAR
    finally:
        sys.path.pop(0)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = UNet2DModel(**CIFAR)

        def forward(self, x: Any, time: Any) -> Any:
            return self.network(x, time, return_dict=False)[0]

    module = Network().eval().requires_grad_(False)
    model = from_module(
        module, name="cifar", sample_shape=(3, 32, 32), prediction="epsilon", schedule="linear"
    )
    step = traced_step(model, False)
    found = layers(step)
    assert sum(p.numel() for p in module.parameters()) == 35_746_307
    wanted = {
        "state": (2, 4, 3, 32, 32),
        "noise": (2, 3, 32, 32),
        "call": (2, 6),
        "update": (2, 4, 6),
    }
    wanted |= {"next_state": (2, 4, 3, 32, 32), "denoised": (2, 3, 32, 32)}
    sizes = {}
    for name, change in (
        ("fp32", lambda p: p),
        ("fp16", to_float16),
        ("int8-trt", lambda p: quantize(p, [Range(-3.0, 3.0)] * len(found), (), signed=True)),
    ):
        chosen, recorded = spying()
        sizes[name] = len(
            build(chosen, change(step).SerializeToString(), ADA, f"cifar/{name}/step.onnx")
        )
        check_network(recorded, wanted, (2,))
    assert sizes["int8-trt"] < sizes["fp16"] < sizes["fp32"]


@pytest.fixture
def small(tiny_bundle: Path) -> Bundle:
    return Bundle.load(tiny_bundle)


@pytest.mark.slow
def test_an_engine_is_built_once_and_again_where_it_is_stale_or_damaged_and_the_log_says_why(
    small: Bundle,
    place: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.WARNING)
    first = build_all(small, ADA)
    assert [e.recipe.graph for e in first] == ["step.onnx", "step_guided.onnx"]
    assert build_all(small, ADA) == first
    assert capsys.readouterr().out.count("there:") == 2
    assert not caplog.records

    def again(because: str) -> Entry:
        caplog.clear()
        entry = ensure(small, "fp32", "step.onnx", choose(ADA), ADA)
        assert because in caplog.text
        assert engines.load(entry)
        return entry

    engine = place / f"{first[0].sha256}.engine"
    engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    again("is not what was built")
    next(place.glob("*.engine")).unlink()
    (place / f"{first[0].recipe.key}.json").write_text("{")
    again("its record cannot be read")
    record = place / f"{first[0].recipe.key}.json"
    record.write_text(record.read_text().replace('"8.9"', '"8.6"'))
    again("its record is of another engine")
    monkeypatch.setattr(trt, "__version__", "1.9.9")
    again("version was 1.7")
    assert len(list(place.glob("*.json"))) == 3


def test_a_plan_in_a_bundle_is_never_read(small: Bundle, place: Path, bundle_copy: Path) -> None:
    entry = ensure(small, "fp32", "step.onnx", choose(ADA), ADA)
    data, record = engines.load(entry), (place / f"{entry.recipe.key}.json").read_bytes()
    engines.clear()
    for folder in (bundle_copy, bundle_copy / "engines", bundle_copy / "fp32"):
        folder.mkdir(exist_ok=True)
        (folder / f"{entry.sha256}.engine").write_bytes(data)
        (folder / f"{entry.recipe.key}.json").write_bytes(record)
    copy = Bundle.load(bundle_copy)
    with pytest.raises(
        EngineError, match=r"no engine of .* Build it: python -m export.engines build"
    ):
        engines.find(
            copy, "fp32", "step.onnx", trt.__name__, trt.__version__, engines.Gpu("", "8.9", "")
        )


def test_what_is_asked_for_and_cannot_be_built_is_an_error(
    small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="--engine none builds nothing"):
        choose(Order("none"))
    with pytest.raises(RequestError, match=r"unknown engine 'tensort'. Did you mean"):
        Order("tensort")
    with pytest.raises(RequestError, match="rising numbers"):
        Order(buckets=(4, 2))
    with pytest.raises(RequestError, match="TensorRT builds for the GPU it runs on"):
        Order("tensorrt", "8.9")
    with pytest.raises(EngineError, match=r"no compute capability '9.0'; it knows 7.5"):
        build_all(small, Order("tensorrt-rtx", "9.0"))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"unnoise\[tensorrt\]"):
        build_all(small, Order("tensorrt"))
    monkeypatch.setenv("UNNOISE_CACHE", "off")
    with pytest.raises(EngineError, match="turned off"):
        build_all(small, ADA)


REFUSALS: dict[str, tuple[Any, str]] = {
    "parse": (False, "cannot parse it"),
    "build_serialized_network": (None, "built no engine"),
    "add_optimization_profile": (-1, "a profile for batches of 2 is not valid"),
    "set_compute_capability": (False, "does not build for compute capability SM89"),
}


@pytest.mark.parametrize("call", REFUSALS)
def test_a_call_that_returns_false_or_none_is_an_export_error(
    call: str, small: Bundle, place: Path
) -> None:
    returned, said = REFUSALS[call]
    chosen, _ = spying({call: returned})
    with pytest.raises(ExportError, match=said):
        ensure(small, "fp32", "step.onnx", chosen, ADA)
    assert not list(place.glob("*"))


def test_a_node_that_the_parser_refuses_is_named(shipped: Bundle) -> None:
    """The int8 graphs for CPUs have zero points, which TensorRT does not accept."""
    with pytest.raises(ExportError, match=r"Quantize: .*zero point is not supported"):
        ensure(shipped, "int8", "step.onnx", choose(ADA), ADA)


def test_weights_come_from_memory_and_no_path_is_followed(shipped: Bundle, tmp_path: Path) -> None:
    """A model whose external weights are outside the bundle raises an error before the library sees
    it."""
    model = onnx.load(str(shipped.path / "fp32" / "step.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    tensor.external_data[0].value = "../../secret"
    from runtime.backends.onnxfile import with_weights
    from runtime.errors import BundleError

    with pytest.raises(BundleError, match="secret"):
        with_weights(model.SerializeToString(), shipped.read("fp32/weights.bin"))


def test_the_command_builds_lists_and_clears(
    tiny_bundle: Path, capsys: pytest.CaptureFixture
) -> None:
    rtx = ["--engine", "tensorrt-rtx", "--compute-capability", "8.9", "--batch-buckets", "1"]
    assert builder.main(["build", str(tiny_bundle), *rtx]) == 0
    capsys.readouterr()
    assert builder.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("tiny fp32 step" in line and "compute capability 8.9" in line for line in lines)
    assert builder.main(["clear", lines[0].split()[0]]) == 0
    assert "1 engines removed" in capsys.readouterr().out
    assert builder.main(["clear"]) == 0
    assert builder.main(["list"]) == 0
    assert "no engines" in capsys.readouterr().out.splitlines()[-1]


def no_gpu() -> bool:
    try:
        choose(Order())
    except BackendError:
        return True
    return False


@pytest.mark.skipif(not no_gpu(), reason="this machine has a GPU")
def test_auto_without_a_gpu_says_that_no_engine_was_built_and_why(
    small: Bundle, capsys: pytest.CaptureFixture, place: Path
) -> None:
    builder.after_export(small, Order(), typed=True)
    assert "no engine was built: " in capsys.readouterr().out
    builder.after_export(small, Order(), typed=False)
    builder.after_export(small, Order("none"), typed=True)
    assert capsys.readouterr().out == ""
    for named in (Order("tensorrt-rtx"), Order("tensorrt")):
        with pytest.raises(BackendError):
            builder.prepare(named)
    with pytest.raises(NoDriverError, match="no NVIDIA driver"):
        builder.after_export(small, Order("tensorrt-rtx"), typed=True)


@pytest.mark.slow
def test_two_processes_build_at_once(
    small: Bundle, tiny_bundle: Path, root: Path, place: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "export.engines",
        "build",
        str(tiny_bundle),
        "--engine",
        "tensorrt-rtx",
    ]
    command += ["--compute-capability", "8.9", "--batch-buckets", "1"]
    running = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate() and process.returncode for process in running] == [0, 0]
    found = [entry for _, entry in engines.entries()]
    assert len(found) == 2
    assert all(engines.load(entry) for entry in found)


class Timings:
    """A timing cache: what it was made from, and one more."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"t"


def test_tensorrts_timings_are_kept_and_begin_anew_where_they_are_anothers(
    small: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attached = list[tuple[bytes, bool]]()

    def attach(timings: Timings, ignore_mismatch: bool) -> bool:
        attached.append((timings.data, ignore_mismatch))
        return timings.data != b"other"

    chosen = as_tensorrt({"create_timing_cache": Timings, "set_timing_cache": attach})
    order = Order("tensorrt", buckets=(2,), timing_cache=tmp_path / "timings")
    model = small.read("fp32/step.onnx")
    with_inside = with_weights(model, small.read("fp32/weights.bin"))
    for _ in range(2):
        assert build(chosen, with_inside, order, "a") == b"plan"
    (tmp_path / "timings").write_bytes(b"other")
    assert build(chosen, with_inside, order, "a") == b"plan"
    assert attached == [(b"", False), (b"t", False), (b"other", False), (b"", False)]
    assert (tmp_path / "timings").read_bytes() == b"t"
    assert "is of another machine or version" in caplog.text
    build(chosen, with_inside, Order("tensorrt", buckets=(2,)), "a")
    assert len(list((tmp_path / "cache" / "engines").glob("timings-*.cache"))) == 1


def test_a_builder_that_finds_no_gpu_is_told(small: Bundle) -> None:
    """TensorRT's factory returns nullptr here; its bindings raise TypeError."""

    def nothing(log: Any) -> Any:
        log.log(trt.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(
        NoGpuError, match=r"tensorrt cannot build here .CUDA initialization failure with error: 35"
    ):
        ensure(small, "fp32", "step.onnx", as_tensorrt({"Builder": nothing}), Order("tensorrt"))


def test_an_engine_of_tensorrt_is_for_one_gpu_and_driver_and_one_of_rtx_for_a_capability(
    small: Bundle,
) -> None:
    gpu = engines.Gpu("L4", "8.9", "CUDA 13.0")
    assert engines.target("tensorrt", gpu) == gpu
    assert engines.target("tensorrt_rtx", gpu) == engines.Gpu("", "8.9", "")


@pytest.mark.skipif(not no_gpu(), reason="this machine has a GPU")
def test_export_builds_the_engine_that_is_asked_for_or_fails_before_it_begins(
    tiny_run: Path,
    small: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    from export import build as command

    given = [str(tiny_run), "--fp16", "--out", str(tmp_path / "out"), "--batch-buckets", "1"]
    monkeypatch.setattr(command, "build", lambda *_, **__: pytest.fail("the export began"))
    assert command.main([*given, "--engine", "tensorrt-rtx"]) == 2
    assert "no NVIDIA driver" in capsys.readouterr().err
    monkeypatch.setattr(command, "build", lambda *_, **__: small)  # as if it had been exported
    assert command.main(given) == 0
    assert "no engine was built: tensorrt: " in capsys.readouterr().out
    assert not list(engines.entries())
    assert command.main([*given, "--compute-capability", "8.6"]) == 0
    found = [entry for _, entry in engines.entries()]
    assert len(found) == 2
    assert all(e.recipe.gpu.compute_capability == "8.6" and e.recipe.buckets == (1,) for e in found)
