"""The engine as a Python model of Triton Inference Server, which `export.triton` writes.

Triton calls the three methods of `TritonPythonModel`. `execute` returns at once, and a response is
sent when its ticket is final. So all requests share batches at every step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from runtime.engine.admission import Limits
from runtime.engine.request import Request
from runtime.engine.service import Engine
from runtime.engine.stats import TickReport
from runtime.engine.tensors import label_of, setting_of
from runtime.engine.ticket import Ticket
from runtime.errors import ClosedError, Overloaded, RequestError
from runtime.errors.keywords import check_options
from runtime.images import Float32, to_uint8
from runtime.sampler import Sampler

PARAMETERS = ("solver", "steps", "grid", "guidance_interval", "options")
"""The parameters of a request, besides its tensors."""
LIMITS = Limits(samples=4096, rows=1_000_000, seconds=600.0, flow_share=1.0)
"""Triton does not name its users, so they are one flow."""


class Tensor(Protocol):
    """A tensor of Triton, which numpy reads by DLPack."""


class Sender(Protocol):
    """What sends the responses of a request."""

    def send(self, response: object = None, flags: int = 0) -> None: ...

    def is_cancelled(self) -> bool: ...


class Asked(Protocol):
    """A request of Triton."""

    def get_response_sender(self) -> Sender: ...

    def requested_output_names(self) -> Sequence[str]: ...

    def parameters(self) -> str: ...


class Library(Protocol):
    """The module that Triton's stub offers."""

    Tensor: type
    InferenceResponse: type
    TritonError: type
    TRITONSERVER_RESPONSE_COMPLETE_FINAL: int

    def get_input_tensor_by_name(self, request: Asked, name: str) -> Tensor | None:
        """Return an input of any shape."""
        ...


class TritonPythonModel:
    """A bundle with its engine."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle in the version's folder, with the settings of config.pbtxt."""
        config = json.loads(args["model_config"])
        settings = {
            name: entry["string_value"] for name, entry in config.get("parameters", {}).items()
        }
        version = Path(args["model_repository"]) / args["model_version"]
        self._library = cast(Library, import_module("triton_python_backend_utils"))
        threads = settings.get("threads", "")
        self._sampler = Sampler.load(
            version / "bundle",
            settings.get("backend", "auto"),
            settings.get("precision", "auto"),
            int(threads) if threads else None,
        )
        self._live: dict[int, tuple[Sender, Ticket]] = {}
        self._engine = Engine(self._sampler, LIMITS, on_tick=self._look)

    def execute(self, requests: Sequence[Asked]) -> None:
        """Submit requests. Their responses follow."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                outputs = list(request.requested_output_names())
                ticket = self._engine.submit(self._requests(request))
            except Exception as error:  # one request may not fail, or hang, the others
                self._fail(sender, error)
                continue
            self._live[ticket.id] = sender, ticket
            ticket.add_done_callback(lambda t, s=sender, o=outputs: self._respond(t, s, o))

    def finalize(self) -> None:
        """Stop the engine; what is left fails."""
        self._engine.close()
        self._sampler.close()

    def _look(self, _: TickReport) -> None:
        """Cancel the work of clients that have left; after every tick."""
        for sender, ticket in list(self._live.values()):
            if sender.is_cancelled():
                ticket.cancel()

    def _requests(self, request: Asked) -> list[Request]:
        """Return one request a sample. Raises RequestError."""
        seeds = self._input(request, "seed")
        if not seeds:
            raise RequestError("an inference needs the input `seed`, INT64 [n].")
        count = len(seeds)
        labels = [label_of(label) for label in self._input(request, "label")] or [None] * count
        scales: list[float | None] = [*self._input(request, "guidance")] or [None] * count
        if {len(labels), len(scales)} != {count}:
            raise RequestError(f"`label` and `guidance` must have {count} entries, as `seed` has.")
        conditions = self._conditions(request, count)
        given = json.loads(request.parameters() or "{}")
        check_options("the parameters", given, PARAMETERS)
        settings = {name: setting_of(name, value) for name, value in given.items()}
        found: list[Request] = []
        for i, (seed, label, scale) in enumerate(zip(seeds, labels, scales, strict=True)):
            fields = {"seed": seed, "label": label, "guidance": scale, **settings}
            own = {name: values[i] for name, values in conditions.items()}
            found.append(replace(Request.from_json(fields), conditions=own))
        return found

    def _conditions(self, request: Asked, count: int) -> dict[str, NDArray[Any]]:
        """Return the conditions [n, *shape] that a request has, by name. Raises RequestError."""
        found: dict[str, NDArray[Any]] = {}
        for condition in self._sampler.bundle.conditions:
            values = self._array(request, condition.port)
            if values is None:
                continue
            if len(values) != count:
                raise RequestError(f"`{condition.port}` must have {count} entries, as `seed` has.")
            # Triton's memory is its own again once the request has been answered.
            found[condition.name] = values.copy()
        return found

    def _input(self, request: Asked, name: str) -> list[float]:
        """Return the entries of an input tensor [n] or [n, 1]; [] without one."""
        values = self._array(request, name)
        return [] if values is None else cast("list[float]", values.reshape(-1).tolist())

    def _array(self, request: Asked, name: str) -> NDArray[Any] | None:
        """Return an input tensor; None without one."""
        tensor = self._library.get_input_tensor_by_name(request, name)
        # `as_numpy` of old stubs repeats the first entry if numpy is 2. DLPack always works.
        return None if tensor is None else np.from_dlpack(cast(Any, tensor))

    def _respond(self, ticket: Ticket, sender: Sender, outputs: list[str]) -> None:
        """Send the response of a ticket, which is final. In the inference thread."""
        self._live.pop(ticket.id, None)
        try:
            self._send(sender, ticket.result(), outputs)
        except Exception as error:  # a client without a response would wait for ever
            self._fail(sender, error)

    def _send(self, sender: Sender, samples: Float32, outputs: list[str]) -> None:
        """Send samples [n, *S] as the outputs that a request names."""
        # DLPack takes no array that is read-only.
        arrays: dict[str, np.ndarray] = {"sample": np.array(samples, order="C")}
        if "image" in outputs:
            shown = to_uint8(samples, *self._sampler.bundle.sample_range)
            arrays["image"] = np.array(shown, order="C")
        # The arrays outlive the response, whether or not a stub keeps their memory alive.
        tensors = [self._library.Tensor.from_dlpack(name, arrays[name]) for name in outputs]
        response = self._library.InferenceResponse(output_tensors=tensors)
        sender.send(response, self._library.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _fail(self, sender: Sender, error: BaseException) -> None:
        kinds = self._library.TritonError
        code = kinds.INTERNAL
        if isinstance(error, RequestError):
            code = kinds.INVALID_ARG
        elif isinstance(error, (Overloaded, ClosedError)):
            code = kinds.UNAVAILABLE
        response = self._library.InferenceResponse(error=kinds(str(error), code))
        sender.send(response, self._library.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
