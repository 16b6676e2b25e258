"""The commands by which Docker and Kubernetes look whether the server is well, as they are written there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trustme
import yaml

from tests.server_process import ServerProcess

DEPLOY = Path(__file__).parents[2] / "service" / "deploy"


def commands() -> dict[str, list[str]]:
    deployment = yaml.safe_load((DEPLOY / "kustomize" / "base" / "deployment.yaml").read_text("utf-8"))
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    found = {name: probe["exec"]["command"] for name, probe in container.items() if name.endswith("Probe")}
    docker = re.findall(r"HEALTHCHECK [^\[]*CMD (\[.*\])$", (DEPLOY / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    return {**found, "HEALTHCHECK": json.loads(docker[0])}


def probe(command: list[str], server: str, ca: Path) -> int:
    """Run a command; only the port and the file differ from what is written."""
    there = {"localhost:50051": server.replace("127.0.0.1", "localhost"), "/etc/segrpc/tls/ca.crt": str(ca)}
    program, *arguments = command
    assert program == "segrpc"
    text = "\n".join(arguments)
    for written, actual in there.items():
        assert text.count(written) == 1
        text = text.replace(written, actual)
    run = [sys.executable, "-m", "segrpc.client.cli", *text.split("\n")]
    return subprocess.run(run, timeout=60, check=False, stderr=subprocess.DEVNULL).returncode


def test_probes_see_a_server_that_speaks_tls_and_wants_credentials(tmp_path: Path) -> None:
    authority = trustme.CA()
    ca, certificate, key, keys = (tmp_path / name for name in ("ca.crt", "tls.crt", "tls.key", "keys.toml"))
    authority.cert_pem.write_to_path(ca)
    issued = authority.issue_cert("localhost")
    certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    made = subprocess.run(
        [sys.executable, "-m", "segrpc.service.cli", "key", "alice"], check=True, capture_output=True, timeout=60
    )
    keys.write_bytes(made.stdout)
    options = ("--tls-certificate", str(certificate), "--tls-key", str(key), "--keys-file", str(keys))
    with ServerProcess(*options, log=tmp_path / "log") as server:
        assert {name: probe(command, server.target, ca) for name, command in commands().items()} == {
            "startupProbe": 0,
            "readinessProbe": 0,
            "livenessProbe": 0,
            "HEALTHCHECK": 0,
        }
        target = server.target
    assert probe(commands()["livenessProbe"], target, ca) == 1


@pytest.mark.parametrize("name", ["readinessProbe", "livenessProbe"])
def test_a_probe_ends_before_its_time_is_up(name: str) -> None:
    deployment = yaml.safe_load((DEPLOY / "kustomize" / "base" / "deployment.yaml").read_text("utf-8"))
    limits = deployment["spec"]["template"]["spec"]["containers"][0][name]
    timeout = next(part for part in limits["exec"]["command"] if part.startswith("--timeout="))
    assert float(timeout.removeprefix("--timeout=")) < limits["timeoutSeconds"]
