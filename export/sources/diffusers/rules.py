"""What the settings of diffusers must be to be exported, and the keys that change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

MOST_KNOTS = 1_000_000


class Rule(NamedTuple):
    """What a value must be: a check, and the same in words."""

    fits: Callable[[object], bool]
    words: str


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    # JSON has integers of any size, and those beyond 2^53 have no exact float.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53


def whole(low: int, high: int = 2**31) -> Rule:
    """An integer from low to high."""
    return Rule(lambda v: _is_whole(v) and low <= v <= high, f"an integer from {low} to {high}")


def real(low: float, high: float) -> Rule:
    """A finite number from low to high."""
    return Rule(lambda v: _is_real(v) and low <= v <= high, f"a number from {low:g} to {high:g}")


def choice(*names: str) -> Rule:
    """One of these strings."""
    return Rule(lambda v: isinstance(v, str) and v in names, f"one of {', '.join(names)}")


def listed(rule: Rule, of: str) -> Rule:
    """A list, not empty, of values that each follow `rule`."""

    def fits(value: object) -> bool:
        return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(rule.fits, value))

    return Rule(fits, f"a list of {of}")


def or_null(rule: Rule) -> Rule:
    """What `rule` says, or null."""
    return Rule(lambda v: v is None or rule.fits(v), f"{rule.words}, or null")


FLAG = Rule(lambda v: isinstance(v, bool), "true or false")
TEXT = Rule(lambda v: isinstance(v, str), "a string")
BETA = Rule(lambda v: _is_real(v) and 0 < v <= 1, "a number above 0 and at most 1")
SIZE = Rule(
    lambda v: (
        whole(1, 65536).fits(v)
        or (isinstance(v, (list, tuple)) and len(v) == 2 and all(map(whole(1, 65536).fits, v)))
    ),
    "an integer from 1 to 65536, or a list of two, height and width",
)

SCHEDULER_RULES: Mapping[str, Rule] = {
    "num_train_timesteps": whole(1, MOST_KNOTS),
    "beta_start": BETA,
    "beta_end": BETA,
    "beta_schedule": choice("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "trained_betas": or_null(listed(BETA, "numbers above 0 and at most 1")),
    "prediction_type": choice("epsilon", "v_prediction", "sample"),
    "clip_sample": FLAG,
    "clip_sample_range": real(1e-6, 1e6),
    "thresholding": FLAG,
    "set_alpha_to_one": FLAG,
    "variance_type": or_null(
        choice(
            *("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
            *("learned", "learned_range"),
        )
    ),
    "timestep_spacing": choice("leading", "trailing", "linspace"),
    "steps_offset": whole(0, MOST_KNOTS),
    "rescale_betas_zero_snr": FLAG,
}

NETWORK_RULES: Mapping[str, Rule] = {
    "sample_size": SIZE,
    "in_channels": whole(1, 65536),
    "out_channels": whole(1, 65536),
    "center_input_sample": FLAG,
    "time_embedding_dim": or_null(whole(1)),
    "freq_shift": real(-1e6, 1e6),
    "flip_sin_to_cos": FLAG,
    "down_block_types": listed(TEXT, "strings"),
    # diffusers takes any string for UNetMidBlock2D.
    "mid_block_type": or_null(choice("UNetMidBlock2D")),
    "up_block_types": listed(TEXT, "strings"),
    "block_out_channels": listed(whole(1), "integers of at least 1"),
    "layers_per_block": whole(1, 1000),
    "mid_block_scale_factor": real(1e-6, 1e6),
    "downsample_padding": whole(0, 1000),
    # diffusers takes any other string for no resampling at all.
    "downsample_type": or_null(choice("conv", "resnet")),
    "upsample_type": or_null(choice("conv", "resnet")),
    "dropout": real(0, 1),
    "act_fn": TEXT,
    "attention_head_dim": or_null(whole(1)),
    "norm_num_groups": or_null(whole(1)),
    "attn_norm_num_groups": or_null(whole(1)),
    "norm_eps": real(0, 1),
    "resnet_time_scale_shift": choice("default", "scale_shift"),
    "add_attention": FLAG,
    "num_class_embeds": or_null(whole(1)),
    "num_train_timesteps": or_null(whole(1)),
}

CONDITIONAL_RULES: Mapping[str, Rule] = {
    "sample_size": SIZE,
    "in_channels": whole(1, 65536),
    "out_channels": whole(1, 65536),
    "center_input_sample": FLAG,
    "cross_attention_dim": whole(1, 65536),
    "num_class_embeds": or_null(whole(1)),
}

PLAIN_SETTINGS: Mapping[str, object] = {
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "time_cond_proj_dim": None,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "timestep_post_act": None,
    "time_embedding_act_fn": None,
}
"""Settings of a UNet2DConditionModel that has no condition besides encoder_hidden_states."""

HARMLESS_FOR_NETWORKS = frozenset(
    (
        # EMAModel.save_pretrained writes the state of the average into unet_ema/config.json.
        # UNet2DModel takes none of it: the weights next to it are already averaged.
        *("decay", "min_decay", "optimization_step", "update_after_step"),
        *("use_ema_warmup", "inv_gamma", "power"),
    )
)

HARMLESS_FOR_SCHEDULERS = frozenset(
    (
        # Of diffusers 0.0 to 0.4: whether the tables are numpy's or PyTorch's.
        "tensor_format",
        # from_config keeps the keys of the scheduler that a config was converted from.
        # DDPMScheduler and DDIMScheduler read none of these. They choose an algorithm, its order,
        # or the noise levels that it visits, not what the network was trained on or predicts.
        *("solver_order", "solver_type", "solver_p", "algorithm_type", "predict_x0", "tau_func"),
        *("predictor_order", "corrector_order", "disable_corrector", "skip_prk_steps"),
        *("lower_order_final", "euler_at_final", "final_sigmas_type", "lambda_min_clipped"),
        *("interpolation_type", "noise_sampler_seed", "sigma_min", "sigma_max"),
        *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
        # Only read together with use_flow_sigmas and use_dynamic_shifting, see NEUTRAL.
        *("flow_shift", "time_shift_type"),
    )
)

NEUTRAL: Mapping[str, tuple[object, str]] = {
    "timestep_values": (None, "the steps are chosen by --steps and --grid"),
    "use_flow_sigmas": (False, "its network was trained on flow's noise levels, not DDPM's"),
    "use_dynamic_shifting": (False, "it belongs to networks trained on flow's noise levels"),
    "shift_terminal": (None, "it belongs to networks trained on flow's noise levels"),
    "timestep_type": ("discrete", "its network is conditioned on log(sigma), not on timesteps"),
}
"""Keys that change nothing at one value, and why any other value is refused."""

RENAMED: Mapping[str, str] = {
    "timesteps": "num_train_timesteps",  # diffusers 0.0
    "clip_predicted_image": "clip_sample",  # diffusers 0.0
}
