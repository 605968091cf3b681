"""Data from others: unused data is named before training, and damaged files raise a DataError that
names them."""

import gzip
import io
import json
import logging
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.errors import RequestError, UnnoiseError
from trainer.config import Config
from trainer.data.decode import endings
from trainer.data.labels import label_name, numbered, whole_number
from trainer.data.sources import load
from trainer.data.stream import Stream
from trainer.errors import DataError
from trainer.fit import fit, main


def png(i: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def put(path: Path, data: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png() if data is None else data)
    return path


def config_for(data: str, **changes: object) -> Config:
    fields = {
        "name": "test",
        "channels": (8,),
        "attention": (),
        "batch": 4,
        "steps": 2,
        "workers": 0,
        "T": 50,
    }
    return Config(data=data, **{**fields, "device": "cpu", "sample_every": 0, **changes})  # pyright: ignore[reportArgumentType]


def refusal(data: str, **changes: object) -> str:
    with pytest.raises(DataError) as refused:
        load(config_for(data, **changes))
    return str(refused.value)


# --- labels and class names


@pytest.mark.parametrize(
    "value",
    [
        None,
        1.5,
        float("nan"),
        [1],
        {"a": 1},
        -1,
        "-3",
        "",
        " ",
        "a\0b",
        "a\nb",
        "\ud800",
        b"caf\xe9",
    ],
)
def test_a_label_that_is_no_text_and_no_whole_number_is_refused(value: object) -> None:
    with pytest.raises(DataError, match=r"^row 3: "):
        label_name(value, "row 3")


def test_labels_are_ordered_by_number_and_other_digits_are_text() -> None:
    assert numbered(["10", "²", "2", "x", "9" * 5000])[0][:2] == ("2", "10")
    assert whole_number("²") is None


@pytest.mark.parametrize("raw", [b"caf\xe9", b"a\x07b", b"line\nbreak", b"\xc2\x85"])
@pytest.mark.parametrize("options", [["--dry-run"], []], ids=["dry run", "run"])
def test_a_class_folder_whose_name_is_no_text_is_refused_and_leaves_nothing(
    tmp_path: Path, raw: bytes, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = os.fsencode(tmp_path / "data") + b"/" + raw
    os.makedirs(folder)
    put(Path(os.fsdecode(folder)) / "1.png")
    put(tmp_path / "data" / "dogs" / "1.png")
    runs = tmp_path / "runs"
    assert main(["--data", f"folder:{tmp_path / 'data'}", f"--runs={runs}", *options]) == 2
    assert "the class name" in capsys.readouterr().err
    assert not runs.exists()


@pytest.mark.parametrize("in_memory_mb", [0, 64])
def test_a_file_whose_name_is_no_text_is_trained_on(tmp_path: Path, in_memory_mb: int) -> None:
    for i in range(8):
        put(tmp_path / "data" / "cats" / os.fsdecode(b"caf\xe9%d.png" % i), png(i))
    assert fit(
        config_for(f"folder:{tmp_path / 'data'}", in_memory_mb=in_memory_mb), tmp_path / "runs"
    )


def test_an_unreadable_file_whose_name_is_no_text_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(8):
        put(
            tmp_path / "data" / "cats" / os.fsdecode(b"caf\xe9%d.png" % i),
            png(i) if i else b"no image",
        )
    config = config_for(f"folder:{tmp_path / 'data'}", in_memory_mb=0, log_every=1)
    assert fit(config, tmp_path / "runs")
    told = (tmp_path / "runs" / "test" / "bad-pictures.txt").read_bytes()
    assert told.endswith(b"caf\xe90.png\n")


@pytest.mark.parametrize(
    "changes",
    [{"data": "folder:/a\udce9"}, {"name": "caf\udce9"}, {"name": "a\0"}, {"name": "x" * 201}, {"label_file": "\udce9"},
     {"name": "a\nb"}, {"start_from": "\udce9"}, {"features": "a\0"}, {"image_column": "\ud800"}],
)  # fmt: skip
def test_paths_and_names_of_a_config_are_text(changes: dict) -> None:
    with pytest.raises(RequestError):
        Config(**{"data": "digits", **changes})


def test_the_folder_of_runs_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", "digits", "--runs", str(tmp_path / "caf\udce9")]) == 2
    assert "--runs" in capsys.readouterr().err


# --- folders: what is left out


def test_every_usual_ending_is_read() -> None:
    assert endings() >= {
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
    }


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".JPG", ".avif", ".jp2", ".qoi"])
def test_images_with_another_ending_are_read(tmp_path: Path, ending: str) -> None:
    if ending.lower() not in endings():
        pytest.skip("this Pillow does not read them")
    put(tmp_path / "a" / "1.png")
    kind = {
        ".jfif": "JPEG",
        ".jpe": "JPEG",
        ".jpg": "JPEG",
        ".avif": "AVIF",
        ".jp2": "JPEG2000",
        ".qoi": "QOI",
    }
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / f"2{ending}", kind[ending.lower()])
    assert len(load(config_for(f"folder:{tmp_path}")).labels) == 2


