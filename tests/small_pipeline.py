"""A diffusers folder with a network that is almost free to run."""

from pathlib import Path


def save_small_pipeline(path: Path, kind: str) -> None:
    """Save a pipeline of 8x8 images: `kind` is DDPM or DDIM."""
    import diffusers

    network = diffusers.UNet2DModel(
        8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
    )
    scheduler = getattr(diffusers, f"{kind}Scheduler")()
    getattr(diffusers, f"{kind}Pipeline")(network, scheduler).save_pretrained(path)
