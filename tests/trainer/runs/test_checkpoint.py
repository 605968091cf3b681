"""A checkpoint is complete or absent, is restored bit for bit, and raises an error if it was
changed."""

import errno
from pathlib import Path

import pytest
import torch

from runtime.files import from_json, to_json
from trainer.errors import CheckpointError
from trainer.runs.checkpoint import (
    PARTS,
    Checkpoint,
    found,
    newest,
    read,
    write,
)
from trainer.training.optimizer import optimizer_tensors, restore_optimizer


def make(step: int = 10) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)

    def tensors() -> dict[str, torch.Tensor]:
        return {
            "conv": torch.randn(4, 3, 3, 3, generator=generator).contiguous(
                memory_format=torch.channels_last
            ),
            "step": torch.tensor(float(step)),
            "odd": torch.tensor([0.0, -0.0, float("inf"), 1e-45]),
        }

    return Checkpoint(step, 1 / 3, tensors(), tensors(), tensors(), {"threads": 1})


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    written = make()
    back = read(write(tmp_path, written, keep=3))
    assert (back.step, back.seconds, back.environment) == (
        written.step,
        written.seconds,
        written.environment,
    )
    for part in PARTS:
        before, after = getattr(written, part), getattr(back, part)
        assert after.keys() == before.keys()
        assert all(
            torch.equal(after[k].view(torch.int32), before[k].view(torch.int32)) for k in before
        )


def test_the_optimizer_goes_on_where_it_was() -> None:
    def step(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> torch.Tensor:
        weight.grad = torch.tensor([1.0, -2.0])
        optimizer.step()
        return weight.detach()

    first = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.AdamW([first])
    half_way = step(optimizer, first).clone()
    tensors = optimizer_tensors(optimizer, ["a:b"])
    second = half_way.requires_grad_()
    other = torch.optim.AdamW([second])
    restore_optimizer(other, ["a:b"], {k: v.clone() for k, v in tensors.items()})
    assert torch.equal(step(other, second), step(optimizer, first))


def test_the_newest_is_the_one_of_the_last_step(tmp_path: Path) -> None:
    for step in (999, 1000, 50):
        write(tmp_path, make(step), keep=3)
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1000


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest(tmp_path / "checkpoints") is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, make(step), keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_the_folder_of_a_killed_write_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, make(1), keep=3)
    whole = write(tmp_path, make(2), keep=3)
    whole.rename(tmp_path / ".step-00000002.0123456789ab")  # left by a kill just before the rename
    assert [p.name for p in found(tmp_path)] == ["step-00000001"]


FILES = [*(f"{part}.safetensors" for part in PARTS), "state.json"]


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named_with_the_way_out(tmp_path: Path, file: str) -> None:
    path = write(tmp_path, make(), keep=3)
    (path / file).unlink()
    with pytest.raises(CheckpointError) as refused:
        newest(tmp_path)
    assert f"checkpoint {path} is damaged: {file} is missing" in str(refused.value)
    assert "Delete this folder to resume from the checkpoint before it" in str(refused.value)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("length", [0, 7, -1])
def test_a_file_cut_short_is_refused_with_the_folder_named(
    tmp_path: Path, file: str, length: int
) -> None:
    path = write(tmp_path, make(), keep=3)
    text = (path / file).read_bytes().rstrip()
    (path / file).write_bytes(text[:length])
    with pytest.raises(
        CheckpointError, match=f"checkpoint {path} is damaged: .*Delete this folder"
    ):
        read(path)


@pytest.mark.parametrize("part", PARTS)
def test_one_changed_bit_is_found(tmp_path: Path, part: str) -> None:
    path = write(tmp_path, make(), keep=3)
    data = bytearray((path / f"{part}.safetensors").read_bytes())
    data[-1] ^= 1
    (path / f"{part}.safetensors").write_bytes(data)
    with pytest.raises(
        CheckpointError, match=f"{part}.safetensors is not the file that was written"
    ):
        read(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"step": NaN}', '{"sha256": []}'])
def test_a_state_that_is_not_what_was_written_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, make(), keep=3)
    (path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"checkpoint {path} is damaged"):
        read(path)


def test_a_step_that_is_not_the_folders_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, make(10), keep=3)
    state = (path / "state.json").read_text()
    (path / "state.json").write_text(state.replace('"step": 10', '"step": 11'))
    with pytest.raises(CheckpointError, match=f"checkpoint {path} is damaged: .*step 11"):
        read(path)


def test_a_full_disk_leaves_the_older_checkpoints_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write(tmp_path, make(step), keep=2)
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "optimizer.safetensors":
            write_bytes(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, make(3), keep=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert read(tmp_path / "step-00000002").step == 2


def test_what_a_kill_left_behind_goes_with_the_next_write(tmp_path: Path) -> None:
    (tmp_path / ".step-00000005.0123456789ab").mkdir()
    write(tmp_path, make(10), keep=3)
    assert names(tmp_path) == ["step-00000010"]


def test_the_one_that_was_just_written_stays_even_if_others_are_of_later_steps(
    tmp_path: Path,
) -> None:
    for step in (20, 30):
        write(tmp_path, make(step), keep=3)
    write(tmp_path, make(10), keep=3)
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"]
    write(tmp_path, make(5), keep=1)
    assert names(tmp_path) == ["step-00000005"]


def test_folders_of_other_names_are_left_alone(tmp_path: Path) -> None:
    copy = write(tmp_path, make(1), keep=3).rename(tmp_path / "step-00000001-good")
    for step in (1, 2, 3):
        write(tmp_path, make(step), keep=1)
    assert names(tmp_path) == [copy.name, "step-00000003"]
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 3


def test_steps_beyond_eight_digits_are_newer(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 100_000_001):
        write(tmp_path, make(step), keep=2)
    assert names(tmp_path) == ["step-100000000", "step-100000001"]
    write(tmp_path, make(99_999_998), keep=3)
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 100_000_001


def test_one_that_is_replaced_while_it_is_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run keeps its best checkpoint alone, and another command may read it meanwhile."""
    write(tmp_path, make(1), keep=1)
    read_bytes = Path.read_bytes

    def replaced(path: Path) -> bytes:
        if path.parent.name == "step-00000001" and path.name == "ema.safetensors":
            write(tmp_path, make(2), keep=1)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", replaced)
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 2


@pytest.mark.parametrize("part", ["../../secret", "/tmp/secret", "..", "A"])
def test_a_part_that_is_no_plain_name_is_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """state.json may come from anywhere, and a part's name becomes a path."""
    path = write(tmp_path, make(), keep=3)
    state = from_json((path / "state.json").read_bytes())
    state["sha256"][part] = "0" * 64
    (path / "state.json").write_text(to_json(state))
    opened: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: opened.append(p.stem) or read_bytes(p))
    with pytest.raises(CheckpointError, match="is not the name of a part"):
        read(path)
    assert {*opened} <= {"state", *PARTS}
