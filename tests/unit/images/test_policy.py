import pickle
from pathlib import Path

import pytest

from segrpc.service.images.policy import SourcePolicy, is_public


def test_by_default_nothing_is_allowed() -> None:
    policy = SourcePolicy()
    assert not policy.allows("https", "example.org", 443)
    assert (policy.media_roots, policy.allow_private_addresses) == ((), False)


def test_a_policy_is_a_value() -> None:
    policy = SourcePolicy((Path("/media"),), ("example.org",), timeout=3)
    copy = pickle.loads(pickle.dumps(policy))
    assert copy == policy
    assert hash(copy) == hash(policy)


@pytest.mark.parametrize(
    ("allowed", "scheme", "host", "port", "expected"),
    [
        ("images.example.org", "https", "images.example.org", 443, True),
        ("images.example.org", "http", "images.example.org", 80, True),
        ("images.example.org", "https", "IMAGES.Example.org.", 443, True),
        ("IMAGES.example.org", "https", "images.example.org", 443, True),
        ("images.example.org", "https", "images.example.org", 80, False),
        ("images.example.org", "https", "images.example.org", 8443, False),
        ("images.example.org:8443", "https", "images.example.org", 8443, True),
        ("images.example.org:8443", "http", "images.example.org", 8443, True),
        ("images.example.org:8443", "https", "images.example.org", 443, False),
        ("example.org", "https", "images.example.org", 443, False),
        ("example.org", "https", "badexample.org", 443, False),
        ("example.org", "https", "example.org.evil.net", 443, False),
        ("*.example.org", "https", "a.b.example.org", 443, True),
        ("*.example.org", "https", "example.org", 443, False),
        ("*.example.org", "https", "badexample.org", 443, False),
        ("*.example.org:81", "http", "a.example.org", 81, True),
        ("192.0.2.1", "http", "192.0.2.1", 80, True),
        ("[2001:DB8::1]:81", "http", "2001:db8::1", 81, True),
    ],
)
def test_allowed_hosts(allowed: str, scheme: str, host: str, port: int, expected: bool) -> None:
    assert SourcePolicy(allowed_hosts=("other.example", allowed)).allows(scheme, host, port) is expected


@pytest.mark.parametrize(
    "host", ["", "https://example.org", "example.org/x", "*", "*.", "a@b", "::1", "bücher.example", "a:b", "a:65536"]
)
def test_malformed_hosts_are_found_at_once(host: str) -> None:
    with pytest.raises(ValueError, match="--allowed-host"):
        SourcePolicy(allowed_hosts=(host,))


@pytest.mark.parametrize("address", ["8.8.8.8", "2600::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "2600::1%eth0"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1"),
        *(
            "192.0.2.1",
            "192.168.0.1",
            "198.18.0.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.1.1.1",
            "240.0.0.1",
            "255.255.255.255",
        ),
        *("::", "::1", "::127.0.0.1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "fec0::1", "100::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::808:808"),
        *(
            "2001:db8::1",
            "2001::1",
            "2001:0:4136:e378:8000:63bf:3fff:fdd2",
            "2002:7f00:1::",
            "2002:808:808::",
            "3fff::1",
        ),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
