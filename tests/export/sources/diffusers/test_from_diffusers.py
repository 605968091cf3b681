"""diffusers' own networks and pipelines, built from published configs with random weights, against
the bundles made of their folders."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.build import build
from export.errors import ExportError
from export.proof.plan import Plan
from export.sources.diffusers.config import Config, scheduler_config
from export.sources.diffusers.convert import FLOW, SAME_FORWARD_PROCESS, advice
from export.sources.diffusers.folder import is_diffusers
from export.sources.diffusers.model import from_diffusers
from export.sources.diffusers.scheduler import read_schedule, read_scheduler
from runtime import Sampler
from runtime.diffusion.noise import Stream, noise
from runtime.errors import RequestError

from ....lazily import Lazy
from ....quick import quick_proof

diffusers = Lazy("diffusers")

CIFAR10 = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": (128, 256, 256, 256),
    "center_input_sample": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "time_embedding_type": "positional",
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
"""google/ddpm-cifar10-32's network."""
CIFAR10_SCHEDULER = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}
CELEBA = {
    **CIFAR10,
    "sample_size": (64, 32),
    "block_out_channels": (16, 16, 32, 32, 64, 64),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
"""google/ddpm-celebahq-256's network cut to an eighth of its width, one layer per block and
64×32."""
SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
"""Another variant: scale and shift by time, resampling inside the blocks, several heads."""
QUICK = Plan(
    batches=(1, 2),
    sizes=(3,),
    times=3,
    pictures=1,
    steps=3,
    samples=1,
    judged=1,
    ways=(("dpmpp_2m", 3),),
)
LEVEL = 1 / 255


def network(config: dict, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(**config).eval()


def draws(count: int, shape: tuple[int, ...], seed: int = 0) -> Iterator[torch.Tensor]:
    """The noise that `Sampler` uses: the start, then every row's."""
    for k in range(-1, 1000):
        stream, step = (Stream.INITIAL, 0) if k < 0 else (Stream.STEP, k)
        yield torch.from_numpy(
            np.stack([noise(seed + i, stream, step, shape) for i in range(count)])
        )


def theirs(
    pipeline: Any, count: int, steps: int, label: list[int] | None = None, **options: Any
) -> np.ndarray:
    """The pipeline's images [n, H, W, C] in 0 … 1 from `Sampler`'s noise. Pipelines take no label:
    it is put in at the network."""
    import importlib

    size, unet = pipeline.unet.config.sample_size, pipeline.unet
    size = (size, size) if isinstance(size, int) else tuple(size)
    drawn = draws(count, (unet.config.in_channels, *size))
    pipeline.set_progress_bar_config(disable=True)
    usual = unet.forward

    def labelled(x: torch.Tensor, t: torch.Tensor) -> Any:
        return usual(x, t, class_labels=torch.tensor(label))

    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "pipelines.ddpm.pipeline_ddpm",
            "pipelines.ddim.pipeline_ddim",
            "schedulers.scheduling_ddpm",
        ):
            module = importlib.import_module(f"diffusers.{name}")
            patch.setattr(module, "randn_tensor", lambda *a, **k: next(drawn))
        if label is not None:
            patch.setattr(unet, "forward", labelled)
        return pipeline(
            batch_size=count, num_inference_steps=steps, output_type="np", **options
        ).images


def ours(sampler: Sampler, count: int, steps: int, **options: Any) -> np.ndarray:
    """The bundle's images, in the form of `theirs`."""
    samples = sampler.sample(count, 0, steps=steps, **options)
    return np.clip(samples / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Sampler]:
    """The published network with its published scheduler, at full size, in the repository's own
    layout: all files side by side."""
    folder = tmp_path_factory.mktemp("cifar10") / "ddpm-cifar10-32"
    pipeline = diffusers.DDPMPipeline(
        network(CIFAR10), diffusers.DDPMScheduler(**CIFAR10_SCHEDULER)
    )
    pipeline.unet.save_pretrained(folder)
    pipeline.scheduler.save_pretrained(folder)
    pipeline.save_config(folder)
    # By default it would take 1000 steps, and 50 for the card's image: too many for a test of this
    # size.
    with quick_proof():
        bundle = build(from_diffusers(folder, steps=4), folder.parent / "bundle", plan=QUICK)
    return pipeline, Sampler(bundle)


@pytest.fixture(scope="module")
def celeba_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not square, and v-prediction: with random weights, most of an image stays unclipped."""
    folder = tmp_path_factory.mktemp("celeba") / "ddim-small"
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    diffusers.DDIMPipeline(network(CELEBA), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def celeba(celeba_folder: Path) -> tuple[Any, Sampler]:
    with quick_proof():
        bundle = build(from_diffusers(celeba_folder), celeba_folder.parent / "bundle", plan=QUICK)
    return diffusers.DDIMPipeline.from_pretrained(celeba_folder), Sampler(bundle)


ONE_LEVEL = {
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(ONE_LEVEL, id="one level"),
        pytest.param({}, id="two levels", marks=pytest.mark.slow),
    ],
)
def classes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Sampler]:
    """Five labels, of which the first is the null label."""
    folder = tmp_path_factory.mktemp("classes") / "five"
    scheduler = diffusers.DDPMScheduler(
        prediction_type="sample", beta_schedule="squaredcos_cap_v2", steps_offset=1
    )
    pipeline = diffusers.DDPMPipeline(
        network({**SMALL, **request.param, "num_class_embeds": 5}), scheduler
    )
    pipeline.save_pretrained(folder)
    with quick_proof():
        bundle = build(from_diffusers(folder, null_label=0), folder.parent / "bundle", plan=QUICK)
    return pipeline, Sampler(bundle)


@pytest.mark.slow
def test_the_published_cifar10_network_gives_ddpm_pipelines_pictures(
    cifar10: tuple[Any, Sampler],
) -> None:
    pipeline, sampler = cifar10
    bundle, defaults = sampler.bundle, sampler.bundle.defaults
    assert sum(p.numel() for p in pipeline.unet.parameters()) == 35_746_307
    assert (bundle.name, bundle.sample_shape, bundle.labels) == (
        "ddpm-cifar10-32",
        (3, 32, 32),
        None,
    )
    assert (bundle.prediction, bundle.schedule.name, bundle.clip) == ("epsilon", "linear_raw", 1.0)
    assert (defaults.solver, dict(defaults.options), defaults.grid) == (
        "ddpm",
        {"variance": "fixed_large"},
        "leading",
    )
    pictures = theirs(pipeline, 2, 4)
    assert ((pictures > 0) & (pictures < 1)).mean() > 0.4, "or clipping hides what is compared"
    # Both are float32: sigma/alpha of 157 multiplies the rounding, including that of their ᾱ.
    np.testing.assert_allclose(ours(sampler, 2, 4), pictures, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_nothing_of_the_cifar10_graph_is_computed_that_is_known_but_for_the_batch(
    cifar10: tuple[Any, Sampler],
) -> None:
    import onnx

    proto = onnx.load(cifar10[1].bundle.path / "fp32/step.onnx", load_external_data=False)
    assert not {n.op_type for n in proto.graph.node} & {
        "Shape",
        "Expand",
        "Size",
        "ConstantOfShape",
    }
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.slow
def test_ddim_pipelines_pictures_where_eps_is_taken_from_the_clipped_estimate(
    celeba: tuple[Any, Sampler],
) -> None:
    pipeline, sampler = celeba
    pictures = theirs(pipeline, 2, 8, use_clipped_model_output=True)
    assert pictures.shape == (2, 64, 32, 3)
    assert ((pictures > 0) & (pictures < 1)).mean() > 0.4
    np.testing.assert_allclose(ours(sampler, 2, 8), pictures, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_ddim_pipelines_default_differs_where_the_clip_bites(celeba: tuple[Any, Sampler]) -> None:
    """By default it clips D and keeps the ε of before. Ours takes ε from the clipped D, so that x
    stays on its level."""
    pipeline, sampler = celeba
    apart = np.abs(ours(sampler, 2, 8) - theirs(pipeline, 2, 8))
    assert apart.max() > 5 * LEVEL


@pytest.mark.slow
def test_ddim_pipelines_pictures_without_clipping(
    celeba: tuple[Any, Sampler], tmp_path: Path
) -> None:
    """The clip is an input of the graphs, so the same graphs work. The model of the folder must
    have no clip."""
    import dataclasses

    pipeline, sampler = celeba
    free = diffusers.DDIMPipeline(
        pipeline.unet, diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    )
    free.save_pretrained(tmp_path)
    model = from_diffusers(tmp_path)
    assert model.clip is None
    unclipped = Sampler(dataclasses.replace(sampler.bundle, clip=model.clip))
    np.testing.assert_allclose(ours(unclipped, 2, 8), theirs(free, 2, 8), rtol=0, atol=1e-5)
    assert np.abs(unclipped.sample(2, 0, steps=8)).max() > 1


@pytest.mark.parametrize(("label", "number"), [(0, 1), ("class4", 4), (None, 0)])
def test_labels_keep_their_meaning_where_the_null_label_comes_first(
    classes: tuple[Any, Sampler], label: int | str | None, number: int
) -> None:
    pipeline, sampler = classes
    assert sampler.bundle.labels is not None
    assert sampler.bundle.labels.names == ("class1", "class2", "class3", "class4")
    pictures = theirs(pipeline, 2, 10, label=[number, number])
    assert ((pictures > 0) & (pictures < 1)).mean() > 0.9
    np.testing.assert_allclose(
        ours(sampler, 2, 10, label=label, guidance=1.0), pictures, rtol=0, atol=1e-5
    )


def test_guidance_mixes_the_answers_under_both_labels(classes: tuple[Any, Sampler]) -> None:
    """One step from the last level: D is linear in F, so guided D is that mix of the other two."""
    sampler = classes[1]
    last = [float(sampler.bundle.schedule.time[-1])]

    def denoised(label: str | None, guidance: float) -> np.ndarray:
        return sampler.sample(2, 0, label=label, guidance=guidance, solver="ddim", grid=last)

    with_label, without = denoised("class2", 1.0), denoised(None, 1.0)
    expected = np.clip(with_label + 0.5 * (with_label - without), -1, 1)
    np.testing.assert_allclose(denoised("class2", 1.5), expected, rtol=0, atol=1e-5)


def config_of(config: Any, kind: str = "DDPMScheduler") -> Config:
    """A scheduler's config, as read from a file."""
    return scheduler_config(Path("scheduler_config.json"), dict(config), kind)


SCHEDULES = [
    {},
    {"num_train_timesteps": 250, "beta_end": 0.05},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"trained_betas": np.linspace(1e-4, 0.03, 50).tolist(), "num_train_timesteps": 50},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "beta_schedule": "squaredcos_cap_v2",
    },
]


