"""A bundle as a model repository for Triton: python -m export.triton BUNDLE --out repository"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.backends.registry import BACKENDS, offered
from runtime.bundle.bundle import Bundle
from runtime.bundle.format import MANIFEST, STEP, STEP_GUIDED, WEIGHTS, inside
from runtime.diffusion.program import R
from runtime.engine.tensors import KINDS
from runtime.errors import RequestError
from runtime.errors.arguments import choice, integer
from runtime.errors.messages import shown_path
from runtime.files import replacing_folder
from runtime.images import is_image
from runtime.terminal.output import say
from runtime.terminal.verbs import add_bundle, program, run_verb

# Triton's Python is often not that of the environment with unnoise.
MODEL = """\
import sys

sys.path[:0] = {paths!r}
from serve.triton import TritonPythonModel  # noqa: E402, F401
"""
CONFIG_FILE = "config.pbtxt"
VERSION = "1"
BUNDLE = "bundle"
"""The folder of the copy in that of its version."""
CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: 0
input [
{inputs}
]
output [
{outputs}
]
parameters {{ key: "backend" value {{ string_value: "{backend}" }} }}
parameters {{ key: "precision" value {{ string_value: "{precision}" }} }}
parameters {{ key: "threads" value {{ string_value: "{threads}" }} }}
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""
STEP_CONFIG = """\
name: "{name}"
backend: "onnxruntime"
max_batch_size: {batch}
default_model_filename: "{file}"
input [
{inputs}
]
output [
{outputs}
]
dynamic_batching {{ }}
"""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """What is written.

    Attributes:
        python_path: Folders that the model adds to Python's path.
        threads: Of the inference library; None for its own choice.
        steps: Whether to write the step graphs as models of Triton's ONNX Runtime backend, too.
        max_batch: Samples of one call of a step graph.
    """

    bundle: Bundle
    backend: str = "onnxruntime"
    precision: str = "fp32"
    threads: int | None = None
    python_path: Sequence[str] = ()
    steps: bool = False
    max_batch: int = 64

    @property
    def graphs(self) -> str:
        """The bundle's folder that the backend reads."""
        return BACKENDS[self.backend].folders[self.precision]


def write_repository(repository: Repository, out: Path) -> list[str]:
    """Write a model repository, or add a model to one. Returns the names of its models.

    Raises:
        RequestError: A setting cannot be used, or a folder there is no model of Triton.
        BundleError: A file of the bundle is damaged.
    """
    bundle = repository.bundle
    backend = choice("backend", repository.backend, BACKENDS)
    folders = BACKENDS[backend].folders
    choice("precision", repository.precision, folders)
    if repository.graphs not in bundle.precisions:
        raise RequestError(
            f"{bundle} has no {repository.precision}. It has: {', '.join(bundle.precisions)}."
        )
    if (backend, repository.precision) not in offered(bundle):
        raise RequestError(
            f"{bundle} cannot be opened in {repository.precision} on {backend}: it missed its "
            "bounds there when it was exported, or was not checked. Choose another backend."
        )
    integer("max_batch", repository.max_batch, 1, 1024)
    if repository.threads is not None:
        integer("threads", repository.threads, 1, 1024)
    # The name becomes a folder and a part of URLs.
    if any(not character.isalnum() and character not in "-_." for character in bundle.name):
        raise RequestError(
            f"Triton needs a name of letters, digits, '-', '_' and '.', got {bundle.name!r}."
        )
    if out.exists() and not out.is_dir():
        raise RequestError(f"{shown_path(out)} is a file. Choose a folder.")
    steps = {
        f"{bundle.name}_{Path(file).stem}": file
        for file in (STEP, STEP_GUIDED)
        if repository.steps and inside(repository.graphs, file) in bundle.files
    }
    # What each model has in its version's folder.
    parts = {bundle.name: f"{BUNDLE}/{MANIFEST}", **steps}
    for name, part in parts.items():
        place = out / name
        if place.exists() and not (place / VERSION / part).is_file():
            raise RequestError(
                f"{shown_path(place)} was not written by this command, so it is not replaced. "
                "Choose another folder with --out."
            )
    # A server that polls the repository sees a whole model or none.
    with replacing_folder((out / bundle.name).resolve()) as folder:
        _write_model(repository, folder)
    for name, file in steps.items():
        with replacing_folder((out / name).resolve()) as folder:
            _write_step(repository, name, file, folder)
    return [*parts]


