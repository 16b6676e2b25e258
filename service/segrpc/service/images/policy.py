"""What the server may read on behalf of others: which files, which hosts, which addresses."""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Final

DEFAULT_PORTS: Final = {"http": 80, "https": 443}

_HOST: Final = re.compile(r"(?P<wildcard>\*\.)?(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+])(:(?P<port>[0-9]{1,5}))?")

_UNICAST: Final = IPv6Network("2000::/3")
_NAT64: Final = IPv6Network("64:ff9b::/96")
# Teredo, benchmarks and the like; documentation; 6to4. Python's `is_global` differs on these from version to version.
_NOT_PUBLIC: Final = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))


@dataclass(frozen=True, slots=True)
class SourcePolicy:
    """What images may be read by path or URL. By default nothing may.

    Attributes:
        media_roots: Folders whose files may be read, with all that is below them.
        allowed_hosts: Hosts that may be asked: ``images.example.org``, ``*.example.org`` (its sub-domains, not
            itself), ``192.0.2.1``, ``[2001:db8::1]``. With ``:port`` that port may be used, otherwise only 80 for http
            and 443 for https. International names in their ASCII form, ``xn--...``.
        allow_private_addresses: Whether these hosts may have addresses that are not public, such as 127.0.0.1.
        timeout: Seconds for fetching an image, from the first look-up to the last byte.
        max_redirects: How many redirections are followed. Each must be allowed in itself.

    Raises:
        ValueError: If a host is malformed.
    """

    media_roots: tuple[Path, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allow_private_addresses: bool = False
    timeout: float = 10.0
    max_redirects: int = 3

    def __post_init__(self) -> None:
        for host in self.allowed_hosts:
            parts = _HOST.fullmatch(host)
            if parts is None or int(parts["port"] or 0) > 65535:
                raise ValueError(
                    f"--allowed-host {host!r} must be a host name or *.DOMAIN, optionally with :PORT, and no URL; "
                    "IPv6 addresses stand in brackets, international names in their ASCII form"
                )

    def allows(self, scheme: str, host: str, port: int) -> bool:
        """Tell whether a host may be asked.

        Args:
            scheme: ``http`` or ``https``.
            host: The name or address, in ASCII and without brackets.
            port: The port.
        """
        host = host.lower().rstrip(".")
        return any(_matches(allowed, scheme, host, port) for allowed in self.allowed_hosts)


DEFAULT_POLICY: Final = SourcePolicy()


def _matches(allowed: str, scheme: str, host: str, port: int) -> bool:
    parts = _HOST.fullmatch(allowed)
    assert parts is not None  # checked when the policy was made
    name = parts["name"].strip("[]").lower().rstrip(".")
    if port != int(parts["port"] or DEFAULT_PORTS[scheme]):
        return False
    return host.endswith(f".{name}") if parts["wildcard"] else host == name


def is_public(address: str) -> bool:
    """Tell whether an IP address can be reached by anyone, so that asking it reveals nothing of the server's network.

    An address that stands for another one (IPv4 in IPv6, NAT64) is judged by that one.
    """
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    elif isinstance(ip, IPv6Address) and ip in _NAT64:
        ip = IPv4Address(int(ip) & 0xFFFFFFFF)
    if isinstance(ip, IPv6Address) and (ip not in _UNICAST or any(ip in network for network in _NOT_PUBLIC)):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)
