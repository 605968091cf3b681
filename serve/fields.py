"""What requests may say: one table for each endpoint. The checks and /openapi.json read these."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.bundle.rules import MAX_RANK
from runtime.diffusion.grid import GRIDS
from runtime.diffusion.noise import MAX_SEED
from runtime.diffusion.solvers import SOLVERS
from runtime.diffusion.tuned import TUNED

from .conditions import CONDITIONS, CONVERT
from .schema import (
    Field,
    Kind,
    array,
    choice,
    either,
    flag,
    integer,
    many,
    named,
    number,
    optional,
    record,
    scalar,
    text,
)

IMAGE_FORMATS = ("png", "webp")
FORMATS = (*IMAGE_FORMATS, "npy", "json")
"""Formats of a response."""
ANIMATION_FORMATS = (*IMAGE_FORMATS, "gif")
"""Formats of an animation as an image; PNG and WebP are lossless."""
MOST_SAMPLES = 10_000
MOST_ENTRIES = 10_000_000
"""Numbers of a condition of all samples; the size of the body bounds them further."""
"""Entries of a list in a request; the settings may allow fewer samples."""
MOST_TIMES = 10_000
MOST_URL_TIMES = 1000
"""Times of a grid in a URL, of which the server reads 64 KiB."""
SOLVER_NAMES = (*SOLVERS, TUNED)
LABEL = either(integer(0, 10**6), text())
SCALE = number(-1e3, 1e3)


def _each(kind: Kind) -> Kind:
    """One value for all samples, or a list of one a sample."""
    return either(kind, many(optional(kind), 1, MOST_SAMPLES))


def _grid(most: int) -> Field:
    """The grid of a sample, of at most so many times."""
    kind = either(text(), many(number(-1e9, 1e9), 1, most))
    return Field("grid", kind, f"A grid ({', '.join(GRIDS)}), or its falling times.")


MODEL = Field("model", text(), "The name of a model. Needed if the service has several.")
SEED = Field(
    "seed",
    either(integer(0, MAX_SEED), many(integer(0, MAX_SEED), 1, MOST_SAMPLES)),
    "Sample i has seed + i, or the i-th of a list.",
    default=0,
)
LABELS = Field("label", _each(LABEL), "The name or number of a label, or a list of one a sample.")
GUIDANCE = Field("guidance", _each(SCALE), "The scale of classifier-free guidance; 1 is none.")
ONE_LABEL = Field("label", LABEL, "The name or number of a label.")
ONE_GUIDANCE = Field("guidance", SCALE, GUIDANCE.doc)
SOLVING: tuple[Field, ...] = (
    Field(
        "guidance_interval",
        many(number(0, 1e9), 2, 2),
        "Guide only where sigma/alpha is above the first number and at most the second.",
    ),
    Field("solver", choice(*SOLVER_NAMES), "The name of a solver."),
    Field("steps", integer(1, 10_000), "The number of grid intervals."),
    _grid(MOST_TIMES),
    Field(
        "options",
        named(scalar(), 20),
        "The solver's own options, by name.",
    ),
)
"""How a sample is made."""
SOLVING_NAMES = tuple(entry.name for entry in SOLVING)
DEADLINE = Field(
    "deadline",
    number(0, 1e6),
    "Seconds in which the result is needed. If the service cannot keep it, it says so at once.",
)


def _format(*names: str) -> Field:
    text = "Of the response; without it the Accept header decides, and then png."
    return Field("format", choice(*names), text)


OUTPUT: tuple[Field, ...] = (
    _format(*FORMATS),
    Field("columns", integer(1, MOST_SAMPLES), "Images in a row of the sheet."),
    DEADLINE,
    Field("stream", flag(), "Respond with an event stream that has previews.", default=False),
    Field("every", integer(1, 10_000), "Send a preview after every so many steps.", default=1),
)
"""How the result is returned."""
SAMPLES: tuple[Field, ...] = (
    MODEL,
    Field("n", integer(1, MOST_SAMPLES), "The number of samples.", default=1),
    SEED,
    LABELS,
    CONDITIONS,
    CONVERT,
    GUIDANCE,
    *SOLVING,
    Field("start", array(), "x [n, *S] at the level where the grid begins, instead of noise."),
    Field("strength", number(0, 1), "The share of the grid that is used, if `start` is given."),
    *OUTPUT,
)
"""POST /v1/samples."""
ONE_SAMPLE: tuple[Field, ...] = (
    MODEL,
    Field("seed", integer(0, MAX_SEED), "The seed.", default=0),
    ONE_LABEL,
    ONE_GUIDANCE,
    *(_grid(MOST_URL_TIMES) if entry.name == "grid" else entry for entry in SOLVING),
    OUTPUT[0],
    DEADLINE,
)
"""GET /v1/samples. A solver's options are options.NAME there."""

