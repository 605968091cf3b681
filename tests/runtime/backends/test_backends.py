"""The ONNX Runtime backend: exact identity rows, buffers bound once, clear errors."""

import dataclasses
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from runtime import BackendError, Bundle, RequestError, Sampler
from runtime.backends import processor, survey
from runtime.backends.nvidia import cuda
from runtime.backends.registry import open_backend
from runtime.engine import costs


@pytest.mark.parametrize("guided", [False, True])
def test_an_identity_row_returns_the_state_bit_for_bit(sampler: Sampler, guided: bool) -> None:
    buffers = sampler.backend.bind(3)
    state = (
        np.random.Generator(np.random.Philox(key=1))
        .standard_normal(buffers.state.shape)
        .astype(np.float32)
    )
    buffers.state[:] = state
    buffers.call[:] = (999, 1, 0, 0, 1, 2)
    buffers.update[:] = np.eye(4, 6)
    buffers.step(guided)
    assert buffers.state.tobytes() == state.tobytes()


def test_buffers_are_bound_once_and_the_two_states_take_turns(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = sampler.backend.bind(2)
    buffers.step(False)
    second = buffers.state
    buffers.step(False)
    first = buffers.state
    assert not np.shares_memory(first, second)
    monkeypatch.setattr(type(buffers), "_bind", lambda *_: pytest.fail("bound again"))
    for expected in (second, first, second):
        buffers.step(False)
        assert buffers.state is expected


def test_the_memory_of_a_batch_is_reused(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler.sample(4, label=1, steps=2)
    monkeypatch.setattr(type(sampler.backend), "bind", lambda *_: pytest.fail("made again"))
    sampler.sample(4, label=1, steps=2)


def test_an_unknown_backend_or_precision_is_refused_with_what_there_is(tiny_bundle: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    with pytest.raises(
        RequestError, match=r"unknown backend 'onnxruntim'. Did you mean 'onnxruntime'"
    ):
        open_backend(bundle, "onnxruntim")
    with pytest.raises(RequestError, match=r"unknown precision 'fp61'. Did you mean 'fp16'"):
        open_backend(bundle, precision="fp61")
    with pytest.raises(
        RequestError,
        match=r"tiny has no int8; export it with --int8. This bundle runs as: onnxruntime fp32",
    ):
        open_backend(bundle, precision="int8")
    with pytest.raises(RequestError, match="onnxruntime does not compute bf16"):
        open_backend(bundle, "onnxruntime", "bf16")
    with pytest.raises(RequestError, match="`threads` must be 1 to"):
        open_backend(bundle, threads=0)


def test_a_missing_library_says_how_to_install_it(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install 'unnoise\[cpu\]'"):
        Sampler.load(tiny_bundle)


def test_the_thread_count_is_taken(tiny_bundle: Path, sampler: Sampler) -> None:
    one = Sampler.load(tiny_bundle, threads=1)
    np.testing.assert_allclose(
        one.sample(2, label=1, steps=3), sampler.sample(2, label=1, steps=3), atol=1e-5
    )


def test_threads_rest_between_calls() -> None:
    """If they kept a core busy for a while, the next call would be slower if it is in streams."""
    buffers = Sampler.load("emoji32", threads=2).backend.bind(4)
    for _ in range(3):
        buffers.step(False)
    begun = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - begun < 0.02


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_container_s_quota_bounds_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert processor.quota(tmp_path) == cores
    monkeypatch.setattr(processor, "quota", lambda: 1)
    assert processor.usable_cores() == 1


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-cuda", "openvino"])
def test_what_an_uninstalled_library_leaves_counts_as_missing(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """To uninstall one of ONNX Runtime's two packages leaves a folder of the other one."""
    module = name.partition("-")[0]
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    with pytest.raises(BackendError, match=r"cannot be imported .* Install it: pip install"):
        open_backend(Bundle.load(tiny_bundle), name)
    monkeypatch.setattr(survey, "find_spec", lambda name: ModuleSpec(name, None))
    found = survey.backends()[name]
    assert (found["version"], found["precisions"]) == (None, [])
    assert str(found["missing"]).startswith("pip install")


def test_a_library_that_does_not_start_is_one_line_of_the_survey(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    spec = ModuleSpec("openvino", None, origin="openvino/__init__.py")
    monkeypatch.setattr(survey, "find_spec", lambda name: spec if name == "openvino" else None)
    found = survey.backends()["openvino"]
    assert found["precisions"] == []
    assert str(found["missing"]).startswith("it does not start: ModuleNotFoundError")


def test_the_survey_sees_which_of_the_two_packages_of_onnxruntime_was_installed_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both are listed as installed, and the later one has overwritten the module."""
    monkeypatch.setattr(survey, "_version", lambda name: "1.32.0")
    monkeypatch.setattr(cuda, "cudart", lambda extra: None)
    monkeypatch.setattr(cuda, "Cuda", lambda api: api)
    found = survey.backends()["onnxruntime-cuda"]
    assert found["precisions"] == []
    assert "the onnxruntime that is installed has no CUDA" in str(found["missing"])


def test_a_precision_that_missed_its_bounds_on_onnxruntime_is_said_so_for_a_gpu(
    tiny_bundle: Path,
) -> None:
    bundle = Bundle.load(tiny_bundle)
    files = {**bundle.files, "fp16/step.onnx": bundle.files["fp32/step.onnx"]}
    report = {**bundle.report, "fp16": {"onnxruntime": {"missed": 1}}}
    bundle = dataclasses.replace(bundle, files=files, report=report)
    with pytest.raises(RequestError, match="fp16 of tiny missed its bounds on onnxruntime"):
        open_backend(bundle, "tensorrt", "fp16")


def test_what_is_cached_depends_on_the_instructions(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Virtual machines of one name have them or not."""
    bundle = Bundle.load(tiny_bundle)
    before = costs.graphs_here(bundle)
    monkeypatch.setattr(costs, "flags", lambda: frozenset({"sse2"}))
    assert costs.graphs_here(bundle) != before
