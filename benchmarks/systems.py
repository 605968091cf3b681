"""The compared systems: one network and weights, sampled by unnoise and other libraries.

The others are diffusers, denoising-diffusion-pytorch, and inference libraries called raw. A system
makes images from x_T: x [B, *S] → x_0 [B, *S]. It uses DDIM with `steps` steps on the grid
`trailing`, without guidance. denoising-diffusion-pytorch has another grid; ours uses that grid when
its images are checked. A system that cannot run is named and left out.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import itertools
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
import torch
from backends import cifar
from numpy.typing import NDArray

from export import build_bundle
from export.proof.plan import QUICK
from export.sources.bundle import from_bundle
from runtime import Bundle, Sampler
from runtime.backends.processor import usable_cores
from runtime.diffusion.noise import Stream, noises

Float32 = NDArray[np.float32]
Make = Callable[[], Float32]
WORK = Path("out/benchmarks")
EAGER = "diffusers, eager"
REFERENCE = "unnoise, onnxruntime fp32"
OURS = {"onnxruntime": ("fp32",), "openvino": ("fp32", "bf16", "int8")}


@dataclass(frozen=True)
class Network:
    """A bundle and the PyTorch module that it was exported from, module(x, time[, label])."""

    name: str
    bundle: Bundle
    module: torch.nn.Module
    first_seed: int = 0

    def with_seeds(self, first: int) -> Network:
        """The same, starting from other noise."""
        return replace(self, first_seed=first)

    @property
    def parameters(self) -> float:
        """In millions."""
        return sum(p.numel() for p in self.module.parameters()) / 1e6

    def start(self, batch: int) -> Float32:
        """x_T of the first seed and those that follow."""
        return noises(
            range(self.first_seed, self.first_seed + batch),
            Stream.INITIAL,
            0,
            self.bundle.sample_shape,
        )

    def labels(self, batch: int) -> NDArray[np.int64] | None:
        """Every class in turn."""
        return np.arange(batch) % self.bundle.num_classes if self.bundle.labels else None


def emoji32() -> Network:
    path = Path("bundles/emoji32")
    return Network("emoji32", Bundle.load(path), from_bundle(path).module)


def cifar10() -> Network:
    return Network("CIFAR-shaped", *cifar(Path("out/cifar10")))


def random_unet(
    pixels: int, channels: tuple[int, ...] = (32, 64, 128), colours: int = 3, attention: int = 8
) -> Network:
    """A U-Net of ours with random weights and no labels, exported into out/benchmarks on the first
    run."""
    from trainer.networks.unet import UNet

    torch.manual_seed(0)
    shape = (colours, pixels, pixels)
    module = UNet(shape, channels, 1, (attention,)).eval().requires_grad_(False)
    for p in module.last.parameters():  # it starts at zero, which would make every answer zero
        torch.nn.init.normal_(p, std=0.02)
    folder = WORK / f"unet-{pixels}-{'-'.join(map(str, channels))}"
    if not (folder / "bundle.json").is_file():
        described = {"sample_shape": shape, "prediction": "v", "schedule": "cosine", "clip": 1.0}
        build_bundle(module, folder, name=f"unet{pixels}", plan=QUICK, **described)
    return Network(f"{pixels}×{pixels}", Bundle.load(folder), module)


def tiny() -> Network:
    """28×28, one colour, 1.06 million parameters."""
    return random_unet(28, (32, 80), 1, 14)


def large() -> Network:
    """64×64, the shape of the shipped network with twice the width and a level more."""
    return random_unet(64, (64, 128, 192, 256))


class Systems:
    """Every system on one network, opened on first use.

    modes: Of torch.compile, each a system.
    only: A pattern of the names of systems that run; "" for all.

    `left_out` says why one is not there."""

    def __init__(
        self, network: Network, modes: Sequence[str] = ("default",), only: str = ""
    ) -> None:
        self.only = only
        self.network, self.bundle, self.modes = network, network.bundle, modes
        self.left_out: dict[str, str] = {}
        self._samplers: dict[str, Sampler] = {}

    def all(self, batch: int, steps: int) -> dict[str, tuple[Make, Float32]]:
        """The function that makes a batch of images, and its first batch, by the system's name.
        Systems that fail are left out.
        """
        found = {}
        for name, make in self._every(batch, steps):
            if not re.search(self.only, name):
                continue
            try:
                with torch.inference_mode():
                    pictures = make()
                    if "compile" in name:  # it has been seen to compile again on the second
                        make()
                found[name] = make, pictures
            except (
                Exception
            ) as error:  # a peer may fail in ways of its own: it is named and left out
                said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                self.left_out[name] = textwrap.shorten(
                    said.split(". ")[0].removesuffix("."), 160, placeholder=" …"
                )
                print(f"left out: {name}: {self.left_out[name]}", file=sys.stderr)
        return found

    def _every(self, batch: int, steps: int) -> Iterator[tuple[str, Make]]:
        n = self.network
        for backend, precisions in OURS.items():
            for precision in precisions:
                yield (
                    f"unnoise, {backend} {precision}",
                    lambda b=backend, p=precision: self.ours(batch, steps, b, p),
                )
                # What every batch was until there were streams.
                yield (
                    f"unnoise, {backend} {precision}, one stream",
                    lambda b=backend, p=precision: self.ours(batch, steps, b, p, 1),
                )
        yield EAGER, self.lazily(lambda: diffusers_loop(n, n.module, batch, steps))
        yield (
            "diffusers, a process per core",
            self.lazily(lambda: processes_loop(n, batch, steps)),
        )
        last = torch.channels_last
        yield (
            "diffusers, channels_last",
            self.lazily(
                lambda: diffusers_loop(
                    n, copy.deepcopy(n.module).to(memory_format=last), batch, steps, last
                )
            ),
        )
        for mode in self.modes:
            yield (
                "diffusers, torch.compile" + (f" ({mode})" if mode != "default" else ""),
                self.lazily(
                    lambda mode=mode: diffusers_loop(n, _compiled(n.module, mode), batch, steps)
                ),
            )
        yield (
            "diffusers, bf16 autocast",
            self.lazily(
                lambda: diffusers_loop(n, _learning(n.module), batch, steps, autocast=True)
            ),
        )
        yield "denoising-diffusion-pytorch", self.lazily(lambda: lucidrains(n, batch, steps))
        yield (
            "raw ONNX Runtime, fp32",
            self.lazily(lambda: raw_loop(n, raw_onnxruntime(n), batch, steps)),
        )
        yield (
            "raw ONNX Runtime, fp32, streams",
            self.lazily(lambda: raw_loop(n, raw_onnxruntime_streams(n), batch, steps)),
        )
        yield (
            "raw OpenVINO, fp32",
            self.lazily(lambda: raw_loop(n, raw_openvino(n, batch, "f32"), batch, steps)),
        )
        yield (
            "raw OpenVINO, fp32, streams",
            self.lazily(lambda: raw_loop(n, raw_openvino_streams(n, batch, "f32"), batch, steps)),
        )
        yield (
            "raw OpenVINO, bf16",
            self.lazily(lambda: raw_loop(n, raw_openvino(n, batch, "bf16"), batch, steps)),
        )

    @staticmethod
    def lazily(opened: Callable[[], Make]) -> Make:
        """Opened when first called, so that what cannot be opened fails there."""
        kept: list[Make] = []

        def make() -> Float32:
            if not kept:
                kept.append(opened())
            return kept[0]()

        return make

    def ours(
        self,
        batch: int,
        steps: int | None,
        backend: str,
        precision: str,
        streams: int | None = None,
        **how: Any,
    ) -> Float32:
        key = f"{backend} {precision} {streams}"
        if key not in self._samplers:
            self._samplers[key] = Sampler(
                self.bundle, backend, precision, max_batch=64, streams=streams
            )
        labels = self.network.labels(batch)
        how = {"solver": "ddim", "steps": steps, "grid": "trailing", "guidance": 1.0, **how}
        return self._samplers[key].sample(
            batch, 0, label=None if labels is None else labels.tolist(), **how
        )

    def expected(self, name: str, batch: int, steps: int) -> Float32:
        """The images with which a system's are compared: ours in fp32, on its grid."""
        if name == "denoising-diffusion-pytorch":
            return self.ours(batch, None, "onnxruntime", "fp32", grid=own_times(steps))
        return self.ours(batch, steps, "onnxruntime", "fp32")


