"""Every command in docs/serving.md runs, word for word, and the Dockerfile fits the project."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import Bundle, Sampler
from serve import Settings, auth, create_app
from serve.app import ENDPOINTS
from serve.health import PAGE
from serve.settings import KIB, MIB

from ..root import ROOT
from .services import running

WAIT_S = 300


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "docs" / "serving.md").read_text()


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with running(create_app([root / "bundles" / "emoji32"], Settings(threads=1))) as found:
        yield found


def test_every_command_runs(text: str, address: str, tmp_path: Path, root: Path) -> None:
    mask = np.full((32, 32), 255, np.uint8)
    mask[:, 16:] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    used = commands.count("curl ")
    assert used >= 25
    plain = commands.replace("localhost:8000", address.removeprefix("http://"))
    plain = re.sub(r"curl ", "curl -sS -w '%{stderr}%{http_code}\\n' ", plain)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", plain],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    codes = done.stderr.split()
    assert done.returncode == 0, done.stderr
    # One command starts a job, and another shows an error.
    assert sorted(codes) == ["200"] * (used - 2) + ["202", "400"]
    sampler = Sampler.load(root / "bundles" / "emoji32", threads=1)
    expected = sampler.pictures(1, 1, label=3, steps=10)[0]
    with Image.open(tmp_path / "sample.png") as image:
        assert (np.asarray(image) == expected).all()
    for name in ("sheet", "again", "job", "stylized", "translated", "painted", "between", "varied"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width >= 32
    assert np.load(tmp_path / "noise.npy").shape == (1, 3, 32, 32)


def test_every_endpoint_has_a_command(text: str) -> None:
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    for method, path, _ in ENDPOINTS:
        if path in PAGE or path in ("/v2", "/v1/models/{model}", "/v2/health/live"):
            continue
        if path == "/v2/models/{model}/ready":
            continue
        plain = path.replace("/v1/jobs/{id}", "$job").replace("{model}", "emoji32")
        plain = plain.replace("{verb}", "stylize")
        assert f"localhost:8000{plain}" in commands, (method, path)


def test_the_limits_are_those_of_the_settings(text: str) -> None:
    settings = Settings()
    for part in (
        f"samples of a request | {settings.samples} |",
        f"before it is made | {settings.rows:,} |",
        f"counts 2 | {settings.request_rows:,} |",
        f"a JSON body | {settings.json_bytes // KIB} KiB |",
        f"{settings.upload_bytes // MIB} MiB, {settings.parts} files |",
        f"{settings.pixels:,} pixels |",
        f"{settings.headers_s:g} s, {settings.body_s:g} s |",
        f"{settings.connections}; {settings.edits}; {settings.uploads} |",
        f"{settings.engine.samples} samples, {settings.engine.rows:,} rows, "
        f"{settings.engine.seconds:g} s;",
    ):
        assert part in text, part


def test_the_metrics_exist(text: str, address: str) -> None:
    import httpx

    exposed = httpx.get(f"{address}/metrics").text
    for name in set(re.findall(r"`(unnoise_[a-z_]+)", text)):
        assert name.removesuffix("_total") in exposed, name


def test_the_dockerfile_fits_the_project(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())
    lines = (root / "Dockerfile").read_text().splitlines()
    found = [line.partition(" ")[::2] for line in lines if line and line[0] not in "# "]
    for name, rest in found:
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (root / source).exists(), source
    words = " ".join(rest for _, rest in found)
    (extras,) = re.findall(r"'\.\[([a-z,]+)\]'", words)
    assert set(extras.split(",")) <= project["project"]["optional-dependencies"].keys()
    # The Host header of the health check is an address: see `auth.check_host`.
    assert f"http://127.0.0.1:8000{auth.READY_PATH}'" in dict(found)["HEALTHCHECK"]
    image = dict(found)["FROM"]
    assert re.fullmatch(r"python:3\.1[1-9]-slim", image)
    command = json.loads(dict(found)["ENTRYPOINT"])
    assert command[0] in project["project"]["scripts"]
    copied = {source for name, rest in found if name == "COPY" for source in rest.split()[:-1]}
    own = project["project"]
    needed = {own["readme"], *own["license-files"], "runtime", "serve", "setup.py"}
    # What setup.py lays into the wheel.
    (laid,) = re.findall(r"^SHIPPED = (\{.*\})$", (root / "setup.py").read_text(), re.MULTILINE)
    assert needed | {f"bundles/{name}" for name in ast.literal_eval(laid)} <= copied
    from serve.__main__ import _parser

    given = _parser().parse_args([*command[2:], *json.loads(dict(found)["CMD"])])
    assert given.open
    assert Bundle.load(given.bundles[0]).name == "emoji32"


def test_the_extra_is_small(root: Path) -> None:
    """At most 10 packages come with the extra, and 10 MB."""
    from importlib import metadata

    from packaging.requirements import Requirement

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    base = {Requirement(line).name for line in project["dependencies"]}
    waiting = [Requirement(line) for line in project["optional-dependencies"]["serve"]]
    found: set[str] = set()
    while waiting:
        needed = waiting.pop()
        name = needed.name.lower().replace("_", "-")
        if name in found | base or (needed.marker and not needed.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        waiting += [Requirement(line) for line in metadata.requires(name) or []]
    assert len(found) <= 10, found
    size = 0
    for name in found:
        for file in metadata.files(name) or []:
            path = Path(str(file.locate()))
            if path.is_file() and path.suffix != ".pyc":
                size += path.stat().st_size
    assert size <= 10_000_000
