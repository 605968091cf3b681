"""Conditions in the service: JSON and forms give the bytes of `Sampler`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from runtime import Sampler
from runtime.engine.json_arrays import array_to_json

from .services import client_of
from .test_limits import png_bomb

HOW: dict[str, Any] = {"n": 2, "seed": 3, "steps": 3, "label": 1, "guidance": 2.0}


@pytest.fixture(scope="module")
def conditioned(second_format: Path) -> Sampler:
    return Sampler.load(second_format / "bundle", threads=1)


@pytest.fixture(scope="module")
def server(conditioned: Sampler) -> Iterator[TestClient]:
    with client_of([conditioned]) as found:
        yield found


@pytest.fixture
def given(conditioned: Sampler) -> dict[str, Any]:
    return {**conditioned.bundle.draw_conditions(2), "style": np.array([1, 3])}


def png(value: int, size: tuple[int, int] = (8, 8), mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, (value,) * len(mode) if mode == "RGB" else value).save(file, "PNG")
    return file.getvalue()


def in_base64(data: bytes) -> dict[str, str]:
    return {"image": base64.b64encode(data).decode()}


def sampled(found: Any) -> np.ndarray:
    assert found.status_code == 200, found.text
    return np.load(io.BytesIO(found.content))


def test_json_gives_the_bytes_of_the_sampler(
    server: TestClient, conditioned: Sampler, given: dict[str, Any]
) -> None:
    expected = conditioned.sample(conditions=given, **HOW).tobytes()
    body = {name: array_to_json(values) for name, values in given.items()}
    asked = {**HOW, "format": "npy"}
    assert sampled(server.post("/v1/samples", json={**asked, "conditions": body})).tobytes() == (
        expected
    )
    lists = {name: values.tolist() for name, values in given.items()}
    found = sampled(server.post("/v1/samples", json={**asked, "conditions": lists}))
    np.testing.assert_allclose(found, np.frombuffer(expected, np.float32).reshape(found.shape))
    # Other conditions are another result, not the one that was kept.
    other = {**lists, "style": [1, 2]}
    changed = sampled(server.post("/v1/samples", json={**asked, "conditions": other}))
    assert np.abs(changed[1] - found[1]).max() > 1e-3
    null = {**lists, "text": None, "low_res": [lists["low_res"][0], None]}
    sampled(server.post("/v1/samples", json={**asked, "conditions": null}))


def test_images_come_in_json_or_as_parts(
    server: TestClient, conditioned: Sampler, given: dict[str, Any]
) -> None:
    ones = np.ones((1, 8, 8), np.float32)
    conditions = {"text": given["text"].tolist(), "style": 2}
    expected = conditioned.sample(
        **HOW, conditions={"low_res": ones, "text": given["text"], "style": 2}
    )
    asked: dict[str, Any] = {**HOW, "format": "npy"}
    body = {**conditions, "low_res": in_base64(png(255))}
    found = sampled(server.post("/v1/samples", json={**asked, "conditions": body}))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    form = {"params": json.dumps({**asked, "conditions": conditions})}
    files = {"conditions.low_res": ("a.png", png(255, (20, 10), "RGB"), "image/png")}
    found = sampled(server.post("/v1/samples", data=form, files=files))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # Without conversion the size must fit.
    form = {"params": json.dumps({**asked, "conditions": conditions, "convert": False})}
    refused = server.post("/v1/samples", data=form, files=files)
    assert refused.status_code == 400
    assert "20×10 RGB, 8×8 L expected" in refused.json()["detail"]


def test_edits_take_conditions(server: TestClient, given: dict[str, Any]) -> None:
    conditions = {"text": given["text"][0].tolist(), "style": 2}
    params = {"steps": 3, "format": "npy", "conditions": conditions, "label": 0}
    files = {
        "image": ("a.png", png(128), "image/png"),
        "conditions.low_res": ("b.png", png(255), "image/png"),
    }
    found = server.post("/v1/edits/stylize", data={"params": json.dumps(params)}, files=files)
    assert sampled(found).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lowres": 1}, "Did you mean 'low_res'?"),
        ({"style": ...}, "needs the condition 'style'"),
        ({"style": 9}, "in 0 … 4"),
        ({"style": "1"}, "must be a number"),
        ({"low_res": "/etc/passwd"}, "must be a number"),
        ({"low_res": {"image": "?"}}, "must be a number"),
        ({"low_res": in_base64(b"no image")}, "cannot be read as PNG, JPEG or WebP"),
        ({"low_res": {"shape": [1], "float32": "AAAAAA=="}}, "of shape (1, 8, 8)"),
        ({"text": in_base64(png(3))}, "takes no image"),
        ({"text": [[[[[[[[1]]]]]]]]}, "must be a number"),
    ],
)
def test_what_cannot_be_used_is_a_400(
    server: TestClient, given: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    lists = {name: values.tolist() for name, values in given.items()}
    body = {name: value for name, value in {**lists, **changed}.items() if value is not ...}
    found = server.post("/v1/samples", json={**HOW, "conditions": body})
    assert found.status_code == 400
    assert message in found.json()["detail"]


BLACK = in_base64(png(0))
LARGE = in_base64(png_bomb(3000, 3000))


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"lowres": BLACK}, "Did you mean 'low_res'?"),
        ({"text": BLACK}, "takes no image"),
        ({"style": [BLACK, BLACK]}, "takes no image"),
        ({"low_res": [BLACK] * 3}, "must be one value or 2 of them, got 3"),
        ({"low_res": [[BLACK, BLACK]]}, "must be a number"),
        ({"low_res": [LARGE, LARGE]}, "at most 16000000 pixels together, got 18000000"),
    ],
)
def test_images_that_cannot_be_used_are_never_decoded(
    server: TestClient, monkeypatch: pytest.MonkeyPatch, conditions: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("serve.conditions.decode", lambda *_: pytest.fail("an image was decoded"))
    found = server.post("/v1/samples", json={**HOW, "conditions": conditions})
    assert found.status_code == 400
    assert message in found.json()["detail"]


def test_a_form_takes_no_other_part(server: TestClient) -> None:
    for files in ({"low_res": ("a", b"", "image/png")}, {"image": ("a", b"", "image/png")}):
        found = server.post("/v1/samples", data={"params": "{}"}, files=files)
        assert found.status_code == 400
        assert "unexpected part" in found.json()["detail"]
    twice = {"params": json.dumps({"conditions": {"low_res": 1}})}
    files = {"conditions.low_res": ("a.png", png(1), "image/png")}
    found = server.post("/v1/samples", data=twice, files=files)
    assert "given twice" in found.json()["detail"]


def test_a_client_learns_what_a_model_takes(server: TestClient) -> None:
    (model,) = server.get("/v1/info").json()["models"]
    assert [c["name"] for c in model["conditions"]] == ["low_res", "text", "style"]
    assert model["conditions"][0]["range"] == [-1, 1]
    found = server.post("/v1/samples", json={**HOW, "conditions": {}})
    assert "It takes low_res: an image of 1×8×8" in found.json()["detail"]
    content = server.get("/openapi.json").json()["paths"]["/v1/samples"]["post"]["requestBody"]
    assert set(content["content"]) == {"application/json", "multipart/form-data"}
    # A sample under conditions is found again by its request alone, not by a URL.
    assert server.get("/v1/samples?seed=1&label=1").status_code == 400


def tensors(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Conditions as inputs of the Open Inference Protocol."""
    kinds = {"f": "FP32", "i": "INT64"}
    return [
        {
            "name": f"condition_{name}",
            "datatype": kinds[np.asarray(values).dtype.kind],
            "shape": list(np.shape(values)),
            "data": np.ravel(values).tolist(),
        }
        for name, values in given.items()
    ]


