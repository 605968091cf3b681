"""Of two thousand damaged bundles, each raises BundleError or loads and samples. None ends in
another exception, a crash or a hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import RequestError

FUZZING = Path(__file__).with_name("fuzzing.py")


def fuzz(bundle: Path, *options: str) -> dict:
    """The outcome of a run in a process without threads, which can fork children."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FUZZING), str(bundle), *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.stdout, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
def test_2000_damaged_bundles_end_well(tiny_bundle: Path) -> None:
    found = fuzz(tiny_bundle, "--cases", "2000")
    assert found["wrong"] == []
    assert sum(found["counts"].values()) == 2000
    assert found["counts"]["ran"] > 100, "or nothing got past the hashes"
    assert found["counts"]["refused"] > 1000, "or nothing was damaged"


@pytest.mark.slow
def test_2000_damaged_bundles_of_format_2_end_well(second_format: Path) -> None:
    found = fuzz(second_format / "bundle", "--cases", "2000")
    assert found["wrong"] == []
    assert sum(found["counts"].values()) == 2000
    assert found["counts"]["ran"] > 100
    assert found["counts"]["refused"] > 1000


def test_the_whole_bundle_runs_so_that_a_refusal_means_something(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    sys.path.insert(0, str(FUZZING.parent))
    try:
        import fuzzing
    finally:
        sys.path.pop(0)
    assert fuzzing.attempt(tiny_bundle, "onnxruntime", "fp32") == fuzzing.RAN
    with pytest.raises(RequestError, match="path"):  # another error does not count as a BundleError
        fuzzing.attempt(BadPath(), "onnxruntime", "fp32")


class BadPath:
    def __fspath__(self) -> str:
        return str(1 // 0)