_INVERTING = (*SOLVING, GUIDANCE)
_ONE_EACH = (ONE_LABEL, *SOLVING, ONE_GUIDANCE)
_COUNT = Field("n", integer(1, MOST_SAMPLES), "The number of samples.", default=8)
EDITS: dict[str, tuple[Field, ...]] = {
    "stylize": (
        Field("strength", number(0, 1), "From one step, 0, to an image forgotten, 1.", 0.5),
        SEED,
        LABELS,
        *_INVERTING,
    ),
    "invert": (
        Field("strength", number(0, 1), "How far up the grid, 1 is all the way to noise."),
        LABELS,
        *_INVERTING,
    ),
    "translate": (
        Field("source", _each(LABEL), "What the image is: a label.", required=True),
        Field("target", _each(LABEL), "What it becomes: a label.", required=True),
        Field("strength", number(0, 1), "How far up the grid; more is more of the target.", 0.4),
        *_INVERTING,
    ),
    "inpaint": (SEED, LABELS, *_INVERTING),
    "interpolate": (
        Field("first", integer(0, MAX_SEED), "A seed to start at, if `image` is not sent."),
        Field("last", integer(0, MAX_SEED), "A seed to end at, if `image2` is not sent."),
        Field("n", integer(2, MOST_SAMPLES), "The number of samples.", default=8),
        *_ONE_EACH,
    ),
    "variations": (
        _COUNT,
        Field("amount", number(0, 1), "From the image itself, 0, to other samples, 1.", 0.3),
        Field("seed", integer(0, MAX_SEED), "Variation i turns toward seed + i.", default=0),
        *_ONE_EACH,
    ),
    "animate": (
        Field("n", integer(1, MOST_SAMPLES), "The number of samples.", default=1),
        SEED,
        LABELS,
        *_INVERTING,
    ),
}
"""POST /v1/edits/{verb}: `params`, alongside MODEL, CONVERT and OUTPUT."""


EDIT_PARTS: dict[str, dict[str, bool]] = {
    "stylize": {"image": True},
    "invert": {"image": True},
    "translate": {"image": True},
    "inpaint": {"image": True, "mask": True},
    "interpolate": {"image": False, "image2": False},
    "variations": {"image": True},
    "animate": {"image": False},
}
"""The files of each verb, and whether it needs them."""


def edit_fields(verb: str) -> Sequence[Field]:
    """The fields of `params` for a verb."""
    return (MODEL, *EDITS[verb], CONDITIONS, CONVERT, _format(*formats_of(verb)), *OUTPUT[1:])


def formats_of(verb: str) -> Sequence[str]:
    """The formats of a verb's response."""
    return (*FORMATS, "gif") if verb == "animate" else FORMATS


def result_fields(animated: bool) -> Sequence[Field]:
    """The query of GET /v1/jobs/{id}/result."""
    return (_format(*formats_of("animate" if animated else "stylize")),)


IGNORED = ("background", "complexity", "input_fidelity", "moderation", "output_compression")
IGNORED += ("quality", "safety_identifier", "style", "user")
"""Fields of OpenAI's API that are accepted and change nothing."""
_PLAIN = either(text(1000), number(-1e9, 1e9), flag())
OPENAI: tuple[Field, ...] = (
    Field("prompt", text(1000), "A label's name or number; empty for none.", required=True),
    MODEL,
    Field("n", integer(1, 10), "The number of images.", default=1),
    Field("size", text(20), '"auto", or the size of the model\'s images, such as "32x32".'),
    Field("response_format", choice("b64_json", "url"), "url is for generations only."),
    Field("output_format", choice("png", "webp", "jpeg"), "Of the images.", default="png"),
    Field("stream", flag(), "Respond with events.", default=False),
    Field("partial_images", integer(0, 3), "Previews of each image in a stream.", default=0),
    Field("seed", integer(0, MAX_SEED), "Image i has seed + i. Random if it is left out."),
    ONE_GUIDANCE,
    *SOLVING,
    DEADLINE,
    *(Field(name, _PLAIN, "Ignored.") for name in IGNORED),
)
"""POST /v1/images/generations."""
OPENAI_EDITS = (
    *OPENAI,
    Field("strength", number(0, 1), "How much of the image is forgotten, without a mask.", 0.5),
)
"""POST /v1/images/edits, as the texts of a multipart body."""
OPENAI_PARTS = {"image": True, "mask": False}
"""The files of POST /v1/images/edits."""
TENSOR: tuple[Field, ...] = (
    Field("name", text(), "seed, label, guidance or condition_NAME.", required=True),
    Field("datatype", text(20), "INT64, FP32 or BYTES.", required=True),
    Field(
        "shape",
        many(integer(0, MOST_SAMPLES), 1, 1 + MAX_RANK),
        "[n], or [n, …] of a condition.",
        required=True,
    ),
    Field("data", many(scalar(), 1, MOST_ENTRIES), "The entries, row by row.", required=True),
    Field("parameters", named(scalar(), 20), "Ignored."),
)
"""An input of POST /v2/models/{model}/infer."""
INFER: tuple[Field, ...] = (
    Field("id", text(), "Returned as it is."),
    Field("inputs", many(record(TENSOR), 1, 10), "Tensors.", required=True),
    Field(
        "outputs",
        many(
            record(
                (
                    Field("name", text(), "sample or image.", required=True),
                    Field("parameters", named(scalar(), 20), "Ignored."),
                )
            ),
            0,
            10,
        ),
        "Those that are wanted; sample if none is named.",
    ),
    Field("parameters", record((*SOLVING, DEADLINE)), "How the samples are made."),
)
"""POST /v2/models/{model}/infer."""
