"""Forked processes: in a child, the parent's sampler raises an error, and the child always
exits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime import BackendError, Bundle, BundleError, RequestError, Sampler
from runtime.backends import forks
from runtime.backends.forks import ForkGuard

from ...root import ROOT

GUARD_S = 120
"""After this time a hung script and its children are killed. It is not a bound on speed."""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

PRELUDE = """
import gc, os, sys, threading
import multiprocessing as mp
from multiprocessing.pool import ThreadPool
from runtime import BackendError, Sampler

PATH, BACKEND = sys.argv[1:]


def load():
    return Sampler.load(PATH, BACKEND, threads=2, max_batch=4)


def draw(sampler, seed=0):
    return sampler.sample(1, seed, label=1, steps=2, guidance=2.0).tobytes()


def refused(call):
    try:
        call()
    except BackendError as error:
        assert "Load the bundle after the fork" in str(error), error
        return True
    return False
"""

CHILDREN = """
def untouched():
    return 7


def uses_it():
    return 7 if refused(lambda: draw(sampler)) and refused(lambda: sampler.backend.bind(1)) else 1


def steps_its_buffers():
    return 7 if refused(lambda: buffers.step(False)) else 1


def drops_it():
    global sampler, buffers
    sampler = buffers = None
    gc.collect()
    return 7


def closes_it():
    with sampler:
        pass
    return 7 if refused(lambda: draw(sampler)) else 1


def raises():
    raise ValueError("deliberate")


def loads_its_own():
    own = load()
    return 7 if draw(own) == expected else 1


def copies_it():
    import copy

    return 7 if draw(copy.copy(sampler)) == expected else 1


def uses_threads():
    own = load()
    with ThreadPool(3) as pool:
        drawn = pool.map(lambda seed: draw(own, seed), range(5))
    return 7 if drawn[0] == expected else 1


def forks_again():
    inner = os.fork()
    if inner == 0:
        sys.exit(uses_it())
    return os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])


sampler = load()
buffers = sampler.backend.bind(2)
expected = draw(sampler)
for child in (untouched, uses_it, steps_its_buffers, drops_it, closes_it, raises, loads_its_own):
    print(child.__name__, end=" ", flush=True)
    pid = os.fork()
    if pid == 0:
        sys.stderr = open(os.devnull, "w")
        sys.exit(child())
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
for child in (copies_it, uses_threads, forks_again):
    print(child.__name__, end=" ", flush=True)
    pid = os.fork()
    if pid == 0:
        sys.exit(child())
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
assert draw(sampler) == expected
"""

WORKERS = """
def in_worker(seed):
    return refused(lambda: draw(sampler, seed))


def own_in_worker(seed):
    return draw(load(), seed)


def sent(sampler, seed):
    return draw(sampler, seed)


if __name__ == "__main__":
    sampler = load()
    expected = [draw(sampler, seed) for seed in range(2)]
    with mp.get_context("fork").Pool(2) as pool:
        assert pool.map(in_worker, range(2)) == [True, True]
        assert pool.map(own_in_worker, range(2)) == expected
        assert pool.starmap(sent, [(sampler, 0), (sampler, 1)]) == expected
    process = mp.get_context("fork").Process(target=sys.exit, args=(7,))
    process.start()
    process.join()
    assert process.exitcode == 7
    with mp.get_context("spawn").Pool(1) as pool:
        assert pool.starmap(sent, [(sampler, 0), (sampler, 1)]) == expected
    print("done")
