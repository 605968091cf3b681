"""backend="fastest": the proved pairs, which is chosen, and what is kept."""

import dataclasses
from pathlib import Path

import pytest

from runtime import BackendError, Bundle, RequestError, Sampler
from runtime.engine import fastest as module
from runtime.engine.fastest import LIMIT_S, Wish, fastest, proved

from ...small_bundle import write_small_bundle
from ...small_streams import StreamedBackend

MS = {"onnxruntime fp32": 0.02, "openvino fp32": 0.01, "openvino int8": 0.004}


def figures(psnr: float, ms: float, missed: int = 0) -> dict[str, object]:
    return {"psnr_db": psnr, "ms_a_call": {"1": ms}, "missed": missed}


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("UNNOISE_CACHE", str(tmp_path / "cache"))
    bundle = write_small_bundle(tmp_path / "bundle")
    files = {**bundle.files, "int8/step.onnx": bundle.files["fp32/step.onnx"]}
    report = {
        "fp32": {"onnxruntime": figures(200, 6), "openvino": figures(140, 7)},
        "bf16": {"openvino": figures(20, 1, missed=1)},
        "int8": {"onnxruntime": figures(40.5, 11), "openvino": figures(40, 4)},
    }
    return dataclasses.replace(bundle, files=files, report=report)


class Opened:
    """The pairs that were opened. Opening takes 0.5 s, and a call as long as MS says."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.backends: list[StreamedBackend] = []
        self.growth = 1.0

    def clock(self) -> float:
        return 0.5 * len(self.backends) + sum(backend.now for backend in self.backends)

    def open(self, bundle: Bundle, name: str, precision: str, *_: object) -> StreamedBackend:
        pair = f"{name} {precision}"
        self.names.append(pair)
        if pair not in MS:
            raise BackendError(f"{name} cannot be imported: install it.")
        backend = StreamedBackend(bundle, {1: MS[pair]}, growth=self.growth)
        backend.name = name
        backend.precision = precision
        self.backends.append(backend)
        return backend


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    opened = Opened()
    monkeypatch.setattr(module, "open_backend", opened.open)
    return opened


def test_the_pairs(bundle: Bundle) -> None:
    assert proved(bundle, Wish()) == [("onnxruntime", "fp32"), ("openvino", "fp32")]
    near = proved(bundle, Wish(min_psnr=40.2))
    assert near == [("onnxruntime", "fp32"), ("openvino", "fp32"), ("onnxruntime", "int8")]
    assert proved(bundle, Wish(min_psnr=10))[0] == ("openvino", "int8")
    assert ("openvino", "bf16") not in proved(bundle, Wish(min_psnr=0))
    assert proved(bundle, Wish("int8", 40.2)) == [("onnxruntime", "int8")]
    with pytest.raises(RequestError, match="was proved with a PSNR of 50 dB or more"):
        proved(bundle, Wish("int8", 50))


def test_a_wish_that_nothing_meets_says_what_to_pass(bundle: Bundle) -> None:
    with pytest.raises(RequestError, match=r"'int7'\. Did you mean 'int8'"):
        proved(bundle, Wish("int7"))
    with pytest.raises(RequestError, match="Pass another precision, or a backend by name"):
        proved(bundle, Wish("bf16"))
    with pytest.raises(RequestError, match="Pass a smaller min_psnr, or a backend by name"):
        proved(bundle, Wish("int8", 50))


def test_the_fastest_is_chosen_and_kept(bundle: Bundle, opened: Opened) -> None:
    choice, backend = fastest(bundle, Wish(), opened.clock)
    assert (backend.name, backend.precision) == ("openvino", "fp32")
    assert str(choice) == "fastest: openvino fp32 (onnxruntime fp32 20.0 ms, openvino fp32 10.0 ms)"
    assert opened.names == ["onnxruntime fp32", "openvino fp32"]
    again, _ = fastest(bundle, Wish(), opened.clock)
    assert (again.backend, again.ms) == (choice.backend, choice.ms)
    assert opened.names[2:] == ["openvino fp32"]


def test_a_time_of_a_busy_machine_is_measured_again(
    bundle: Bundle, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next process chooses rightly, and the one after it does not measure."""
    with monkeypatch.context() as patch:
        # Each call takes longer than the one before it.
        patch.setitem(MS, "openvino fp32", 0.04)
        patch.setattr(opened, "growth", 1.3)
        choice, _ = fastest(bundle, Wish(), opened.clock)
        assert (choice.backend, choice.settled) == ("onnxruntime", False)
    choice, _ = fastest(bundle, Wish(), opened.clock)
    assert (choice.backend, choice.settled) == ("openvino", True)
    before = len(opened.names)
    assert fastest(bundle, Wish(), opened.clock)[0].ms == choice.ms
    assert opened.names[before:] == ["openvino fp32"]


def test_a_long_call_is_measured_once(
    bundle: Bundle, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIMIT_S", 60)
    monkeypatch.setitem(MS, "onnxruntime fp32", 1.5)
    monkeypatch.setitem(MS, "openvino fp32", 1.2)
    choice, _ = fastest(bundle, Wish(), opened.clock)
    assert (choice.backend, choice.settled) == ("openvino", True)


def test_it_ends_in_time(bundle: Bundle, opened: Opened) -> None:
    choice, _ = fastest(bundle, Wish(min_psnr=10), opened.clock)
    assert len(choice.ms) == 3 < len(proved(bundle, Wish(min_psnr=10)))
    assert set(choice.left_out.values()) == {f"after {LIMIT_S:g} s"}
    assert not choice.settled


def test_a_library_that_is_missing_is_left_out(bundle: Bundle, opened: Opened) -> None:
    choice, _ = fastest(bundle, Wish(min_psnr=40.2), opened.clock)
    assert choice.left_out == {"onnxruntime int8": "onnxruntime cannot be imported"}
    with pytest.raises(BackendError, match="runs none of the proved pairs of small: onnxruntime"):
        fastest(bundle, Wish("int8", 40.2), opened.clock)


def test_a_sampler_says_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNNOISE_CACHE", str(tmp_path / "cache"))
    sampler = Sampler.load("emoji32", "fastest")
    assert sampler.chosen
    assert sampler.backend.precision == "fp32"
    assert sampler.backend.name in str(sampler.chosen)
    assert Sampler.load("emoji32").chosen is None
    with pytest.raises(RequestError, match="min_psnr"):
        Sampler.load("emoji32", min_psnr=40)
    with pytest.raises(RequestError, match="min_psnr"):
        Sampler.load("emoji32", "fastest", min_psnr=-1)


def test_the_next_process_takes_up_where_there_was_no_time(
    bundle: Bundle, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With networks that take seconds to open, each process tries one more pair."""
    monkeypatch.setattr(module, "LIMIT_S", 0.4)
    wish = Wish(min_psnr=10)
    for i in range(1, 5):
        choice, backend = fastest(bundle, wish, opened.clock)
        assert len(choice.ms) == min(i, 3)  # one pair of four cannot be opened
        assert f"{backend.name} {backend.precision}" == min(choice.ms, key=choice.ms.__getitem__)
    assert choice.settled
    before = len(opened.names)
    assert fastest(bundle, wish, opened.clock)[0].ms == choice.ms
    assert opened.names[before:] == ["openvino int8"]