@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_schedules_are_those_of_diffusers(config: dict) -> None:
    """To their float32: of ᾱ near 1 that leaves 1 - ᾱ, and so the first sigmas, few digits."""
    own = diffusers.DDPMScheduler(**config)
    alpha_bar = own.alphas_cumprod.double().numpy()
    found = read_schedule(config_of(own.config))
    np.testing.assert_allclose(found.alpha**2, alpha_bar, rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(found.sigma, np.sqrt(1 - alpha_bar), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("steps", [2, 7, 50, 999])
def test_default_grids_are_their_timesteps(
    kind: str, spacing: str, offset: int, steps: int
) -> None:
    from runtime.diffusion.grid import make_grid

    own = getattr(diffusers, kind)(timestep_spacing=spacing, steps_offset=offset)
    own.set_timesteps(steps)
    read = read_scheduler(config_of(own.config, kind))
    np.testing.assert_array_equal(
        make_grid(read.schedule, read.grid, steps).time[:-1], own.timesteps.numpy()
    )


def test_a_grid_that_starts_at_one_has_a_step_less() -> None:
    """diffusers looks up t = 1000 in its table here, and fails."""
    own = diffusers.DDPMScheduler(steps_offset=1)
    assert read_scheduler(config_of(own.config)).steps == 999
    own.set_timesteps(1000)
    with pytest.raises(IndexError):
        own.step(torch.zeros(1, 1), own.timesteps[0], torch.zeros(1, 1))


@pytest.mark.parametrize(
    "kind", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"]
)
def test_variances_are_those_of_diffusers(kind: str) -> None:
    from runtime import make_program
    from runtime.diffusion.program import Z

    own = diffusers.DDPMScheduler(variance_type=kind)
    own.set_timesteps(10)
    read = read_scheduler(config_of(own.config))
    found = make_program(read.schedule, "epsilon", "ddpm", 10, "leading", **read.options).update[
        :-1, 0, Z
    ]
    with np.errstate(invalid="ignore"):
        theirs = np.array([float(own._get_variance(t)) for t in own.timesteps[:-1]])
    as_variance = {"fixed_small_log": theirs**2, "fixed_large_log": np.exp(theirs)}.get(
        kind, theirs
    )
    np.testing.assert_allclose(
        found**2, as_variance, rtol=1e-3
    )  # their 1 - ᾱ of the first knot has four digits


def test_fixed_large_log_is_nan_in_diffusers() -> None:
    """diffusers takes the root of the logarithm; ours uses the intended variance."""
    own = diffusers.DDPMScheduler(variance_type="fixed_large_log")
    own.set_timesteps(10)
    x = torch.zeros(1, 1, 2, 2)
    assert own.step(x, 500, x).prev_sample.isnan().all()


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline's folder. Read it, do not write it."""
    path = tmp_path_factory.mktemp("saved") / "small"
    diffusers.DDPMPipeline(network(SMALL), diffusers.DDPMScheduler()).save_pretrained(path)
    return path


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    """A small pipeline's folder to change."""
    return Path(shutil.copytree(small_folder, tmp_path / "small"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_a_folder_says_is_what_the_model_says(folder: Path) -> None:
    model = from_diffusers(folder)
    assert is_diffusers(folder)
    assert model.name == "small"
    assert model.defaults.steps == 1000, (
        "as DDPMPipeline, which runs every step unless told otherwise"
    )
    assert not any(p.requires_grad for p in model.module.parameters())
    assert model.provenance["source"] == "diffusers, DDPMPipeline"
    assert str(folder.parent) not in json.dumps(dict(model.provenance)), "no path of the machine"
    chosen = from_diffusers(folder, name="mine", solver="dpmpp_2m", steps=20, grid="karras")
    assert (chosen.name, chosen.defaults.solver, chosen.defaults.steps) == ("mine", "dpmpp_2m", 20)
    assert chosen.defaults.grid == "karras"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("out_channels", 2),
        ("out_channels", 3),
        ("center_input_sample", True),
        ("time_embedding_type", "fourier"),
        ("time_embedding_type", "learned"),
        ("class_embed_type", "timestep"),
        ("class_embed_type", "identity"),
        ("sample_size", None),
    ],
)
def test_an_unsupported_setting_of_the_network_is_named(
    folder: Path, setting: str, value: Any
) -> None:
    edit(folder / "unet/config.json", **{setting: value})
    with pytest.raises(
        ExportError, match=rf"config\.json: {setting}={value!r} cannot be exported: "
    ):
        from_diffusers(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variance_type": "learned"}, "variance_type='learned' cannot be exported"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range' cannot be exported"),
        (
            {"variance_type": "fixed_smal"},
            "variance_type must be one of.*Did you mean 'fixed_small'",
        ),
        ({"thresholding": True}, "thresholding=True cannot be exported"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one=False cannot be exported"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True cannot be exported"),
        ({"prediction_type": "v"}, 'prediction_type must be one of.*got "v"'),
        ({"beta_schedule": "laplace"}, 'beta_schedule must be one of.*got "laplace"'),
        ({"timestep_spacing": "log"}, 'timestep_spacing must be one of.*got "log"'),
        ({"steps_offset": 1.5}, r"steps_offset must be an integer.*got 1\.5"),
        ({"steps_offset": 1000}, "steps_offset=1000 cannot be exported"),
        ({"beta_end": 1.0}, "beta_end=1.0 cannot be exported.*pure noise"),
    ],
    ids=str,
)
def test_an_unsupported_setting_of_the_scheduler_is_named(
    folder: Path, changes: dict, message: str
) -> None:
    if "set_alpha_to_one" in changes:
        edit(folder / "model_index.json", _class_name="DDIMPipeline")
    edit(folder / "scheduler/scheduler_config.json", **changes)
    with pytest.raises(ExportError, match=message):
        from_diffusers(folder)