def _learning(module: torch.nn.Module) -> torch.nn.Module:
    """Its parameters as training leaves them: autocast keeps what it cast of those that ask for
    gradients only, and casts others in each call."""
    return copy.deepcopy(module).requires_grad_(True)


def _compiled(module: torch.nn.Module, mode: str) -> Any:
    """Compiled for the shapes that it meets."""
    torch._dynamo.reset()
    return torch.compile(copy.deepcopy(module), dynamic=False, mode=mode)


def scheduler(bundle: Bundle, kind: str = "ddim", steps: int = 10) -> Any:
    """diffusers' scheduler for a bundle's schedule, on the grid `trailing`."""
    import diffusers

    betas = 1 - (bundle.schedule.alpha / np.concatenate([[1.0], bundle.schedule.alpha[:-1]])) ** 2
    prediction = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[bundle.prediction]
    shared = {
        "trained_betas": betas.tolist(),
        "prediction_type": prediction,
        "timestep_spacing": "trailing",
    }
    if kind == "ddim":
        made = diffusers.DDIMScheduler(**shared, clip_sample=bundle.clip is not None)
    elif kind == "ddpm":
        made = diffusers.DDPMScheduler(
            **shared, clip_sample=bundle.clip is not None, variance_type="fixed_small"
        )
    else:  # it cannot clip as we do; its thresholding is Imagen's
        made = diffusers.DPMSolverMultistepScheduler(**shared, solver_order=2)
    made.set_timesteps(steps)
    return made


