"""/openapi.json is valid, lists every endpoint, and says what is checked; no request that it
allows, or nearly allows, makes the service fail."""

from __future__ import annotations

from collections import Counter

import hypothesis
import jsonschema
import pytest
import requests
import schemathesis
from openapi_spec_validator import validate
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    status_code_conformance,
)
from starlette.testclient import TestClient

from runtime import Sampler
from runtime.errors import RequestError
from serve import Settings, create_app, fields, openapi
from serve.app import ENDPOINTS
from serve.health import PAGE
from serve.schema import check_all

from .services import running, small_sampler

CASES = 12
"""Cases of an operation in a normal run: about 400 in all."""
CASES_SLOW = 150
"""In the slow run: more than 2,000 in all."""
LONGEST_HEAD = 64 * 1024
"""Bytes of a request line and headers that are read."""
REFUSALS = ["400", "404", "405", "409", "413", "415", "422", "429"]
"""Answers to a request that breaks the schema. One that is too large gets 413 before it is read."""
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    negative_data_rejection,
]


def test_the_document_is_valid(client: TestClient) -> None:
    validate(client.get("/openapi.json").json())


def test_every_endpoint_is_described() -> None:
    served = {(m, path) for m, path, _ in ENDPOINTS if path not in PAGE}
    served.remove(("POST", "/v1/edits/{verb}"))
    served |= {("POST", f"/v1/edits/{verb}") for verb in fields.EDITS}
    assert {(entry.method, entry.path) for entry in openapi.OPERATIONS} == served


TABLES = {
    "samples": fields.SAMPLES,
    "generations": fields.OPENAI,
    "infer": fields.INFER,
    **{verb: fields.edit_fields(verb) for verb in fields.EDITS},
}
VALUES = [True, 0, 1, -1, 3, 10**30, 0.5, -2.5, 1e300, "", "a", "ddim", "x" * 2000]
VALUES += [[], [1], [0.5, 0.1], ["a", None], {}, {"a": 1}, {"shape": [1], "float32": "AAAAAA=="}]


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_schema_and_the_check_agree(table: tuple[fields.Field, ...]) -> None:
    """The check rejects exactly the values that the schema rejects."""
    required = {entry.name: _least(entry) for entry in table if entry.required}
    for entry in table:
        schema = {**entry.to_schema(), "$schema": "https://json-schema.org/draft/2020-12/schema"}
        for value in VALUES:
            fits = jsonschema.Draft202012Validator(schema).is_valid(value)
            try:
                check_all("x", table, {**required, entry.name: value})
                passes = True
            except RequestError:
                passes = False
            assert fits == passes, (entry.name, value)


def _least(entry: fields.Field) -> object:
    tensor = {"name": "seed", "datatype": "INT64", "shape": [1], "data": [1]}
    return {"inputs": [tensor], "name": "seed"}.get(entry.name, "one")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory):
    sampler: Sampler = small_sampler(tmp_path_factory.mktemp("api"), knots=20)
    settings = Settings(samples=4, rows=100, request_rows=200)
    app = create_app([sampler], settings)
    rejection = {"negative_data_rejection": {"expected-statuses": REFUSALS}}
    config = schemathesis.Config.from_dict({"checks": rejection})
    with running(app) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json", config=config), address


def attack(api, cases: int) -> Counter[int]:
    """Send cases of every operation. Returns how many got each status."""
    schema, address = api
    statuses: Counter[int] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()

        @hypothesis.settings(
            max_examples=cases,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=strategy_of(operation))
        def run(case) -> None:
            try:
                got = case.call(base_url=address)
            except requests.RequestException:
                # A longer head is refused before its end has come. Then the connection's end may
                # overtake the answer.
                assert len(case.as_curl_command()) > LONGEST_HEAD
                return
            # On a busy machine a deadline may be accepted and then missed: no failure of ours.
            missed = got.status_code == 504 and "the deadline passed" in got.text
            checks = [c for c in CHECKS if not (missed and c is not_a_server_error)]
            case.validate_response(got, checks=checks)
            statuses[got.status_code] += 1

        run()
    return statuses


def strategy_of(operation):
    mode = schemathesis.GenerationMode
    negative = operation.as_strategy(generation_mode=mode.NEGATIVE)
    positive = operation.as_strategy(generation_mode=mode.POSITIVE)
    return hypothesis.strategies.one_of(positive, negative)


def test_no_request_makes_the_service_fail(api) -> None:
    assert {200, 400, 404} <= attack(api, CASES).keys()


@pytest.mark.slow
def test_no_request_of_thousands_makes_the_service_fail(api) -> None:
    assert attack(api, CASES_SLOW).total() >= 2000