WRONG_OF_A_SCHEDULER = [
    *(("clip_sample_range", value) for value in (None, "1", 0, -1, float("nan"), True, [1.0])),
    *(("num_train_timesteps", value) for value in (1000.0, 0, -1, 10**12, "1000", None, True)),
    *(("beta_start", value) for value in ("0.0001", float("nan"), None, 0, -1e-4, 2, True)),
    *(("beta_end", value) for value in ([0.02], float("inf"), {}, 10**400)),
    *(("trained_betas", v) for v in ([], [0.1, float("nan")], ["0.1"], [[0.1]], "linear", [2.0])),
    *(("prediction_type", value) for value in (None, ["epsilon"], {}, 1, "Epsilon")),
    *(("beta_schedule", value) for value in (None, ["linear"], 0)),
    *(("variance_type", value) for value in (["fixed_small"], 1, "")),
    *(("timestep_spacing", value) for value in (None, ["leading"], False)),
    *(("steps_offset", value) for value in (True, "1", None, -1, [1])),
    *(("clip_sample", value) for value in (None, "true", 1)),
    *(("thresholding", value) for value in (None, "false", 0)),
    *(("rescale_betas_zero_snr", value) for value in (None, "false", 0)),
]


@pytest.mark.parametrize(("key", "value"), WRONG_OF_A_SCHEDULER, ids=str)
def test_every_value_of_a_scheduler_has_its_type_and_its_range(key: str, value: Any) -> None:
    with pytest.raises(ExportError, match=rf"scheduler_config\.json: {key} must be .*, got .*\."):
        read_scheduler(config_of({key: value}))