"""


def run(code: str, bundle: Path, backend: str, tmp_path: Path) -> str:
    """Run a script, which must succeed, and return what it prints; kill all of it if it hangs."""
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + code, encoding="utf-8")
    root = ROOT
    environment = {**os.environ, "PYTHONPATH": str(root), "UNNOISE_CACHE": str(tmp_path / "cache")}
    environment["PYTHONWARNINGS"] = "ignore"  # Python 3.12 warns of forks in processes with threads
    with (tmp_path / "output").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, str(script), str(bundle), backend],
            cwd=root,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code_of_exit = process.wait(GUARD_S)
        except subprocess.TimeoutExpired:
            code_of_exit = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        printed = output.read()
    assert code_of_exit == 0, f"{'hung' if code_of_exit is None else code_of_exit}:\n{printed}"
    return printed


@pytest.fixture(params=["onnxruntime", "openvino"])
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return request.param


@needs_fork
def test_a_forked_child_is_refused_and_exits_with_its_own_status(
    tiny_bundle: Path, backend: str, tmp_path: Path
) -> None:
    printed = run(CHILDREN, tiny_bundle, backend, tmp_path)
    statuses = dict(line.split() for line in printed.splitlines())
    assert len(statuses) == 10
    assert statuses.pop("raises") == "1"
    assert set(statuses.values()) == {"7"}, printed


@needs_fork
def test_workers_of_multiprocessing(tiny_bundle: Path, backend: str, tmp_path: Path) -> None:
    """Forked workers cannot use the parent's sampler; one that is sent to them is loaded there."""
    assert "done" in run(WORKERS, tiny_bundle, backend, tmp_path)


def test_another_process_id_is_refused_by_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = ForkGuard("anything", object)
    guard.check()
    another = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: another)
    assert guard.forked
    with pytest.raises(BackendError, match=r"loaded on anything in process .* after the fork"):
        guard.check()


def test_cuda_is_not_opened_again_in_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_inherited", {"CUDA"})
    for name in ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda"):
        with pytest.raises(BackendError, match="CUDA was started before this process was forked"):
            ForkGuard(name, object)
    ForkGuard("onnxruntime", object)


def test_a_pickled_sampler_keeps_its_settings_and_its_samples(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import copy
    import pickle

    monkeypatch.chdir(tiny_bundle.parent)
    sampler = Sampler.load(tiny_bundle.name, "onnxruntime", "fp32", threads=1, max_batch=3)
    pickled = pickle.dumps(sampler)
    assert len(pickled) < sum(file.size for file in sampler.bundle.files.values())
    samples = sampler.sample(4, label=1, steps=2)
    monkeypatch.chdir("/")
    unpickled = pickle.loads(pickled)
    monkeypatch.chdir(tiny_bundle.parent)  # a copy reads the bundle by the path as it was given
    for again in (unpickled, copy.copy(sampler), copy.deepcopy(sampler)):
        assert again.backend is not sampler.backend
        assert (again.max_batch, again.backend.threads, again.backend.name) == (3, 1, "onnxruntime")
        assert again.sample(4, label=1, steps=2).tobytes() == samples.tobytes()


def test_a_pickled_sampler_does_not_load_files_that_changed(bundle_copy: Path) -> None:
    import pickle

    pickled = pickle.dumps(Sampler.load(bundle_copy))
    weights = bundle_copy / "fp32" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(BundleError, match="sha256"):
        pickle.loads(pickled)


def test_a_sampler_of_a_backend_object_is_not_pickled(sampler: Sampler) -> None:
    import pickle

    own = Sampler(sampler.bundle, sampler.backend)
    with pytest.raises(RequestError, match=r"cannot be pickled or copied. Pass `backend` by name"):
        pickle.dumps(own)


def test_a_bundle_can_be_pickled_and_copied(tiny_bundle: Path) -> None:
    import copy
    import pickle

    bundle = Bundle.load(tiny_bundle)
    again = pickle.loads(pickle.dumps(bundle))
    assert again.to_json() == bundle.to_json()
    assert again.read("fp32/weights.bin") == bundle.read("fp32/weights.bin")
    assert copy.copy(bundle) is bundle
    assert copy.deepcopy(bundle) is bundle


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_closed_sampler_is_refused(tiny_bundle: Path, name: str) -> None:
    pytest.importorskip(name)
    with Sampler.load(tiny_bundle, name) as sampler:
        before = sampler.sample(1, label=1, steps=2)
    sampler.close()
    with pytest.raises(BackendError, match="was closed"):
        sampler.sample(1, label=1, steps=2)
    with pytest.raises(BackendError, match="was closed"):
        sampler.animate(1, label=1, steps=2)
    assert np.isfinite(before).all()
