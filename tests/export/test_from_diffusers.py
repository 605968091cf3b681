"""diffusers' own networks and pipelines, built from published configs with random weights, against the bundles made of their folders."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from export.build import build
from export.check import Plan
from export.errors import ExportError
from export.from_diffusers import from_diffusers, is_diffusers, read_schedule, read_scheduler
from runtime import Sampler
from runtime.errors import RequestError
from runtime.noise import Stream, noise

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
"""google/ddpm-celebahq-256's network cut to an eighth of its width, one layer a block and 64×32."""
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
"""Another make: scale and shift by time, resampling inside the blocks, several heads."""
QUICK = Plan(batches=(1, 2), times=3, pictures=1, steps=3, samples=1, judged=1, ways=(("dpmpp_2m", 3),))
LEVEL = 1 / 255


def network(config: dict, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(**config).eval()


def draws(count: int, shape: tuple[int, ...], seed: int = 0) -> Iterator[torch.Tensor]:
    """The noise that `Sampler` uses: the start, then every row's."""
    for k in range(-1, 1000):
        stream, step = (Stream.INITIAL, 0) if k < 0 else (Stream.STEP, k)
        yield torch.from_numpy(np.stack([noise(seed + i, stream, step, shape) for i in range(count)]))


def theirs(pipeline: Any, count: int, steps: int, label: list[int] | None = None, **options: Any) -> np.ndarray:
    """The pipeline's pictures [n, H, W, C] in 0 … 1 from `Sampler`'s noise. Pipelines take no label: it is put in at the network."""
    import importlib

    size, unet = pipeline.unet.config.sample_size, pipeline.unet
    size = (size, size) if isinstance(size, int) else tuple(size)
    drawn = draws(count, (unet.config.in_channels, *size))
    pipeline.set_progress_bar_config(disable=True)
    usual = unet.forward

    def labelled(x: torch.Tensor, t: torch.Tensor) -> Any:
        return usual(x, t, class_labels=torch.tensor(label))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("pipelines.ddpm.pipeline_ddpm", "pipelines.ddim.pipeline_ddim", "schedulers.scheduling_ddpm"):
            module = importlib.import_module(f"diffusers.{name}")
            patch.setattr(module, "randn_tensor", lambda *a, **k: next(drawn))
        if label is not None:
            patch.setattr(unet, "forward", labelled)
        return pipeline(batch_size=count, num_inference_steps=steps, output_type="np", **options).images


def ours(sampler: Sampler, count: int, steps: int, **options: Any) -> np.ndarray:
    """The bundle's pictures, as `theirs`."""
    samples = sampler.sample(count, 0, steps=steps, **options)
    return np.clip(samples / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Sampler]:
    """The published network with its published scheduler, at full size, in the repository's own layout: all files side by side."""
    folder = tmp_path_factory.mktemp("cifar10") / "ddpm-cifar10-32"
    pipeline = diffusers.DDPMPipeline(network(CIFAR10), diffusers.DDPMScheduler(**CIFAR10_SCHEDULER))
    pipeline.unet.save_pretrained(folder)
    pipeline.scheduler.save_pretrained(folder)
    pipeline.save_config(folder)
    # By default it would take 1000 steps, and 50 for the card's picture: too many for a test of this size.
    return pipeline, Sampler(build(from_diffusers(folder, steps=4), folder.parent / "bundle", plan=QUICK))


@pytest.fixture(scope="module")
def celeba_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not square, and v-prediction: of random weights that leaves most of a picture unclipped."""
    folder = tmp_path_factory.mktemp("celeba") / "ddim-small"
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    diffusers.DDIMPipeline(network(CELEBA), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def celeba(celeba_folder: Path) -> tuple[Any, Sampler]:
    bundle = build(from_diffusers(celeba_folder), celeba_folder.parent / "bundle", plan=QUICK)
    return diffusers.DDIMPipeline.from_pretrained(celeba_folder), Sampler(bundle)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Sampler]:
    """Five labels, the first of them the null label."""
    folder = tmp_path_factory.mktemp("classes") / "five"
    scheduler = diffusers.DDPMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2", steps_offset=1)
    pipeline = diffusers.DDPMPipeline(network({**SMALL, "num_class_embeds": 5}), scheduler)
    pipeline.save_pretrained(folder)
    return pipeline, Sampler(build(from_diffusers(folder, null_label=0), folder.parent / "bundle", plan=QUICK))


def test_the_published_cifar10_network_gives_ddpm_pipelines_pictures(cifar10: tuple[Any, Sampler]) -> None:
    pipeline, sampler = cifar10
    bundle, defaults = sampler.bundle, sampler.bundle.defaults
    assert sum(p.numel() for p in pipeline.unet.parameters()) == 35_746_307
    assert (bundle.name, bundle.sample_shape, bundle.labels) == ("ddpm-cifar10-32", (3, 32, 32), None)
    assert (bundle.prediction, bundle.schedule.name, bundle.clip) == ("epsilon", "linear_raw", 1.0)
    assert (defaults.solver, dict(defaults.options), defaults.grid) == ("ddpm", {"variance": "fixed_large"}, "leading")
    pictures = theirs(pipeline, 2, 4)
    assert ((pictures > 0) & (pictures < 1)).mean() > 0.4, "or clipping hides what is compared"
    # Both in float32: sigma/alpha of 157 multiplies rounding, of theirs in ᾱ too.
    np.testing.assert_allclose(ours(sampler, 2, 4), pictures, rtol=0, atol=1e-4)


def test_nothing_of_the_cifar10_graph_is_computed_that_is_known_but_for_the_batch(cifar10: tuple[Any, Sampler]) -> None:
    import onnx

    proto = onnx.load(cifar10[1].bundle.path / "fp32/step.onnx", load_external_data=False)
    assert not {n.op_type for n in proto.graph.node} & {"Shape", "Expand", "Size", "ConstantOfShape"}
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_ddim_pipelines_pictures_where_eps_is_taken_from_the_clipped_estimate(celeba: tuple[Any, Sampler]) -> None:
    pipeline, sampler = celeba
    pictures = theirs(pipeline, 2, 8, use_clipped_model_output=True)
    assert pictures.shape == (2, 64, 32, 3)
    assert ((pictures > 0) & (pictures < 1)).mean() > 0.4
    np.testing.assert_allclose(ours(sampler, 2, 8), pictures, rtol=0, atol=1e-5)


def test_ddim_pipelines_default_differs_where_the_clip_bites(celeba: tuple[Any, Sampler]) -> None:
    """By default it clips D and keeps the ε of before. Ours takes ε from the clipped D, so that x stays on its level."""
    pipeline, sampler = celeba
    apart = np.abs(ours(sampler, 2, 8) - theirs(pipeline, 2, 8))
    assert apart.max() > 5 * LEVEL


def test_ddim_pipelines_pictures_without_clipping(celeba: tuple[Any, Sampler], tmp_path: Path) -> None:
    """The clip is an input of the graphs, so the same ones serve; the folder's model must say that there is none."""
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
    np.testing.assert_allclose(ours(sampler, 2, 10, label=label, guidance=1.0), pictures, rtol=0, atol=1e-5)


def test_guidance_mixes_the_answers_under_both_labels(classes: tuple[Any, Sampler]) -> None:
    """One step from the last level: D is linear in F, so guided D is that mix of the other two."""
    sampler = classes[1]
    last = [float(sampler.bundle.schedule.time[-1])]

    def denoised(label: str | None, guidance: float) -> np.ndarray:
        return sampler.sample(2, 0, label=label, guidance=guidance, solver="ddim", grid=last)

    with_label, without = denoised("class2", 1.0), denoised(None, 1.0)
    expected = np.clip(with_label + 0.5 * (with_label - without), -1, 1)
    np.testing.assert_allclose(denoised("class2", 1.5), expected, rtol=0, atol=1e-5)


SCHEDULES = [
    {},
    {"num_train_timesteps": 250, "beta_end": 0.05},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"trained_betas": np.linspace(1e-4, 0.03, 500).tolist()},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
]


