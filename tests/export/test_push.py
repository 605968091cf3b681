"""Bundles on the Hugging Face Hub: uploaded, downloaded, kept in its cache and checked.

The hub is a server of this machine. The client is huggingface_hub itself, in processes of its own,
because it reads its settings when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from export.push import Upload
from runtime import Bundle, BundleError, RequestError, Sampler
from runtime.bundle.hub import HubName

from ..hub_server import Hub, hosted_hub

pytest.importorskip("huggingface_hub", reason="pip install 'unnoise[hub]'")
HANGING_S = 600
REPO = "someone/digits"
LOAD = """
import hashlib, sys
from runtime import Sampler
sampler = Sampler.load(sys.argv[1], threads=1)
print(sampler.bundle.path)
print(hashlib.sha256(sampler.sample(1, 5, steps=2).tobytes()).hexdigest())
"""
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hosted_hub() as found:
        yield found


@pytest.fixture(scope="module")
def command(hub: Hub, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """command(word, …, NAME=VALUE): Python with the hub as its Hub, and a cache of its own."""
    home = str(tmp_path_factory.mktemp("hub"))

    def call(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        own = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": home,
            "HF_TOKEN": "hf_token",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(root),
        }
        return subprocess.run(
            [sys.executable, *words],
            env={**os.environ, **own, **variables},
            capture_output=True,
            text=True,
            timeout=HANGING_S,
        )

    return call


@pytest.fixture(scope="module")
def source(first_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle. The card of the first release's is not the one that its bundle.json lists."""
    folder = tmp_path_factory.mktemp("source") / "bundle"
    shutil.copytree(first_release / "bundle", folder)
    card = (folder / "README.md").read_bytes()
    value = json.loads((folder / "bundle.json").read_text())
    entry = {"sha256": hashlib.sha256(card).hexdigest(), "size": len(card)}
    value["files"]["README.md"] = entry
    (folder / "bundle.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def pushed(hub: Hub, command: Command, source: Path) -> str:
    """The commit of a bundle that was uploaded."""
    words = ("-m", "export.push", str(source), REPO, "--licence", "apache-2.0")
    ended = command(*words)
    assert ended.returncode == 0, ended.stderr
    found = re.search(rf'Sampler\.load\("hf:{REPO}@([0-9a-f]{{40}})"\)', ended.stdout)
    assert found is not None, ended.stdout
    return found[1]


@pytest.fixture(scope="module")
def expected(first_release: Path) -> str:
    """The hash of the sample that `LOAD` makes."""
    sampler = Sampler.load(first_release / "bundle", threads=1)
    return hashlib.sha256(sampler.sample(1, 5, steps=2).tobytes()).hexdigest()


def test_what_is_uploaded_is_the_bundle_with_the_hubs_metadata(
    hub: Hub, pushed: str, source: Path, tmp_path: Path
) -> None:
    files = hub.commits[REPO][pushed]
    bundle = Bundle.load(source)
    assert {*files} == {*bundle.files, "bundle.json", "README.md"}
    for name in bundle.files:
        assert name == "README.md" or files[name] == bundle.read(name)
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    copy = Bundle.load(tmp_path)
    card = copy.read("README.md").decode()
    assert card.startswith("---\n")
    front = card.split("---\n")[1]
    for line in ("license: apache-2.0", "library_name: unnoise", "- diffusion"):
        assert line in front
    assert "pipeline_tag: unconditional-image-generation" in front
    assert f'Sampler.load("hf:{REPO}")' in card or "Sampler.load" not in card


@pytest.mark.usefixtures("pushed")
def test_a_bundle_is_loaded_by_branch_and_by_commit_and_then_without_a_network(
    hub: Hub, command: Command, pushed: str, expected: str
) -> None:
    hub.asked.clear()
    ended = command("-c", LOAD, f"hf:{REPO}")
    assert ended.returncode == 0, ended.stderr
    folder, digest = ended.stdout.split()
    # All other files come by the commit: the branch may move meanwhile.
    by_branch = {path.partition("/resolve/main/")[2] for path in hub.asked if "/main/" in path}
    assert by_branch == {"bundle.json"}
    assert Path(folder).parts[-3:] == ("models--someone--digits", "snapshots", pushed)
    assert digest == expected
    # A commit that is in the cache needs no request, and a branch one alone.
    hub.asked.clear()
    assert command("-c", LOAD, f"hf:{REPO}@{pushed}").stdout.split() == [folder, expected]
    assert hub.asked == []
    assert command("-c", LOAD, f"hf:{REPO}@main").stdout.split() == [folder, expected]
    assert hub.asked == [f"HEAD /{REPO}/resolve/main/bundle.json"]
    offline = command(
        "-c", LOAD, f"hf:{REPO}", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert offline.stdout.split() == [folder, expected], offline.stderr


@pytest.mark.usefixtures("pushed")
def test_a_damaged_file_is_refused_and_fetched_again(
    hub: Hub, command: Command, expected: str, tmp_path: Path
) -> None:
    home = str(tmp_path)
    hub.damaged.add("fp32/weights.bin")
    try:
        ended = command("-c", LOAD, f"hf:{REPO}", HF_HOME=home)
    finally:
        hub.damaged.clear()
    assert "BundleError: weights.bin has sha256" in ended.stderr
    ended = command("-c", LOAD, f"hf:{REPO}", HF_HOME=home)
    assert ended.stdout.split()[1] == expected, ended.stderr


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:-1] + b"?"])
def test_a_file_that_is_damaged_in_the_cache_is_removed_from_it(
    first_release: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    snapshot = tmp_path / "models--someone--digits" / "snapshots" / "0123"
    shutil.copytree(first_release / "bundle", snapshot)
    for folder, is_kept in ((snapshot, False), (tmp_path / "own", True)):
        if is_kept:
            shutil.copytree(first_release / "bundle", folder)
        weights = folder / "fp32" / "weights.bin"
        weights.write_bytes(change(weights.read_bytes()))
        with pytest.raises(BundleError, match=r"Fetch or export the bundle again"):
            Bundle.load(folder).read("fp32/weights.bin")
        assert weights.exists() is is_kept


@pytest.mark.usefixtures("pushed")
@pytest.mark.parametrize(
    ("name", "variables", "message"),
    [
        ("hf:nobody/none", {}, "hf:nobody/none cannot be fetched from the Hugging Face Hub"),
        (f"hf:{REPO}@v9", {}, f"hf:{REPO}@v9 cannot be fetched"),
        ("hf:other/cached", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ("hf:digits", {}, "hf:USER/NAME@REVISION, got 'hf:digits'"),
    ],
)
def test_a_name_that_is_none_says_why(
    command: Command, name: str, variables: dict[str, str], message: str
) -> None:
    ended = command("-m", "runtime.info", name, **variables)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_repository_is_private_if_asked_and_a_second_upload_adds_a_commit(
    hub: Hub, command: Command, source: Path
) -> None:
    words = ("-m", "export.push", str(source), "someone/secret", "--private")
    for _ in range(2):
        ended = command(*words)
        assert ended.returncode == 0, ended.stderr
    assert hub.private == {"someone/secret"}
    assert len(hub.commits["someone/secret"]) == 2
    manifests = {
        json.dumps(json.loads(f["bundle.json"])) for f in hub.commits["someone/secret"].values()
    }
    assert len(manifests) == 1


def test_a_public_repository_gets_nothing_that_is_to_be_private(
    hub: Hub, command: Command, source: Path
) -> None:
    words = ("-m", "export.push", str(source), "someone/open")
    assert command(*words).returncode == 0
    ended = command(*words, "--private")
    assert ended.returncode == 2
    assert "someone/open exists and is public, so nothing was uploaded" in ended.stderr
    assert len(hub.commits["someone/open"]) == 1


def test_without_a_login_the_upload_says_so(command: Command, source: Path) -> None:
    words = ("-m", "export.push", str(source), "someone/else")
    ended = command(*words, HF_TOKEN="", HF_HUB_DISABLE_IMPLICIT_TOKEN="1")
    assert ended.returncode == 2
    assert "cannot be uploaded" in ended.stderr
    assert "hf auth login" in ended.stderr


@pytest.mark.parametrize("name", ["digits", "a/b/c", "a/b@", "../b", "a/b@c d", "a/.."])
def test_a_name_that_the_hub_cannot_have_is_refused(name: str, first_release: Path) -> None:
    with pytest.raises(RequestError, match="hf:USER/NAME"):
        HubName.read(f"hf:{name}")
    with pytest.raises(RequestError, match="hf:USER/NAME"):
        Upload(bundle=Bundle.load(first_release / "bundle"), repo=name)


def test_a_link_out_of_a_snapshot_is_refused(first_release: Path, tmp_path: Path) -> None:
    """The files of a snapshot may be links to the cache's blobs, and to nothing else."""
    source = first_release / "bundle"
    repo = tmp_path / "models--a--b"
    for store, allowed in (("blobs", True), ("../blobs", True), ("../elsewhere", False)):
        folder = repo / "snapshots" / store.replace("/", "-")
        for path in source.rglob("*"):
            if path.is_file():
                copy = folder / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        weights = folder / "fp32" / "weights.bin"
        target = (repo / store).resolve() / "weights"
        target.parent.mkdir(parents=True, exist_ok=True)
        weights.rename(target)
        weights.symlink_to(target)
        bundle = Bundle.load(folder)
        if allowed:
            bundle.read("fp32/weights.bin")
        else:
            with pytest.raises(Exception, match="leads out of the bundle"):
                bundle.read("fp32/weights.bin")