def diffusers_loop(
    network: Network,
    module: Any,
    batch: int,
    steps: int,
    layout: torch.memory_format = torch.contiguous_format,
    autocast: bool = False,
    kind: str = "ddim",
) -> Make:
    """The loop of DDIMPipeline.__call__ from a given x_T, without its conversion to PIL and its
    bar: what it does for each step, no more.

    use_clipped_model_output: with clipping, the sampler of the paper, and the one whose images can
    be compared.
    """
    start = (network.start(batch), network.labels(batch))
    return _looped(network.bundle, module, *start, steps, layout, autocast, kind)


def _looped(
    bundle: Bundle,
    module: Any,
    start: Float32,
    labels: NDArray[np.int64] | None,
    steps: int,
    layout: torch.memory_format = torch.contiguous_format,
    autocast: bool = False,
    kind: str = "ddim",
) -> Make:
    batch = len(start)
    steps_of = scheduler(bundle, kind, steps)
    x_T = torch.from_numpy(start).to(memory_format=layout)
    extra = [] if labels is None else [torch.from_numpy(labels)]
    options = {"use_clipped_model_output": True} if kind == "ddim" else {}

    def make() -> Float32:
        x = x_T
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for t in steps_of.timesteps:
                F = module(x, t.float().expand(batch), *extra)
                x = steps_of.step(F.float() if autocast else F, t, x, **options).prev_sample
        if kind == "dpmpp_2m":
            steps_of.set_timesteps(steps)  # it counts its own steps
        return x.float().contiguous().numpy()

    return make


def processes_loop(network: Network, batch: int, steps: int) -> Make:
    """Eager diffusers in a process of one thread for each core, with its part of the batch."""
    cores = usable_cores()
    if batch < cores:
        raise ValueError("there are fewer samples than cores")
    labels = network.labels(batch)
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    for part in np.array_split(np.arange(batch), cores):
        ours, theirs = context.Pipe()
        own = (network.start(batch)[part], None if labels is None else labels[part])
        given = (theirs, network.bundle, network.module, *own, steps)
        context.Process(target=_part, args=given, daemon=True).start()
        pipes.append(ours)

    def make() -> Float32:
        for pipe in pipes:
            pipe.send(True)
        return np.concatenate([pipe.recv() for pipe in pipes])

    return make


def _part(
    pipe: Connection,
    bundle: Bundle,
    module: torch.nn.Module,
    start: Float32,
    labels: NDArray[np.int64] | None,
    steps: int,
) -> None:
    torch.set_num_threads(1)
    make = _looped(bundle, module, start, labels, steps)
    with contextlib.suppress(EOFError):  # the benchmark has ended
        while pipe.recv():
            pipe.send(make())


def own_times(steps: int, T: int = 1000) -> list[float]:
    """The grid of denoising-diffusion-pytorch's ddim_sample, without its end."""
    return [float(t) for t in reversed(torch.linspace(-1, T - 1, steps=steps + 1).int().tolist())][
        :-1
    ]


def denoising_diffusion_pytorch() -> Any:
    """Its module, which imports torchvision at the top to read a folder: an empty module stands for
    that while it is imported."""
    empty: Any = types.ModuleType("torchvision")
    empty.transforms = empty.utils = empty
    with mock.patch.dict(
        sys.modules, {} if importlib.util.find_spec("torchvision") else {"torchvision": empty}
    ):
        return importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")


def lucidrains(network: Network, batch: int, steps: int) -> Make:
    """GaussianDiffusion.ddim_sample, unchanged, around the same network: its draws of x_T give
    ours."""
    theirs = denoising_diffusion_pytorch()
    bundle, labels = network.bundle, network.labels(batch)
    extra = [] if labels is None else [torch.from_numpy(labels)]

    class Asked(torch.nn.Module):
        channels = out_dim = bundle.sample_shape[0]
        self_condition = random_or_learned_sinusoidal_cond = False

        def __init__(self) -> None:
            super().__init__()
            self.network = network.module

        def forward(
            self, x: torch.Tensor, t: torch.Tensor, x_self_cond: Any = None
        ) -> torch.Tensor:
            return self.network(x, t.float(), *extra)

    own = theirs.GaussianDiffusion(
        Asked(),
        image_size=bundle.sample_shape[-1],
        sampling_timesteps=steps,
        objective={"v": "pred_v", "epsilon": "pred_noise", "x0": "pred_x0"}[bundle.prediction],
        beta_schedule={"cosine": "cosine", "linear_raw": "linear", "linear": "linear"}[
            bundle.schedule.name
        ],
        auto_normalize=False,
    ).eval()
    x_T = torch.from_numpy(network.start(batch))
    theirs.tqdm = lambda items, **_: items  # no bar, as everywhere here

    def make() -> Float32:
        with mock.patch.object(torch, "randn", return_value=x_T), torch.inference_mode():
            return own.sample(batch).numpy()

    return make


def network_onnx(network: Network) -> Path:
    """The network alone as torch.onnx.export writes it, which is what one has without us. Kept by
    the weights' hash."""
    digest = hashlib.sha256()
    for p in network.module.parameters():
        digest.update(p.numpy().tobytes())
    logging.getLogger("torch.onnx").setLevel(
        logging.ERROR
    )  # it warns of torchvision, which is not there
    path = WORK / f"network-{digest.hexdigest()[:12]}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = [] if network.labels(2) is None else [torch.zeros(2, dtype=torch.int64)]
        arguments = (torch.zeros(2, *network.bundle.sample_shape), torch.zeros(2), *labels)
        names = ["x", "time", "label"][: len(arguments)]
        dims = tuple({0: torch.export.Dim("batch", max=4096)} for _ in arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own dependencies' deprecations
            program = torch.onnx.export(
                network.module,
                arguments,
                dynamo=True,
                input_names=names,
                dynamic_shapes=dims,
                verbose=False,
            )
        assert program is not None
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            program.save(f"{folder}/network.onnx", external_data=False)
            Path(folder, "network.onnx").replace(path)
    return path


Raw = Callable[[Mapping[str, Any]], Float32]


def raw_onnxruntime(network: Network) -> Raw:
    session = ort.InferenceSession(str(network_onnx(network)), providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)[0]


def raw_openvino(network: Network, batch: int, precision: str) -> Raw:
    """Compiled for the batch's shape and for latency, its best setting for one caller."""
    import openvino

    core = openvino.Core()
    model = core.read_model(network_onnx(network))
    model.reshape({i.any_name: [batch, *list(i.partial_shape)[1:]] for i in model.inputs})
    compiled = core.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    )
    request = compiled.create_infer_request()
    return lambda feeds: request.infer(feeds, share_inputs=True, share_outputs=True)[0]


def raw_onnxruntime_streams(network: Network) -> Raw:
    """A part of the batch for each core, in a session of one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    path = str(network_onnx(network))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    cores = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(cores)

    def run(feeds: Mapping[str, Any]) -> Float32:
        parts = min(cores, len(feeds["x"]))
        cut = {name: np.array_split(value, parts) for name, value in feeds.items()}
        each = [{name: value[i] for name, value in cut.items()} for i in range(parts)]
        return np.concatenate([*pool.map(lambda part: session.run(None, part)[0], each)])

    return run


def raw_openvino_streams(network: Network, batch: int, precision: str) -> Raw:
    """As many requests as cores, in one model that is compiled for throughput."""
    import openvino

    cores = len(os.sched_getaffinity(0))
    parts = max(p for p in range(1, cores + 1) if batch % p == 0)
    core = openvino.Core()
    model = core.read_model(network_onnx(network))
    model.reshape({i.any_name: [batch // parts, *list(i.partial_shape)[1:]] for i in model.inputs})
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "THROUGHPUT"}
    compiled = core.compile_model(model, "CPU", {**settings, "NUM_STREAMS": parts})
    requests = [compiled.create_infer_request() for _ in range(parts)]

    def run(feeds: Mapping[str, Any]) -> Float32:
        cut = {name: np.array_split(value, parts) for name, value in feeds.items()}
        for i, request in enumerate(requests):
            request.start_async({name: value[i] for name, value in cut.items()}, share_inputs=True)
        found = []
        for request in requests:
            request.wait()
            found.append(request.get_output_tensor().data.copy())
        return np.concatenate(found)

    return run


def raw_loop(network: Network, run: Raw, batch: int, steps: int) -> Make:
    """DDIM in numpy around a network, as one writes it in twenty lines."""
    bundle, labels = network.bundle, network.labels(batch)
    x_T, T, clip = network.start(batch), len(bundle.schedule), bundle.clip
    alpha, sigma = (
        np.float32(np.append(v, end))
        for v, end in ((bundle.schedule.alpha, 1), (bundle.schedule.sigma, 0))
    )
    knots = [round(T - i * T / steps) - 1 for i in range(steps)] + [T]  # index T: the clean end
    fixed = {} if labels is None else {"label": labels}

    def make() -> Float32:
        x = x_T
        for k, after in itertools.pairwise(knots):
            F = run({"x": x, "time": np.full(batch, k, np.float32), **fixed})
            D = (
                alpha[k] * x - sigma[k] * F
                if bundle.prediction == "v"
                else (x - sigma[k] * F) / alpha[k]
            )
            D = np.clip(D, -clip, clip) if clip else D
            eps = (x - alpha[k] * D) / sigma[k]
            x = alpha[after] * D + sigma[after] * eps
        return x

    return make
