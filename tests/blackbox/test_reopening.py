"""A server whose port is opened anew, because grpc.aio gave up, goes on as if nothing had been."""

import socket
import ssl
from pathlib import Path

from segrpc.client import SegmentationClient
from tests.blackbox.frames import NAMELESS
from tests.blackbox.test_tls import Certificates
from tests.server_process import ServerProcess


def break_off(server: ServerProcess, authority: Path) -> None:
    """Make grpc.aio give up; returns once the server has ended this connection."""
    context = ssl.create_default_context(cafile=authority)
    context.set_alpn_protocols(["h2"])
    host, _, port = server.target.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        connection.sendall(NAMELESS)
        try:
            while connection.recv(2**16):
                pass
        except (ConnectionError, ssl.SSLError):  # it says no goodbye
            pass


def test_a_session_goes_on_under_tls(tmp_path: Path, photo: bytes) -> None:
    certificates = Certificates(tmp_path)
    with ServerProcess(*certificates.options, log=tmp_path / "log") as server:
        with SegmentationClient(server.target, ca=certificates.ca) as client, client.refine(photo) as session:
            first = session.click(100, 100)
            for count in range(1, 4):
                break_off(server, certificates.ca)
                result = session.click(100 + 20 * count, 90)
                assert (result.revision, len(result.rounds[-1].points)) == (count + 1, count + 1)
                assert result.rounds[-1].mask_revision == count  # which the server still has
                assert server.log_text().count("serving anew") == count
            assert session.undo(3).shown_revision == first.shown_revision
            assert session.result() is not None
            assert client.replay(session.export(), photo).identical
        assert "bug in" not in server.log_text()


def test_a_key_that_is_being_replaced_does_not_keep_the_port_closed(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    with ServerProcess(*certificates.options, log=tmp_path / "log") as server:
        certificates.break_key()
        break_off(server, certificates.ca)
        with SegmentationClient(server.target, ca=certificates.ca, timeout=60) as client:
            assert client.models()  # with the old pair
        certificates.renew(certificates.stranger)
        break_off(server, certificates.other_ca)
        with SegmentationClient(server.target, ca=certificates.other_ca, timeout=60) as client:
            assert client.models()
