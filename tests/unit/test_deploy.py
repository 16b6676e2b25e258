"""What is in ``service/deploy`` against the server's own settings and times: linters do not know those."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ByteSize, TypeAdapter

from segrpc.service.engine.child import STOP_SECONDS
from segrpc.service.models.sam2.catalog import VARIANTS
from segrpc.service.rpc.port import CLOSE_SECONDS
from segrpc.service.settings import GiB, Settings

DEPLOY = Path(__file__).parents[2] / "service" / "deploy"
BASE, GPU = DEPLOY / "kustomize" / "base", DEPLOY / "kustomize" / "gpu"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text("utf-8")
UNIT = (DEPLOY / "segrpc-server.service").read_text("utf-8")

PROCESSES = 2 * GiB  # for the server, its worker and what requests take for a moment


def manifest(file: Path) -> Any:
    return yaml.safe_load(file.read_text("utf-8"))


def pod() -> Any:
    return manifest(BASE / "deployment.yaml")["spec"]["template"]["spec"]


def environment(*folders: Path) -> dict[str, str]:
    return {name: value for folder in folders for name, value in manifest(folder / "configmap.yaml")["data"].items()}


def in_dockerfile() -> dict[str, str]:
    return dict(re.findall(r"(SEGRPC_\w+)=(\S+)", DOCKERFILE))


def settings(found: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in list(os.environ):
        if name.upper().startswith("SEGRPC_"):
            monkeypatch.delenv(name)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    return Settings.load(None, {})


@pytest.mark.parametrize("found", [in_dockerfile(), environment(BASE), environment(BASE, GPU)])
def test_the_environment_has_settings_that_may_listen_for_everybody(
    found: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = settings(found, monkeypatch)
    assert {name.removeprefix("SEGRPC_").lower() for name in found} <= set(Settings.model_fields)
    assert loaded.listen == "0.0.0.0:50051"
    loaded.check_security()
    assert not loaded.insecure


def test_ports_are_where_the_settings_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, ports = settings(environment(BASE), monkeypatch), pod()["containers"][0]["ports"]
    named = {port["name"]: str(port["containerPort"]) for port in ports}
    assert named == {"grpc": loaded.listen.rpartition(":")[2], "metrics": loaded.metrics_listen.rpartition(":")[2]}
    assert re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE) == [" ".join(named.values())]
    annotations = manifest(BASE / "deployment.yaml")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == named["metrics"]
    allowed = manifest(BASE / "networkpolicy.yaml")["spec"]["ingress"]
    assert [port["port"] for rule in allowed for port in rule["ports"]] == list(named)


def test_what_is_pulled_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = pod()
    assert settings(environment(BASE), monkeypatch).model in VARIANTS
    assert spec["initContainers"][0]["args"] == ["pull", "$(SEGRPC_MODEL)"]
    assert spec["initContainers"][0]["envFrom"] == spec["containers"][0]["envFrom"]


def test_there_is_time_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, drain = pod(), settings(environment(BASE), monkeypatch).drain_seconds
    assert drain == settings({}, monkeypatch).drain_seconds, "the unit file sets none"
    needed = drain + 2 * CLOSE_SECONDS + STOP_SECONDS
    wait = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > wait + needed
    assert float(re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)[0]) > needed


def test_budgets_fit_into_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = pod()["containers"][0]["resources"]["limits"]
    size = TypeAdapter(ByteSize).validate_python
    memory = size(limits["memory"] + "B")
    base = settings(environment(BASE), monkeypatch)
    assert base.threads == int(limits["cpu"])
    fixed = PROCESSES + base.image_store_bytes + base.session_bytes
    assert fixed + base.embedding_cache_bytes <= memory
    gpu = settings(environment(BASE, GPU), monkeypatch)
    assert fixed + gpu.host_embedding_cache_bytes <= memory
    plain = settings({}, monkeypatch)
    of_unit = size(re.findall(r"^MemoryMax=(\d+G)$", UNIT, re.MULTILINE)[0] + "iB")
    assert PROCESSES + plain.image_store_bytes + plain.session_bytes + plain.embedding_cache_bytes <= of_unit


def test_nothing_may_write_but_to_volumes() -> None:
    spec = pod()
    for container in (*spec["initContainers"], *spec["containers"]):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/tmp", "/var/lib/segrpc"} <= mounted
    assert spec["securityContext"]["runAsNonRoot"]
    assert f"USER {spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}" in DOCKERFILE
