"""Images are loaded completely with the right labels, or raise an error that names the image, the
fault and the remedy."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.config import Config
from trainer.data import sources as data
from trainer.data.builtin import EMOJI
from trainer.data.memory import Pictures
from trainer.data.sources import load
from trainer.errors import DataError

RED, BLUE = (200, 0, 0), (0, 0, 200)


def draw(
    path: Path, color: object = RED, size: tuple[int, int] = (8, 6), mode: str = "RGB"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def noisy(path: Path) -> Path:
    """An image that does not compress, so that half of its file is half of the image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    return path


def load_folder(path: Path, **options: object) -> Pictures:
    return load(Config(data=f"folder:{path}", name="test", **options))


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(DataError) as refused:
        load_folder(path, **options)
    return str(refused.value)


# --- emoji and digits


@pytest.fixture(scope="module")
def file() -> dict[str, np.ndarray]:
    with np.load(EMOJI, allow_pickle=False) as opened:
        return dict(opened)


def test_training_leaves_out_every_tenth_emoji_in_both_styles(file) -> None:
    kept = [i for i in range(len(file["images"])) if i % 10 != 0]
    expected = file["images"][kept].reshape(-1, 32, 32, 3)
    np.testing.assert_array_equal(load(Config()).images, expected)


def test_split_all_holds_every_emoji_in_both_styles(file) -> None:
    np.testing.assert_array_equal(
        load(Config(split="all")).images, file["images"].reshape(-1, 32, 32, 3)
    )


@pytest.mark.parametrize("split", ["train", "all"])
def test_a_model_card_can_say_which_emoji_were_seen(split: str) -> None:
    assert ("held out" in load(Config(split=split)).note) == (split == "train")


def test_emoji_are_labelled_style_and_category(file) -> None:
    pictures = load(Config(split="all"))
    assert len(pictures.classes) == 18
    for i in (0, 1, 1000, 1905):
        category = file["categories"][file["category"][i]].lower().replace(" & ", "-")
        named = [pictures.classes[label] for label in pictures.labels[2 * i : 2 * i + 2]]
        assert named == [f"noto/{category}", f"twemoji/{category}"]


def test_digits_are_all_there_and_show_what_their_label_says() -> None:
    pictures = load(Config(data="digits"))
    assert pictures.images.shape == (1797, 8, 8, 1)
    assert (pictures.images.min(), pictures.images.max()) == (0, 255)
    assert pictures.classes == tuple("0123456789")
    means = np.stack([pictures.images[pictures.labels == k].mean(axis=0) for k in range(10)])
    distance = ((pictures.images[:, None] - means) ** 2).sum(axis=(2, 3, 4))
    assert (
        distance.argmin(axis=1) == pictures.labels
    ).mean() > 0.8  # wrong labels would be right one time in ten


# --- a folder


def test_subfolders_are_the_classes_in_sorted_order(tmp_path: Path) -> None:
    draw(tmp_path / "dogs" / "1.png", BLUE)
    draw(tmp_path / "cats" / "1.png", RED)
    draw(tmp_path / "cats" / "2.jpg", RED)
    (tmp_path / "empty").mkdir()
    pictures = load_folder(tmp_path)
    assert pictures.classes == ("cats", "dogs")
    assert pictures.labels.tolist() == [0, 0, 1]
    assert pictures.images[:, 0, 0].argmax(axis=1).tolist() == [0, 0, 2]  # red, red, blue


@pytest.mark.parametrize(
    ("mode", "color", "shape"), [("RGB", RED, (3, 6, 8)), ("L", 200, (1, 6, 8))]
)
def test_colour_and_grey_pictures_keep_their_channels(
    tmp_path: Path, mode: str, color, shape
) -> None:
    draw(tmp_path / "a" / "1.png", color, mode=mode)
    pictures = load_folder(tmp_path)
    assert pictures.sample_shape == shape
    assert pictures.images[0, 0, 0].tolist() == list(np.atleast_1d(color))


def test_a_folder_without_subfolders_is_one_class(tmp_path: Path) -> None:
    draw(tmp_path / "cats" / "1.png")
    draw(tmp_path / "cats" / "2.png")
    pictures = load_folder(tmp_path / "cats")
    assert pictures.classes == ("cats",)
    assert pictures.labels.tolist() == [0, 0]


