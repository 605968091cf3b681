"""A UNet2DConditionModel: its texts' embeddings are a condition, and images are diffusers' own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import Condition, ExportError
from export.build import build
from export.proof.plan import LEAST
from export.sources.diffusers.model import from_diffusers
from runtime import RequestError, Sampler
from runtime.diffusion.noise import Stream, noise
from runtime.files import from_json, to_json

from ....lazily import Lazy

diffusers = Lazy("diffusers")

TEXTS = "encoder_hidden_states"
NETWORK: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
STEPS = 10
GUIDANCE = 2.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with its scheduler, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("conditional")
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(**NETWORK).save_pretrained(folder)
    diffusers.DDIMScheduler(**SCHEDULE).save_pretrained(folder)
    return folder


def by_diffusers(folder: Path, x: np.ndarray, texts: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Images by diffusers' network and scheduler, in the loop of its pipelines."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder).eval()
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder)
    scheduler.set_timesteps(STEPS)
    sample = torch.from_numpy(x)
    both = torch.cat(
        [torch.from_numpy(np.broadcast_to(null, texts.shape).copy()), torch.from_numpy(texts)]
    )
    with torch.inference_mode():
        for time in scheduler.timesteps:
            found = unet(torch.cat([sample, sample]), time, both).sample
            null_half, own = found.chunk(2)
            guided = null_half + GUIDANCE * (own - null_half)
            sample = scheduler.step(guided, time, sample).prev_sample
    return sample.numpy()


@pytest.mark.slow  # PyTorch takes most of a quarter of a minute to trace it
def test_images_are_those_of_diffusers(folder: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    null = generator.standard_normal((5, 12)).astype(np.float32)
    texts = Condition(TEXTS, (5, 12), meaning="a text", null="learned")
    model = from_diffusers(folder, conditions=[texts], nulls={TEXTS: null})
    assert model.provenance["source"] == "diffusers, UNet2DConditionModel"
    bundle = build(model, tmp_path / "out", plan=LEAST, winograd=False)
    given = generator.standard_normal((3, 5, 12)).astype(np.float32)
    start = np.stack([noise(seed, Stream.INITIAL, 0, (4, 8, 8)) for seed in range(3)])
    expected = by_diffusers(folder, start, given, null)
    how: dict[str, Any] = {"solver": "ddim", "steps": STEPS, "guidance": GUIDANCE}
    found = Sampler(bundle).sample(3, conditions={TEXTS: given}, **how)
    assert np.abs(found - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


def test_texts_have_77_tokens_and_no_null_value_unless_declared(folder: Path) -> None:
    model = from_diffusers(folder)
    (texts,) = model.conditions
    assert (texts.name, texts.shape, texts.null) == (TEXTS, (77, 12), None)
    assert model.schedule.name == "scaled_linear"


def test_latents_of_a_network_alone_are_not_clipped(folder: Path, tmp_path: Path) -> None:
    """Such as unet/ of Stable Diffusion. Latents are larger than 1; images are not."""
    alone = tmp_path / "unet"
    alone.mkdir()
    for path in folder.glob("*"):
        if not path.name.startswith("scheduler"):
            shutil.copy(path, alone)
    given: dict[str, Any] = {"schedule": "scaled_linear", "prediction": "epsilon"}
    assert from_diffusers(alone, **given).clip is None
    assert from_diffusers(alone, clip=4.0, **given).clip == 4.0
    with pytest.raises(RequestError, match="has a scheduler, which says schedule, prediction and"):
        from_diffusers(folder, clip=1.0)


@pytest.mark.parametrize(
    "conditions",
    [
        [Condition("texts", (5, 12))],
        [Condition(TEXTS, (5, 13))],
        [Condition(TEXTS, (5, 12)), Condition("more")],
    ],
)
def test_other_conditions_are_refused(folder: Path, conditions: list[Condition]) -> None:
    with pytest.raises(RequestError, match="the one condition is encoder_hidden_states"):
        from_diffusers(folder, conditions=conditions)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("addition_embed_type", "text_time"),
        ("class_embed_type", "timestep"),
        ("encoder_hid_dim", 16),
        ("attention_type", "gated"),
        ("num_class_embeds", 4),
    ],
)
def test_further_inputs_are_refused_by_name(
    folder: Path, tmp_path: Path, key: str, value: object
) -> None:
    config = from_json((folder / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(to_json({**config, key: value}))
    with pytest.raises(ExportError, match=f"{key}=.* cannot be exported"):
        from_diffusers(tmp_path, schedule="scaled_linear", prediction="epsilon")
