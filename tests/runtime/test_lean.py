"""The runtime needs only numpy and one inference library: it runs in an environment with nothing
else."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from runtime import Sampler


def test_importing_the_runtime_imports_neither_torch_nor_onnx_nor_pillow(root: Path) -> None:
    code = (
        "import sys, runtime;"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'PIL', 'trainer', 'export', 'matplotlib', "
        "'scipy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def _with_dependencies(*distributions: str) -> set[str]:
    """The distributions and all their requirements, without extras."""
    found: set[str] = set()
    waiting = list(distributions)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            required = [r for r in metadata.requires(name) or [] if "extra ==" not in r]
            waiting += [
                re.match(r"[\w.-]+", r).group()
                for r in required
                if "sys_platform == 'win32'" not in r
            ]
    return found


def test_the_runtime_samples_where_torch_and_onnx_are_not_installed(
    tiny_bundle: Path, sampler: Sampler, root: Path, tmp_path: Path
) -> None:
    """A Python that sees numpy, onnxruntime, pillow, their dependencies and the folder runtime/,
    and nothing else."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "runtime").symlink_to(root / "runtime")
    for name in _with_dependencies("numpy", "onnxruntime", "pillow"):
        distribution = metadata.distribution(name)
        for top in {
            f.parts[0] for f in distribution.files or [] if f.parts[0] not in ("..", "__pycache__")
        }:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import importlib.util\n"
        "assert not any(importlib.util.find_spec(m) for m in ('torch', 'onnx', 'trainer', "
        "'scipy'))\n"
        "from runtime import Sampler\n"
        f"sampler = Sampler.load({str(tiny_bundle)!r})\n"
        "sys.stdout.buffer.write(sampler.sample(3, seed=5, label=4, steps=3).tobytes())\n"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, check=True, capture_output=True
    )
    assert run.stdout == sampler.sample(3, seed=5, label=4, steps=3).tobytes()