def test_a_value_in_quotes_is_named_as_one(folder: Path) -> None:
    edit(folder / "unet/config.json", sample_size="8")
    with pytest.raises(ExportError, match=r'sample_size must be .*, got "8". Write 8 without quot'):
        from_diffusers(folder)


WRONG_OF_A_NETWORK = [
    *(("sample_size", value) for value in (True, 8.0, -8, 0, [8], [8, 8, 8], [8, "8"], 10**9, {})),
    *(("in_channels", value) for value in (None, "1", 1.0, 0, True)),
    *(("num_class_embeds", value) for value in (0, -1, "5", 5.0, True, [5])),
    *(("center_input_sample", value) for value in (None, "false", 0)),
    *(
        ("resnet_time_scale_shift", value)
        for value in (None, "ada_group", "scale-shift", ["default"])
    ),
    *(("block_out_channels", value) for value in (None, [], 16, ["16"], [16.0, 32.0])),
    *(("down_block_types", value) for value in (None, [], "DownBlock2D", [1])),
    *(("mid_block_type", value) for value in ("UNetMidBlock2DCrossAttn", 1)),
    *(("downsample_type", value) for value in ("fir", 1)),
    *(("norm_eps", value) for value in (None, "1e-5", -1, float("nan"))),
    *(("layers_per_block", value) for value in (None, 1.5, 0)),
    *(("flip_sin_to_cos", value) for value in (None, "true", 1)),
]


@pytest.mark.parametrize(("key", "value"), WRONG_OF_A_NETWORK, ids=str)
def test_every_value_of_a_network_has_its_type_and_its_range(
    folder: Path, key: str, value: Any
) -> None:
    edit(folder / "unet/config.json", **{key: value})
    with pytest.raises(ExportError, match=rf"config\.json: {key} must be .*, got .*\."):
        from_diffusers(folder)


