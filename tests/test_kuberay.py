"""The manifest for KubeRay: valid YAML whose parts fit together. No cluster runs it here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from .root import ROOT

MANIFEST = ROOT / "examples" / "kuberay.yaml"


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return yaml.safe_load(MANIFEST.read_text())


@pytest.fixture(scope="module")
def config(manifest: dict[str, Any]) -> dict[str, Any]:
    """What KubeRay gives to Ray Serve."""
    return yaml.safe_load(manifest["spec"]["serveConfigV2"])


def test_it_is_a_service_whose_pods_have_one_image(manifest: dict[str, Any]) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    cluster = manifest["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]
    workers = cluster["workerGroupSpecs"]
    containers = [group["template"]["spec"]["containers"][0] for group in (head, *workers)]
    assert len({container["image"] for container in containers}) == 1
    ports = {port["name"]: port["containerPort"] for port in containers[0]["ports"]}
    assert ports["serve"] == 8000
    for container in containers:
        # With other limits than requests Kubernetes may evict a pod first.
        assert container["resources"]["requests"] == container["resources"]["limits"]
    for group in workers:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_workers_have_the_processors_of_the_replicas(
    manifest: dict[str, Any], config: dict[str, Any]
) -> None:
    arguments = config["applications"][0]["args"]
    cluster = manifest["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    least = 0
    most = 0
    for group in cluster["workerGroupSpecs"]:
        resources = group["template"]["spec"]["containers"][0]["resources"]
        replicas = int(resources["requests"]["cpu"]) // arguments["threads"]
        least += group["minReplicas"] * replicas
        most += group["maxReplicas"] * replicas
    assert least >= arguments["replicas"]
    assert most >= arguments["max_replicas"]


def test_its_version_of_ray_is_the_tested_one(manifest: dict[str, Any], root: Path) -> None:
    version = manifest["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"\nray=={version}\n" in (root / "constraints.txt").read_text()
    assert f"rayproject/ray:{version}-" in MANIFEST.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_serve_accepts_its_configuration(config: dict[str, Any]) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="pip install 'unnoise[ray]'")
    from serve.ray import Arguments

    checked = schema.ServeDeploySchema.model_validate(config)
    assert checked.applications[0].import_path == "serve.ray:app"
    arguments = Arguments.read(config["applications"][0]["args"])
    assert arguments.max_replicas > arguments.replicas