def test_files_that_are_no_pictures_by_name_are_left_alone(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    assert len(load_folder(tmp_path).images) == 1


def test_hidden_folders_and_files_are_passed_over(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    for name in (".thumbnails/1.png", "__MACOSX/2.png", "._1.png"):
        draw(tmp_path / name)
    pictures = load_folder(tmp_path)
    assert pictures.classes == (tmp_path.name,)
    assert len(pictures.images) == 1


def test_pictures_beside_subfolders_of_pictures_are_not_passed_over(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    draw(tmp_path / "extra" / "2.png")
    with pytest.raises(
        DataError, match=r"has 1 images itself \(1\.png\) and 1 in 1 subfolders \(extra\)"
    ):
        load_folder(tmp_path)


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    assert f"no images in {tmp_path}" in refusal(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(draw(tmp_path / "1.png"))
    assert "is not a folder" in refusal(tmp_path / "nowhere")


# --- pictures that cannot be read


def cut(path: Path) -> Path:
    data = noisy(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def text(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("not a picture")
    return path


def bomb(path: Path) -> Path:
    """A few bytes that claim to be an image of 65536 x 65536 pixels, which Pillow will not
    unpack."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P6 65536 65536 255\n")
    return path


def cut_exif(path: Path) -> Path:
    """A JPEG whose EXIF block ends in its header: Pillow raises struct.error."""
    draw(path, size=(8, 8))
    with Image.open(path) as image:
        image.save(path, "JPEG", dpi=(72, 72), exif=b"Exif\0\0II*\0")
    return path


@pytest.mark.parametrize("spoil", [cut, text, bomb, cut_exif])
def test_a_picture_that_cannot_be_read_is_named_with_the_way_out(tmp_path: Path, spoil) -> None:
    noisy(tmp_path / "a" / "good.png")
    bad = spoil(tmp_path / "a" / "bad.png")
    told = refusal(tmp_path, bad_pictures="refuse")
    assert re.search(f"{re.escape(str(bad))} cannot be read.*--bad-pictures skip", told)


@pytest.mark.parametrize("spoil", [cut, text, bomb])
def test_bad_pictures_skip_leaves_them_out_and_says_so(
    tmp_path: Path, spoil, caplog: pytest.LogCaptureFixture
) -> None:
    good = np.asarray(Image.open(noisy(tmp_path / "a" / "good.png")))
    noisy(tmp_path / "b" / "good.png")
    bad = spoil(tmp_path / "a" / "bad.png")
    pictures = load_folder(tmp_path, bad_pictures="skip")
    np.testing.assert_array_equal(pictures.images, [good, good])
    assert pictures.labels.tolist() == [0, 1]
    assert str(bad) in caplog.text
    assert "1 unreadable ones left out" in pictures.note


def test_a_folder_of_bad_pictures_alone_is_refused_even_when_skipping(tmp_path: Path) -> None:
    cut(tmp_path / "a" / "bad.png")
    assert "none of the first 1 images" in refusal(tmp_path, bad_pictures="skip")


# --- pictures that are not alike


def test_another_size_is_refused_with_both_pictures_and_the_remedy(tmp_path: Path) -> None:
    first = draw(tmp_path / "a" / "1.png", size=(8, 6))
    other = draw(tmp_path / "a" / "2.png", size=(9, 6))
    assert re.match(f"{other} is 9x6 RGB, but {first} is 8x6 RGB.*--size N", refusal(tmp_path))


def test_the_picture_compared_with_is_one_that_was_read(tmp_path: Path) -> None:
    text(tmp_path / "a" / "1.png")
    first = draw(tmp_path / "a" / "2.png", size=(8, 6))
    draw(tmp_path / "a" / "3.png", size=(9, 6))
    assert f"but {first} is 8x6" in refusal(tmp_path, bad_pictures="skip")


def test_size_resizes_the_shorter_side_and_crops_the_centre(tmp_path: Path) -> None:
    wide = Image.new("RGB", (24, 8), BLUE)
    wide.paste(RED, (8, 0, 16, 8))
    (tmp_path / "a").mkdir()
    wide.save(tmp_path / "a" / "1.png")
    draw(tmp_path / "a" / "2.png", RED, size=(5, 7))
    pictures = load_folder(tmp_path, size=4)
    assert pictures.sample_shape == (3, 4, 4)
    assert (
        pictures.images.argmax(axis=3) == 0
    ).all()  # red alone: the blue sides are cut off, not squeezed in


@pytest.mark.parametrize(
    ("mode", "color"), [("RGBA", (*RED, 255)), ("P", 3), ("CMYK", (0, 0, 0, 0))]
)
def test_a_mode_that_no_network_takes_is_refused_with_the_remedy(
    tmp_path: Path, mode: str, color
) -> None:
    path = tmp_path / "a" / ("1.tiff" if mode == "CMYK" else "1.png")
    assert (
        f"{draw(path, color, mode=mode)} has mode {mode}; RGB or L is needed. --mode RGB"
        in refusal(tmp_path)
    )


def test_grey_among_colour_is_refused_with_the_remedy(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.png")
    grey = draw(tmp_path / "a" / "2.png", 7, mode="L")
    assert re.match(f"{grey} is 8x6 L, but .* is 8x6 RGB.*--mode RGB", refusal(tmp_path))


def test_mode_does_not_cut_sixteen_bits_at_eight(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.png", 128 * 257, mode="I;16")
    assert (load_folder(tmp_path, mode="RGB").images == 128).all()


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_mode_converts_pictures_of_every_mode(tmp_path: Path, mode: str, channels: int) -> None:
    for i, (found, color) in enumerate(
        {"RGB": RED, "L": 7, "RGBA": (*RED, 255), "P": 3, "1": 1}.items()
    ):
        draw(tmp_path / "a" / f"{i}.png", color, mode=found)
    assert load_folder(tmp_path, mode=mode).images.shape == (5, 6, 8, channels)


def test_converting_lays_transparency_on_white(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.png", (*RED, 0), mode="RGBA")
    draw(tmp_path / "a" / "2.png", (*RED, 255), mode="RGBA")
    Image.new("RGB", (8, 6), RED).quantize(2).save(tmp_path / "a" / "3.png", transparency=0)
    corners = load_folder(tmp_path, mode="RGB").images[:, 0, 0]
    assert corners.tolist() == [[255, 255, 255], list(RED), [255, 255, 255]]


# --- the fingerprint, by which a run knows its data again


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    draw(tmp_path / "cats" / "1.png", RED)
    draw(tmp_path / "dogs" / "1.png", BLUE)
    return load_folder(tmp_path)


def test_the_same_data_has_the_same_fingerprint(pictures: Pictures, tmp_path: Path) -> None:
    assert load_folder(tmp_path).fingerprint() == pictures.fingerprint()


@pytest.mark.parametrize("what", ["images", "labels", "classes"])
def test_one_pixel_one_label_or_a_class_name_changes_the_fingerprint(
    pictures: Pictures, what: str
) -> None:
    if what == "classes":
        changed: object = ("cats", "wolves")
    else:
        changed = getattr(pictures, what).copy()
        changed.flat[-1] ^= 1
    assert dataclasses.replace(pictures, **{what: changed}).fingerprint() != pictures.fingerprint()


def test_the_order_in_which_the_file_system_lists_files_does_not_matter(
    pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "cats" / "2.png", BLUE)
    in_order, listed = load_folder(tmp_path), Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(listed(path), reverse=True))
    backwards = load_folder(tmp_path)
    assert Counter(backwards.labels.tolist()) == {0: 2, 1: 1}
    assert backwards.fingerprint() == in_order.fingerprint() != pictures.fingerprint()


def test_the_record_for_a_bundle_names_data_count_licence_and_fingerprint(
    pictures: Pictures,
) -> None:
    record = pictures.describe()
    assert record.pictures == 2
    assert record.fingerprint == pictures.fingerprint()
    assert record.licence == "not stated"


def test_every_built_in_data_set_states_its_licence() -> None:
    assert all(re.search(r"CC-BY|Apache", made.licence) for made in (data.emoji(), data.digits()))
