"""Write the inputs of sampler.onnx, the whole sampling loop as one graph, for other languages.

    python examples/onnx_loop.py inputs/

Writes float32 arrays as plain bytes, and sample.bin, what the loop gives in ONNX Runtime.
onnx_loop.cpp reads the same files. The solver is data: another one is other numbers.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

from runtime import Bundle, Request, noise
from runtime.diffusion.noise import Stream
from runtime.engine.job import begin
from runtime.engine.request import Planner

STEPS = 10


def main(folder: Path) -> None:
    bundle = Bundle.load("emoji32")
    job = Planner(bundle).job(Request(seed=0, label="noto/flags", steps=STEPS))
    shape = bundle.sample_shape
    rows = len(job.table)
    z = [noise(job.seed, Stream.STEP, k, shape) for k in range(rows)]
    inputs = {
        "x": begin(job, shape)[None],  # [B, C, H, W], here with B = 1
        "noise": np.stack(z)[:, None],  # [rows, B, C, H, W]
        "call": job.table.call[:, None],  # [rows, B, 6]
        "update": job.table.update[:, None],  # [rows, B, 4, 6]
        "label": np.array([job.label]),  # [B], int64
    }
    graph = bundle.path / "fp32" / "sampler_guided.onnx"
    session = onnxruntime.InferenceSession(graph)
    (sample,) = session.run(["sample"], inputs)

    folder.mkdir(parents=True, exist_ok=True)
    for name, array in {**inputs, "sample": sample}.items():
        (folder / f"{name}.bin").write_bytes(array.tobytes())
    print(graph)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
