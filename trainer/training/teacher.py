"""The teacher of a distilled run: the network that it learns from, and its samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.bundle.bundle import MANIFEST, Bundle
from runtime.bundle.conditions import Condition
from runtime.bundle.shipped import named_folder
from runtime.diffusion.arrays import Float32, Float64
from runtime.diffusion.noise import noises
from runtime.diffusion.program import Program, R, advance, denoise
from runtime.diffusion.schedule import Schedule
from runtime.diffusion.solvers import make_program
from runtime.diffusion.tuned import TUNED
from runtime.errors import RequestError

from ..config import Config
from ..config.distillation import Distillation, wanted_knots
from ..errors import CheckpointError
from ..networks.cost import make_network
from ..objectives.objective import Network
from ..randomness import TRAJECTORY_START
from ..runs import checkpoint as checkpoints
from ..runs.folder import read_run
from ..runs.weights import fitting, start_of


@dataclass(frozen=True)
class Origin:
    """A run or a bundle that can be a teacher.

    Attributes:
        config: That which it was trained with.
        bundle: None for a run.
        can_guide: Whether it was trained without a label or conditions, too.
        guidance: The scale that it is sampled with by default.
    """

    config: Config
    bundle: Bundle | None
    can_guide: bool
    guidance: float

    @classmethod
    def of(cls, place: Path) -> Origin:
        """Read what a run or a bundle says of itself.

        Args:
            place: Its folder, or the name of a shipped bundle.

        Raises:
            CheckpointError: It is neither, or a bundle that was not made from a run.
            RequestError: It is a student itself.
        """
        folder = named_folder(place)
        if (folder / MANIFEST).is_file():
            bundle = Bundle.load(folder)
            record = bundle.provenance.get("config")
            if not isinstance(record, dict):
                raise CheckpointError(
                    f"{folder} did not come from a run of trainer.fit, so its network cannot be "
                    "trained on. Distil a run, or a bundle made from one."
                )
            found = cls(
                Config.from_json(record), bundle, bundle.can_guide, bundle.defaults.guidance
            )
        else:
            config, rest = read_run(folder)
            can_guide = config.label_dropout > 0 and bool(rest["classes"])
            can_guide |= config.condition_dropout > 0 and config.conditioned
            found = cls(config, None, can_guide, 1.0)
        if found.config.distillation:
            raise RequestError(f"{place} is distilled itself. Distil the network it came from.")
        return found

    def program(self, wanted: Distillation) -> Program:
        """Return the program that the teacher samples with.

        Raises:
            RequestError: It has no such solver, or its null label was not trained.
        """
        if wanted.guidance != 1 and not self.can_guide:
            raise RequestError(
                f"guidance {wanted.guidance:g} cannot be built in: the teacher was not trained "
                "without a label or conditions. Use --guidance 1."
            )
        program = self._program(wanted)
        if wanted.method == "endpoint" and program.noisy.any():
            raise RequestError(
                f"solver {wanted.solver!r} adds noise on the way, so no point of a path says where "
                "it ends. Use --solver dpmpp_2m, unipc, ddim or another one without noise."
            )
        return program

    def _program(self, wanted: Distillation) -> Program:
        if self.bundle:
            return self.bundle.program(wanted.solver, wanted.solver_steps, guidance=wanted.guidance)
        if wanted.solver == TUNED:
            raise RequestError(
                f"solver {TUNED!r} belongs to a bundle, and the teacher is a run. Use another "
                "--solver."
            )
        config = self.config
        return make_program(
            config.make_schedule(),
            config.prediction,
            wanted.solver,
            wanted.solver_steps,
            clip=1.0,
            guidance=wanted.guidance,
        )


def levels_of(program: Program, config: Config, calls: tuple[int, ...]) -> tuple[int, ...]:
    """Return the knots nearest to the rows of a program that a student is called at.

    These are the rows nearest to the grid `trailing` of each number of calls.

    Raises:
        RequestError: Two of its levels fall on one row.
    """
    wanted = wanted_knots(calls, config.T)
    schedule = config.make_schedule()
    found = rows_of(program, schedule, wanted)
    if len(set(found)) < len(found):
        raise RequestError(
            f"{len(program)} calls of the teacher by {program.solver!r} are too few to learn "
            f"{len(wanted)} levels from. Use more --solver-steps, another --solver, or other "
            "--calls."
        )
    knots = _angle(schedule.alpha, schedule.sigma)
    rows = _angle(*program.level.T)
    return tuple(int(np.abs(knots - rows[row]).argmin()) for row in found)


def rows_of(program: Program, schedule: Schedule, knots: Sequence[int]) -> list[int]:
    """Return the row of a program that is nearest to each of the knots."""
    rows = _angle(*program.level.T)
    at = _angle(schedule.alpha, schedule.sigma)
    # Of rows at one level the last: the ones before may be predictions that it corrects.
    return [len(rows) - 1 - int(np.abs(rows[::-1] - at[knot]).argmin()) for knot in knots]


def _angle(alpha: Float64, sigma: Float64) -> Float64:
    """Return noise levels as angles, which are finite at pure noise too."""
    return np.arctan2(sigma, alpha)


class Teacher:
    """The network that a student learns from, frozen.

    Attributes:
        module: In evaluation mode, on the run's device.
        sha256: Of its weights.
        program: How it samples.
        null_label: The number of the label that guidance contrasts with; None keeps the label.
        nulls: The values of conditions that guidance contrasts with, by name, [*shape] each.
    """

    def __init__(
        self,
        config: Config,
        sample_shape: tuple[int, int, int],
        classes: Sequence[str],
        device: torch.device,
        conditions: Sequence[Condition] = (),
    ) -> None:
        """Read the teacher that `config.start_from` names; it has the network of its own config.

        Raises:
            CheckpointError: There is none, or it is not the network that its config says.
        """
        assert config.distillation is not None
        place = Path(config.start_from)
        self.config = config
        self.sample_shape = sample_shape
        self.device = device
        origin = Origin.of(place)
        self.program = origin.program(config.distillation)
        # Only what the teacher was trained without; the student is never.
        without = origin.config
        self.null_label = len(classes) if without.label_dropout else None
        dropped = conditions if without.condition_dropout else ()
        self.nulls = {c.name: np.zeros(c.shape, np.float32) for c in dropped}
        levels = config.distillation.levels
        self._rows = rows_of(self.program, config.make_schedule(), levels)
        other = start_of(place)
        if other.classes != tuple(classes):
            raise CheckpointError(
                f"{place} has other classes than the data: a student learns those of its teacher."
            )
        self.module = make_network(origin.config, sample_shape, len(classes), conditions)
        taken = fitting(other.weights, dict(self.module.named_parameters()), place)
        self.sha256 = hashlib.sha256(checkpoints.to_bytes(taken)).hexdigest()
        self.module.load_state_dict(taken, strict=False)
        self.module.to(device).eval().requires_grad_(False)
        if config.channels_last:
            self.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def guided(self, network: Network) -> Network:
        """Return a network with the guidance that is built in: F_c + (g - 1)(F_c - F_u).

        See Ho & Salimans 2022, eq. 6.
        """
        assert self.config.distillation is not None
        guidance = self.config.distillation.guidance
        if guidance == 1:
            return network

        def call(x: Tensor, time: Tensor, label: Tensor, **given: Tensor) -> Tensor:
            F = network(x, time, label, **given)
            null = label if self.null_label is None else torch.full_like(label, self.null_label)
            # What is dropped in training is 0.
            without = {k: torch.zeros_like(v) if k in self.nulls else v for k, v in given.items()}
            return F + (guidance - 1) * (F - network(x, time, null, **without))

        return call

    @torch.no_grad()
    def paths(
        self,
        seeds: Sequence[int],
        label: NDArray[np.int64],
        conditions: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float16]:
        """Sample, and return where each path ends and the noise that leads there.

        Args:
            seeds: [n], of the samples.
            label: [n].
            conditions: [n, …] each, by name.

        Returns:
            [n, 1 + L, C, H, W]: the end x_0; and for each level of the student, noisiest first,
            eps with x_t = alpha_t · x_0 + sigma_t · eps, x_t the path's point there.
        """
        program = self.program
        start = noises(seeds, TRAJECTORY_START, 0, self.sample_shape)
        state = np.zeros((len(seeds), R, *self.sample_shape), np.float32)
        state[:, 0] = start * np.float32(program.start)
        points: list[Float32] = []
        for k in range(len(program)):
            points.append(state[:, 0].copy())
            x = state[:, 0]
            D = denoise(
                program.call[k], self._network, x, label, self.null_label, conditions, self.nulls
            )
            state = advance(program.update[k], state, D)
        end = state[:, 0]
        found = [end]
        for row in self._rows:
            alpha, sigma = program.level[row].astype(np.float32)
            found.append((points[row] - alpha * end) / sigma)
        return np.stack(found, axis=1).astype(np.float16)

    def _network(
        self, x: Float32, time: Float32, label: NDArray[np.int64], **given: Float32
    ) -> Float32:
        inputs = (torch.from_numpy(array).to(self.device) for array in (x, time, label))
        # Copied: null values are broadcast, which PyTorch cannot share.
        named = {name: torch.tensor(value, device=self.device) for name, value in given.items()}
        return self.module(*inputs, **named).float().cpu().numpy()