@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_schedules_are_those_of_diffusers(config: dict) -> None:
    """To their float32: of ᾱ near 1 that leaves 1 - ᾱ, and so the first sigmas, few digits."""
    own = diffusers.DDPMScheduler(**config)
    alpha_bar, found = own.alphas_cumprod.double().numpy(), read_schedule(own.config)
    np.testing.assert_allclose(found.alpha**2, alpha_bar, rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(found.sigma, np.sqrt(1 - alpha_bar), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("steps", [2, 7, 50, 999])
def test_default_grids_are_their_timesteps(kind: str, spacing: str, offset: int, steps: int) -> None:
    from runtime.grid import make_grid

    own = getattr(diffusers, kind)(timestep_spacing=spacing, steps_offset=offset)
    own.set_timesteps(steps)
    read = read_scheduler({**own.config, "_class_name": kind})
    np.testing.assert_array_equal(make_grid(read.schedule, read.grid, steps).time[:-1], own.timesteps.numpy())


def test_a_grid_that_starts_at_one_has_a_step_less() -> None:
    """diffusers asks its table for t = 1000 there, and fails."""
    own = diffusers.DDPMScheduler(steps_offset=1)
    assert read_scheduler({**own.config, "_class_name": "DDPMScheduler"}).steps == 999
    own.set_timesteps(1000)
    with pytest.raises(IndexError):
        own.step(torch.zeros(1, 1), own.timesteps[0], torch.zeros(1, 1))


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"])
def test_variances_are_those_of_diffusers(kind: str) -> None:
    from runtime import make_program
    from runtime.program import Z

    own = diffusers.DDPMScheduler(variance_type=kind)
    own.set_timesteps(10)
    read = read_scheduler({**own.config, "_class_name": "DDPMScheduler"})
    found = make_program(read.schedule, "epsilon", "ddpm", 10, "leading", **read.options).update[:-1, 0, Z]
    with np.errstate(invalid="ignore"):
        theirs = np.array([float(own._get_variance(t)) for t in own.timesteps[:-1]])
    as_variance = {"fixed_small_log": theirs**2, "fixed_large_log": np.exp(theirs)}.get(kind, theirs)
    np.testing.assert_allclose(found**2, as_variance, rtol=1e-3)  # their 1 - ᾱ of the first knot has four digits


def test_fixed_large_log_is_nan_in_diffusers() -> None:
    """It takes the root of the logarithm; ours takes the variance that is meant."""
    own = diffusers.DDPMScheduler(variance_type="fixed_large_log")
    own.set_timesteps(10)
    x = torch.zeros(1, 1, 2, 2)
    assert own.step(x, 500, x).prev_sample.isnan().all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small pipeline's folder to change."""
    path = tmp_path / "small"
    diffusers.DDPMPipeline(network(SMALL), diffusers.DDPMScheduler()).save_pretrained(path)
    return path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_a_folder_says_is_what_the_model_says(folder: Path) -> None:
    model = from_diffusers(folder)
    assert is_diffusers(folder)
    assert model.name == "small"
    assert model.defaults.steps == 1000, "as DDPMPipeline, which runs every step unless told otherwise"
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
def test_an_unsupported_setting_of_the_network_is_named(folder: Path, setting: str, value: Any) -> None:
    edit(folder / "unet/config.json", **{setting: value})
    with pytest.raises(ExportError, match=f"{setting}={value!r} cannot be exported: "):
        from_diffusers(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variance_type": "learned"}, "variance_type='learned' cannot be exported"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range' cannot be exported"),
        ({"variance_type": "fixed_smal"}, "Did you mean 'fixed_small'"),
        ({"thresholding": True}, "thresholding=True cannot be exported"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one=False cannot be exported"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True cannot be exported"),
        ({"prediction_type": "v"}, "unknown prediction_type 'v'"),
        ({"beta_schedule": "laplace"}, "unknown beta_schedule 'laplace'"),
        ({"timestep_spacing": "log"}, "unknown timestep_spacing 'log'"),
        ({"steps_offset": 1.5}, "steps_offset=1.5 cannot be exported"),
        (
            {"_class_name": "PNDMScheduler"},
            "is of a PNDMScheduler; DDPMScheduler or DDIMScheduler expected.*from_config",
        ),
    ],
    ids=str,
)
def test_an_unsupported_setting_of_the_scheduler_is_named(folder: Path, changes: dict, message: str) -> None:
    edit(folder / "scheduler/scheduler_config.json", **changes)
    with pytest.raises(ExportError, match=message):
        from_diffusers(folder)