@pytest.mark.parametrize("part", ["unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(
    ("key", "hint"),
    [("predction_type", ""), ("shift", ""), ("sigma_data", ""), ("quantization_config", "")],
)
def test_an_unknown_key_is_refused_by_name(folder: Path, part: str, key: str, hint: str) -> None:
    edit(folder / part, **{key: 1})
    with pytest.raises(ExportError, match=f"{Path(part).name}: .*unknown key '{key}'=1"):
        from_diffusers(folder)


def test_a_misspelt_key_gets_the_right_one(folder: Path) -> None:
    edit(folder / "scheduler/scheduler_config.json", predction_type="sample")
    with pytest.raises(ExportError, match="Did you mean 'prediction_type'"):
        from_diffusers(folder)


OLD_SCHEDULERS: list[tuple[dict, dict]] = [
    ({"predict_epsilon": False}, {"prediction_type": "sample"}),
    ({"predict_epsilon": True}, {"prediction_type": "epsilon"}),
    ({"predict_epsilon": False, "prediction_type": "sample"}, {"prediction_type": "sample"}),
    ({"timesteps": 200}, {"num_train_timesteps": 200}),
    ({"timesteps": 200, "num_train_timesteps": 200}, {"num_train_timesteps": 200}),
    ({"clip_predicted_image": False}, {"clip_sample": False}),
    ({"tensor_format": "np", "timestep_values": None}, {}),
    ({"variance_type": None}, {}),
    ({"_diffusers_version": "0.1.1", "_name_or_path": "a/b"}, {}),
    # What from_config keeps of the scheduler that a config was converted from.
    ({"set_alpha_to_one": False, "skip_prk_steps": True, "use_karras_sigmas": True}, {}),
    # diffusers takes its default for these keys.
    ({"_use_default_values": ["beta_end"], "beta_end": 0.5}, {}),
]


@pytest.mark.parametrize(("old", "today"), OLD_SCHEDULERS, ids=str)
def test_old_configs_mean_what_diffusers_says_in_todays_words(old: dict, today: dict) -> None:
    own = diffusers.DDPMScheduler(**today)
    config = config_of(old)
    found = read_scheduler(config)
    expected = own.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(found.schedule.alpha**2, expected, rtol=2e-5, atol=1e-12)
    assert (found.clip is not None) == own.config.clip_sample
    assert len(config.mapped) == len(
        {"predict_epsilon", "timesteps", "clip_predicted_image"} & {*old}
    )

    # One step of theirs, with the network's output 0.5, has the D that the prediction says.
    x = torch.full((1, 1, 2, 2), 0.25)
    F = torch.full_like(x, 0.5)
    t = len(found.schedule) // 2
    theirs = own.step(F, t, x).pred_original_sample.numpy()
    from runtime.diffusion.program import precondition

    alpha, sigma = found.schedule.alpha[[t]], found.schedule.sigma[[t]]
    _, c_skip, c_out = precondition(found.prediction, alpha, sigma)[0][0]
    D = np.clip(c_skip * 0.25 + c_out * 0.5, *((-1, 1) if found.clip else (None, None)))
    np.testing.assert_allclose(theirs, D, rtol=1e-4)  # their table is float32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"predict_epsilon": False, "prediction_type": "epsilon"},
            "predict_epsilon and prediction",
        ),
        (
            {"predict_epsilon": True, "prediction_type": "v_prediction"},
            "predict_epsilon and predic",
        ),
        ({"predict_epsilon": "false"}, "predict_epsilon must be true or false"),
        ({"timesteps": 100, "num_train_timesteps": 1000}, "timesteps and num_train_timesteps must"),
        ({"timesteps": "100"}, "num_train_timesteps must be an integer"),
        ({"timestep_values": [3, 2, 1]}, r"timestep_values=\[3, 2, 1\] cannot be exported"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True cannot be exported"),
        ({"use_flow_sigmas": 0}, "use_flow_sigmas=0 cannot be exported"),
        ({"timestep_type": "continuous"}, "timestep_type='continuous' cannot be exported"),
        (
            {"trained_betas": [0.1] * 7},
            "trained_betas must have num_train_timesteps numbers, got 7",
        ),
        ({"beta_start": 1.0, "beta_end": 1.0}, "the betas make no schedule"),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "the betas make no schedule"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(config: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        read_scheduler(config_of(config))


def test_what_was_mapped_is_in_the_provenance(folder: Path) -> None:
    path = folder / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    del config["prediction_type"]
    path.write_text(json.dumps({**config, "predict_epsilon": False, "lambda_min_clipped": -np.inf}))
    model = from_diffusers(folder)
    assert model.prediction == "x0"
    mapped = ['predict_epsilon=false is prediction_type="sample"']
    assert model.provenance["mapped"] == mapped
    assert model.provenance["scheduler"]["prediction_type"] == "sample"
    json.dumps(dict(model.provenance), allow_nan=False)


def save_as(folder: Path, config: dict) -> Path:
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps(config))
    return path


# Some schedulers convert tensors in a way that numpy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize("kind", SAME_FORWARD_PROCESS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"beta_schedule": "scaled_linear", "clip_sample": True}, {"LEAN": True}],
    ids=str,
)
def test_the_conversion_that_is_advised_keeps_the_forward_process(
    kind: str, changes: dict, tmp_path: Path
) -> None:
    """The advice is run, word for word, and its result compared with the scheduler's own table."""
    changes = dict(changes)
    lean = changes.pop("LEAN", False)
    try:
        own = getattr(diffusers, kind)(**{k: v for k, v in changes.items() if k != "clip_sample"})
    except ImportError as error:
        pytest.skip(f"{kind}: {error}")
    # A minimal file relies on the defaults of its class, which are not DDPM's.
    stated = {} if lean else {k: v for k, v in own.config.items() if not k.startswith("_")}
    stated = {**stated, **changes}
    path = save_as(tmp_path, {"_class_name": kind, **stated})
    network(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=f"got '{kind}'.*from_config") as caught:
        from_diffusers(tmp_path)
    code = str(caught.value).split("converted: ")[1].split(" writes a DDPMScheduler")[0]
    exec(code, {})
    model = from_diffusers(tmp_path)
    expected = own.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(model.schedule.alpha**2, expected, rtol=2e-5, atol=1e-12)
    assert model.prediction == "epsilon"
    clips = changes.get("clip_sample", False) or getattr(own.config, "clip_sample", False)
    takes = "clip_sample" in own.config
    assert (model.clip is not None) == bool(takes and clips), path.read_text()


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        *((kind, {}, "Export the network alone.*--schedule flow --prediction "
        "flow") for kind in FLOW),
        ("EDMEulerScheduler", {}, "--schedule edm --prediction edm"),
        ("EDMDPMSolverMultistepScheduler", {}, "--schedule edm --prediction edm"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "--schedule flow"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "--schedule flow"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "cannot be converted: with "
        "time"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "Set use_karras_sigmas to false"),
        ("LMSDiscreteScheduler", {"use_exponential_sigmas": True}, "--grid log_snr"),
        *((kind, {}, "cannot be converted: its noise levels") for kind in
          ("ScoreSdeVeScheduler", "IPNDMScheduler", "SCMScheduler", "LCMScheduler", "MyScheduler")),
        ("FlaxDDPMScheduler", {}, "Set _class_name to 'DDPMScheduler'"),
    ],
)  # fmt: skip
def test_a_conversion_that_would_be_wrong_is_not_advised(
    kind: str, config: dict, message: str, tmp_path: Path
) -> None:
    found = {"_class_name": kind, **config}
    text = advice(tmp_path / "scheduler_config.json", found, kind)
    assert "DDPMScheduler.from_config" not in text
    assert re.search(message, text)
    network(SMALL).save_pretrained(tmp_path)
    save_as(tmp_path, found)
    with pytest.raises(ExportError, match=f"got '{kind}'.*{message}"):
        from_diffusers(tmp_path)


