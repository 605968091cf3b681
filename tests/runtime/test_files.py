"""Files are complete or absent, even if writing is interrupted; JSON is strict in both
directions."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.files import (
    from_json,
    is_temporary,
    replacing,
    replacing_folder,
    to_json,
    write_text,
)

FAILURES = [OSError("disk full"), KeyboardInterrupt()]


def names(folder: Path) -> list[str]:
    """Everything in the folder, hidden temporaries included."""
    return sorted(p.name for p in folder.iterdir())


def write_half(path: Path, failure: BaseException) -> None:
    path.write_bytes(b"half of the n")
    raise failure


def test_a_file_takes_its_place_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "a.txt"
    for text in ("old", "new"):
        with replacing(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    assert names(path.parent) == ["a.txt"]


def test_the_old_file_stands_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent, (
            "only a rename inside one folder is sure to be atomic"
        )
        assert path.read_text() == "old"


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_a_failure_leaves_the_old_file_and_no_temporary(
    failure: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(failure)), replacing(path) as temporary:
        write_half(temporary, failure)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_block_that_writes_nothing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def test_a_folder_takes_its_place_and_nothing_of_the_old_one_is_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    for name in ("old.bin", "new.bin"):
        with replacing_folder(path) as temporary:
            (temporary / "fp32").mkdir()
            (temporary / "fp32" / name).write_bytes(b"w")
    assert [p.relative_to(path).as_posix() for p in path.rglob("*.bin")] == ["fp32/new.bin"]
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_a_failure_leaves_the_old_folder_and_no_temporary(
    failure: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "a.bin").write_bytes(b"old")
    with pytest.raises(type(failure)), replacing_folder(path) as temporary:
        write_half(temporary / "a.bin", failure)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {"a.bin": b"old"}
    assert names(tmp_path) == ["bundle"]


def test_the_old_folder_is_put_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "a.bin").write_bytes(b"old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if (self / "new.bin").exists():
            raise PermissionError("held by another program")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError), replacing_folder(path) as temporary:
        (temporary / "new.bin").write_bytes(b"new")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {"a.bin": b"old"}
    assert names(tmp_path) == ["bundle"]


# path / "." is the file itself.
@pytest.mark.parametrize(("writer", "file"), [("replacing", "."), ("replacing_folder", "a.bin")])
def test_a_process_that_dies_while_writing_leaves_the_old(
    writer: str, file: str, tmp_path: Path, root: Path
) -> None:
    """os._exit runs no handlers, like a kill."""
    path = tmp_path / "it"
    if writer == "replacing_folder":
        path.mkdir()
    (path / file).write_bytes(b"old")
    code = (
        f"import os, sys; from runtime.files import {writer}\n"
        f"with {writer}(sys.argv[1]) as t:\n    (t / {file!r}).write_bytes(b'half of the n'); "
        f"os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], cwd=root).returncode == 9
    assert (path / file).read_bytes() == b"old"


def test_text_is_utf8_on_every_machine(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "σ²")
    assert (tmp_path / "a.txt").read_bytes() == "σ²".encode()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(value=JSON)
def test_json_reads_back_to_the_bit(value: object) -> None:
    found = from_json(to_json(value))
    assert repr(found) == repr(value)  # unlike ==, tells -0.0 from 0.0, 1 from 1.0 and from True


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_is_not_written_for_numbers_that_it_lacks(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"a": [value]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": NaN}', "NaN is not JSON"),
        ("[Infinity]", "Infinity is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("1e999", "1e999 is too large"),
        ("[-1e999]", "-1e999 is too large"),
        ('{"a": 1, "a": 1}', "given twice"),
        ('[{"b": {"a": 1, "\\u0061": 2}}]', "given twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("", "Expecting value"),
        ("[1] [2]", "Extra data"),
        (b"\xff\xfe\xff", "codec can't decode"),
    ],
    ids=lambda v: repr(v)[:20],
)
def test_what_is_not_strict_json_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(text)


@pytest.mark.parametrize(
    "text", [b'"\\ud800"', b'{"\\uDFFF": 1}', b'"\xed\xa0\x80"', '"\ud800"', '["\\ud83d "]']
)
def test_half_of_a_surrogate_pair_is_refused(text: str | bytes) -> None:
    """It cannot be written to a file."""
    with pytest.raises(ValueError, match=r"surrogate|can't decode"):
        from_json(text)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_whole_pair_is_a_character_in_every_encoding(encoding: str) -> None:
    assert from_json('["\\ud83d\\ude42", "🙂", "\\\\ud800"]'.encode(encoding)) == [
        "🙂",
        "🙂",
        "\\ud800",
    ]


def test_a_folder_replaces_a_link_and_a_file_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("old")
    for name in ("link", "file"):
        with replacing_folder(tmp_path / name) as temporary:
            (temporary / "a").write_text("new")
        assert (tmp_path / name / "a").read_text() == "new"
    assert names(tmp_path) == ["file", "link", "real"]
    assert names(tmp_path / "real") == []


@pytest.mark.parametrize("name", ["a" * 251 + ".txt", "写" * 83 + ".txt"])
def test_a_name_as_long_as_the_file_system_allows_is_written(name: str, tmp_path: Path) -> None:
    write_text(tmp_path / name, "new")
    assert names(tmp_path) == [name]
    with replacing_folder(tmp_path / name) as temporary:
        assert is_temporary(temporary)
    assert names(tmp_path) == [name]
