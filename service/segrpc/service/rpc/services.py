"""What handlers need of the server."""

import asyncio
from dataclasses import dataclass

from segrpc.service.admission.ledger import Ledger
from segrpc.service.engine.base import Engine
from segrpc.service.images.library import ImageLibrary
from segrpc.service.rpc.patience import Patience
from segrpc.service.sessions.current_images import CurrentImages
from segrpc.service.sessions.store import SessionStore
from segrpc.v1 import model_service_pb2


@dataclass(frozen=True, slots=True)
class Services:
    """What handlers need of the server.

    Attributes:
        engine: Runs the models.
        images: Finds images.
        current_images: Remembers the image of each ``session_id`` of stateless calls.
        sessions: Holds interactive sessions.
        ledger: Counts who has how much of what.
        limits: What requests must keep to.
        patience: Waits for clients.
        draining: Set when the server begins to shut down.
        drain_seconds: How long streams may go on after that.
    """

    engine: Engine
    images: ImageLibrary
    current_images: CurrentImages
    sessions: SessionStore
    ledger: Ledger
    limits: model_service_pb2.Limits
    patience: Patience
    draining: asyncio.Event
    drain_seconds: float
