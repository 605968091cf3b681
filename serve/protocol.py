"""The Open Inference Protocol (KServe's v2), in JSON.

Inputs of a model: `seed` INT64 [n], and optionally `label` INT64 or BYTES [n], below 0 for the null
label, and `guidance` FP32 [n]. A model with conditions needs `condition_NAME` [n, …] of each.
Parameters: solver, steps, grid, guidance_interval, options, deadline; a list or an object may be
its JSON. Outputs: `sample` FP32 [n, *S], and if it is asked for `image` UINT8 [n, H, W, C].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from runtime.bundle.conditions import PREFIX
from runtime.diffusion.arrays import Array
from runtime.engine.tensors import KINDS, label_of, setting_of
from runtime.errors import RequestError
from runtime.errors.arguments import choice, integer
from runtime.images import to_uint8

from .bodies import read_json
from .events import accepted, unless_gone
from .fields import INFER
from .models import Model, version
from .pictures import Float32
from .problems import Problem, to_bytes
from .samples import requests_of
from .schema import check_all
from .service import flow_of, note_facts, service_of

INPUTS = {"seed": ("INT64",), "label": ("INT64", "BYTES"), "guidance": ("FP32",)}
"""The data types that each input may have."""
WHOLE = ("INT64",)
Tensor = Mapping[str, object]
"""A tensor of a body that `INFER` has checked."""


async def server(request: Request) -> Response:
    """Name the server."""
    return JSONResponse({"name": "unnoise", "version": version(), "extensions": []})


async def live(request: Request) -> Response:
    """Whether the event loop answers."""
    return JSONResponse({"live": True})


async def ready(request: Request) -> Response:
    """Whether the service can take work."""
    reason = service_of(request).unready()
    if reason:
        raise Problem(503, reason, 2.0)
    return JSONResponse({"ready": True})


async def model(request: Request) -> Response:
    """Describe a model's tensors."""
    found = _model(request)
    label = {"name": "label", "datatype": "INT64", "shape": [-1]}
    guidance = {"name": "guidance", "datatype": "FP32", "shape": [-1]}
    inputs = [{"name": "seed", "datatype": "INT64", "shape": [-1]}]
    inputs += [label] if found.bundle.labels else []
    inputs += [guidance] if found.bundle.can_guide else []
    for condition in found.bundle.conditions:
        inputs.append(_tensor(condition.port, KINDS[condition.dtype], [-1, *condition.shape]))
    outputs = [_tensor("sample", "FP32", [-1, *found.bundle.sample_shape])]
    if found.shows_images:
        outputs.append(_tensor("image", "UINT8", [-1, *_image_shape(found)]))
    return JSONResponse(
        {
            "name": found.name,
            "versions": ["1"],
            "platform": f"unnoise_{found.sampler.backend.name}",
            "inputs": inputs,
            "outputs": outputs,
        }
    )


async def model_ready(request: Request) -> Response:
    """Whether a model can take work."""
    found = _model(request)
    reason = found.unready(service_of(request).settings.hung_s)
    if reason:
        raise Problem(503, reason, 2.0)
    return JSONResponse({"name": found.name, "ready": True})


async def infer(request: Request) -> Response:
    """Make samples of input tensors."""
    service = service_of(request)
    service.check_accepting()
    found = _model(request)
    body = check_all("the body", INFER, _read(await read_json(request, service.settings)))
    tensors = cast("Sequence[Tensor]", body["inputs"])
    most = service.settings.samples
    inputs = _inputs([t for t in tensors if not _is_condition(t)], most)
    if "seed" not in inputs:
        raise RequestError("an inference needs the input `seed`, INT64 [n].")
    conditions = _conditions(found, tensors, len(inputs["seed"]))
    given = cast("Mapping[str, object]", body.get("parameters", {}))
    seeds = inputs.pop("seed")
    wanted = _outputs(found, cast("Sequence[Tensor]", body.get("outputs", [])))
    requests = requests_of(found, len(seeds), seeds, {**given, **inputs}, conditions)
    work = await service.runs.plan(found, requests)
    deadline = cast("float | None", given.get("deadline"))
    run = service.runs.start(work, flow_of(request), deadline)
    await accepted(request.receive, run)
    try:
        samples = await unless_gone(request.receive, run.result())
        timing = note_facts(request, run)
    finally:
        run.leave()
    name = cast("str | None", body.get("id"))
    data = await service.encode(_response, found, samples, wanted, name)
    return Response(data, headers=timing, media_type="application/json")


