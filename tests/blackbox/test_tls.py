"""TLS in both directions, certificates that change, and what the server refuses to start with."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from segrpc.client import (
    AsyncSegmentationClient,
    NotFoundError,
    SegmentationClient,
    UnauthenticatedError,
    UnavailableError,
)
from segrpc.service.identity.keys import hash_of, new_key, toml_of
from tests.blackbox.flood import Flood
from tests.blackbox.scrape import Scrape
from tests.blackbox.test_buf_curl import BUF
from tests.server_process import ServerProcess


class Certificates:
    """Authorities and certificates in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority, self.stranger = trustme.CA(), trustme.CA()
        self.ca, self.other_ca = folder / "ca.pem", folder / "other-ca.pem"
        self.authority.cert_pem.write_to_path(self.ca)
        self.stranger.cert_pem.write_to_path(self.other_ca)
        self.certificate, self.key = folder / "server.pem", folder / "server.key"
        self.renew(self.authority)

    def renew(self, authority: trustme.CA) -> None:
        """Give the server another certificate: first the certificate, then the key, as tools do."""
        issued = authority.issue_cert("127.0.0.1", "localhost")
        self._replace(self.certificate, b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        self._replace(self.key, issued.private_key_pem.bytes())

    def break_key(self) -> None:
        """Put a key there that is not the certificate's."""
        self._replace(self.key, self.authority.issue_cert("127.0.0.1").private_key_pem.bytes())

    def client(self, authority: trustme.CA, *names: str, common_name: str | None = None) -> dict[str, Any]:
        """Issue a certificate for a client; return the options of a client that has it."""
        issued = authority.issue_cert(*names, common_name=common_name)
        stem = self.folder / f"client-{hash(issued)}"
        certificate, key = stem.with_suffix(".pem"), stem.with_suffix(".key")
        certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return {"ca": self.ca, "client_certificate": certificate, "client_key": key}

    @property
    def options(self) -> tuple[str, ...]:
        return ("--tls-certificate", str(self.certificate), "--tls-key", str(self.key))

    def _replace(self, file: Path, data: bytes) -> None:
        new = file.with_suffix(".new")
        new.write_bytes(data)
        new.replace(file)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@pytest.fixture
def server(certificates: Certificates, tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(*certificates.options, log=tmp_path / "log") as process:
        yield process


def cannot_connect(target: str, **options: Any) -> None:
    with SegmentationClient(target, timeout=10, **options) as client, pytest.raises(UnavailableError):
        client.health()


async def test_both_clients_speak_tls(server: ServerProcess, certificates: Certificates, photo: bytes) -> None:
    with SegmentationClient(server.target, ca=certificates.ca) as client, client.refine(photo) as session:
        assert session.click(100, 100).revision == 1
    async with AsyncSegmentationClient(server.target, ca=str(certificates.ca)) as asynchronous:
        assert await asynchronous.health()


def test_a_client_trusts_only_its_authorities(server: ServerProcess, certificates: Certificates) -> None:
    cannot_connect(server.target, ca=certificates.other_ca)
    cannot_connect(server.target, tls=True)  # the system's authorities
    cannot_connect(server.target)  # no TLS at all


def test_a_renewed_certificate_is_used_without_a_restart(server: ServerProcess, certificates: Certificates) -> None:
    with SegmentationClient(server.target, ca=certificates.ca) as before:
        assert before.health()
        certificates.break_key()
        with SegmentationClient(server.target, ca=certificates.ca) as meanwhile:
            assert meanwhile.health()  # with the old pair
        assert "is not that of the certificate" in server.log_text()
        certificates.renew(certificates.stranger)
        with SegmentationClient(server.target, ca=certificates.other_ca) as after:
            assert after.health()
        cannot_connect(server.target, ca=certificates.ca)
        assert before.health()  # a connection that is open stays open


def test_client_certificates_say_who_calls(certificates: Certificates, tmp_path: Path, photo: bytes) -> None:
    options = (*certificates.options, "--tls-client-ca", str(certificates.ca))
    with ServerProcess(*options, log=tmp_path / "log") as server:
        named = certificates.client(certificates.authority, "machine-7.example", common_name="camera 7")
        unnamed = certificates.client(certificates.authority, "machine-8.example")
        with SegmentationClient(server.target, **named) as seven, SegmentationClient(server.target, **unnamed) as eight:
            digest = seven.upload(photo).digest
            assert seven.segment(digest, points=[(100, 100)]).predictions
            with pytest.raises(NotFoundError):
                eight.segment(digest, points=[(100, 100)])
        cannot_connect(server.target, ca=certificates.ca)  # without a certificate
        cannot_connect(server.target, **certificates.client(certificates.stranger, common_name="camera 7"))
    log = server.log_text()  # only now: calls are logged after they are answered
    assert "principal='certificate:camera 7'" in log
    assert "principal='certificate:machine-8.example'" in log


def test_strangers_do_not_come_as_far_as_a_stream(certificates: Certificates, tmp_path: Path, photo: bytes) -> None:
    client_ca = ("--tls-client-ca", str(certificates.ca), "--metrics-listen", "0")
    known = {**certificates.client(certificates.authority, common_name="camera 7"), "timeout": 60}
    with ServerProcess(*certificates.options, *client_ca, log=tmp_path / "log") as server:
        with SegmentationClient(server.target, **known) as before, Flood(server.target, str(certificates.ca)) as flood:
            for _ in range(5):
                with SegmentationClient(server.target, **known) as fresh:
                    for client in (before, fresh):
                        assert client.health()
                        assert client.segment(photo, points=[(5, 5)]).predictions
            assert flood.goes_on()
        found = Scrape(server).samples.items()
    begun = {dict(labels)["grpc_method"]: n for (name, labels), n in found if name == "grpc_server_call_started_total"}
    assert begun == {"grpc.health.v1.Health/Check": 10, "segrpc.v1.SegmentationService/Segment": 10}


def test_a_token_counts_more_than_a_certificate(certificates: Certificates, tmp_path: Path) -> None:
    key, keys = new_key(), tmp_path / "keys.toml"
    keys.write_text(toml_of("alice", key))
    options = (*certificates.options, "--tls-client-ca", str(certificates.ca), "--keys-file", str(keys))
    mine = certificates.client(certificates.authority, common_name="gateway")
    with ServerProcess(*options, log=tmp_path / "log") as server:
        for token in (key, None):
            with SegmentationClient(server.target, token=token, **mine) as client:
                client.models()
        with SegmentationClient(server.target, token=new_key(), **mine) as client, pytest.raises(UnauthenticatedError):
            client.models()
    log = server.log_text()
    assert log.count("principal='key:alice'") == log.count("principal='certificate:gateway'") == 1


def run(module: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def test_the_readmes_commands(certificates: Certificates, tmp_path: Path) -> None:
    made = run("segrpc.service.cli", "key", "alice")
    key = made.stderr.split()[-1]
    assert (made.returncode, hash_of(key) in made.stdout, key in made.stdout) == (0, True, False)
    keys = tmp_path / "keys.toml"
    keys.write_text(made.stdout)
    with ServerProcess(*certificates.options, "--keys-file", str(keys), log=tmp_path / "log") as server:
        header = ["-H", f"Authorization: Bearer {key}", "--reflect-header", "*"]
        url = f"https://{server.target}"
        curl = [str(BUF), "curl", "--protocol", "grpc", "--cacert", str(certificates.ca)]
        for command in (
            [*curl, *header, "--list-methods", url],
            [*curl, *header, "-d", "{}", f"{url}/segrpc.v1.ModelService/ListModels"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
        assert "grabcut" in done.stdout
        refused = subprocess.run(
            [*curl, "--list-methods", url], capture_output=True, text=True, timeout=60, check=False
        )
        assert refused.returncode != 0

        ask = ["models", "--server", server.target, "--ca", str(certificates.ca)]
        assert run("segrpc.client.cli", *ask, "--token", key).returncode == 0
        assert (
            run("segrpc.client.cli", *ask, env={"SEGRPC_TOKEN": key, "PYTHONPATH": ":".join(sys.path)}).returncode == 0
        )
        denied = run("segrpc.client.cli", *ask)
        assert (denied.returncode, "CREDENTIAL_MISSING" in denied.stderr) == (1, True)
        clear = run("segrpc.client.cli", "models", "--server", "example.org:1", "--token", key)
        assert (clear.returncode, "in the clear" in clear.stderr, key in clear.stderr) == (2, True, False)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ("", "no TLS (tls_certificate, tls_key) and no credentials (keys_file, jwt_issuer or tls_client_ca)"),
        ("tls", "no credentials (keys_file, jwt_issuer or tls_client_ca)"),
        ("keys", "no TLS (tls_certificate, tls_key)"),
    ],
)
def test_beyond_the_loopback_interface_strangers_are_kept_out(
    certificates: Certificates, tmp_path: Path, address: str, given: str, missing: str
) -> None:
    (tmp_path / "keys.toml").write_text(toml_of("alice", new_key()))
    keys = ("--keys-file", str(tmp_path / "keys.toml"))
    options = {"": (), "tls": certificates.options, "keys": keys}[given]
    refused = run("segrpc.service.cli", "serve", "--listen", address, *options)
    assert refused.returncode == 1
    assert f"there is {missing};" in refused.stderr
    assert "--insecure" in refused.stderr


@pytest.mark.parametrize("how", ["insecure", "secure"])
def test_what_may_listen_everywhere(certificates: Certificates, tmp_path: Path, how: str) -> None:
    key = new_key()
    (tmp_path / "keys.toml").write_text(toml_of("alice", key))
    secure = (*certificates.options, "--keys-file", str(tmp_path / "keys.toml"))
    options = ("--insecure",) if how == "insecure" else secure
    with ServerProcess("--listen", "0.0.0.0:0", *options, log=tmp_path / "log") as server:
        target = f"127.0.0.1:{server.target.rpartition(':')[2]}"
        mine: dict[str, Any] = {} if how == "insecure" else {"ca": certificates.ca, "token": key}
        with SegmentationClient(target, **mine) as client:
            assert client.models()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tls-key", "k"], "need each other"),
        (["--tls-client-ca", "a"], "needs tls_certificate"),
        (["--jwt-issuer", "i"], "need each other"),
        (["--jwt-jwks", "j"], "need each other"),
        (["--tls-certificate", "{ca}", "--tls-key", "{key}"], "is not that of the certificate"),
        (["--tls-certificate", "{key}", "--tls-key", "{key}"], "no certificate in PEM"),
        (["--tls-certificate", "{ca}", "--tls-key", "{ca}"], "no private key in PEM"),
        (["--keys-file", "{folder}/nothing"], "No such file"),
        (["--keys-file", "{ca}"], "keys_file"),
        (["--jwt-issuer", "i", "--jwt-audience", "a", "--jwt-jwks", "{ca}"], "is no JSON Web Key Set"),
    ],
)
def test_settings_that_cannot_work_stop_the_start(
    certificates: Certificates, options: list[str], expected: str
) -> None:
    names = {"ca": certificates.ca, "key": certificates.key, "folder": certificates.folder}
    refused = run("segrpc.service.cli", "serve", "--listen", "127.0.0.1:0", *(one.format(**names) for one in options))
    assert refused.returncode == 1
    assert expected in refused.stderr
    assert "Traceback" not in refused.stderr