def test_the_schedules_that_are_advised_are_those_schedulers_own() -> None:
    """EDM's preconditioning, and what flow's network is conditioned on, at one level each."""
    from runtime.diffusion.program import precondition
    from runtime.diffusion.schedule import make_schedule

    own = diffusers.EDMEulerScheduler()
    x, F, sigma = (torch.tensor(value, dtype=torch.float64) for value in (0.7, 0.3, 2.5))
    c_in, c_skip, c_out = precondition("edm", np.ones(1), np.array([2.5]))[0][0]
    assert float(own.precondition_inputs(x, sigma)) == pytest.approx(c_in * 0.7)
    assert float(own.precondition_outputs(x, F, sigma)) == pytest.approx(c_skip * 0.7 + c_out * 0.3)
    edm = make_schedule("edm")
    found = np.interp(np.log(2.5), np.log(edm.sigma), edm.time)
    assert float(own.precondition_noise(sigma)) == pytest.approx(found)

    rectified = diffusers.FlowMatchEulerDiscreteScheduler()
    rectified.set_timesteps(10)
    alpha, sigma = make_schedule("flow").level(rectified.timesteps.double().numpy())
    np.testing.assert_allclose(sigma, rectified.sigmas[:-1].numpy(), rtol=1e-6)  # theirs: float32
    np.testing.assert_allclose(alpha, 1 - sigma, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_a_conversion_that_was_wrong_is_refused(kind: str, folder: Path) -> None:
    """diffusers converts these silently; the keys that it keeps show it."""
    own = getattr(diffusers, kind)()
    stated = {key: value for key, value in own.config.items() if not key.startswith("_")}
    diffusers.DDPMScheduler.from_config(stated).save_pretrained(folder / "scheduler")
    with pytest.raises(
        ExportError, match=r"scheduler_config.json: .*(unknown key|cannot be exported)"
    ):
        from_diffusers(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as diffusers' training scripts write it, with an average of the weights."""
    from diffusers.training_utils import EMAModel

    root = tmp_path / "output" / "checkpoint-500"
    unet = network(SMALL)
    unet.save_pretrained(root / "unet")
    average = EMAModel(
        network(SMALL, seed=1).parameters(),
        model_cls=diffusers.UNet2DModel,
        model_config=unet.config,
    )
    average.save_pretrained(root / "unet_ema")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (root / name).write_bytes(b"not read")
    return root


def test_a_checkpoint_of_a_training_script_says_which_network_to_choose(checkpoint: Path) -> None:
    told = {"schedule": "linear_raw", "prediction": "epsilon"}
    assert is_diffusers(checkpoint)
    assert is_diffusers(checkpoint.parent)
    for options in ({}, told):
        with pytest.raises(ExportError, match=r"two networks: .*unet, .*unet_ema, .*Pass one of"):
            from_diffusers(checkpoint, **options)
    with pytest.raises(ExportError, match=r"1 training checkpoints.*checkpoint-500.*unet_ema"):
        from_diffusers(checkpoint.parent)
    for name, seed in (("unet", 0), ("unet_ema", 1)):
        model = from_diffusers(checkpoint / name, **told)
        expected = network(SMALL, seed).state_dict()["conv_in.weight"]
        torch.testing.assert_close(model.module.state_dict()["unet.conv_in.weight"], expected)
        assert (model.name, model.prediction) == (name, "epsilon")
    shutil.rmtree(checkpoint / "unet_ema")
    assert from_diffusers(checkpoint, **told).name == "checkpoint-500"


@pytest.mark.parametrize(
    "file", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b"\xef\xbb\xbf" + b, "must be UTF-8 without a byte order mark"),
        (lambda b: b.decode().encode("utf-16"), "must be UTF-8 without a byte order mark"),
        (lambda b: b.decode().encode("utf-16-le"), "cannot be read as JSON"),
        (lambda b: b"\xff" + b, "must be UTF-8|cannot be read as JSON"),
        (lambda b: b"[" + b + b"]", "must be a JSON object"),
        (lambda b: b"3", "must be a JSON object, got 3"),
        (lambda b: b"", "cannot be read as JSON"),
        (lambda b: b"[" * 100_000, "cannot be read as JSON"),
        (lambda b: b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (lambda b: b.rstrip()[:-1] + b', "_class_name": "UNet2DModel"}', "'_class_name' twice"),
        (None, "must be a file|cannot be read"),
    ],
    ids=[
        "bom",
        "utf16",
        "utf16-le",
        "latin",
        "list",
        "number",
        "empty",
        "deep",
        "long",
        "twice",
        "folder",
    ],
)
def test_a_file_that_is_no_config_is_explained(
    folder: Path, file: str, change: Any, message: str
) -> None:
    path = folder / file
    data = path.read_bytes()
    path.unlink()
    if change is None:
        path.mkdir()
    else:
        path.write_bytes(change(data))
    with pytest.raises(ExportError, match=message) as caught:
        from_diffusers(folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": None}, "_class_name must be DDPMPipeline or DDIMPipeline, got null"),
        ({"_class_name": ["p", "DDPMPipeline"]}, "_class_name must be DDPMPipeline"),
        ({"_class_name": "FlaxDDPMPipeline"}, "_class_name must be DDPMPipeline"),
        (
            {"unet": ["diffusers", "UNet2DConditionModel"]},
            "must be 'UNet2DConditionModel'.*in model_index",
        ),
        (
            {"scheduler": ["diffusers", "PNDMScheduler"]},
            "must be 'PNDMScheduler', as in model_index",
        ),
        (
            {"scheduler": ["diffusers", "DDIMScheduler"]},
            "must be 'DDIMScheduler', as in model_index",
        ),
        ({"unet": ["mine", "Net"]}, "unet must be .*with --module"),
        ({"unet": "UNet2DModel"}, 'unet must be .*got "UNet2DModel"'),
        ({"unet": [None]}, "unet must be"),
        ({"vqvae": ["diffusers", "VQModel"]}, "unknown key 'vqvae'"),
    ],
    ids=str,
)
def test_a_pipeline_of_other_parts_is_refused(folder: Path, changes: dict, message: str) -> None:
    edit(folder / "model_index.json", **changes)
    with pytest.raises(ExportError, match=message):
        from_diffusers(folder)