def _read(body: object) -> object:
    """Return a body whose parameters are read as Triton's are. Raises RequestError."""
    given = body.get("parameters") if isinstance(body, Mapping) else None
    if not isinstance(body, Mapping) or not isinstance(given, Mapping):
        return body
    return {**body, "parameters": {name: setting_of(name, v) for name, v in given.items()}}


def _model(request: Request) -> Model:
    """The model of the path. Raises Problem (404) if there is none."""
    try:
        return service_of(request).models.get(request.path_params["model"])
    except RequestError as error:
        raise Problem(404, str(error)) from None


def _inputs(tensors: Sequence[Tensor], most: int) -> dict[str, list[object]]:
    """The entries of the input tensors by name. Raises RequestError."""
    found: dict[str, list[object]] = {}
    for tensor in tensors:
        name = choice("name", tensor["name"], INPUTS)
        kind = choice("datatype", tensor["datatype"], INPUTS[name])
        shape = cast("list[int]", tensor["shape"])
        data = cast("list[object]", tensor["data"])
        if name in found:
            raise RequestError(f"the input `{name}` is given twice. Give it once.")
        # Triton's clients send [n, 1], too.
        if len(shape) not in (1, 2) or shape[1:] not in ([], [1]) or shape[0] != len(data):
            raise RequestError(f"`{name}` must have shape [n] and n entries, got {shape}.")
        integer("n", len(data), 1, most)
        found[name] = [_entry(name, kind, entry) for entry in data]
        if name == "label":
            found[name] = [label_of(entry) for entry in found[name]]
    return found


def _is_condition(tensor: Tensor) -> bool:
    return str(tensor["name"]).startswith(PREFIX)


def _conditions(model: Model, tensors: Sequence[Tensor], count: int) -> dict[str, Array]:
    """The conditions [count, …] among the input tensors, by name. Raises RequestError."""
    known = {condition.port: condition for condition in model.bundle.conditions}
    found: dict[str, Array] = {}
    for tensor in filter(_is_condition, tensors):
        name = choice("name", tensor["name"], known, "input")
        condition = known[name]
        kind = choice("datatype", tensor["datatype"], (KINDS[condition.dtype],))
        shape = cast("list[int]", tensor["shape"])
        data = cast("list[object]", tensor["data"])
        if condition.name in found:
            raise RequestError(f"the input `{name}` is given twice. Give it once.")
        wanted = [count, *condition.shape]
        if shape != wanted or len(data) != math.prod(shape):
            raise RequestError(
                f"`{name}` must have shape {wanted}, as many as `seed`, and its entries row by "
                f"row, got {shape} and {len(data)} entries."
            )
        entries = [_entry(name, kind, entry) for entry in data]
        try:
            found[condition.name] = np.array(entries, condition.kind).reshape(shape)
        except OverflowError:
            raise RequestError(
                f"the data of `{name}` must be {kind}, and a number of it is too large."
            ) from None
    return found


def _entry(name: str, kind: str, value: object) -> object:
    # In Python True is a number.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = isinstance(value, str) if kind == "BYTES" else is_number
    if not fits or (kind in WHOLE and not isinstance(value, int)):
        raise RequestError(f"the data of `{name}` must be {kind}, got {str(value)[:60]!r}.")
    return value


def _outputs(model: Model, tensors: Sequence[Tensor]) -> list[str]:
    """The names of the outputs that are wanted. Raises RequestError."""
    known = ["sample", "image"] if model.shows_images else ["sample"]
    names = [choice("name", tensor["name"], known) for tensor in tensors]
    return names or ["sample"]


def _response(model: Model, samples: Float32, wanted: Sequence[str], name: str | None) -> bytes:
    """The body of a response. samples: [n, *S]."""
    outputs: list[dict[str, object]] = []
    for output in dict.fromkeys(wanted):
        array: NDArray[np.generic] = samples
        kind = "FP32"
        if output == "image":
            array = to_uint8(samples, *model.bundle.sample_range)
            kind = "UINT8"
        tensor = _tensor(output, kind, list(array.shape))
        outputs.append({**tensor, "data": array.ravel().tolist()})
    found = {"model_name": model.name, "model_version": "1", "outputs": outputs}
    return to_bytes(found if name is None else {**found, "id": name})


def _tensor(name: str, kind: str, shape: list[int]) -> dict[str, object]:
    return {"name": name, "datatype": kind, "shape": shape}


def _image_shape(model: Model) -> list[int]:
    channels, height, width = model.bundle.sample_shape
    return [height, width, channels]