def _write_model(repository: Repository, folder: Path) -> None:
    """Write the Python model, with a copy of the bundle in its version's folder."""
    bundle = repository.bundle
    inputs = [_port("seed", "INT64", [-1])]
    inputs += [_port("label", "INT64", [-1], optional=True)] if bundle.labels else []
    inputs += [_port("guidance", "FP32", [-1], optional=True)] if bundle.can_guide else []
    inputs += [_port(c.port, KINDS[c.dtype], [-1, *c.shape]) for c in bundle.conditions]
    outputs = [_port("sample", "FP32", [-1, *bundle.sample_shape])]
    shape = bundle.sample_shape
    if is_image(shape):
        outputs.append(_port("image", "UINT8", [-1, *shape[1:], shape[0]]))
    config = CONFIG.format(
        name=bundle.name,
        inputs=",\n".join(inputs),
        outputs=",\n".join(outputs),
        backend=repository.backend,
        precision=repository.precision,
        threads=repository.threads or "",
    )
    (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
    version = folder / VERSION
    version.mkdir()
    code = MODEL.format(paths=[str(path) for path in repository.python_path])
    (version / "model.py").write_text(code, encoding="utf-8")
    # What the backend reads, and nothing else of the bundle.
    for name in bundle.files:
        if not name.startswith(f"{repository.graphs}/"):
            continue
        path = version / BUNDLE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bundle.read(name))
    (version / BUNDLE / MANIFEST).write_bytes((bundle.path / MANIFEST).read_bytes())


def _write_step(repository: Repository, name: str, file: str, folder: Path) -> None:
    """Write a step graph. Triton's batch is the first dimension of every tensor."""
    bundle = repository.bundle
    S = bundle.sample_shape
    inputs = [
        _port("state", "FP32", [R, *S]),
        _port("noise", "FP32", list(S)),
        _port("call", "FP32", [6]),
        _port("update", "FP32", [R, R + 2]),
    ]
    if bundle.labels:
        inputs.append(_port("label", "INT64", [1], reshape=True))
    for condition in bundle.conditions:
        # Triton knows no tensor without axes.
        dims = condition.shape or (1,)
        kind = KINDS[condition.dtype]
        inputs.append(_port(condition.port, kind, dims, reshape=not condition.shape))
    outputs = [_port("next_state", "FP32", [R, *S]), _port("denoised", "FP32", list(S))]
    config = STEP_CONFIG.format(
        name=name,
        batch=repository.max_batch,
        file=file,
        inputs=",\n".join(inputs),
        outputs=",\n".join(outputs),
    )
    (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
    version = folder / VERSION
    version.mkdir()
    for part in (file, WEIGHTS):
        (version / part).write_bytes(bundle.read(inside(repository.graphs, part)))


def _port(
    name: str, kind: str, dims: Sequence[int], optional: bool = False, reshape: bool = False
) -> str:
    """Return a tensor of a configuration."""
    parts = [f'name: "{name}"', f"data_type: TYPE_{kind}", f"dims: {list(dims)}"]
    parts += ["reshape: { shape: [] }"] if reshape else []
    parts += ["optional: true"] if optional else []
    return "  { " + ", ".join(parts) + " }"


def main(arguments: list[str] | None = None) -> int:
    return run_verb(_parser(), _run, arguments)


def _run(given: argparse.Namespace) -> None:
    """Run the command line."""
    repository = Repository(
        bundle=Bundle.load(given.bundle),
        backend=given.backend,
        precision=given.precision,
        threads=given.threads,
        python_path=given.python_path or [],
        steps=given.steps,
    )
    names = write_repository(repository, given.out)
    say(f"{', '.join(names)}: tritonserver --model-repository={given.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("export.triton"), description=__doc__)
    add_bundle(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="the model repository")
    add("--backend", default="onnxruntime", help="inference library [onnxruntime]")
    add("--precision", default="fp32", help="one that the bundle holds [fp32]")
    add("--threads", type=int, help="of the inference library [one a core]")
    add(
        "--python-path",
        action="append",
        metavar="DIR",
        help="a folder with unnoise and what it needs, for a Triton whose Python lacks them",
    )
    add("--steps", action="store_true", help="write the step graphs for Triton's ONNX Runtime too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
