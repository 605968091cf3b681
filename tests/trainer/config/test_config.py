"""A config is resolved from the given options, the data's preset and the defaults, in this order,
and checked when it is created."""

import argparse
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime import RequestError
from runtime.files import from_json, to_json
from trainer.config import Config
from trainer.config.options import Options
from trainer.config.presets import DATA, PRESETS, add_arguments, from_arguments
from trainer.training.state import precision_of

FIELDS = dataclasses.fields(Options)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_arguments(made)
    return made


def resolve(*command_line: str) -> Config:
    return from_arguments(parser().parse_args(command_line))


def test_no_option_at_all_gives_the_defaults() -> None:
    assert resolve() == Config()


@pytest.mark.parametrize("kind", DATA)
def test_what_fits_a_kind_of_data_changes_what_it_lists_and_nothing_else(kind: str) -> None:
    data = kind if kind in ("emoji", "digits") else f"{kind}:cats"
    assert resolve("--data", data) == dataclasses.replace(Config(data=data), **DATA[kind])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_goes_before_what_fits_the_data_and_the_command_line_before_both(
    preset: str,
) -> None:
    given = resolve("--data", "digits", "--preset", preset, "--steps", "7")
    assert given == Config(**{"data": "digits", **DATA["digits"], **PRESETS[preset], "steps": 7})


def test_an_unknown_preset_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(RequestError, match="unknown preset 'dit-m'"):
        resolve("--preset", "dit-m")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("emoji", "emoji"),
        ("digits", "digits"),
        ("folder:pets/cats", "cats"),
        ("folder:cats/", "cats"),
        ("wds:data/shards/*.tar", "shards"),
        ("wds:data/cats-{000..099}.tar", "cats-"),
        ("wds:*.tar", "run"),
        ("hf:data/[ab].parquet", "data"),
    ],
)
def test_a_run_is_named_after_its_data(data: str, name: str) -> None:
    assert Config(data=data).name == name


def test_a_given_name_is_kept() -> None:
    assert Config(data="digits", name="second-try").name == "second-try"


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_every_field_has_an_option_with_one_line_of_help(
    field, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    doc = field.metadata["doc"]
    assert doc
    assert "\n" not in doc
    option = field.name.replace("_", "-")
    assert re.search(rf"--{option}\b[^\n]*\s+{re.escape(doc)}", parser().format_help())


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ("--channels=8,16", "channels", (8, 16)),
        ("--attention=", "attention", ()),
        ("--learning-rate=3e-4", "learning_rate", 3e-4),
        ("--zero-terminal-snr", "zero_terminal_snr", True),
        ("--no-zero-terminal-snr", "zero_terminal_snr", False),
        ("--bad-pictures=refuse", "bad_pictures", "refuse"),
        ("--ema-half-life=500,2000", "ema_half_life", (500, 2000)),
        ("--ema-power=0.05,0.1", "ema_power", (0.05, 0.1)),
    ],
)
def test_an_option_sets_its_field(option: str, field: str, value: object) -> None:
    assert getattr(resolve(option), field) == value