def test_what_is_left_out_is_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("1.png", "2.heic", "3", "4.txt", ".5.png"):
        put(tmp_path / "cats" / name)
    (tmp_path / "cats" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "cats" / "self.png").symlink_to("self.png")
    (tmp_path / "none").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(load(config_for(f"folder:{tmp_path}")).labels) == 1
    (told,) = [record.getMessage() for record in caplog.records]
    for part in (
        "2 images with an ending that is not read (cats/2.heic, cats/3)",
        "1 hidden images and folders (cats/.5.png)",
        "1 other files (.txt: 1)",
        "2 links that lead nowhere (cats/gone.png, cats/self.png)",
        "1 links to a folder above (loop)",
        "1 folders without images, which are no classes (none)",
    ):
        assert part in told


def test_a_folder_of_images_alone_is_not_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "cats" / "1.png")
    load(config_for(f"folder:{tmp_path}"))
    assert caplog.text == ""


def link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize(
    ("name", "write"), [("1.heic", put), ("1", put), ("1.png", link), (".1.png", put)]
)
def test_a_class_that_would_vanish_is_refused(
    tmp_path: Path, name: str, write: Callable[[Path], object]
) -> None:
    put(tmp_path / "cats" / "1.png")
    (tmp_path / "dogs").mkdir()
    write(tmp_path / "dogs" / name)
    assert f"the class folder {tmp_path}/dogs has no image that is read" in refusal(
        f"folder:{tmp_path}"
    )


def test_a_class_whose_images_are_all_unreadable_is_refused(tmp_path: Path) -> None:
    for i in range(5):
        put(tmp_path / "cats" / f"{i}.png")
    put(tmp_path / "dogs" / "1.png", b"no image")
    assert "no image of this class can be read: dogs" in refusal(f"folder:{tmp_path}")
    with pytest.raises(DataError, match="no image of this class can be read: dogs"):
        fit(
            config_for(f"folder:{tmp_path}", in_memory_mb=0, batch=8, log_every=1),
            tmp_path / "runs",
        )


def test_images_below_the_class_folders_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "cats" / "1.png")
    put(tmp_path / "dogs" / "big" / "1.png")
    assert "1 images in deeper folders (dogs/big: 1)" in refusal(f"folder:{tmp_path}")


def test_the_parent_of_the_data_is_refused_with_the_folder_to_name(tmp_path: Path) -> None:
    root = tmp_path / "my data"
    put(root / "train" / "cats" / "1.png")
    put(root / "train" / "dogs" / "1.png")
    assert f"--data 'folder:{root}/train'" in refusal(f"folder:{root}")
    put(root / "test" / "cats" / "1.png")
    assert f"--data 'folder:{root}/train'" in refusal(f"folder:{root}")


@pytest.mark.parametrize(
    "parts", [("train", "test"), ("Training", "val"), ("train2017", "val2017")]
)
def test_the_parts_of_a_data_set_are_no_classes(tmp_path: Path, parts: tuple[str, str]) -> None:
    for i in range(3):
        put(tmp_path / parts[0] / f"{i}.png")
    put(tmp_path / parts[1] / "1.png")
    told = refusal(f"folder:{tmp_path}")
    assert "parts of a data set" in told
    assert f"--data folder:{tmp_path}/{parts[0]}" in told


def test_a_class_may_be_called_like_a_part(tmp_path: Path) -> None:
    for name in ("train", "bus"):
        put(tmp_path / name / "1.png")
    assert load(config_for(f"folder:{tmp_path}")).classes == ("bus", "train")


