"""TLS for the server's port, with certificates that are read again when their files change."""

from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from segrpc.service.identity.watched import Watched


class Certificates:
    """The server's certificate and its key, and whose certificates clients must have.

    Args:
        certificate: The server's certificate and those between it and its authority, in PEM.
        key: The certificate's private key in PEM, not encrypted.
        client_ca: The authorities of client certificates in PEM; None asks clients for none.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is no PEM of its kind, or the key is not the certificate's.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        files = [certificate, key, *([client_ca] if client_ca else [])]
        self._watched = Watched(files, lambda: _read(certificate, key, client_ca))
        self._asks_clients = client_ca is not None

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials for one port. New connections get what the files say at that time."""
        current = self._watched.get()

        def changed() -> Any:  # a configuration or None, which the stubs of grpc forget
            # Called for each handshake, by threads of gRPC. None leaves what it has.
            nonlocal current
            newest = self._watched.get()
            if newest is current:
                return None
            current = newest
            return newest

        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            current, changed, require_client_authentication=self._asks_clients
        )
        return credentials


def _read(certificate: Path, key: Path, client_ca: Path | None) -> grpc.ServerCertificateConfiguration:
    chain, secret = certificate.read_bytes(), key.read_bytes()
    _check_pair(chain, secret, certificate, key)
    authorities = None if client_ca is None else client_ca.read_bytes()
    if authorities is not None:
        _certificates(authorities, client_ca)
    return grpc.ssl_server_certificate_configuration([(secret, chain)], root_certificates=authorities)


def _check_pair(chain: bytes, secret: bytes, certificate: Path, key: Path) -> None:
    """Look whether a key is a certificate's. gRPC would only tell clients, one handshake after the other."""
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    try:
        owned = load_pem_private_key(secret, password=None).public_key().public_bytes(*form)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError(f"{key} is no private key in PEM, or an encrypted one") from None
    if _certificates(chain, certificate)[0].public_key().public_bytes(*form) != owned:
        raise ValueError(f"the key in {key} is not that of the certificate in {certificate}")


def _certificates(text: bytes, file: Path | None) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(text)
    except ValueError:
        raise ValueError(f"{file} has no certificate in PEM, or a broken one") from None
