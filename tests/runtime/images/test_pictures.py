"""Conversion between arrays and images loses nothing and moves nothing, and a file has the format
of its suffix."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import RequestError
from runtime.images import from_uint8, picture_format, read, save, save_animation, tile, to_uint8

RANGES = [(-1.0, 1.0), (0.0, 1.0), (-3.0, 0.5)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_every_value_of_a_pixel_survives_the_round_trip(low: float, high: float) -> None:
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    samples = from_uint8(every, low, high)
    assert samples.dtype == np.float32
    assert (samples.min(), samples.max()) == (low, high)
    np.testing.assert_array_equal(to_uint8(samples, low, high), every)


def test_a_pixel_is_the_nearest_of_the_256_values() -> None:
    samples = np.array([100.0, 100.4, 100.6, 101.0]).reshape(1, 1, 1, 4)
    assert to_uint8(samples, 0.0, 255.0).tolist() == [[[[100], [100], [101], [101]]]]


def test_values_outside_the_range_are_cut_and_do_not_wrap_around() -> None:
    samples = np.array([-np.inf, -1.01, 1.01, np.inf], np.float32).reshape(1, 1, 1, 4)
    assert to_uint8(samples).reshape(-1).tolist() == [0, 0, 255, 255]


def test_channels_go_last_in_pictures_and_second_in_samples() -> None:
    samples = np.full((2, 3, 4, 5), -1.0)
    samples[1, 2, 3, 0] = 1.0
    pictures = to_uint8(samples)
    assert pictures.shape == (2, 4, 5, 3)
    assert np.argwhere(pictures).tolist() == [[1, 3, 0, 2]]
    np.testing.assert_array_equal(from_uint8(pictures), samples)


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 2, 4, 4), (1, 4, 4, 3)])
def test_samples_that_are_no_pictures_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"images need samples \[n, 1 or 3, H, W\], got shape"):
        to_uint8(np.zeros(shape))


def test_a_sample_that_is_not_numbers_is_refused_and_named() -> None:
    samples = np.zeros((4, 3, 2, 2), np.float32)
    samples[2:, 1, 0, 1] = np.nan
    with pytest.raises(RequestError, match=r"got NaN in 2 of 4 samples \(the first is number 2\)"):
        to_uint8(samples)
    assert to_uint8(np.zeros((0, 3, 2, 2))).shape == (0, 2, 2, 3)


@pytest.mark.parametrize("columns", [None, 3])
def test_a_sheet_of_nothing_is_refused(columns: int | None) -> None:
    with pytest.raises(RequestError, match=r"at least 1 image, got none \(shape \(0, 2, 2, 3\)\)"):
        tile(np.zeros((0, 2, 2, 3), np.uint8), columns)


def test_a_sheet_holds_its_pictures_row_by_row_on_white() -> None:
    pictures = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 2, 3, 1), np.uint8)
    w = 255
    assert tile(pictures, columns=3, gap=1)[..., 0].tolist() == [
        [w, w, w, w, w, w, w, w, w, w, w, w, w],
        [w, 0, 0, 0, w, 1, 1, 1, w, 2, 2, 2, w],
        [w, 0, 0, 0, w, 1, 1, 1, w, 2, 2, 2, w],
        [w, w, w, w, w, w, w, w, w, w, w, w, w],
        [w, 3, 3, 3, w, 4, 4, 4, w, w, w, w, w],
        [w, 3, 3, 3, w, 4, 4, 4, w, w, w, w, w],
        [w, w, w, w, w, w, w, w, w, w, w, w, w],
    ]


@pytest.mark.parametrize(
    ("n", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (4, 2, 2), (5, 2, 3), (10, 3, 4)]
)
def test_a_sheet_is_as_square_as_it_gets(n: int, rows: int, columns: int) -> None:
    assert tile(np.zeros((n, 1, 1, 3), np.uint8), gap=0).shape == (rows, columns, 3)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_png_reads_back_to_the_byte(channels: int, mode: str, tmp_path: Path) -> None:
    picture = np.random.Generator(np.random.Philox(key=1)).integers(
        0, 256, (4, 6, channels), np.uint8
    )
    save(tmp_path / "a.PNG", picture)
    with Image.open(tmp_path / "a.PNG") as image:
        assert (image.format, image.mode) == ("PNG", mode)
        np.testing.assert_array_equal(np.asarray(image).reshape(picture.shape), picture)


@pytest.mark.parametrize(("least", "factor"), [(0, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_a_picture_is_enlarged_by_the_least_whole_factor_and_its_pixels_stay_square(
    least: int, factor: int, tmp_path: Path
) -> None:
    picture = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    save(tmp_path / "a.png", picture, least)
    with Image.open(tmp_path / "a.png") as image:
        found = np.asarray(image)
    assert found.shape == (2 * factor, 3 * factor, 3)
    for y, x in np.ndindex(found.shape[:2]):
        np.testing.assert_array_equal(found[y, x], picture[y // factor, x // factor])


@pytest.mark.parametrize(("ending", "kind"), [(".jpg", "JPEG"), (".webp", "WEBP"), (".bmp", "BMP")])
def test_the_ending_chooses_the_format(ending: str, kind: str, tmp_path: Path) -> None:
    save(tmp_path / f"a{ending}", np.zeros((2, 2, 3), np.uint8))
    with Image.open(tmp_path / f"a{ending}") as image:
        assert image.format == kind


@pytest.mark.parametrize(
    "name", ["a.xyz", "a", "a.psd", ".png"]
)  # .psd can be read and not written
def test_an_ending_that_cannot_be_written_is_refused_and_leaves_nothing(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(
        RequestError, match=r"cannot write images as .*: use a name that ends in \.png"
    ):
        save(tmp_path / name, np.zeros((2, 2, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


RANDOM = np.random.Generator(np.random.Philox(key=2))
COLOUR = RANDOM.integers(0, 256, (6, 5, 3), np.uint8)
GREY = COLOUR[..., :1]


def test_every_kind_of_picture_is_read_as_the_same_sample(tmp_path: Path) -> None:
    expected = from_uint8(COLOUR[None])
    image = Image.fromarray(COLOUR)
    image.save(tmp_path / "a.png")
    for one in (
        COLOUR,
        image,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        expected[0],
        expected[0].astype(np.float64),
    ):
        for given in (one, [one], (one,)):
            assert read(given, (3, 6, 5)).tobytes() == expected.tobytes()
    for batch in (
        np.stack([COLOUR, COLOUR]),
        [image, COLOUR],
        np.concatenate([expected, expected]),
    ):
        assert read(batch, (3, 6, 5)).tobytes() == 2 * expected.tobytes()
    grey = from_uint8(GREY[None], 0.0, 1.0)
    for given in (GREY, GREY[..., 0], Image.fromarray(GREY[..., 0])):
        assert read(given, (1, 6, 5), 0.0, 1.0).tobytes() == grey.tobytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Image.new("RGB", (6, 5)), "the picture is 6×5 RGB, 5×6 RGB expected: .*--convert"),
        ([COLOUR, Image.new("RGBA", (5, 6))], "picture 1 is 5×6 RGBA, 5×6 RGB expected"),
        (GREY, "the picture is 5×6 L, 5×6 RGB expected"),
        (COLOUR.astype(np.int64), r"must be uint8 .* got int64 \(6, 5, 3\)"),
        (np.zeros((6, 5, 7), np.uint8), "1 to 4 channels come last"),
        (
            np.zeros((6, 5, 3), np.float32),
            r"a float array of shape \(6, 5, 3\), a sample of \(3, 6, 5\)",
        ),
        (np.full((3, 6, 5), 200.0), "values outside -1 … 1, .* 0 … 255 as uint8"),
        (np.full((3, 6, 5), np.nan), "values outside"),
        ([], "no picture was given"),
        (7, "must be a path, a Pillow image or an array, got 7"),
        ("nowhere.png", "there is no image nowhere.png"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_picture_that_does_not_fit_is_refused_and_told_why(given: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read(given, (3, 6, 5))


def test_samples_that_are_no_pictures_go_in_as_floats_alone() -> None:
    signal = np.linspace(-1, 1, 20).reshape(2, 10)
    assert read(signal, (2, 10)).shape == (1, 2, 10)
    assert read(np.stack([signal] * 3), (2, 10)).shape == (3, 2, 10)
    with pytest.raises(RequestError, match="are not images"):
        read(COLOUR, (2, 10))


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bits_become_eight_and_are_not_cut(dtype: str, tmp_path: Path) -> None:
    """Pillow's own convert() clips them at 255: all but the darkest 256th part of a ramp would be
    white."""
    ramp = (np.arange(30).reshape(6, 5) * 257 * 8).astype(dtype)
    image = Image.frombytes("I;16" if dtype[0] == "<" else "I;16B", (5, 6), ramp.tobytes())
    expected = from_uint8((ramp // 257).astype(np.uint8)[None, ..., None])
    assert read(image, (1, 6, 5), convert=True).tobytes() == expected.tobytes()
    Image.fromarray(ramp.astype("<u2")).save(tmp_path / "a.png")
    colour = read(tmp_path / "a.png", (3, 6, 5), convert=True)
    assert colour.tobytes() == np.repeat(expected, 3, axis=1).tobytes()
    with pytest.raises(RequestError, match=r"5×6 I;16B?, 5×6 L expected"):
        read(image, (1, 6, 5))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_do_not_say_what_is_white(dtype: type) -> None:
    with pytest.raises(RequestError, match=r"the picture has mode [IF], 32 bits a pixel"):
        read(Image.fromarray(np.ones((6, 5), dtype)), (3, 6, 5), convert=True)


def test_a_picture_is_converted_when_asked() -> None:
    clear = Image.new("RGBA", (5, 6), (255, 0, 0, 0))
    assert (read(clear, (3, 6, 5), convert=True) == 1).all(), "what is transparent is white"
    palette = Image.fromarray(COLOUR).quantize(4)
    assert (
        read(palette, (3, 6, 5), convert=True).tobytes()
        == read(palette.convert("RGB"), (3, 6, 5)).tobytes()
    )
    wide = Image.new("RGB", (50, 6), "white")
    wide.paste("black", (0, 0, 20, 6))
    assert (read(wide, (3, 6, 6), convert=True)[0, :, :, 1:] == 1).all(), "the middle is kept"
    turned = Image.fromarray(COLOUR)
    turned.getexif()[0x0112] = 3  # upside down
    assert (
        read(turned, (3, 6, 5), convert=True).tobytes()
        == read(COLOUR[::-1, ::-1], (3, 6, 5)).tobytes()
    )
    assert (
        read(Image.fromarray(COLOUR), (3, 6, 5), convert=True).tobytes()
        == read(COLOUR, (3, 6, 5)).tobytes()
    )


@pytest.mark.parametrize(("name", "kind"), [("a.gif", "GIF"), ("a.png", "PNG"), ("a.webp", "WEBP")])
def test_an_animation_has_its_frames_and_repeats(name: str, kind: str, tmp_path: Path) -> None:
    frames = np.stack([np.full((4, 3, 3), 60 * i, np.uint8) for i in range(4)])
    save_animation(tmp_path / name, frames, least=6, frame_ms=40, last_ms=500)
    with Image.open(tmp_path / name) as image:
        assert (image.format, image.n_frames, image.size, image.info["loop"]) == (
            kind,
            4,
            (6, 8),
            0,
        )
        for i in range(4):
            image.seek(i)
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - 60 * i).max() <= 3
    with pytest.raises(RequestError, match=r"cannot write an animation as \.jpg"):
        save_animation(tmp_path / "a.jpg", frames)


@pytest.mark.parametrize(
    ("name", "channels"),
    [("a.h5", 3), ("a.wmf", 1), ("a.xbm", 3), ("a.ico", 3), ("a.jpg", 4), ("a.jpg", 2)],
)
def test_a_format_that_cannot_hold_the_image_is_refused_and_leaves_nothing(
    name: str, channels: int, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=r"cannot write images.* use a name that ends in \.png"):
        picture_format(name, channels)
    with pytest.raises(RequestError, match="cannot write images"):
        save(tmp_path / name, np.zeros((2, 2, channels), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_is_too_wide_for_its_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"a\.jpg cannot be written: .* or a smaller image"):
        save(tmp_path / "a.jpg", np.zeros((1, 70_000, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_pixels_that_are_not_what_a_viewer_shows_need_convert(tmp_path: Path) -> None:
    """The right size and mode, and yet another image: on its side, or with a colour that is none."""
    turned = Image.Exif()
    for orientation, is_turned in ((1, False), (6, True), (99, False)):
        turned[0x0112] = orientation
        Image.fromarray(COLOUR[:5]).save(tmp_path / "turned.png", exif=turned)
        if is_turned:
            with pytest.raises(RequestError, match=r"transparent or stored turned .* --convert"):
                read(tmp_path / "turned.png", (3, 5, 5))
            upright = np.rot90(COLOUR[:5], -1)
            found = read(tmp_path / "turned.png", (3, 5, 5), convert=True)
            assert found.tobytes() == from_uint8(upright[None]).tobytes()
        else:
            assert read(tmp_path / "turned.png", (3, 5, 5)).shape == (1, 3, 5, 5)
    Image.new("RGB", (5, 5), "red").save(tmp_path / "clear.png", transparency=(255, 0, 0))
    with pytest.raises(RequestError, match=r"clear\.png is transparent"):
        read(tmp_path / "clear.png", (3, 5, 5))
    assert (read(tmp_path / "clear.png", (3, 5, 5), convert=True) == 1).all()


@pytest.mark.parametrize("function", ["clip", "round"])
def test_samples_without_memory_for_their_pixels_are_refused(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = np.zeros((1, 3, 2, 2), np.float32)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, function, fail)
    with pytest.raises(RequestError, match=r"does not fit in .* Convert fewer at a time"):
        to_uint8(samples)


def test_an_animation_without_memory_for_its_frames_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "fromarray", fail)
    with pytest.raises(RequestError, match="an animation of 2 frames does not fit"):
        save_animation(tmp_path / "a.gif", np.zeros((2, 4, 4, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []
