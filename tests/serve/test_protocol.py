"""The Open Inference Protocol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from runtime import Bundle, Sampler
from serve import create_app

from ..open_inference import check_conditions, check_server
from .services import running

INFER = "/v2/models/small/infer"


def tensor(name: str, kind: str, data: list) -> dict:
    return {"name": name, "datatype": kind, "shape": [len(data)], "data": data}


SEED = tensor("seed", "INT64", [3, 8])


def test_health_and_metadata(client: TestClient, small: Sampler) -> None:
    assert client.get("/v2").json()["name"] == "unnoise"
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/small/ready").json() == {"name": "small", "ready": True}
    found = client.get("/v2/models/small").json()
    assert [entry["name"] for entry in found["inputs"]] == ["seed", "label", "guidance"]
    shapes = {entry["name"]: entry["shape"] for entry in found["outputs"]}
    assert shapes == {"sample": [-1, 1, 4, 4], "image": [-1, 4, 4, 1]}
    for path in ("/v2/models/none", "/v2/models/none/ready"):
        got = client.get(path)
        assert got.status_code == 404
        assert "unknown model" in got.json()["error"]


@pytest.mark.parametrize("kind", ["INT64", "BYTES"])
def test_inference_has_the_bytes_of_the_sampler(
    client: TestClient, small: Sampler, kind: str
) -> None:
    labels = ["two", "one"] if kind == "BYTES" else [2, 1]
    inputs = [SEED, tensor("label", kind, labels), tensor("guidance", "FP32", [1.5, 3])]
    outputs = [{"name": "image"}, {"name": "sample", "parameters": {"binary_data": False}}]
    parameters = {"solver": "ddpm", "steps": 6, "options": {"variance": "fixed_large"}}
    body = {"id": "mine", "inputs": inputs, "outputs": outputs, "parameters": parameters}
    got = client.post(INFER, json=body).json()
    assert got["id"] == "mine"
    assert got["model_name"] == "small"
    expected = small.sample(
        2, [3, 8], label=[2, 1], guidance=[1.5, 3.0], solver="ddpm", steps=6, variance="fixed_large"
    )
    found = {entry["name"]: entry for entry in got["outputs"]}
    sample = np.array(found["sample"]["data"], np.float32).reshape(found["sample"]["shape"])
    assert sample.tobytes() == expected.tobytes()
    image = np.array(found["image"]["data"], np.uint8).reshape(found["image"]["shape"])
    assert (image == small.to_uint8(expected)).all()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "needs `inputs`"),
        ({"inputs": []}, "`inputs` must be"),
        ({"inputs": [tensor("label", "INT64", [1])]}, "needs the input `seed`"),
        ({"inputs": [SEED, SEED]}, "given twice"),
        ({"inputs": [tensor("seed", "FP32", [1.0])]}, "unknown datatype"),
        ({"inputs": [tensor("seed", "INT64", [1.5])]}, "must be INT64"),
        ({"inputs": [tensor("seed", "INT64", [True])]}, "must be INT64"),
        ({"inputs": [tensor("seed", "INT64", [-1])]}, "`seed` must be"),
        ({"inputs": [{**SEED, "shape": [3]}]}, "must have shape [n]"),
        ({"inputs": [SEED, tensor("label", "INT64", [1])]}, "`label` must be"),
        ({"inputs": [SEED], "outputs": [{"name": "noise"}]}, "unknown name"),
        ({"inputs": [SEED], "outputs": ["sample"]}, "`outputs` must be a JSON object"),
        ({"inputs": [SEED], "outputs": [{}]}, "`outputs` needs `name`"),
        ({"inputs": ["seed"]}, "`inputs` must be a JSON object"),
        ({"inputs": [SEED], "parameters": 3}, "`parameters` must be a JSON object"),
        ({"inputs": [SEED], "parameters": {"step": 3}}, "Did you mean 'steps'?"),
        ({"inputs": [tensor("seed", "INT64", list(range(65)))]}, "`n` must be"),
    ],
)
def test_nonsense_is_refused(client: TestClient, body: dict, sentence: str) -> None:
    got = client.post(INFER, json=body)
    assert got.status_code == 400
    assert sentence in got.json()["error"]


def test_the_client_that_talks_to_triton_talks_to_the_service(first_release: Path) -> None:
    bundle = Bundle.load(first_release / "bundle")
    with running(create_app([Sampler(bundle, threads=1)])) as address:
        check_server(address, bundle)


def test_its_conditions_are_those_of_triton(second_format: Path) -> None:
    bundle = Bundle.load(second_format / "bundle")
    with running(create_app([Sampler(bundle, threads=1)])) as address:
        check_conditions(address, bundle)
