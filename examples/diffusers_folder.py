"""Export a pipeline that diffusers saved, and sample it with its own scheduler's settings.

    python examples/diffusers_folder.py FOLDER BUNDLE

FOLDER: what DDPMPipeline.save_pretrained or DDIMPipeline.save_pretrained wrote, in safetensors.
"""

import sys
from pathlib import Path

from PIL import Image

from export.build import build
from export.proof.plan import QUICK
from export.sources.diffusers.model import from_diffusers
from runtime import Sampler


def main(folder: Path, target: Path) -> None:
    # Scheduler settings that unnoise does not reproduce raise an error that names them.
    model = from_diffusers(folder)
    build(model, target, plan=QUICK)

    sampler = Sampler.load(target)
    defaults = sampler.bundle.defaults
    print(f"{defaults.solver}, {defaults.steps} steps on {defaults.grid}: the scheduler's own")
    image = sampler.pictures(1, seed=0, steps=10)[0]
    Image.fromarray(image.squeeze()).save(target.with_suffix(".png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
