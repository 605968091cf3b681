"""/openapi.json, made of the tables that the checks read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .conditions import PART
from .fields import (
    EDIT_PARTS,
    INFER,
    ONE_SAMPLE,
    OPENAI,
    OPENAI_EDITS,
    OPENAI_PARTS,
    SAMPLES,
    edit_fields,
    formats_of,
    result_fields,
)
from .models import version
from .pictures import MEDIA_TYPES
from .schema import Field, object_schema
from .service import service_of

Json = dict[str, object]
PROBLEM = "application/problem+json"
JSON = "application/json"
EVENTS = "text/event-stream"
REF_PROBLEM: Json = {"$ref": "#/components/schemas/Problem"}
IMAGES = [MEDIA_TYPES[kind] for kind in ("png", "webp", "npy", "json")] + [EVENTS]
ERRORS = (400, 401, 403, 405, 408, 413, 415, 421, 422, 429, 500, 503, 504)
"""Statuses that a request which sends work may get."""
QUERY_ERRORS = (400, 401, 405, 421, 422, 429, 500, 503, 504)


@dataclass(frozen=True)
class Operation:
    """An operation of the API.

    Attributes:
        kinds: Media types of its success.
        body: The fields of its JSON body.
        parts: The files of its multipart body, and whether they are required.
        texts: The texts of its multipart body.
        query: The fields of its query.
        more: Other statuses than 200, with what they mean.
    """

    method: str
    path: str
    summary: str
    kinds: Sequence[str] = (JSON,)
    body: Sequence[Field] | None = None
    parts: Mapping[str, bool] | None = None
    texts: Mapping[str, Json] = field(default_factory=dict)
    query: Sequence[Field] = ()
    errors: Sequence[int] = QUERY_ERRORS
    error_kind: str = PROBLEM
    more: Mapping[int, str] = field(default_factory=dict)

    def to_json(self) -> Json:
        """Return the operation object."""
        names = [part[1:-1] for part in self.path.split("/") if part.startswith("{")]
        parameters = [_parameter(name, "path", {"type": "string"}, True) for name in names]
        parameters += [
            _parameter(entry.name, "query", entry.kind.schema, entry.required)
            for entry in self.query
            if entry.name != "options"
        ]
        found: Json = {"summary": self.summary, "responses": self._responses()}
        # Names for those who generate clients.
        name = f"{self.method.lower()}{self.path}"
        found["operationId"] = "".join(c if c.isalnum() else "_" for c in name)
        if parameters:
            found["parameters"] = parameters
        body = self._body()
        return {**found, "requestBody": body} if body else found

    def _body(self) -> Json | None:
        if self.body is not None:
            schema = object_schema(self.body)
            content: Json = {JSON: {"schema": schema}}
            if self.parts is not None:
                content |= self._form()
            return {"required": True, "content": content}
        return None if self.parts is None else {"required": True, "content": self._form()}

    def _form(self) -> Json:
        """Return the content of a multipart body."""
        assert self.parts is not None
        # Binary data, as OpenAPI 3.1 has it.
        file: Json = {"type": "string", "contentMediaType": "application/octet-stream"}
        required = [name for name, needed in self.parts.items() if needed]
        schema = {
            "type": "object",
            "properties": {**dict.fromkeys(self.parts, file), **self.texts},
            "required": required,
            "additionalProperties": False,
        }
        if "params" in self.texts:
            schema["patternProperties"] = {f"^{re.escape(PART)}": file}
        encoding = {"params": {"contentType": JSON}} if "params" in self.texts else {}
        content = {"schema": schema, **({"encoding": encoding} if encoding else {})}
        return {"multipart/form-data": content}

    def _responses(self) -> Json:
        content = {
            kind: {"schema": {} if kind != EVENTS else {"type": "string"}} for kind in self.kinds
        }
        found: Json = {"200": {"description": "Success.", "content": content}}
        for status, text in self.more.items():
            found[str(status)] = {"description": text}
        for status in self.errors:
            schema = REF_PROBLEM if self.error_kind == PROBLEM else {"type": "object"}
            entry: Json = {
                "description": "An error.",
                "content": {self.error_kind: {"schema": schema}},
            }
            if status in (429, 503):
                seconds = {"schema": {"type": "integer"}, "description": "Seconds."}
                entry["headers"] = {"Retry-After": seconds}
            found[str(status)] = entry
        return found


def _parameter(name: str, place: str, schema: Mapping[str, object], required: bool) -> Json:
    found: Json = {"name": name, "in": place, "required": required, "schema": dict(schema)}
    # Lists are joined with commas.
    return {**found, "style": "form", "explode": False} if place == "query" else found


def _edit(verb: str) -> Operation:
    fields = object_schema(edit_fields(verb))
    return Operation(
        "POST",
        f"/v1/edits/{verb}",
        f"Edit an image: {verb}.",
        [*(MEDIA_TYPES[kind] for kind in formats_of(verb)), EVENTS],
        parts=EDIT_PARTS[verb],
        texts={"params": fields},
        errors=ERRORS,
        more=JOB,
    )


JOB = {202: "A job, for requests with the header Prefer: respond-async."}
NOT_MODIFIED = {304: "The client's copy is the same."}
JOB_ERRORS = (*QUERY_ERRORS, 404, 409)
OPENAI_TEXTS = {entry.name: entry.to_schema() for entry in OPENAI_EDITS}
OPERATIONS: tuple[Operation, ...] = (
    Operation("GET", "/v1/info", "The models with their labels and solvers; the limits."),
    Operation(
        "POST",
        "/v1/samples",
        "Make samples.",
        IMAGES,
        SAMPLES,
        parts={},
        texts={"params": object_schema(SAMPLES)},
        errors=ERRORS,
        more=JOB,
    ),
    Operation(
        "GET",
        "/v1/samples",
        "One image by its URL. A solver's own options are options.NAME=VALUE.",
        IMAGES,
        query=ONE_SAMPLE,
        more=NOT_MODIFIED,
    ),
    *(_edit(verb) for verb in EDIT_PARTS),
    Operation("GET", "/v1/jobs/{id}", "Where a job stands.", errors=JOB_ERRORS),
    Operation("DELETE", "/v1/jobs/{id}", "Cancel a job.", errors=JOB_ERRORS),
    Operation("GET", "/v1/jobs/{id}/events", "Its events.", (EVENTS,), errors=JOB_ERRORS),
    Operation(
        "GET",
        "/v1/jobs/{id}/result",
        "Its result.",
        [MEDIA_TYPES[kind] for kind in formats_of("animate")],
        query=result_fields(animated=True),
        errors=JOB_ERRORS,
    ),
    Operation(
        "POST",
        "/v1/images/generations",
        "OpenAI's API: make images of a label.",
        (JSON, EVENTS),
        OPENAI,
        errors=ERRORS,
        error_kind=JSON,
    ),
    Operation(
        "POST",
        "/v1/images/edits",
        "OpenAI's API: edit an image.",
        (JSON, EVENTS),
        parts=OPENAI_PARTS,
        texts=OPENAI_TEXTS,
        errors=ERRORS,
        error_kind=JSON,
    ),
    Operation("GET", "/v1/models", "OpenAI's API: the models.", error_kind=JSON),
    Operation(
        "GET", "/v1/models/{model}", "OpenAI's API: a model.", errors=JOB_ERRORS, error_kind=JSON
    ),
    Operation("GET", "/v2", "Open Inference Protocol: the server.", error_kind=JSON),
    Operation("GET", "/v2/health/live", "Whether the server is alive.", error_kind=JSON),
    Operation("GET", "/v2/health/ready", "Whether the server is ready.", error_kind=JSON),
    Operation(
        "GET", "/v2/models/{model}", "A model's tensors.", errors=JOB_ERRORS, error_kind=JSON
    ),
    Operation(
        "GET",
        "/v2/models/{model}/ready",
        "Whether a model is ready.",
        errors=JOB_ERRORS,
        error_kind=JSON,
    ),
    Operation(
        "POST",
        "/v2/models/{model}/infer",
        "Make samples of input tensors.",
        body=INFER,
        errors=(*ERRORS, 404),
        error_kind=JSON,
    ),
    Operation("GET", "/livez", "Whether the event loop answers.", ("text/plain",)),
    Operation("GET", "/readyz", "Whether the service can take work.", ("text/plain",)),
    Operation("GET", "/metrics", "Figures for Prometheus.", ("text/plain",)),
    Operation("GET", "/openapi.json", "This document."),
)


def document() -> Json:
    """Return the OpenAPI document."""
    paths: dict[str, Json] = {}
    for operation in OPERATIONS:
        path = paths.setdefault(operation.path, {})
        path[operation.method.lower()] = operation.to_json()
    text: Json = {"type": "string"}
    problem: Json = {
        "type": "object",
        "description": "Problem details, RFC 9457.",
        "required": ["type", "title", "status", "detail"],
        "properties": {
            "type": text,
            "title": text,
            "status": {"type": "integer"},
            "detail": text,
            "retry_after": {"type": "number", "description": "Predicted seconds."},
        },
    }
    bearer: Json = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "unnoise", "version": version()},
        "paths": paths,
        "components": {"schemas": {"Problem": problem}, "securitySchemes": {"token": bearer}},
    }


async def show(request: Request) -> Response:
    """Return the OpenAPI document."""
    found = document()
    if service_of(request).settings.tokens:
        found["security"] = [{"token": []}]
    return JSONResponse(found)
