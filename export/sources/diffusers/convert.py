"""What to do with a scheduler of diffusers that is neither DDPM's nor DDIM's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .config import defaults_of, in_json

SAME_FORWARD_PROCESS = (
    *("PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler"),
    *("UniPCMultistepScheduler", "SASolverScheduler"),
    *("DDPMParallelScheduler", "DDIMParallelScheduler"),
)
"""Schedulers that sample from a network of DDPM's forward process: the same table of betas."""

FLOW = (
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"),
    *("LTXEulerAncestralRFScheduler", "FlowMapEulerDiscreteScheduler"),
)
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")

GRIDS: Mapping[str, str] = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "log_snr",
    "use_lu_lambdas": "log_snr",
    "use_beta_sigmas": "trailing",
}
"""Flags that move a scheduler's noise levels, and the nearest grid here."""

FORWARD = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    "prediction_type",
)
"""The settings that say what the network was trained on."""


def advice(path: Path, found: Mapping[str, object], kind: str) -> str:
    """Return what the user can do about a scheduler of class `kind`.

    Converting with DDPMScheduler.from_config is right only if both schedulers have the same
    forward process. diffusers silently converts between others too, and wrongly.
    """
    if kind.startswith("Flax"):
        return (
            f"Set _class_name to {kind.removeprefix('Flax')!r}, write clip_sample explicitly, and "
            "convert the weights to safetensors with a diffusers version that reads Flax."
        )
    # A setting that the file leaves out has the default of its own class.
    settings = {**defaults_of(kind), **found}
    flow = settings.get("use_flow_sigmas") or settings.get("use_dynamic_shifting")
    if kind in FLOW or flow or settings.get("prediction_type") == "flow_prediction":
        return (
            "Its network was trained on flow's noise levels, which no DDPM schedule has. Export "
            "the network alone: pass its own folder with --schedule flow --prediction flow."
        )
    if kind in EDM:
        return (
            "Its network is EDM's, which no DDPM schedule fits. Export the network alone: pass its "
            "own folder with --schedule edm --prediction edm. Give sigma_min, sigma_max, rho and "
            "sigma_data with --schedule-option unless they are 0.002, 80, 7 and 0.5. "
            "Only prediction_type epsilon has this form."
        )
    if kind not in SAME_FORWARD_PROCESS:
        return (
            "It cannot be converted: its noise levels are not those of DDPM. If its network fits "
            "a schedule here, export it as a PyTorch module, with --module."
        )
    if settings.get("timestep_type", "discrete") != "discrete":
        return (
            "It cannot be converted: with timestep_type="
            f"{in_json(settings['timestep_type'])} its network is conditioned on log(sigma)."
        )
    return _conversion(path, found, kind, settings)


def _conversion(
    path: Path, found: Mapping[str, object], kind: str, settings: Mapping[str, object]
) -> str:
    flags = [flag for flag in GRIDS if settings.get(flag)]
    if flags:
        return (
            f"It moves its noise levels ({flags[0]}), which DDPMScheduler does not. Set "
            f"{flags[0]} to false and run this again to see how to convert it; then pass --grid "
            f"{GRIDS[flags[0]]} to sample on similar levels."
        )
    unknown = [key for key in FORWARD if key not in settings]
    if unknown:
        return (
            f"Write {', '.join(unknown)} into the file, because {kind}'s defaults are not known "
            "here, and run this again to see how to convert it."
        )
    # A key that the file leaves out would get DDPMScheduler's default, not that of its own class.
    assumed = {**defaults_of("DDPMScheduler"), **found}
    meant = {key: settings[key] for key in FORWARD}
    # Schedulers without this setting do not clip. DDPMScheduler does by default.
    meant["clip_sample"] = bool(settings["clip_sample"]) if _clips(kind) else False
    changes = [f"{key}={value!r}" for key, value in meant.items() if assumed[key] != value]
    folder = repr(str(path.parent))
    arguments = ", ".join([f"DDPMScheduler.load_config({folder})", *changes])
    return (
        "It samples from networks of the same forward process, so it can be converted: "
        f"from diffusers import DDPMScheduler; DDPMScheduler.from_config({arguments})"
        f".save_pretrained({folder}) writes a DDPMScheduler."
    )


def _clips(kind: str) -> bool:
    return "clip_sample" in defaults_of(kind)
