import grpc
import pytest

from segrpc.client import AsyncSegmentationClient, SegmentationClient, UnauthenticatedError
from segrpc.client.channel import CallMetadata, is_local


@pytest.mark.parametrize(
    "target",
    ["localhost:1", "127.0.0.1:1", "127.8.8.8:1", "[::1]:1", "::1", "localhost", "dns:///localhost:1", "unix:/run/x"],
)
def test_targets_on_this_machine(target: str) -> None:
    assert is_local(target)


@pytest.mark.parametrize(
    "target",
    [
        *("example.org:1", "10.0.0.1:1", "0.0.0.0:1", "[::]:1", "localhost.example.org:1", "dns:///example.org:1"),
        *("dns://8.8.8.8/localhost:1", "ipv4:127.0.0.1:1,10.0.0.1:1", "127.0.0.1.example.org:1", "xds:///localhost"),
    ],
)
async def test_a_token_does_not_travel_in_the_clear(target: str) -> None:
    for kind in (SegmentationClient, AsyncSegmentationClient):
        with pytest.raises(ValueError, match="in the clear"):
            kind(target, token="secret")
    with SegmentationClient(target):  # without a token there is nothing to protect
        pass
    with SegmentationClient(target, token="secret", tls=True):
        pass


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="need each other"):
        SegmentationClient(client_key="key.pem")
    with pytest.raises(ValueError, match="either credentials"):
        SegmentationClient(tls=True, credentials=grpc.ssl_channel_credentials())
    with pytest.raises(TypeError, match="unknown option: tsl"):
        SegmentationClient(tsl=True)  # type: ignore[call-arg]


def failing() -> str:
    raise OSError("the vault is closed")


@pytest.mark.parametrize("token", ["", "two words", "líne", "a\nb", failing, lambda: None])
async def test_a_token_that_cannot_be_had(token: object) -> None:
    metadata = CallMetadata({"token": token})  # type: ignore[typeddict-item]
    with pytest.raises(UnauthenticatedError) as first:
        metadata.of_call()
    with pytest.raises(UnauthenticatedError) as second:
        await metadata.of_call_async()
    for caught in (first, second):
        assert "two words" not in str(caught.value)
