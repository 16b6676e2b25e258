"""How channels are opened: options that both clients share."""

import json
from collections.abc import Sequence
from typing import Any

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 60.0  # seconds; a first call on a CPU encodes the image
RECONNECT_SECONDS = 60.0  # half of what the server keeps a session for, by default
MAX_MESSAGE_BYTES = 64 * 2**20  # an embedding in float32 has 17 MB

# Calls that may be repeated: nothing depends on how often they ran. Streams never are.
_SAFE = [
    {"service": "segrpc.v1.SegmentationService", "method": "Segment"},
    {"service": "segrpc.v1.SegmentationService", "method": "EncodeImage"},
    {"service": "segrpc.v1.ModelService"},
]
_RETRY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 3,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


def channel_options(extra: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the options of a channel; ``extra`` ones win."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", 30_000),  # less than 10 s would be refused as too many pings
        # Tried again soon: gRPC would wait up to two minutes, longer than a person or a session does.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A connection of its own: the server keeps callers apart by connection.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.service_config", json.dumps({"methodConfig": [{"name": _SAFE, "retryPolicy": _RETRY}]})),
        *extra,
    ]