@pytest.mark.parametrize("value", [None, 3, [], ["UNet2DModel"], "UNet1DModel"], ids=str)
@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_class_is_one_name(folder: Path, file: str, value: Any, indexed: bool) -> None:
    if not indexed:
        (folder / "model_index.json").unlink()
    edit(folder / file, _class_name=value)
    with pytest.raises(ExportError, match=r"config\.json: _class_name must be .*, got"):
        from_diffusers(folder)


def test_a_class_may_be_named_in_the_index_only(folder: Path) -> None:
    path = folder / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    del config["_class_name"]
    path.write_text(json.dumps(config))
    assert from_diffusers(folder).defaults.solver == "ddpm"
    (folder / "model_index.json").unlink()
    with pytest.raises(ExportError, match=r"_class_name must name the class.*missing"):
        from_diffusers(folder)


def test_the_default_steps_are_the_pipelines(folder: Path) -> None:
    path = folder / "scheduler/scheduler_config.json"
    edit(path, num_train_timesteps=4000, beta_end=0.005)
    assert from_diffusers(folder).defaults.steps == 1000
    # 50 steps would start at knot 50 of 50.
    edit(path, num_train_timesteps=50, beta_end=0.2, steps_offset=1)
    assert from_diffusers(folder, solver="ddim").defaults.steps == 49


@pytest.mark.parametrize(
    "options",
    [
        *({"folder": value} for value in (b"x", None, 5, "a\0b", ["x"])),
        *({"name": value} for value in (5, "", "a/b", b"x")),
        *({"schedule": value, "prediction": "epsilon"} for value in (5, ["cosine"], "cosin")),
        *({"schedule": "cosine", "prediction": value} for value in ([1], 5, "eps")),
        *({"null_label": value} for value in ("1", 5, 1.5, True, [1])),
        *({"label_names": value} for value in ("ab", 5, [1, 2], [], ["a"], ["a", ""], {"a": 1})),
        *({"variant": value} for value in (5, "", "../x", ["fp16"], "a\0")),
        *({"solver": value} for value in (5, ["ddim"], np.array(["ddim", "ddpm"]))),
        *({"steps": value} for value in ("3", 0, 1.5, True)),
        *({"grid": value} for value in (5, [1, 2], "trailin")),
        *({"guidance": value} for value in (None, "2", float("nan"))),
        *(
            {"provenance": value}
            for value in (5, "x", {1: 2}, {"a": float("nan")}, {"a": object()})
        ),
    ],
    ids=lambda options: str(options).partition(" at 0x")[0],
)
def test_arguments_of_any_type_end_in_an_error_of_ours(tmp_path: Path, options: dict) -> None:
    network({**SMALL, "num_class_embeds": 2}).save_pretrained(tmp_path / "two")
    arguments = {"schedule": "cosine", "prediction": "epsilon", **options}
    folder = arguments.pop("folder", tmp_path / "two")
    with pytest.raises((ExportError, RequestError)):
        from_diffusers(folder, **arguments)


