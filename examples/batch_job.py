"""A batch job: read one request per line from a JSON file, sample all of them, write one image each.

    python examples/batch_job.py requests.jsonl images/

A line: {"name": "flag", "seed": 3, "label": "noto/flags", "steps": 20}. Requests of different
solvers, steps and labels share batches. The same file gives the same images again.
"""

import json
import sys
from pathlib import Path

from PIL import Image

from runtime import Request, RequestError, Sampler


def main(source: Path, target: Path) -> None:
    sampler = Sampler.load("emoji32")
    names = []
    requests = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        fields = json.loads(line)
        try:
            names.append(fields.pop("name"))
            requests.append(Request(**fields))
        except (KeyError, RequestError) as error:
            sys.exit(f"{source}:{number}: {error}")

    images = sampler.to_uint8(sampler.sample_requests(requests))
    target.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(target / f"{name}.png")
    print(f"{len(images)} images in {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
