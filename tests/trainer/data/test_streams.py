"""Streamed images equal those that are loaded into memory, in the same order, from folders,
datasets and tar files. Bad ones are counted and named."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.errors import RequestError
from trainer.config import Config
from trainer.data import shards
from trainer.data import sources as data
from trainer.data.decode import UnreadablePicture
from trainer.data.image_files import Names
from trainer.data.memory import Pictures
from trainer.data.sources import load
from trainer.data.stream import Stream
from trainer.data.workers import Decoded
from trainer.errors import DataError
from trainer.fit import fit
from trainer.parallel.processes import Processes
from trainer.runs.log import read
from trainer.training.trial import try_out

ALONE = Processes(0, 1, torch.device("cpu"))
N = 30


def picture(i: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)


def png(i: int, size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(i, size)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(N):
        path = tmp_path / "pictures" / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return tmp_path / "pictures"


def config_for(where: str, **changes) -> Config:
    base = Config(
        data=where, name="test", channels=(8,), attention=(), batch=6, steps=20, in_memory_mb=0, workers=0, T=50,
        device="cpu", sample_every=0, log_every=5,
    )  # fmt: skip
    return replace(base, **changes)


def taken(config: Config, steps: int = 12, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    reader = load(config).reader(config, ALONE)
    found = [reader.take(step) for step in range(first, first + steps)]
    reader.close()
    return torch.stack([b.images for b in found]).numpy(), torch.stack(
        [b.labels for b in found]
    ).numpy()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_mb", [0, 1])
def test_a_streamed_folder_gives_what_one_in_memory_gives(
    folder: Path, workers: int, cache_mb: int
) -> None:
    config = config_for(f"folder:{folder}", workers=workers, cache_mb=cache_mb)
    assert isinstance(load(config), Stream)
    whole = replace(config, in_memory_mb=64)
    assert isinstance(load(whole), Pictures)
    for a, b in zip(taken(config), taken(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_data_set_in_memory_and_a_streamed_one_answer_alike(folder: Path) -> None:
    config = config_for(f"folder:{folder}")
    streamed, held = load(config), load(replace(config, in_memory_mb=64))
    assert (type(streamed), type(held)) == (Stream, Pictures)
    assert len(streamed) == len(held) == N
    assert streamed.sample_shape == held.sample_shape
    assert streamed.classes == held.classes
    np.testing.assert_array_equal(streamed.labels, held.labels)
    for dataset in (streamed, held):
        images, indices = dataset.gather(np.array([7, 3]))
        np.testing.assert_array_equal(images, [held.gather(np.array([i]))[0][0] for i in (7, 3)])
        assert indices.tolist() == [7, 3]
        assert len(set(dataset.image_names(range(N)))) == N
        record = dataset.describe()
        assert (record.pictures, record.fingerprint) == (N, dataset.fingerprint())
        assert dataset.unlabelled().classes == ()
        assert dataset.unlabelled().labels.tolist() == dataset.labels.tolist()
    assert streamed.image_names([0]) == [str(folder / "class0" / "00.png")]


def test_images_that_cannot_be_read_are_left_out_of_measurements(folder: Path) -> None:
    spoil(folder, 2)
    dataset = load(config_for(f"folder:{folder}"))
    images, indices = dataset.gather(np.arange(3, 9))
    assert indices.tolist() == [3, 4, 7, 8]
    assert len(images) == 4
    with pytest.raises(DataError, match="none of the 2 images to compare with can be read"):
        dataset.gather(np.array([5, 6]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_goes_on_anywhere(folder: Path, workers: int) -> None:
    config = config_for(f"folder:{folder}", workers=workers, crop="random", size=6)
    whole, part = taken(config)[0], taken(config, steps=3, first=7)[0]
    np.testing.assert_array_equal(whole[7:10], part)


def test_a_random_crop_is_another_part_each_time_and_a_centre_crop_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    wide = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (8, 1, 3))
    for i in range(6):
        Image.fromarray(wide).save(tmp_path / "a" / f"{i}.png")
    seen = {}
    for crop in ("random", "centre"):
        images, _ = taken(config_for(f"folder:{tmp_path}", crop=crop, size=8), steps=4)
        seen[crop] = len(np.unique(images[:, :, 0, 0, 0]))
    assert seen["random"] > 10
    assert seen["centre"] == 1


def test_names_are_kept_as_they_are() -> None:
    names = ["a/ä.png", "", "b", "\udcff.png"]
    assert list(Names(names)) == names


def test_decoded_pictures_are_kept_as_many_as_fit() -> None:
    kept = Decoded(10_000, (32, 32, 3), megabytes=1)
    assert kept.count == 2**20 // 3072
    kept.put(3, np.full((32, 32, 3), 7, np.uint8))
    kept.put(9_999, np.zeros((32, 32, 3), np.uint8))
    assert kept.get(2) is None
    assert kept.get(9_999) is None
    assert (kept.get(3) == 7).all()


# --- pictures that cannot be read


def spoil(folder: Path, count: int) -> list[str]:
    files = sorted(folder.rglob("*.png"))[5 : 5 + count]
    for file in files:
        file.write_bytes(b"no picture")
    return [str(file) for file in files]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_picture_is_counted_and_named_and_another_stands_in(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    bad = spoil(folder, 1)
    assert fit(config_for(f"folder:{folder}", workers=workers), tmp_path / "runs")
    run = tmp_path / "runs" / "test"
    assert [row["bad"] for row in read(run / "log.csv")][-1] == "1"
    assert (run / "bad-pictures.txt").read_text().splitlines() == bad


def test_too_many_bad_pictures_end_the_run_with_their_names(folder: Path, tmp_path: Path) -> None:
    bad = spoil(folder, 3)
    with pytest.raises(DataError, match="3 of 30 images cannot be read, more than 1 %") as refused:
        fit(config_for(f"folder:{folder}", log_every=20), tmp_path / "runs")
    assert all(name in str(refused.value) for name in bad)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_pictures_end_a_run_that_refuses_them(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    bad = spoil(folder, 1)
    with pytest.raises(DataError, match="cannot be read as an image") as refused:
        fit(
            config_for(f"folder:{folder}", bad_pictures="refuse", workers=workers),
            tmp_path / "runs",
        )
    assert str(refused.value).startswith(bad[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_of_another_size_ends_the_run_with_the_remedy(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    (folder / "class1" / "01.png").write_bytes(png(1, (9, 8)))
    with pytest.raises(DataError, match=r"01\.png is 8x9 RGB, but .* is 8x8 RGB.*--size N"):
        fit(config_for(f"folder:{folder}", workers=workers), tmp_path / "runs")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_of_32_bits_ends_the_run_in_one_line(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "class1" / "99.tif")
    with pytest.raises(DataError, match=r"99\.tif has mode F, 32 bits a pixel") as refused:
        fit(config_for(f"folder:{folder}", mode="L", workers=workers), tmp_path / "runs")
    assert "\n" not in str(refused.value)


# --- classes


def test_classes_come_from_a_json_file(folder: Path, tmp_path: Path) -> None:
    names = {"class0/00.png": "cat", "class1/01.png": "dog", "class0/03.png": "cat"}
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(names))
    found = load(config_for(f"folder:{folder}", label_file=str(file)))
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1]
    file.write_text(
        json.dumps({"labels": [["class1/01.png", 10], ["class0/00.png", 2]]})
    )  # StyleGAN's dataset.json
    found = load(config_for(f"folder:{folder}", label_file=str(file)))
    assert (found.classes, found.labels.tolist()) == (("2", "10"), [0, 1])


@pytest.mark.parametrize("names", [{"class0/99.png": "x"}, {"../secret.png": "x"}, [1, 2], {}])
def test_a_json_file_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, names) -> None:
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(names))
    with pytest.raises(DataError, match=r"labels\.json"):
        load(config_for(f"folder:{folder}", label_file=str(file)))


def test_without_labels_there_are_no_classes(folder: Path) -> None:
    assert load(config_for(f"folder:{folder}", labels=False)).classes == ()


# --- arrays


def test_an_npz_file_gives_its_arrays(tmp_path: Path) -> None:
    images, labels = np.stack([picture(i) for i in range(4)]), np.array([1, 0, 1, 1])
    np.savez(tmp_path / "a.npz", images=images, labels=labels, classes=np.array(["x", "y", "z"]))
    found = load(config_for(f"npz:{tmp_path / 'a.npz'}"))
    assert isinstance(found, Pictures)
    np.testing.assert_array_equal(found.images, images)
    assert (found.classes, found.labels.tolist()) == (("x", "y", "z"), [1, 0, 1, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, "needs images, uint8"),
        ({"pictures": np.zeros((2, 4, 4, 3), np.uint8)}, "needs images, uint8"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "needs a label for "
        "each "
        "of "
        "2 "
        "images"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 7]), "classes": np.array(["a"])}, "beyond "
        "them"),
    ],
)  # fmt: skip
def test_an_npz_file_of_something_else_is_refused(
    tmp_path: Path, arrays: dict, message: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load(config_for(f"npz:{tmp_path / 'a.npz'}"))


@pytest.mark.parametrize("asked", [{"size": 16}, {"mode": "L"}])
def test_an_npz_file_is_taken_as_it_is(tmp_path: Path, asked: dict) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    assert len(load(Config(data=f"npz:{tmp_path / 'a.npz'}", size=8, mode="RGB")).labels) == 2
    with pytest.raises(DataError, match="has images of 8x8 RGB, which are taken as they are"):
        load(Config(data=f"npz:{tmp_path / 'a.npz'}", **asked))


# --- tar files


def shard(path: Path, numbers: range, more: Callable[[int], dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            for ending, content in {"png": png(i), **more(i)}.items():
                member = tarfile.TarInfo(f"train/{i:04d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def assert_holds_all(found, labels: list[int]) -> None:
    assert found.labels.tolist() == labels
    images, indices = found.gather(np.arange(N))
    np.testing.assert_array_equal(images, [picture(i) for i in range(N)])
    assert indices.tolist() == list(range(N))


@pytest.mark.parametrize(
    "more",
    [
        lambda i: {"cls": str(i % 3).encode()},
        lambda i: {"json": json.dumps({"label": i % 3}).encode()},
    ],
)
def test_tar_files_give_every_picture_with_its_class(tmp_path: Path, more) -> None:
    shard(tmp_path / "a-0.tar", range(17), more)
    shard(tmp_path / "a-1.tar", range(17, N), more)
    found = load(config_for(f"wds:{tmp_path}/a-{{0..1}}.tar"))
    assert found.classes == ("0", "1", "2")
    assert_holds_all(found, [i % 3 for i in range(N)])
    assert_holds_all(load(config_for(f"wds:{tmp_path}/a-*.tar")), [i % 3 for i in range(N)])


def test_more_shards_than_files_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MOST_OPEN", 2)
    for i in range(5):
        shard(tmp_path / f"a-{i}.tar", range(i, N, 5), lambda i: {})
    opened, closed = [], []
    open_file, close_file = os.open, os.close
    monkeypatch.setattr(shards.os, "open", lambda *a: opened.append(open_file(*a)) or opened[-1])
    monkeypatch.setattr(shards.os, "close", lambda file: closed.append(file) or close_file(file))
    found = load(config_for(f"wds:{tmp_path}/a-{{0..4}}.tar"))
    before = len(opened) - len(closed)
    assert len(found.gather(np.arange(N))[0]) == N
    assert len(opened) - len(closed) <= before + 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_gone_ends_the_run_with_its_name(tmp_path: Path, workers: int) -> None:
    # The first image is read at the start, and its shard stays open.
    shard(tmp_path / "a-0.tar", range(1), lambda i: {})
    shard(tmp_path / "a-1.tar", range(1, N), lambda i: {})
    config = config_for(f"wds:{tmp_path}/a-{{0..1}}.tar", workers=workers, cache_mb=0)
    reader = load(config).reader(config, ALONE)
    (tmp_path / "a-1.tar").unlink()
    with pytest.raises(DataError, match=r"a-1\.tar cannot be read any more \(No such file"):
        reader.take(0)
    reader.close()


def test_remote_tar_files_are_fetched_once_and_go_on_within_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNNOISE_CACHE", str(tmp_path / "cache"))
    shard(tmp_path / "a.tar", range(N), lambda i: {})
    config = config_for(f"wds:pipe:cat {tmp_path}/a.tar", workers=1, name="tar")
    whole = taken(config)[0]
    (tmp_path / "a.tar").unlink()
    np.testing.assert_array_equal(taken(config, steps=3, first=4)[0], whole[4:7])


def test_what_is_no_tar_file_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNNOISE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(DataError, match=r"a\.tar cannot be read as an uncompressed tar file"):
        load(config_for(f"wds:{tmp_path}/a.tar"))
    with pytest.raises(DataError, match="cannot be fetched"):
        load(config_for(f"wds:pipe:cat {tmp_path}/a.tar"))
    assert list((tmp_path / "cache" / "shards").glob("*.tar")) == []
    with pytest.raises(DataError, match="there is no file"):
        load(config_for(f"wds:{tmp_path}/b.tar"))


def test_a_trial_of_a_run_of_one_step_takes_its_three(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try_out(config_for(f"folder:{folder}", steps=1))
    assert "for all 1 steps; nothing was written" in capsys.readouterr().out


# --- datasets


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    rows = {
        "picture": [{"bytes": png(i), "path": None} for i in range(N)],
        "kind": [i % 3 for i in range(N)],
    }
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.mark.parametrize("form", ["saved", "parquet", "folder of parquet"])
def test_a_dataset_gives_every_row_with_its_class(table, tmp_path: Path, form: str) -> None:
    place = tmp_path / "table" if form != "parquet" else tmp_path / "table" / "a.parquet"
    if form == "saved":
        table.save_to_disk(str(place))
    else:
        (tmp_path / "table").mkdir()
        table.to_parquet(str(tmp_path / "table" / "a.parquet"))
    found = load(config_for(f"hf:{place}", label_column="kind"))
    assert isinstance(found, Stream)
    assert found.classes == ("a", "b", "c")
    assert_holds_all(found, [i % 3 for i in range(N)])
    with pytest.raises(RequestError, match=r"unknown label column 'knd'\. Did you mean 'kind'"):
        load(config_for(f"hf:{place}", label_column="knd"))


def test_of_parquet_files_with_splits_the_train_split_is_taken(
    table, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "table").mkdir()
    for split, rows in (("test", range(4)), ("train", range(4, N))):
        file = tmp_path / "table" / f"{split}-00000-of-00001.parquet"
        table.select(rows).to_parquet(str(file))
    assert len(load(config_for(f"hf:{tmp_path / 'table'}"))) == N - 4
    assert "training on the train split, without test" in caplog.text
    file.unlink()
    with pytest.raises(DataError, match="no parquet files of a train split, only test"):
        load(config_for(f"hf:{tmp_path / 'table'}"))


def test_other_images_of_as_many_rows_are_other_data(table, tmp_path: Path) -> None:
    place = str(tmp_path / "a.parquet")
    table.to_parquet(place)
    before = load(config_for(f"hf:{place}")).fingerprint()
    assert load(config_for(f"hf:{place}")).fingerprint() == before
    rows = table.to_dict()
    rows["picture"][4] = {"bytes": png(4)[:-12], "path": None}
    type(table).from_dict(rows, features=table.features).to_parquet(place)
    assert load(config_for(f"hf:{place}")).fingerprint() != before


def test_a_row_without_a_picture_is_a_bad_one(table, tmp_path: Path) -> None:
    rows = table.to_dict()
    rows["picture"][4] = None
    type(table).from_dict(rows, features=table.features).save_to_disk(str(tmp_path / "table"))
    found = load(config_for(f"hf:{tmp_path / 'table'}", label_column="kind"))
    assert isinstance(found, Stream)
    with pytest.raises(UnreadablePicture, match="the row has no image"):
        found.images.read(4)


@pytest.mark.parametrize("missing", [None, -1])
def test_rows_without_a_label_are_refused(table, tmp_path: Path, missing: int | None) -> None:
    rows = table.to_dict()
    rows["kind"][4] = missing
    type(table).from_dict(rows, features=table.features).save_to_disk(str(tmp_path / "table"))
    with pytest.raises(DataError, match=f"1 of {N} rows have no label in the column 'kind'"):
        load(config_for(f"hf:{tmp_path / 'table'}", label_column="kind"))


def test_what_is_no_dataset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be opened as a dataset"):
        load(config_for(f"hf:{tmp_path / 'a.parquet'}"))


def test_every_kind_of_data_has_a_fingerprint_that_its_classes_change(
    folder: Path, tmp_path: Path
) -> None:
    before = load(config_for(f"folder:{folder}")).fingerprint()
    assert load(config_for(f"folder:{folder}")).fingerprint() == before
    (folder / "class0" / "00.png").rename(folder / "class1" / "00.png")
    assert load(config_for(f"folder:{folder}")).fingerprint() != before
    assert data.digits().fingerprint() != before


@pytest.mark.parametrize("saved", ["torch", "numpy", "pandas"])
def test_the_format_that_a_dataset_was_saved_with_changes_nothing(
    table, tmp_path: Path, saved: str
) -> None:
    table.with_format(saved, columns=["kind"]).save_to_disk(str(tmp_path / "table"))
    found = load(config_for(f"hf:{tmp_path / 'table'}", label_column="kind"))
    assert_holds_all(found, [i % 3 for i in range(N)])
