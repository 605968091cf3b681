"""int8 on OpenVINO next to fp32 on ONNX Runtime: time, and how far the images differ.

    pip install '.[cpu,openvino]'
    python examples/int8_openvino.py

int8 images are other images: the same seed gives a similar image, not the same bytes. The processor
must have VNNI or AMX (`unnoise info` says so).
"""

import os
import time

import numpy as np

from runtime import Sampler

STEPS = int(os.environ.get("STEPS", "20"))
N = 8


def timed(backend: str, precision: str) -> tuple[np.ndarray, float]:
    """Images [N, H, W, C], and milliseconds per image after a warm-up."""
    with Sampler.load("emoji32", backend=backend, precision=precision) as sampler:
        sampler.sample(N, steps=1, label=3)
        begun = time.perf_counter()
        images = sampler.pictures(N, seed=0, label=3, steps=STEPS)
        return images, 1000 * (time.perf_counter() - begun) / N


reference, fp32_ms = timed("onnxruntime", "fp32")
images, int8_ms = timed("openvino", "int8")

squared = (images.astype(float) - reference).reshape(N, -1) ** 2
psnr = 10 * np.log10(255**2 / np.maximum(squared.mean(1), 1e-9))
print(f"fp32 on ONNX Runtime: {fp32_ms:.1f} ms per image")
print(f"int8 on OpenVINO:     {int8_ms:.1f} ms per image")
print(f"PSNR: median {np.median(psnr):.1f} dB, least {psnr.min():.1f} dB")
