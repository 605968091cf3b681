"""A client of the Open Inference Protocol over HTTP. The same code talks to `serve` and to Triton."""

from __future__ import annotations

import math
from collections.abc import Mapping

import httpx
import numpy as np

from runtime import Bundle, Sampler

WAIT_S = 600
KINDS = {"FP32": np.float32, "UINT8": np.uint8}


class Client:
    """Asks one model of a server."""

    def __init__(self, address: str, model: str) -> None:
        self._client = httpx.Client(timeout=WAIT_S, trust_env=False)
        self._address = f"{address}/v2"
        self.model = model

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, path: str) -> httpx.Response:
        return self._client.get(f"{self._address}{path}")

    def infer(
        self,
        inputs: Mapping[str, tuple[str, list | np.ndarray]],
        outputs: tuple[str, ...] = ("sample",),
        **parameters: object,
    ) -> httpx.Response:
        """inputs: data type and entries of each tensor."""
        tensors = [
            {
                "name": name,
                "datatype": kind,
                "shape": list(np.shape(data)),
                "data": np.ravel(data).tolist(),
            }
            for name, (kind, data) in inputs.items()
        ]
        body = {
            "id": "mine",
            "inputs": tensors,
            "outputs": [{"name": name} for name in outputs],
            "parameters": parameters,
        }
        return self._client.post(f"{self._address}/models/{self.model}/infer", json=body)


def arrays_of(response: httpx.Response) -> dict[str, np.ndarray]:
    """The output tensors of a response."""
    assert response.status_code == 200, response.text
    found = {}
    for tensor in response.json()["outputs"]:
        assert len(tensor["data"]) == math.prod(tensor["shape"])
        array = np.array(tensor["data"], KINDS[tensor["datatype"]])
        found[tensor["name"]] = array.reshape(tensor["shape"])
    return found


def check_server(address: str, bundle: Bundle) -> None:
    """Check all that the protocol asks of a server, and the bytes of its samples."""
    with Client(address, bundle.name) as client:
        check_metadata(client, bundle)
        check_samples(client, Sampler(bundle, threads=1))
        check_errors(client)


def check_conditions(address: str, bundle: Bundle) -> None:
    """Check that a server passes conditions on, and the bytes of its samples."""
    values = {**bundle.draw_conditions(2), "style": np.array([1, 3])}
    kinds = {"low_res": "FP32", "text": "FP32", "style": "INT64"}
    inputs = {f"condition_{name}": (kind, values[name]) for name, kind in kinds.items()}
    rest = {"seed": ("INT64", [5, 6]), "label": ("INT64", [2, 0])}
    with Client(address, bundle.name) as client:
        described = client.get(f"/models/{client.model}").json()["inputs"]
        assert {
            "name": "condition_text",
            "datatype": "FP32",
            "shape": [-1, 3, 4],
        } in described
        response = client.infer({**rest, **inputs}, steps=3)
        expected = Sampler(bundle, threads=1).sample(
            2, [5, 6], label=[2, 0], steps=3, conditions=values
        )
        assert arrays_of(response)["sample"].tobytes() == expected.tobytes()
        for changed, message in (
            (("FP32", values["text"][:1]), "condition_text"),
            (("FP32", values["text"][:, :1]), "[2, 3, 4]|[-1,3,4]"),
        ):
            response = client.infer({**rest, **inputs, "condition_text": changed}, steps=3)
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert any(part in error for part in message.split("|")), error


def check_metadata(client: Client, bundle: Bundle) -> None:
    for path in ("/health/live", "/health/ready", f"/models/{client.model}/ready"):
        assert client.get(path).status_code == 200, path
    assert {"name", "version", "extensions"} <= client.get("").json().keys()
    found = client.get(f"/models/{client.model}").json()
    assert found["name"] == bundle.name
    assert found["versions"] == ["1"]
    assert found["inputs"] == [
        {"name": "seed", "datatype": "INT64", "shape": [-1]},
        {"name": "label", "datatype": "INT64", "shape": [-1]},
        {"name": "guidance", "datatype": "FP32", "shape": [-1]},
    ]
    channels, *size = bundle.sample_shape
    assert found["outputs"] == [
        {"name": "sample", "datatype": "FP32", "shape": [-1, *bundle.sample_shape]},
        {"name": "image", "datatype": "UINT8", "shape": [-1, *size, channels]},
    ]


def check_samples(client: Client, sampler: Sampler) -> None:
    seeds = ("INT64", [7, 2**40])
    response = client.infer({"seed": seeds})
    assert response.json()["id"] == "mine"
    assert response.json()["model_name"] == sampler.bundle.name
    expected = sampler.sample(2, [7, 2**40])
    assert arrays_of(response)["sample"].tobytes() == expected.tobytes()

    # -1 is the null label, and a list or an object may be its JSON.
    inputs = {"seed": seeds, "label": ("INT64", [3, -1]), "guidance": ("FP32", [2.5, 1.0])}
    response = client.infer(
        inputs,
        ("image", "sample"),
        solver="ddpm",
        grid="[90, 60, 30, 5]",
        guidance_interval="[0, 50]",
        options='{"variance": "fixed_large"}',
    )
    expected = sampler.sample(
        2,
        [7, 2**40],
        label=[3, None],
        guidance=[2.5, 1.0],
        solver="ddpm",
        grid=(90, 60, 30, 5),
        guidance_interval=(0, 50),
        variance="fixed_large",
    )
    found = arrays_of(response)
    assert found["sample"].tobytes() == expected.tobytes()
    assert (found["image"] == sampler.to_uint8(expected)).all()


def check_errors(client: Client) -> None:
    seed = ("INT64", [1])
    for inputs, parameters, message in (
        ({"seed": seed}, {"solver": "dimm"}, "Did you mean 'ddim'"),
        ({"seed": seed}, {"steps": 0}, "`steps` must be"),
        ({"seed": seed}, {"grid": "[1"}, "`grid` cannot be read as JSON"),
        ({"seed": seed, "label": ("INT64", [10])}, {}, "out of range"),
        ({"seed": seed, "guidance": ("FP32", [1.0, 2.0])}, {}, "guidance"),
    ):
        response = client.infer(inputs, **parameters)
        assert response.status_code == 400, response.text
        assert message in response.json()["error"]
    response = client.get("/models/nobody")
    assert response.status_code in (400, 404)
    assert "nobody" in response.json()["error"]