def test_a_folder_of_any_name_has_a_name_here(folder: Path) -> None:
    for given, expected in ((".ä b", "b"), ("日本", "network")):
        moved = folder.rename(folder.with_name(given))
        assert from_diffusers(moved).name == expected
        folder = moved


@pytest.mark.parametrize("length", [0, 4, 100, 5000])
def test_weights_that_are_cut_off_are_explained(folder: Path, length: int) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ExportError, match="diffusers cannot load the network"):
        from_diffusers(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(ExportError, match="must be a file, and it is a folder"):
        from_diffusers(folder)


def test_a_ddim_pipeline_with_ddpms_scheduler_samples_with_ddim(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="DDIMPipeline")
    assert from_diffusers(folder).defaults.solver == "ddim"


def test_a_network_alone_needs_to_be_told_schedule_and_prediction(folder: Path) -> None:
    alone = folder / "unet"
    assert is_diffusers(alone)
    with pytest.raises(
        ExportError, match=r"no scheduler_config\.json.*--schedule linear_raw --prediction epsilon"
    ):
        from_diffusers(alone)
    model = from_diffusers(alone, schedule="cosine", prediction="v")
    assert (model.schedule.name, model.prediction) == ("cosine", "v")
    with pytest.raises(RequestError, match="has a scheduler, which says"):
        from_diffusers(folder, prediction="v")


def sharded(folder: Path) -> None:
    unet = network(SMALL)
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1


def half(folder: Path) -> None:
    unet = network(SMALL).half()
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", variant="fp16")


@pytest.mark.parametrize(
    ("make", "options", "atol"), [(sharded, {}, 0), (half, {"variant": "fp16"}, 1e-3)]
)
def test_weights_in_shards_and_in_half_precision_are_read_as_float32(
    folder: Path, make: Callable[[Path], None], options: dict, atol: float
) -> None:
    make(folder)
    found, expected = (
        from_diffusers(folder, **options).module.state_dict(),
        network(SMALL).state_dict(),
    )
    for key, tensor in expected.items():
        torch.testing.assert_close(found[f"unet.{key}"], tensor, rtol=0, atol=atol)


def drop(folder: Path, key: str) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["other.weight"] = weights.pop(key)
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (half, "no plain weights. It has the variants fp16: name one with --variant"),
        (
            lambda f: drop(f, "conv_in.weight"),
            "'conv_in.weight' is missing; 'other.weight' is unexpected",
        ),
        (
            lambda f: edit(f / "unet/config.json", block_out_channels=[16, 64]),
            "cannot load the network",
        ),
        (
            lambda f: edit(f / "unet/config.json", up_block_types=["UpBlock2D"]),
            "cannot load the network",
        ),
        (
            lambda f: edit(f / "unet/config.json", _class_name="UNet2DConditionModel"),
            "_class_name must be .UNet2DModel",
        ),
        (lambda f: edit(f / "unet/config.json", sample_size=9), r"x \[2, 1, 9, 9\].*fails with"),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"no"),
            "cannot load the network",
        ),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(),
            "has no diffusion_pytorch_model.saf",
        ),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(
                f / "unet/diffusion_pytorch_model.bin"
            ),
            r"as \.bin only.*save_pretrained",
        ),
        (
            lambda f: shutil.rmtree(f / "scheduler"),
            r"without its scheduler: .*scheduler_config\.json is missing",
        ),
        (lambda f: (f / "unet/config.json").unlink(), r"has no unet/config\.json"),
        (lambda f: (f / "unet/config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "unet/config.json").write_text("[]"), "must be a JSON object"),
        (
            lambda f: edit(f / "model_index.json", _class_name="StableDiffusionPipeline"),
            'got "StableDiffusionPipeline"',
        ),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_a_folder_that_cannot_be_exported_is_explained(
    folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(folder)
    with pytest.raises(ExportError, match=message):
        from_diffusers(folder)


def test_labels_that_the_network_does_not_have_are_refused(folder: Path) -> None:
    for options in ({"null_label": 3}, {"label_names": ["a"]}):
        with pytest.raises(RequestError, match="has no labels"):
            from_diffusers(folder, **options)
    edit(folder / "unet/config.json", num_class_embeds=3)
    with pytest.raises(ExportError, match=r"'class_embedding\.weight' is missing"):
        from_diffusers(folder)
    network({**SMALL, "num_class_embeds": 3}).save_pretrained(folder / "unet")
    with pytest.raises(RequestError, match=r"null_label.* must be .*0 to 2, .* 3"):
        from_diffusers(folder, null_label=3)
    assert from_diffusers(folder, null_label=2, label_names=["cat", "dog"]).labels.names == (
        "cat",
        "dog",
    )
    every = from_diffusers(folder)
    assert every.labels.names == ("0", "1", "2")
    assert not every.labels.null_trained
    assert every.defaults.guidance == 1


def test_without_diffusers_the_error_says_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ExportError, match=r"pip install 'unnoise\[diffusers\]'"):
        from_diffusers(folder)
