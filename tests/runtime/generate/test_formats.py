"""The formats of shards: other libraries read them, and they hold the sampler's images."""

from __future__ import annotations

import gc
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import Bundle, RequestError, Sampler
from runtime.generate.entries import Content, Entries
from runtime.generate.formats import FORMATS
from runtime.generate.plan import Plan
from runtime.generate.records import digest
from runtime.generate.run import generate
from runtime.generate.settings import Settings
from runtime.generate.webdataset import TarWriter

PLAN = Plan.from_json({"seed": 5, "labels": [3, None, 8], "steps": 3})
N = 5


@pytest.fixture(scope="module")
def bundle(first_release: Path) -> Bundle:
    return Bundle.load(first_release / "bundle")


@pytest.fixture(scope="module")
def samples(bundle: Bundle) -> np.ndarray:
    labels = [3, None, 8, 3, None]
    return Sampler(bundle, threads=1).sample(N, 5, label=labels, steps=3)


@pytest.fixture(scope="module")
def images(bundle: Bundle, samples: np.ndarray) -> np.ndarray:
    return Sampler(bundle, threads=1).to_uint8(samples)[..., 0]


def made(bundle: Bundle, out: Path, kind: str, **how: int) -> list[Path]:
    """The shards of a run, and nothing else in their folder."""
    settings = Settings(bundle=bundle, plan=PLAN, out=out, n=N, shard=3, format=kind, **how)
    assert generate(settings).made == 2
    return sorted((out / "shards").iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_tar_files(bundle: Bundle, images: np.ndarray, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="pip install 'unnoise[data]'")
    shards = made(bundle, tmp_path / "out", "webdataset")
    assert [path.name for path in shards] == ["shard-000000.tar", "shard-000001.tar"]
    found = list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False))
    gc.collect()  # it leaves its files open, which would be a warning in a later test
    assert len(found) == N
    for i, sample in enumerate(found):
        assert sample["__key__"] == f"{i:010d}"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), images[i])
        label = [3, None, 8][i % 3]
        described = json.loads(sample["json"])
        name = None if label is None else str(label)
        assert described == {"index": i, "seed": 5 + i, "label": label, "label_name": name}
        assert (sample.get("cls") is None) == (label is None)
        assert label is None or int(sample["cls"]) == label


def test_a_tar_file_has_no_time_and_no_user(bundle: Bundle, tmp_path: Path) -> None:
    with tarfile.open(made(bundle, tmp_path / "out", "webdataset")[0]) as tar:
        for member in tar:
            facts = member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode
            assert facts == (0, 0, 0, "", "", 0o644)


def test_a_tar_file_of_many_samples_needs_no_memory(
    bundle: Bundle, samples: np.ndarray, tmp_path: Path
) -> None:
    content = Content(N, bundle.sample_shape, bundle.sample_range, bundle.labels.names)
    writer = TarWriter(tmp_path / "x.tar", content)
    writer.add(Entries(0, [*range(N)], [0] * N, samples))
    assert writer._tar.members == []
    writer.close()
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert len(tar.getmembers()) == 3 * N


def test_datasets_reads_the_parquet_files(
    bundle: Bundle, images: np.ndarray, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install 'unnoise[data]'")
    shards = made(bundle, tmp_path / "out", "parquet")
    files = [str(path) for path in shards]
    found = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    rows = found["train"]
    assert rows.features["label"].names == [str(i) for i in range(10)]
    assert [row["label"] for row in rows] == [3, None, 8, 3, None]
    assert [row["seed"] for row in rows] == [5, 6, 7, 8, 9]
    for i, row in enumerate(rows):
        assert np.array_equal(np.asarray(row["image"]), images[i])


def test_a_row_group_ends_after_so_many_rows_however_they_come(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("runtime.generate.parquet", reason="pip install pyarrow")
    monkeypatch.setattr(parquet, "ROWS", 2)
    one = made(bundle, tmp_path / "one", "parquet", max_batch=1)
    all_at_once = made(bundle, tmp_path / "all", "parquet", max_batch=16)
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in all_at_once]
    assert parquet.parquet.ParquetFile(one[0]).metadata.num_row_groups == 2


def test_npy_holds_the_samples_themselves(
    bundle: Bundle, samples: np.ndarray, tmp_path: Path
) -> None:
    shards = made(bundle, tmp_path / "out", "npy")
    found = [np.load(path / "samples.npy", mmap_mode="r") for path in shards]
    assert np.concatenate(found).tobytes() == samples.tobytes()
    labels = np.concatenate([np.load(path / "labels.npy") for path in shards])
    assert labels.tolist() == [3, 10, 8, 3, 10]
    seeds = np.concatenate([np.load(path / "seeds.npy") for path in shards])
    assert seeds.dtype == np.uint64
    assert seeds.tolist() == [5, 6, 7, 8, 9]


def test_a_folder_holds_images_and_one_line_for_each(
    bundle: Bundle, images: np.ndarray, tmp_path: Path
) -> None:
    index = 0
    for shard in made(bundle, tmp_path / "out", "folder"):
        for text in (shard / "metadata.jsonl").read_text().splitlines():
            line = json.loads(text)
            with Image.open(shard / line["file_name"]) as image:
                assert np.array_equal(np.asarray(image), images[index])
            assert (line["index"], line["seed"]) == (index, 5 + index)
            index += 1
    assert index == N


@pytest.mark.parametrize("kind", FORMATS)
def test_the_bytes_of_a_shard_are_those_of_any_other_run(
    bundle: Bundle, kind: str, tmp_path: Path
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="pip install 'unnoise[parquet]'")
    first = made(bundle, tmp_path / "first", kind)
    second = made(bundle, tmp_path / "second", kind, max_batch=2)
    assert [digest(path) for path in first] == [digest(path) for path in second]


def test_the_hash_of_a_folder_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"two")
    (tmp_path / "a").write_bytes(b"one")
    # sha256sum * | sha256sum
    assert digest(tmp_path) == (
        "d17138d96382403690482a89da33475336ab36c046a6912a86badedd62301cb8",
        6,
    )


def test_samples_that_are_no_images_need_npy(bundle: Bundle, tmp_path: Path) -> None:
    latents = Bundle(**{**vars_of(bundle), "sample_shape": (4, 8, 8)})
    with pytest.raises(RequestError, match=r"of digits are 4×8×8\. Use the format npy"):
        Settings(bundle=latents, plan=PLAN, out=tmp_path, n=1)
    Settings(bundle=latents, plan=PLAN, out=tmp_path, n=1, format="npy")


def vars_of(bundle: Bundle) -> dict[str, object]:
    """The fields of a bundle."""
    return {name: getattr(bundle, name) for name in Bundle.__dataclass_fields__}
