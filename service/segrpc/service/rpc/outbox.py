"""What a Refine stream still has to send."""

import asyncio
from collections import OrderedDict
from dataclasses import replace
from typing import TypeAlias

from segrpc.service.sessions.session import Event, ObjectResult
from segrpc.v1 import refine_pb2

Item: TypeAlias = Event | refine_pb2.RefineResponse

MAX_ITEMS = 64  # unsent ones; computing waits beyond that, and so does reading


class Outbox:
    """A queue between the one who computes and the one who writes.

    Transport backpressure begins only megabytes behind a client that does not read. So what is stale must be dropped
    here, before it is written: a result is replaced by a newer one of the same object, which takes over its rounds.

    Args:
        keep_all: Whether stale results are sent all the same.
    """

    def __init__(self, keep_all: bool) -> None:
        self._keep_all = keep_all
        self._items: OrderedDict[object, Item] = OrderedDict()
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, item: Item) -> None:
        """Add an item at the end."""
        key: object = object()
        if isinstance(item, ObjectResult) and not self._keep_all:
            key = item.object_id
            stale = self._items.pop(key, None)
            if isinstance(stale, ObjectResult):
                item = replace(item, rounds=stale.rounds + item.rounds)
        elif isinstance(item, refine_pb2.RefineResponse) and item.HasField("upload"):
            key = refine_pb2.UploadProgress
        self._items[key] = item
        self._changed.set()

    def close(self) -> None:
        """Say that nothing will be added any more."""
        self._closed = True
        self._changed.set()

    async def get(self) -> Item | None:
        """Take the next item, as soon as there is one; None if there will be none."""
        while not self._items:
            if self._closed:
                return None
            await self._wait()
        _, item = self._items.popitem(last=False)
        self._changed.set()
        return item

    async def room(self) -> None:
        """Wait until items may be added."""
        while len(self._items) >= MAX_ITEMS:
            await self._wait()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()
