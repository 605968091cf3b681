"""The cache of compiled models: entries are complete or absent, private to the user, and never
cause an error."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.backends import cache

PARTS = [b"head\nhead", b"", bytes(range(256)) * 10]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNNOISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_stored_is_loaded(place: Path) -> None:
    assert cache.load("a") is None
    for parts in (PARTS, [], [b""]):
        cache.store("a", parts)
        assert [found.tobytes() for found in cache.load("a")] == parts
    cache.forget("a")
    cache.forget("a")
    assert cache.load("a") is None
    assert not list(place.iterdir())


def test_a_folder_that_cannot_be_written_to_is_of_use(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.store("entry", [b"parts"])

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    found = cache.load("entry")
    assert found is not None
    assert found[0].tobytes() == b"parts"
    assert list(place.iterdir())


def test_an_entry_that_was_changed_anywhere_is_none_and_goes(place: Path) -> None:
    cache.store("a", PARTS)
    whole = (place / "a.compiled").read_bytes()
    damaged = [whole[:i] for i in (0, 10, 32, 33, len(whole) - 1)] + [whole + b"x"]
    damaged += [
        whole[:32] + lengths + whole[whole.index(b"\n", 32) :]
        for lengths in (b"", b"-1", b"9" * 30, b"x")
    ]
    damaged += [
        whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in (0, 31, 32, 40, len(whole) - 1)
    ]
    for data in damaged:
        (place / "a.compiled").write_bytes(data)
        assert cache.load("a") is None
        assert not (place / "a.compiled").exists()


def test_a_key_tells_everything_apart() -> None:
    keys = [cache.key(*parts) for parts in [(), ("a",), ("a", 1), ("a", "1"), ("a1",), (["a"], 1)]]
    assert len(set(keys)) == len(keys)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_the_folder_is_made_for_the_user_alone_and_not_used_where_others_may_write(
    place: Path,
) -> None:
    cache.store("a", PARTS)
    assert place.stat().st_mode & 0o777 == 0o700
    place.chmod(0o770)
    assert cache.load("a") is None
    cache.store("b", PARTS)
    assert [e.name for e in place.iterdir()] == ["a.compiled"]


@pytest.mark.parametrize("off", ["", "0", "off", "OFF"])
def test_it_can_be_turned_off(off: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNNOISE_CACHE", off)
    cache.store("a", PARTS)
    assert cache.load("a") is None
    assert not place.exists()


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNNOISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "unnoise"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not to be used, says the XDG specification
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home" / ".cache" / "unnoise"


def test_a_folder_that_cannot_be_made_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNNOISE_CACHE", str(tmp_path / "file" / "cache"))
    cache.store("a", PARTS)
    assert cache.load("a") is None


def test_what_was_unused_for_longest_goes_first(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LIMIT", 420)
    for i, name in enumerate("abc"):
        cache.store(name, [bytes(100)])
        os.utime(place / f"{name}.compiled", (i, i))
    assert cache.load("a")  # b is now the oldest
    cache.store("d", [bytes(100)])
    assert sorted(e.stem for e in place.iterdir()) == ["a", "c", "d"]
    cache.store("e", [bytes(400)])
    assert not list(place.iterdir())


def test_several_processes_write_and_read_at_once(root: Path) -> None:
    """Four processes store different data in one entry repeatedly; a reader always gets the data of
    one of them."""
    code = (
        "import sys; from runtime.backends import cache\n"
        "data = [sys.argv[1].encode() * 100_000]\n"
        "for _ in range(50):\n"
        "    cache.store('a', data)\n"
        "    found = cache.load('a')\n"
        "    assert found and len(found[0]) == 100_000 and len(set(found[0].tolist())) == 1, found"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, letter], cwd=root) for letter in "wxyz"
    ]
    assert [process.wait() for process in running] == [0] * 4


def test_what_a_killed_process_left_goes_in_time(place: Path) -> None:
    cache.store("a", PARTS)
    for name, age in ((".0123456789abcdef", 7200), (".fedcba9876543210", 0), (".other", 7200)):
        (place / name).write_bytes(b"half")
        os.utime(place / name, (0, time.time() - age))
    cache.store("b", PARTS)
    assert {e.name for e in place.iterdir()} == {
        *("a.compiled", "b.compiled"),
        *(".fedcba9876543210", ".other"),
    }


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_an_entry_that_cannot_be_read_now_stays(
    place: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    cache.store("a", PARTS)

    def refuse(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        assert cache.load("a") is None
    assert cache.load("a")