def test_links_between_folders_end(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.png")
    put(tmp_path / "b" / "1.png")
    (tmp_path / "a" / "x").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "x").symlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    assert load(config_for(f"folder:{tmp_path}")).classes == ("a", "b", "c")


def test_the_folder_may_be_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "cats" / "1.png")
    monkeypatch.chdir(tmp_path / "cats")
    assert load(config_for("folder:.")).classes == ("cats",)


# --- label files


def test_images_that_a_label_file_does_not_name_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a/1.png", "a/2.png", "a/b/c/3.png"):
        put(tmp_path / "data" / name)
    put(tmp_path / "data" / "a" / "4.heic")
    file = put(tmp_path / "labels.json", b'{"a/1.png": "x"}')
    assert len(load(config_for(f"folder:{tmp_path / 'data'}", label_file=str(file))).labels) == 1
    assert "does not name 2 of the images" in caplog.text
    assert "a/2.png, a/b/c/3.png" in caplog.text
    assert "left out 1 images with an ending that is not read (a/4.heic)" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        b"", b"5", b"null", b"[]", b"{}", b'"a"', b'["ab"]', b'[["a/1.png"]]', b'[["a/1.png", 1, 2]]', b'[[1, 2]]',
        b'{"a/1.png": null}', b'{"a/1.png": [1]}', b'{"a/1.png": 1.5}', b'{"a/1.png": NaN}', b'{"a/1.png": -1}',
        b'{"a/1.png": ""}', b'{"a/1.png": 1, "a/1.png": 2}', b'[["a/1.png", 1], ["./a/1.png", 2]]',
        b'{"labels": null}', b'{"labels": {"a/1.png": 1}}', b'{"/etc/hostname": 1}', b'{"a/../a/1.png": 1}', b'{"": 1}',
        b'{"a": 1}', b'{"a\\u0000": 1}', b'{"\\ud800": 1}', b'{"a/1.png": "\\ud800"}', b'{"a/1.png": "caf\xe9"}',
        b'{"a/1.png": "x\\u0007"}', b"[" * 100_000, ('{"' + "x" * 5000 + '": 1}').encode(),
    ],
)  # fmt: skip
def test_a_label_file_of_something_else_is_refused(tmp_path: Path, text: bytes) -> None:
    put(tmp_path / "data" / "a" / "1.png")
    file = put(tmp_path / "labels.json", text)
    assert "labels.json" in refusal(f"folder:{tmp_path / 'data'}", label_file=str(file))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_label_file_may_be_in_every_encoding_of_unicode(tmp_path: Path, encoding: str) -> None:
    put(tmp_path / "data" / "a" / "é.png")
    file = put(tmp_path / "labels.json", '{"a/é.png": "café"}'.encode(encoding))
    assert load(config_for(f"folder:{tmp_path / 'data'}", label_file=str(file))).classes == (
        "café",
    )


@pytest.mark.parametrize("place", [".", "nowhere.json"])
def test_a_label_file_that_is_no_file_is_refused(tmp_path: Path, place: str) -> None:
    put(tmp_path / "a" / "1.png")
    assert "cannot be read" in refusal(f"folder:{tmp_path}", label_file=str(tmp_path / place))


# --- arrays