@pytest.mark.parametrize("option", ["--channels=16,x", "--ema-power=0.05,x"])
def test_a_list_of_other_things_than_numbers_is_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        resolve(option)
    assert "numbers with commas between, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data", "emojis", "unknown data 'emojis'. Did you mean 'emoji'?"),
        ("data", "folder:", "--data folder:PATH"),
        ("split", "trian", "unknown value for --split 'trian'. Did you mean 'train'?"),
        ("mode", "RGBA", "unknown value for --mode 'RGBA'. Did you mean 'RGB'?"),
        ("bad_pictures", "skipp", "unknown value for --bad-pictures 'skipp'. Did you mean 'skip'?"),
        (
            "prediction",
            "epsilom",
            "unknown value for --prediction 'epsilom'. Did you mean 'epsilon'?",
        ),
        ("schedule", "cosin", "unknown value for --schedule 'cosin'. Did you mean 'cosine'?"),
        ("device", "gpu", "unknown value for --device 'gpu'."),
        ("precision", "fp8", "unknown value for --precision 'fp8'."),
        ("data", "hf", "data 'hf' needs a place: --data hf:PLACE"),
        ("data", "digits:0", "unknown data 'digits:0'"),
        ("prediction", "edn", "unknown value for --prediction 'edn'. Did you mean 'edm'?"),
        ("weighting", "snr", "unknown value for --weighting 'snr'. Did you mean 'min_snr'?"),
        ("ema_half_life", (), "ema-half-life needs at least one"),
        ("ema_half_life", (10, 10), "ema-half-life must differ from each other"),
        ("ema_power", (0.3,), "`ema-power` must be a number from 0.001 to 0.28"),
        ("accumulate", 3, "batch must be a multiple of accumulate, found 64 images in 3 parts"),
        ("width", 100, "width must be a multiple of 4 times the heads, found 100 with 6 heads"),
        ("steps", 0, "`steps` must be 1 to 1000000000000, got 0"),
        ("batch", 2.5, "`batch` must be an integer, 1 to 1048576, got 2.5"),
        ("keep", True, "`keep` must be an integer, 1 to 1000000000000, got True"),
        ("checkpoint_every", 0, "`checkpoint-every` must be 1 to 1000000000000, got 0"),
        ("sample_every", -1, "`sample-every` must be 0 to 1000000000000, got -1"),
        ("seed", 2**63, "`seed` must be 0 to 9223372036854775807, got 9223372036854775808"),
        (
            "learning_rate",
            float("nan"),
            "`learning-rate` must be a number from 1e-12 to 1000, got nan",
        ),
        ("learning_rate", 0, "`learning-rate` must be a number from 1e-12 to 1000, got 0.0"),
        (
            "gradient_clip",
            float("inf"),
            "`gradient-clip` must be a number from 1e-12 to 1e+12, got inf",
        ),
        ("label_dropout", 1.5, "`label-dropout` must be a number from 0 to 1, got 1.5"),
        ("weight_decay", "0.1", "`weight-decay` must be a number from 0 to 1000, got '0.1' (str)"),
        ("channels", (), "channels must be multiples of 8, found ()"),
        ("channels", (32, 60), "channels must be multiples of 8, found (32, 60)"),
    ],
)
def test_a_bad_value_is_refused_with_its_option_named(
    field: str, value: object, message: str
) -> None:
    with pytest.raises(RequestError) as refused:
        Config(**{field: value})
    assert message in str(refused.value)


@pytest.mark.parametrize("name", ["..", "../up", "a/b", "/tmp", "a\\b", ".hidden"])
def test_a_name_that_leaves_the_runs_folder_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="a run's name is a plain folder name"):
        Config(name=name)


def test_an_epsilon_network_at_zero_terminal_snr_is_refused_with_the_way_out() -> None:
    with pytest.raises(RequestError, match="zero terminal SNR: use --prediction v, x0 or flow"):
        Config(prediction="epsilon", zero_terminal_snr=True)


def test_a_half_life_of_an_older_run_is_one_of_many() -> None:
    assert Config.from_json({"ema_half_life": 500}).ema_half_life == (500,)


def test_fp16_without_a_gpu_is_refused() -> None:
    with pytest.raises(RequestError, match="fp16 trains on a GPU alone"):
        precision_of(Config(precision="fp16"), torch.device("cpu"))


def test_a_solver_that_there_is_not_is_refused_before_the_first_grid() -> None:
    with pytest.raises(RequestError, match=r"unknown solver 'dpmpp2m'\. Did you mean 'dpmpp_2m'"):
        Config(sample_solver="dpmpp2m")


def test_zero_terminal_snr_takes_the_last_knot_to_pure_noise() -> None:
    assert Config().make_schedule().alpha[-1] > 0
    assert Config(zero_terminal_snr=True).make_schedule().alpha[-1] == 0


@pytest.mark.parametrize("data", ["emoji", "digits", "folder:cats"])
def test_a_config_comes_back_from_json_as_it_was(data: str) -> None:
    config = resolve(
        "--data", data, "--learning-rate", "0.1", "--attention", "", "--zero-terminal-snr"
    )
    assert Config.from_json(from_json(to_json(config.to_json()))) == config


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(
        RequestError, match=r"unknown config key 'chanels'\. Did you mean 'channels'"
    ):
        Config.from_json({"chanels": [8]})


def test_help_needs_no_data_and_names_every_option(root: Path) -> None:
    command = [sys.executable, "-m", "trainer.fit", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert not done.stderr
    assert [f.name for f in FIELDS if f"--{f.name.replace('_', '-')}" not in done.stdout] == []