def test_the_open_inference_protocol_takes_conditions(
    server: TestClient, conditioned: Sampler, given: dict[str, Any]
) -> None:
    (name,) = [entry["name"] for entry in server.get("/v1/info").json()["models"]]
    listed = server.get(f"/v2/models/{name}").json()["inputs"]
    shapes = {entry["name"]: entry["shape"] for entry in listed}
    assert shapes["condition_low_res"] == [-1, 1, 8, 8]
    seed = {"name": "seed", "datatype": "INT64", "shape": [2], "data": [3, 8]}
    body = {"inputs": [seed, *tensors(given)], "parameters": {"steps": 3}}
    got = server.post(f"/v2/models/{name}/infer", json=body)
    assert got.status_code == 200, got.text
    (output,) = got.json()["outputs"]
    expected = conditioned.sample(2, [3, 8], conditions=given, steps=3)
    found = np.array(output["data"], np.float32).reshape(output["shape"])
    assert found.tobytes() == expected.tobytes()
    missing = server.post(f"/v2/models/{name}/infer", json={"inputs": [seed]})
    assert missing.status_code == 400
    assert "low_res" in missing.text
    wrong = tensors({"low_res": np.ones((2, 1, 8, 7), np.float32)})
    refused = server.post(f"/v2/models/{name}/infer", json={"inputs": [seed, *wrong]})
    assert "must have shape [2, 1, 8, 8]" in refused.json()["error"]
    few = tensors(given)
    del few[0]["data"][-1]
    refused = server.post(f"/v2/models/{name}/infer", json={"inputs": [seed, *few]})
    assert refused.status_code == 400
    assert "entries" in refused.json()["error"]
    for inputs in (tensors(given), tensors(given)):
        large = inputs[-1]
        large["data"] = [10**400] * len(large["data"])
        refused = server.post(f"/v2/models/{name}/infer", json={"inputs": [seed, *inputs]})
        assert refused.status_code == 400
        assert "too large" in refused.json()["error"]


def test_the_openai_api_refuses_conditions_by_name(server: TestClient) -> None:
    found = server.post("/v1/images/generations", json={"prompt": "1"})
    assert found.status_code == 400
    assert "needs conditions (low_res, text, style)" in found.text
