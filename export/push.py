"""Upload a bundle to the Hugging Face Hub: python -m export.push BUNDLE USER/NAME"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType

from runtime.bundle.bundle import Bundle
from runtime.bundle.format import CARD, MANIFEST
from runtime.bundle.hub import PREFIX, HubName, hub_library
from runtime.bundle.manifest import File
from runtime.errors.messages import reason
from runtime.files import to_json
from runtime.images import is_image
from runtime.terminal.output import say
from runtime.terminal.verbs import add_bundle, program, run_verb

from .errors import ExportError

TAGS = ("unnoise", "diffusion", "onnx")
_FRONT = re.compile(r"\A---\n.*?\n---\n+", re.DOTALL)
_LOAD = re.compile(r'Sampler\.load\("[^"\n]*"\)')


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What is uploaded, and where.

    Attributes:
        repo: USER/NAME.
        branch: None for the main branch. Another one must exist.
        private: Whether a repository that is made here is private.
        licence: The Hub's name of a licence, such as "apache-2.0", for the card.
    """

    bundle: Bundle
    repo: str
    branch: str | None = None
    private: bool = False
    licence: str | None = None

    def __post_init__(self) -> None:
        """Check the names. Raises RequestError."""
        branch = "" if self.branch is None else f"@{self.branch}"
        HubName.read(f"{PREFIX}{self.repo}{branch}")


def push(upload: Upload) -> str:
    """Upload a bundle in one commit, and make the repository if there is none.

    The model card gets the Hub's metadata. Files of the repository that are not of the bundle stay.

    Returns:
        The name to load it by, with the commit.

    Raises:
        RequestError: A name cannot be used.
        BundleError: A file of the bundle is damaged, or huggingface_hub is missing.
        ExportError: The Hub refuses, or cannot be reached.
    """
    hub = hub_library()
    texts = _texts(upload, hub)
    operations = [
        hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in {**_files(upload.bundle), **texts}.items()
    ]
    try:
        api = hub.HfApi(library_name="unnoise")
        # One commit for all files: nobody can download half a bundle.
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        # The Hub leaves a repository that exists as it is.
        if upload.private and not api.model_info(upload.repo).private:
            raise ExportError(
                f"{upload.repo} exists and is public, so nothing was uploaded. Make it private in "
                "its settings, or leave out --private."
            )
        commit = api.create_commit(
            upload.repo,
            operations,
            commit_message=f"{upload.bundle.name} {upload.bundle.sha256[:12]}",
            revision=upload.branch,
        )
    except ExportError:
        raise
    except Exception as error:  # its HTTP library, and so its errors, differ by version
        raise ExportError(
            f"{upload.repo} cannot be uploaded: {reason(error)} Log in with `hf auth login`, and "
            "check the name and the network."
        ) from error
    return f"{PREFIX}{upload.repo}@{commit.oid}"


def _files(bundle: Bundle) -> Mapping[str, str]:
    """Return the paths of the bundle's files by name, each compared with its hash."""
    for name in bundle.files:
        bundle.read(name)
    # Paths, so that they need not be in memory at the same time.
    return {name: str(bundle.path / name) for name in bundle.files}


def _texts(upload: Upload, hub: ModuleType) -> Mapping[str, bytes]:
    """Return the card with the Hub's metadata, and the bundle.json that lists it."""
    bundle = upload.bundle
    card = _card(upload, hub).encode()
    entry = File(hashlib.sha256(card).hexdigest(), len(card))
    listed = replace(bundle, files={**bundle.files, CARD: entry})
    return {CARD: card, MANIFEST: to_json(listed.to_json()).encode()}


def _card(upload: Upload, hub: ModuleType) -> str:
    bundle = upload.bundle
    text = bundle.read(CARD).decode() if CARD in bundle.files else f"# {bundle.name}\n"
    metadata = hub.ModelCardData(
        license=upload.licence,
        library_name="unnoise",
        tags=list(TAGS),
        pipeline_tag="unconditional-image-generation" if is_image(bundle.sample_shape) else None,
    )
    # A card that came from the Hub has metadata already.
    body = _FRONT.sub("", text)
    body = _LOAD.sub(f'Sampler.load("{PREFIX}{upload.repo}")', body)
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def main(arguments: list[str] | None = None) -> int:
    return run_verb(_parser(), _run, arguments)


def _run(given: argparse.Namespace) -> None:
    """Run the command line."""
    upload = Upload(
        bundle=Bundle.load(given.bundle),
        repo=given.repo,
        branch=given.branch,
        private=given.private,
        licence=given.licence,
    )
    say(f'uploaded; load it: Sampler.load("{push(upload)}")')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("export.push"), description=__doc__)
    add_bundle(parser)
    add = parser.add_argument
    add("repo", metavar="USER/NAME", help="the repository; it is made if there is none")
    add("--branch", metavar="NAME", help="a branch that exists [main]")
    add("--private", action="store_true", help="make the repository a private one")
    add("--licence", metavar="NAME", help="of the model, by the Hub's name, such as apache-2.0")
    return parser


if __name__ == "__main__":
    sys.exit(main())