IMAGES = np.zeros((3, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": np.zeros((0, 4, 4, 3), np.uint8)},
        {"images": np.zeros((3, 0, 4, 3), np.uint8)},
        {"images": np.uint8(3)},
        {"images": np.array([None, None], object)},
        {"images": IMAGES, "labels": np.array([0, -1, 1])},
        {"images": IMAGES, "labels": np.array([0.0, 1.0, 2.0])},
        {"images": IMAGES, "labels": np.array([0, np.nan, 1])},
        {"images": IMAGES, "labels": np.array(3)},
        {"images": IMAGES, "labels": np.array([[0], [1], [2]])},
        {"images": IMAGES, "labels": np.array(["a", "", "b"])},
        {"images": IMAGES, "labels": np.array(["a", "\ud800", "b"])},
        {"images": IMAGES, "labels": np.array([b"caf\xe9", b"a", b"b"])},
        {"images": IMAGES, "labels": np.array([True, False, True])},
        {"images": IMAGES, "labels": np.array([0, 1, 2]), "classes": np.array("a")},
        {"images": IMAGES, "labels": np.array([0, 1, 2]), "classes": np.array(["a", "a", "b"])},
        {"images": IMAGES, "labels": np.array([0, 1, 2]), "classes": np.array(["a", "b", "c\n"])},
        {
            "images": IMAGES,
            "labels": np.array(["0", "1", "²"]),
            "classes": np.array(["a", "b", "c"]),
        },
        {"images": IMAGES, "labels": np.array([0, 1, 3]), "classes": np.array(["a", "b", "c"])},
        {"images": IMAGES, "labels": np.array([0, 1, 2]), "classes": np.array(["a", None], object)},
        {"images": IMAGES, "labels": np.array([0, 1, 2]), "classes": np.array([1.5, 2.5, 3.5])},
    ],
    ids=lambda arrays: ", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in arrays.items()),
)
def test_arrays_that_are_no_images_labels_and_classes_are_refused(
    tmp_path: Path, arrays: dict
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    assert "a.npz" in refusal(f"npz:{tmp_path / 'a.npz'}")


def huge(path: Path) -> None:
    """An array whose header claims 10^12 elements."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1000, 1000, 1)}
    )
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("images.npy", header.getvalue() + b"\0" * 10)


def flipped(path: Path) -> None:
    np.savez(path, images=np.full((3, 16, 16, 3), 7, np.uint8))
    data = bytearray(path.read_bytes())
    data[400] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    "write",
    [
        flipped, huge,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a zip file"),
        lambda path: np.save(path.with_suffix(".npy"), IMAGES) or path.with_suffix(".npy").rename(path),
        lambda path: np.savez(path, images=IMAGES) or path.write_bytes(path.read_bytes()[:200]),
        lambda path: path.mkdir(),
        lambda path: None,
    ],
    ids=["crc", "huge", "empty", "text", "npy", "cut", "folder", "missing"],
)  # fmt: skip
def test_a_damaged_npz_file_is_refused(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path / "a.npz")
    assert "a.npz cannot be read as an .npz file" in refusal(f"npz:{tmp_path / 'a.npz'}")


def test_labels_and_classes_may_be_bytes_of_text(tmp_path: Path) -> None:
    labels = np.array([b"b", "café".encode(), b"b"])
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=labels)
    assert load(config_for(f"npz:{tmp_path / 'a.npz'}")).classes == ("b", "café")


def test_classes_without_images_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(
        tmp_path / "a.npz",
        images=IMAGES,
        labels=np.array([0, 0, 2]),
        classes=np.array(["x", "y", "z"]),
    )
    load(config_for(f"npz:{tmp_path / 'a.npz'}"))
    assert "1 classes have no images: y" in caplog.text


@pytest.mark.parametrize("data", ["emoji", "digits"])
def test_the_built_in_data_is_not_warned_of(data: str, caplog: pytest.LogCaptureFixture) -> None:
    load(Config(data=data))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("data", "option"),
    [("emoji", {"size": 64}), ("emoji", {"mode": "L"}), ("digits", {"crop": "random"})],
)
def test_options_for_files_that_change_nothing_are_warned_of(
    data: str, option: dict, caplog: pytest.LogCaptureFixture
) -> None:
    load(Config(data=data, **option))
    size = "32x32 RGB" if data == "emoji" else "8x8 L"
    assert f"{data}: --size, --mode and --crop are for image files" in caplog.text
    assert f"these images stay {size}" in caplog.text


# --- tar files


def tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    pytest.importorskip("webdataset")
    with tarfile.open(path, "w") as file:
        for name, content in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


FOUR = {f"{i}.png": png(i) for i in range(4)}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: 512 + 512 + 100],  # inside the second header
        lambda data: data[: 512 + 512],  # after the first member
        lambda data: data[: 512 + 100],  # inside the first member
        lambda data: data[:1024] + b"\xff" * 512 + data[1536:],  # a damaged header
        lambda data: data + data,  # two joined shards
        gzip.compress,
        lambda data: b"",
        lambda data: b"x" * 2000,
        lambda data: b"\0" * 10240,
    ],
    ids=["header", "boundary", "data", "damaged", "joined", "gz", "empty", "text", "zeros"],
)
def test_a_damaged_tar_file_is_refused(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tar(
        tmp_path / "a.tar", {name: data[:500].ljust(512, b"\0") for name, data in FOUR.items()}
    )
    path.write_bytes(spoil(path.read_bytes()))
    assert "a.tar" in refusal(f"wds:{path}")


@pytest.mark.parametrize(
    "more",
    [
        {"0.cls": b"caf\xe9"}, {"0.cls": b""}, {"0.cls": b"a\0b"}, {"0.cls": b"-1"}, {"0.json": b"5"}, {"0.json": b"null"},
        {"0.json": b"[]"}, {"0.json": b'{"label": null}'}, {"0.json": b'{"label": [1]}'}, {"0.json": b'{"label": 1.5}'},
        {"0.json": b'{"label": NaN}'}, {"0.json": b'{"label": 1, "label": 2}'}, {"0.json": b"caf\xe9"}, {"0.json": b""},
        {"0.json": b'{"label": "\\ud800"}'}, {"0.json": b'{"label": -1}'},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_label_in_a_tar_file_is_refused_with_its_member(
    tmp_path: Path, more: dict[str, bytes]
) -> None:
    told = refusal(f"wds:{tar(tmp_path / 'a.tar', {**FOUR, **more})}")
    assert str(tmp_path / "a.tar") in told
    assert next(iter(more)) in told


def test_two_classes_of_one_image_are_refused_in_any_order(tmp_path: Path) -> None:
    both = {"0.cls": b"3", "0.json": b'{"label": "dog"}'}
    for members in ({**FOUR, **both}, {**dict(reversed(both.items())), **FOUR}):
        path = tar(tmp_path / "a.tar", members)
        assert "'0' has two classes" in refusal(f"wds:{path}")
    (tmp_path / "a.tar").unlink()
    every = {f"{i}.{ending}": text for i in range(4) for ending, text in (
        ("png", png(i)), ("cls", b"3"), ("json", b'{"label": 3, "name": "dog"}'))}  # fmt: skip
    path = tar(tmp_path / "a.tar", every)
    assert load(config_for(f"wds:{path}")).classes == ("3",)
    assert load(config_for(f"wds:{path}", label_column="name")).classes == ("dog",)


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.png", png(1))])
    assert "'0.png' is there twice" in refusal(f"wds:{path}")


def test_a_class_whose_images_are_not_read_is_refused(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "a.tar", {"0.png": png(), "0.cls": b"cat", "1.heic": b"x", "1.cls": b"dog"}
    )
    assert "these classes have no image that is read: dog" in refusal(f"wds:{path}")


def test_what_is_left_out_of_a_tar_file_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = {
        **FOUR,
        "0.txt": b"caption",
        "1.jpg": b"x",
        "photo.v2.jpg": b"x",
        "9.heic": b"x",
        "8.txt": b"x",
        "._0.png": b"x",
    }
    assert len(load(config_for(f"wds:{tar(tmp_path / 'a.tar', members)}")).labels) == 4
    for part in (
        "1 second images of the same name (a.tar/1.jpg)",
        "2 images with an ending that is not read (a.tar/photo.v2.jpg, a.tar/9.heic)",
        "1 members without an image (a.tar/8.txt)",
        "1 hidden images (a.tar/._0.png)",
    ):
        assert part in caplog.text


def test_links_in_a_tar_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tar(tmp_path / "a.tar", FOUR)
    with tarfile.open(path, "a") as file:
        for name, kind in (("5.png", tarfile.LNKTYPE), ("6.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0.png"
            file.addfile(member)
    found = load(config_for(f"wds:{path}"))
    assert isinstance(found, Stream)
    assert len(found) == 5
    np.testing.assert_array_equal(found.images.read(4), found.images.read(0))
    assert "links and special files (a.tar/6.png)" in caplog.text


@pytest.mark.parametrize("name", ["caf\udce9.png", "a\nb.png"])
def test_a_member_whose_name_is_no_text_is_read(tmp_path: Path, name: str) -> None:
    found = load(config_for(f"wds:{tar(tmp_path / 'a.tar', {name: png()})}"))
    assert isinstance(found, Stream)
    assert found.images.read(0).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "urls", ["{0..99999999999}.tar", "{0..9999}{0..9999}.tar", "{a,b.tar", "a\0.tar", "}{"]
)
def test_shards_that_cannot_be_named_are_refused(urls: str) -> None:
    pytest.importorskip("webdataset")
    with pytest.raises(UnnoiseError):
        load(config_for(f"wds:{urls}"))


# --- tables


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()

    def write(**columns: object) -> Path:
        pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    return write


def rows(n: int = 4) -> list[dict | None]:
    return [{"bytes": png(i), "path": None} for i in range(n)]


@pytest.mark.parametrize(
    "values", [[png(i) for i in range(4)], ["a", "b", "c", "d"], [1, 2, 3, 4], [[1], [2], [3], [4]], [None] * 4], ids=lambda v: type(v[0]).__name__
)  # fmt: skip
def test_a_column_of_something_else_than_images_is_refused(parquet, values: list) -> None:
    place = parquet(image=rows(), other=values)
    told = refusal(f"hf:{place}", image_column="other")
    assert "a.parquet: the column 'other' holds" in told
    assert "Columns with images: 'image'" in told


@pytest.mark.parametrize("empty", [None, {"bytes": None, "path": None}])
def test_rows_without_an_image_are_counted(
    parquet, caplog: pytest.LogCaptureFixture, empty: dict | None
) -> None:
    place = parquet(image=[empty, *rows()])
    assert len(load(config_for(f"hf:{place}")).labels) == 5
    assert "left out 1 rows without an image: row 0" in caplog.text
    place = parquet(image=[empty, *rows(), empty])
    assert "2 of 6 rows have no image in the column 'image': row 0, row 5" in refusal(f"hf:{place}")


@pytest.mark.parametrize("column", [[b"no image"] * 4, [b""] * 4])
def test_rows_whose_bytes_are_no_image_are_refused_with_the_first(
    parquet, column: list[bytes]
) -> None:
    place = parquet(image=[{"bytes": data, "path": None} for data in column])
    assert "a.parquet row 0" in refusal(f"hf:{place}")


@pytest.mark.parametrize(
    "labels",
    [[0, 1, None, 1], [0.0, 1.0, 2.0, 1.0], [0.0, float("nan"), 1.0, 1.0], [[0], [1], [2], [1]], [{"a": 1}] * 4,
     ["a", "", "b", "c"], ["a", "b", "c\0", "d"], [0, 1, -1, 1], [b"a", b"b", b"\xe9", b"d"], [None] * 4],
    ids=str,
)  # fmt: skip
def test_a_column_of_something_else_than_labels_is_refused(parquet, labels: list) -> None:
    place = parquet(image=rows(), label=labels)
    assert "a.parquet" in refusal(f"hf:{place}")
    assert load(config_for(f"hf:{place}", labels=False)).classes == ()


def test_a_label_beyond_the_names_is_refused_with_its_row(parquet, tmp_path: Path) -> None:
    import datasets
    import pyarrow.parquet

    kinds = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])}
    )
    made = datasets.Dataset.from_dict({"image": rows(), "label": [0, 1, 1, 1]}, features=kinds)
    made.to_parquet(str(tmp_path / "b.parquet"))
    table = pyarrow.parquet.read_table(tmp_path / "b.parquet")
    spoiled = table.set_column(1, table.schema.field("label"), [[0, 1, 7, 1]])
    pyarrow.parquet.write_table(spoiled, tmp_path / "a.parquet")
    assert "a.parquet row 2: the label 7" in refusal(f"hf:{tmp_path / 'a.parquet'}")


@pytest.mark.parametrize(
    "spoil", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"text"]
)
def test_a_damaged_parquet_file_is_refused(parquet, spoil: Callable[[bytes], bytes]) -> None:
    place = parquet(image=rows(), label=[0, 1, 0, 1])
    place.write_bytes(spoil(place.read_bytes()))
    assert "cannot be opened as a dataset" in refusal(f"hf:{place}")


def test_a_table_without_rows_is_refused(parquet) -> None:
    import pyarrow

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    assert "a.parquet" in refusal(f"hf:{parquet(image=pyarrow.array([], kind))}")


def test_a_dry_run_names_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog
) -> None:
    put(tmp_path / "data" / "cats" / "1.png")
    put(tmp_path / "data" / "cats" / "2.heic")
    options = [
        "--channels=8",
        "--attention=",
        "--batch=2",
        "--T=50",
        "--device=cpu",
        "--size=8",
        "--dry-run",
    ]
    with caplog.at_level(logging.WARNING):
        assert main(["--data", f"folder:{tmp_path / 'data'}", f"--runs={tmp_path}", *options]) == 0
    assert "cats/2.heic" in caplog.text
    assert json.dumps({"name": "data"})[1:-1] in capsys.readouterr().out
