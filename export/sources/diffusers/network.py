"""A UNet2DModel or UNet2DConditionModel as a module: its config, sample shape and weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.bundle.conditions import Condition
from runtime.errors import RequestError
from runtime.errors.messages import described

from ...errors import ExportError
from ..loading import mismatch
from .config import (
    Config,
    class_name,
    conditional_config,
    diffusers_module,
    in_json,
    network_config,
    read_json,
)
from .folder import WEIGHTS, Folder

CONDITIONAL = "UNet2DConditionModel"
TEXTS = "encoder_hidden_states"
"""The condition of such a network: what a text encoder made of a text."""
TOKENS = 77
"""Of a text, as CLIP counts them."""


class UNet(nn.Module):
    """A UNet2DModel as a module of x [B, *S], time [B] and, if it has classes, label [B]."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, time: Tensor, *label: Tensor) -> Tensor:
        return self.unet(x, time, *label, return_dict=False)[0]


class ConditionalUNet(nn.Module):
    """A UNet2DConditionModel as a module of x [B, *S], time [B] and embeddings [B, tokens, k]."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, time: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.unet(x, time, encoder_hidden_states, return_dict=False)[0]


def wrapped(unet: nn.Module, config: Config) -> UNet | ConditionalUNet:
    """Return a network of diffusers as a module that exports."""
    return ConditionalUNet(unet) if config.kind == CONDITIONAL else UNet(unet)


def texts_of(network: Config, declared: Sequence[Condition]) -> list[Condition]:
    """Return the conditions of a network: its texts' embeddings, as declared or 77 tokens.

    Raises:
        RequestError: Something else is declared.
    """
    if network.kind != CONDITIONAL:
        if declared:
            raise RequestError(
                f"{network.path}: a {network.kind} takes no further conditions, got "
                f"{declared[0].name!r}. Leave them out."
            )
        return []
    width = network.get("cross_attention_dim")
    if not declared:
        return [Condition(TEXTS, (TOKENS, width), meaning="the embedding of each token of a text")]
    (texts,) = declared if len(declared) == 1 else (None,)
    if texts is None or texts.name != TEXTS or texts.shape[1:] != (width,):
        raise RequestError(
            f"{network.path}: the one condition is {TEXTS}, [tokens, {width}], got "
            f"{declared[0]}. Declare --condition {TEXTS}:{TOKENS},{width}."
        )
    return [texts]


def network_of(parts: Folder) -> Config:
    """Read the config of a UNet2DModel or a UNet2DConditionModel.

    Raises ExportError for other networks.
    """
    path = parts.unet / "config.json"
    found = read_json(path)
    kind = class_name(path, found, parts.classes.get("unet"))
    if kind == CONDITIONAL:
        return conditional_config(path, found)
    if kind != "UNet2DModel":
        raise ExportError(
            f"{path}: _class_name must be UNet2DModel or {CONDITIONAL}, got {in_json(kind)}. "
            "Export any other network as a PyTorch module, with --module."
        )
    return network_config(path, found)


def sample_shape(config: Config) -> tuple[int, int, int]:
    """Return [C, H, W] of a network's config. Raises ExportError for unsupported settings."""
    values = config.values
    channels = config.get("in_channels")
    out = config.get("out_channels")
    # The likeliest cause first: OpenAI's networks predict a variance in the second half.
    if out == 2 * channels:
        raise config.refused(
            "out_channels",
            "twice in_channels is a learned variance, and solvers here fix their variance",
        )
    if out != channels:
        raise config.refused("out_channels", f"in_channels is {channels}, and F has x's shape")
    if config.get("center_input_sample"):
        raise config.refused(
            "center_input_sample",
            "its samples are in 0 to 1, and every scheduler here uses -1 to 1",
        )
    if values["time_embedding_type"] == "fourier":
        raise config.refused(
            "time_embedding_type",
            "such a network is conditioned on sigma and divides by it, as score SDEs do",
        )
    if values["time_embedding_type"] != "positional":
        raise config.refused(
            "time_embedding_type",
            "the network must take any time, between integers too: positional",
        )
    if values["class_embed_type"] is not None:
        raise config.refused("class_embed_type", "labels are integers: null with num_class_embeds")
    if values["sample_size"] is None:
        raise config.refused(
            "sample_size", "the graph has one size: write it into the network's config.json"
        )
    size = config.get("sample_size")
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def load_network(
    folder: Path, variant: str | None, kind: str = "UNet2DModel"
) -> tuple[nn.Module, str]:
    """Load the network in float32 and evaluation mode; return it and diffusers' version.

    Raises ExportError unless every weight is there, as safetensors.
    """
    # diffusers' own error for missing weights names no remedy, so they are looked for first.
    _find_weights(folder, variant)
    diffusers = diffusers_module()
    try:
        unet, info = getattr(diffusers, kind).from_pretrained(
            folder,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # a config that makes no network, damaged files: many types
        raise ExportError(
            f"{folder}: diffusers cannot load the network ({described(error)})."
        ) from error
    # diffusers loads what fits and leaves the rest at random, with a warning.
    faults = [
        f"{key!r} is {state}"
        for state in ("missing", "unexpected")
        for key in info[f"{state}_keys"]
    ]
    if faults:
        raise ExportError(mismatch(str(folder), faults))
    return unet.eval().requires_grad_(False), diffusers.__version__


def _find_weights(folder: Path, variant: str | None) -> None:
    """Raises ExportError unless the weights, of this variant, are there as safetensors."""
    endings = (".safetensors", ".safetensors.index.json")
    stems = [f"{WEIGHTS}.{variant}"] if variant else [WEIGHTS]
    # A variant's index has been named both ways.
    indices = [f"{WEIGHTS}.safetensors.index.{variant}.json"] if variant else []
    paths = [folder / name for name in [*(s + e for s in stems for e in endings), *indices]]
    if any(path.is_file() for path in paths):
        return
    folders = [path for path in paths if path.is_dir()]
    if folders:
        raise ExportError(f"{folders[0]} must be a file, and it is a folder.")
    # What is there instead decides the remedy: other variants, formats that are not read, nothing.
    pattern = re.compile(rf"{WEIGHTS}\.([A-Za-z_]\w*?)(?:-\d+-of-\d+)?\.safetensors")
    files = sorted(folder.glob(f"{WEIGHTS}.*.safetensors"))
    matches = (pattern.fullmatch(path.name) for path in files)
    variants = sorted({match[1] for match in matches if match})
    wanted = f"variant {variant!r}" if variant else "plain weights"
    if variants:
        raise ExportError(
            f"{folder} has no {wanted}. It has the variants {', '.join(variants)}: name one with "
            f"--variant."
        )
    if list(folder.glob(f"{WEIGHTS}*.bin")):
        raise ExportError(
            f"{folder} has its weights as .bin only, a format that can run code when it is opened, "
            "so it is not read. If you trust the file: diffusers.UNet2DModel.from_pretrained("
            "path, use_safetensors=False).save_pretrained(path)."
        )
    if list(folder.glob("*.msgpack")):
        raise ExportError(
            f"{folder} has Flax weights (.msgpack) only. Convert them with a diffusers version "
            "that reads Flax: UNet2DModel.from_pretrained(path, from_flax=True)."
        )
    raise ExportError(
        f"{folder} has no {stems[0]}.safetensors. Save the network with save_pretrained."
    )
