"""What a network is conditioned on: made of images, or given with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.bundle.conditions import Condition
from runtime.errors import RequestError
from runtime.files import to_json
from runtime.images import sheet_shape
from runtime.images.arrays import MAX_BYTES
from trainer.config import Config
from trainer.data.builtin import emoji
from trainer.data.sources import load
from trainer.data.tasks import Task, task_of
from trainer.data.vectors import condition_name
from trainer.errors import DataError
from trainer.networks.cost import make_network
from trainer.runs.folder import write_examples
from trainer.training.called import Called
from trainer.training.preview import fitting
from trainer.training.step import Trainer

TINY: dict[str, Any] = {"channels": (8, 16), "attention": ()}


def task(**options: Any) -> Task:
    config = Config(**{"data": "digits", **TINY, **options})
    return task_of(config, load(config))


def images(task: Task, count: int = 4) -> torch.Tensor:
    found = task.dataset.gather(np.arange(count))[0]
    return torch.from_numpy(found).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_superres_gives_the_mean_of_each_square() -> None:
    made = task(task="superres", factor=4)
    (condition,) = made.conditions
    assert (condition.name, condition.shape, condition.null) == ("low_res", (1, 2, 2), 0.0)
    x0 = images(made)
    low_res = made.of(x0, range(4), range(4))["low_res"]
    assert low_res.shape == (4, 1, 2, 2)
    torch.testing.assert_close(low_res[2, 0, 1, 0], x0[2, 0, 4:, :4].mean())


def test_colorize_gives_the_grey_image() -> None:
    made = task(task="colorize", data="emoji")
    x0 = images(made)
    grey = made.of(x0, range(4), range(4))["grey"]
    expected = 0.299 * x0[:, 0] + 0.587 * x0[:, 1] + 0.114 * x0[:, 2]
    torch.testing.assert_close(grey[:, 0], expected)


def test_inpaint_leaves_out_a_rectangle_that_depends_on_the_place() -> None:
    made = task(task="inpaint", data="emoji")
    x0 = images(made)
    found = made.of(x0, range(4), range(10, 14))
    mask = found["mask"]
    torch.testing.assert_close(found["known"], x0 * (1 - mask))
    for one in mask[:, 0]:
        rows = one.any(1)
        columns = one.any(0)
        assert torch.equal(one.bool(), rows[:, None] & columns[None])
        assert 8 <= rows.sum() <= 24
        assert 8 <= columns.sum() <= 24
    # A share of a batch has the same holes as in the whole batch.
    part = made.of(x0[2:], range(2, 4), range(12, 14))
    torch.testing.assert_close(part["mask"], mask[2:])
    assert not torch.equal(mask[0], mask[1])


def test_restyle_gives_the_same_emoji_in_the_other_style() -> None:
    made = task(task="restyle", data="emoji")
    data = emoji()
    x0 = images(made)
    found = made.of(x0, [0, 1, 6, 7], range(4))["source"]
    for place, other in enumerate([1, 0, 7, 6]):
        expected = torch.from_numpy(data.images[other]).permute(2, 0, 1).float() / 127.5 - 1
        torch.testing.assert_close(found[place], expected)
    mirrored = torch.tensor([False, True, False, True])
    turned = made.of(x0, [0, 1, 6, 7], range(4), mirrored)["source"]
    torch.testing.assert_close(turned[1], found[1].flip(2))
    torch.testing.assert_close(turned[2], found[2])


def test_dropped_conditions_are_zero() -> None:
    made = task(task="superres")
    given = made.of(images(made), range(4), range(4))
    drop = torch.tensor([True, False, False, True])
    found = made.dropped(given, drop)["low_res"]
    assert not found[0].any()
    torch.testing.assert_close(found[1:3], given["low_res"][1:3])


def write_pairs(path: Path, count: int = 3, factor: int = 2) -> None:
    generator = np.random.default_rng(0)
    for part, side in (("source", 8 // factor), ("target", 8)):
        (path / part).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(path / part / f"{i}.png")


def test_pairs_are_matched_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pairs(tmp_path)
    (tmp_path / "source" / "4.heic").touch()
    made = task(data=f"pairs:{tmp_path}")
    assert "left out 1 images with an ending that is not read (4.heic)" in caplog.text
    (condition,) = made.conditions
    assert (condition.name, condition.shape) == ("source", (3, 4, 4))
    expected = np.asarray(Image.open(tmp_path / "source" / "2.png"))
    np.testing.assert_array_equal(made.dataset.given["source"][2], expected)
    before = made.dataset.fingerprint()
    Image.fromarray(expected[::-1]).save(tmp_path / "source" / "2.png")
    assert task(data=f"pairs:{tmp_path}").dataset.fingerprint() != before
    for part, other in (("source", "target"), ("target", "source")):
        kept = (tmp_path / part / "1.png").read_bytes()
        (tmp_path / part / "1.png").unlink()
        with pytest.raises(DataError, match=rf"1 images of {other}/ have none of the same name"):
            task(data=f"pairs:{tmp_path}")
        (tmp_path / part / "1.png").write_bytes(kept)


def test_a_grid_shows_grey_images_next_to_their_coloured_sources(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    for file in (tmp_path / "target").iterdir():
        Image.open(file).convert("L").save(file)
    config = Config(data=f"pairs:{tmp_path}", channels=(8,), attention=(), device="cpu", T=50)
    trainer = Trainer(config, load(config))
    assert trainer.preview.grid(trainer.state.ema).shape[2] == 3


def test_pairs_must_fit_each_other(tmp_path: Path) -> None:
    write_pairs(tmp_path / "odd", factor=1)
    for file in (tmp_path / "odd" / "source").iterdir():
        Image.open(file).resize((3, 3)).save(file)
    with pytest.raises(DataError, match="the same whole multiple"):
        task(data=f"pairs:{tmp_path / 'odd'}")
    with pytest.raises(DataError, match="has no folder source/"):
        task(data=f"pairs:{tmp_path}")


def test_vectors_come_from_json_and_from_arrays(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    vectors = {f"{i}.png": [i, 0.5] for i in range(3)}
    file = tmp_path / "vectors.json"
    file.write_text(to_json(vectors))
    made = task(data=f"folder:{tmp_path / 'target'}", condition_column=str(file))
    assert made.conditions[0].shape == (2,)
    found = made.of(torch.zeros(2, 3, 8, 8), [2, 0], [0, 1])["vector"]
    torch.testing.assert_close(found, torch.tensor([[2, 0.5], [0, 0.5]]))
    arrays = tmp_path / "data.npz"
    images = np.zeros((3, 8, 8), np.uint8)
    np.savez(arrays, images=images, **{"the depth": np.arange(3.0)})
    made = task(data=f"npz:{arrays}", condition_column="the depth")
    assert [(c.name, c.shape) for c in made.conditions] == [("the_depth", (1,))]
    given = made.of(torch.zeros(1, 1, 8, 8), [2], [0])
    torch.testing.assert_close(given["the_depth"], torch.tensor([[2.0]]))
    del vectors["1.png"]
    file.write_text(to_json(vectors))
    with pytest.raises(DataError, match="has no vector for 1 images"):
        task(data=f"folder:{tmp_path / 'target'}", condition_column=str(file))
    with pytest.raises(DataError, match="needs an array 'none'"):
        task(data=f"npz:{arrays}", condition_column="none")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.float32(3), "needs an array 'v' of a vector for each of 3 images"),
        (np.arange(2.0), "needs an array 'v' of a vector for each of 3 images"),
        (np.array(["1.5", "2", "3"]), "must be numbers, or lists of numbers"),
        (np.array([1, 2, 3j]), "must be numbers, or lists of numbers"),
        (np.array([1, 2, np.nan]), "finite numbers for each image"),
        (np.zeros((3, 2, 2)), "finite numbers for each image"),
    ],
    ids=str,
)
def test_what_is_no_vector_is_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    arrays = tmp_path / "data.npz"
    np.savez(arrays, images=np.zeros((3, 8, 8), np.uint8), v=values)
    with pytest.raises(DataError, match=message):
        task(data=f"npz:{arrays}", condition_column="v")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "superres", "factor": 3}, "--factor must divide the images' sides"),
        ({"task": "colorize"}, "needs RGB images"),
        ({"task": "restyle"}, "needs pairs of images"),
        ({"task": "upscale"}, "unknown value for --task 'upscale'"),
        ({"condition_column": "a"}, "--condition-column is for --data hf and npz and folder"),
        ({"label_column": "a"}, "--label-column is for --data hf and wds, got digits"),
        ({"image_column": "a"}, "--image-column is for --data hf and wds, got digits"),
        ({"label_file": "a"}, "--label-file is for --data folder and pairs, got digits"),
        ({"data": "pairs:x", "crop": "random"}, "--data pairs needs --crop centre"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        task(**options)


def test_runs_without_conditions_keep_their_record() -> None:
    assert not {"task", "factor", "condition_column"} & set(Config().to_json())
    config = Config(task="superres", factor=4)
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_networks_use_their_conditions(network: str) -> None:
    made = task(task="superres", network=network, width=32, depth=2, heads=2)
    vector = task_of(made.config, made.dataset).conditions
    net = make_network(made.config, (1, 8, 8), 10, vector)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 1, 8, 8)
    time = torch.tensor([1.0, 500.0])
    label = torch.tensor([1, 2])
    low = torch.randn(2, 1, 4, 4)
    found = net(x, time, label, low_res=low)
    assert found.shape == x.shape
    other = net(x, time, label, low_res=low.flip(0))
    assert not torch.allclose(found, other)


@pytest.mark.parametrize("count", [97, 97 * 101, 90])
def test_the_images_that_are_shown_differ(count: int) -> None:
    digits = load(Config(data="digits", **TINY))
    many = replace(
        digits, images=np.resize(digits.images, (count, 8, 8, 1)), labels=np.arange(count)
    )
    shown = Task(Config(data="digits", **TINY), many, ()).shown(24)[1]
    assert len(set(shown.tolist())) == 24


@pytest.mark.parametrize("column", ["values", "type", "training", "label", "x", "time"])
def test_a_column_may_have_any_name(tmp_path: Path, column: str) -> None:
    arrays = tmp_path / "data.npz"
    np.savez(arrays, images=np.zeros((3, 8, 8), np.uint8), **{column: np.arange(3.0)})
    made = task(data=f"npz:{arrays}", condition_column=column)
    assert [c.name for c in made.conditions] == [f"given_{column}"]
    make_network(made.config, (1, 8, 8), 1, made.conditions)


@pytest.mark.parametrize("column", ["self", "file", "allow_pickle"])
def test_a_condition_is_not_named_like_an_argument_of_what_takes_it(
    tmp_path: Path, column: str
) -> None:
    name = condition_name(column)
    vector = Condition(name, (2,))
    net = make_network(Config(data="digits", **TINY), (1, 8, 8), 0, [vector])
    called = Called(net, torch.autocast("cpu", enabled=False), torch.contiguous_format)
    called(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1), **{name: torch.ones(1, 2)})
    write_examples(tmp_path, {name: np.ones((1, 2), np.float32)})
    with np.load(tmp_path / "examples.npz") as file:
        assert file.files == [name]


def test_two_conditions_of_one_name_are_refused(tmp_path: Path) -> None:
    arrays = tmp_path / "data.npz"
    images = np.zeros((3, 8, 8), np.uint8)
    np.savez(arrays, images=images, low_res=np.arange(3.0))
    with pytest.raises(RequestError, match="makes a condition 'low_res', and the data gives one"):
        task(data=f"npz:{arrays}", condition_column="low_res", task="superres")


def test_a_grid_of_large_images_has_fewer_of_them() -> None:
    assert fitting(64, (8, 8, 1)) == 64
    assert fitting(24, (1024, 4 * 1026, 3), across=3) == 12
    for side in (1300, 5000, 2**14):
        count = fitting(64, (side, side, 3))
        assert 1 <= count < 64
        assert count == 1 or np.prod(sheet_shape(count, (side, side, 3))) <= MAX_BYTES
