"""A bundle of a few numbers and a backend in numpy, so that one sample takes a millisecond."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runtime import Bundle, make_schedule
from runtime.backends.ports import shapes
from runtime.bundle.format import MANIFEST
from runtime.bundle.manifest import File
from runtime.bundle.spec import Defaults, Labels
from runtime.diffusion.program import C_IN, C_OUT, C_SKIP, CLIP
from runtime.files import to_json

SHAPE = (1, 4, 4)
KNOTS = 8


def write_small_bundle(path: Path, knots: int = KNOTS) -> Bundle:
    """A folder that Bundle.load opens. The network is that of `SmallBackend`: there is no graph."""
    bundle = Bundle(
        path=path,
        name="small",
        sample_shape=SHAPE,
        sample_range=(-1.0, 1.0),
        prediction="v",
        schedule=make_schedule("cosine", T=knots),
        clip=1.0,
        labels=Labels(("zero", "one", "two"), null_trained=True),
        defaults=Defaults("ddim", 3, "trailing", 2.0),
        files={"fp32/step.onnx": File("0" * 64, 0)},
        provenance={},
        report={},
    )
    path.mkdir(parents=True, exist_ok=True)
    (path / MANIFEST).write_text(to_json(bundle.to_json()))
    return Bundle.load(path)


class SmallBuffers:
    """The update in numpy, of a network that returns half of its input."""

    def __init__(self, bundle: Bundle, batch: int) -> None:
        sizes = shapes(bundle, batch)
        self.state = np.zeros(sizes["state"], np.float32)
        self.next_state = np.zeros(sizes["state"], np.float32)
        self.noise = np.zeros(sizes["noise"], np.float32)
        self.call = np.zeros(sizes["call"], np.float32)
        self.update = np.zeros(sizes["update"], np.float32)
        self.denoised = np.zeros(sizes["denoised"], np.float32)
        self.label = np.zeros(sizes["label"], np.int64)
        self.conditions = {c.port: np.zeros(sizes[c.port], c.kind) for c in bundle.conditions}

    def run(self, guided: bool, first: int, count: int) -> None:
        part = slice(first, first + count)
        state = self.state[part]
        call = self.call[part].T[..., None, None, None]
        x = state[:, 0]
        denoised = call[C_SKIP] * x + 0.5 * call[C_OUT] * call[C_IN] * x
        self.denoised[part] = np.clip(denoised, -call[CLIP], call[CLIP])
        columns = [state, self.denoised[part][:, None], self.noise[part][:, None]]
        update = self.update[part]
        self.next_state[part] = np.einsum(
            "brc,bcijk->brijk", update, np.concatenate(columns, axis=1)
        )

    def turn(self) -> None:
        self.state, self.next_state = self.next_state, self.state

    def step(self, guided: bool) -> None:
        self.run(guided, 0, len(self.state))
        self.turn()


class SmallBackend:
    """A fake inference library."""

    name = "onnxruntime"
    precision = "fp32"

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def bind(self, batch: int) -> SmallBuffers:
        return SmallBuffers(self.bundle, batch)