def test_a_ddim_pipeline_with_ddpms_scheduler_samples_with_ddim(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="DDIMPipeline")
    assert from_diffusers(folder).defaults.solver == "ddim"


def test_a_network_alone_needs_to_be_told_schedule_and_prediction(folder: Path) -> None:
    alone = folder / "unet"
    assert is_diffusers(alone)
    with pytest.raises(ExportError, match=r"no scheduler_config\.json.*--schedule linear_raw --prediction epsilon"):
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


@pytest.mark.parametrize(("make", "options", "atol"), [(sharded, {}, 0), (half, {"variant": "fp16"}, 1e-3)])
def test_weights_in_shards_and_in_half_precision_are_read_as_float32(
    folder: Path, make: Callable[[Path], None], options: dict, atol: float
) -> None:
    make(folder)
    found, expected = from_diffusers(folder, **options).module.state_dict(), network(SMALL).state_dict()
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
        (half, "no plain weights; it has the variants fp16: name one with --variant"),
        (lambda f: drop(f, "conv_in.weight"), "'conv_in.weight' is missing; 'other.weight' is unexpected"),
        (lambda f: edit(f / "unet/config.json", block_out_channels=[16, 64]), "cannot load the network"),
        (lambda f: edit(f / "unet/config.json", up_block_types=["UpBlock2D"]), "cannot load the network"),
        (lambda f: edit(f / "unet/config.json", _class_name="UNet2DConditionModel"), "UNet2DModel expected"),
        (lambda f: edit(f / "unet/config.json", sample_size=9), r"x \[2, 1, 9, 9\].*fails with"),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"no"), "cannot load the network"),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "has no diffusion_pytorch_model.saf"),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(f / "unet/diffusion_pytorch_model.bin"),
            r"as \.bin only.*save_pretrained",
        ),
        (lambda f: shutil.rmtree(f / "scheduler"), r"without its scheduler: .*scheduler_config\.json is missing"),
        (lambda f: (f / "unet/config.json").unlink(), r"has no unet/config\.json"),
        (lambda f: (f / "unet/config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "unet/config.json").write_text("[]"), "a JSON object expected"),
        (lambda f: edit(f / "model_index.json", _class_name="StableDiffusionPipeline"), "is a StableDiffusionPipeline"),
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
    with pytest.raises(RequestError, match="null_label must be from 0 to 2, found 3"):
        from_diffusers(folder, null_label=3)
    assert from_diffusers(folder, null_label=2, label_names=["cat", "dog"]).labels.names == ("cat", "dog")
    every = from_diffusers(folder)
    assert every.labels.names == ("0", "1", "2")
    assert not every.labels.null_trained
    assert every.defaults.guidance == 1


def test_without_diffusers_the_error_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ExportError, match=r"pip install 'unnoise\[diffusers\]'"):
        from_diffusers(folder)
