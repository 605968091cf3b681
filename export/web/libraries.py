"""onnxruntime-web, from npm. Nothing of it is in this repository."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from runtime.errors import RequestError
from runtime.errors.messages import reason, shown_path

from ..errors import ExportError

VERSION = "1.30.0"
"""The version of onnxruntime-web. Others have other files, and were not tested."""
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""The hash of its package, as npm writes it."""
WASM = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)
WEBGPU = (
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
NPM_S = 600


def library(package: Path | None, webgpu: bool) -> dict[str, bytes]:
    """Return the files of onnxruntime-web that a site needs, by name.

    Args:
        package: The file that `npm pack onnxruntime-web` has written; None runs npm.
        webgpu: Whether the files for WebGPU are needed, too.

    Raises:
        RequestError: The package is another one.
        ExportError: npm is missing, or fails.
    """
    if package is not None:
        return _files(package, webgpu)
    with tempfile.TemporaryDirectory() as folder:
        return _files(_packed(Path(folder)), webgpu)


def _packed(folder: Path) -> Path:
    """Download the package with npm into a folder."""
    npm = shutil.which("npm")
    remedy = (
        f"Install Node.js, or run `npm pack onnxruntime-web@{VERSION}` elsewhere and pass the file "
        "with --library."
    )
    if npm is None:
        raise ExportError(f"a site needs onnxruntime-web, and npm is not installed. {remedy}")
    command = [npm, "pack", "--silent", f"onnxruntime-web@{VERSION}"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=NPM_S)
    except subprocess.SubprocessError as error:
        raise ExportError(f"npm cannot fetch onnxruntime-web: {reason(error)}. {remedy}") from error
    return folder / f"onnxruntime-web-{VERSION}.tgz"


def _files(package: Path, webgpu: bool) -> dict[str, bytes]:
    try:
        data = package.read_bytes()
    except OSError as error:
        raise RequestError(
            f"{shown_path(package)} cannot be read: {error.strerror or error}."
        ) from error
    # The hash is npm's own, so the same file is fetched today and in ten years.
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != SHA512:
        raise RequestError(
            f"{shown_path(package)} is not onnxruntime-web {VERSION}. Run "
            f"`npm pack onnxruntime-web@{VERSION}`, or leave out --library."
        )
    found: dict[str, bytes] = {}
    with tarfile.open(package) as tar:
        for name in (*WASM, *(WEBGPU if webgpu else ())):
            member = tar.extractfile(f"package/dist/{name}")
            assert member is not None  # the hash says so
            found[name] = member.read()
    return found
