"""Encoding an image once for all jobs that need it at the same time."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from segrpc.service.engine.base import CancelToken, StageTimes
from segrpc.service.engine.pacing import Device, Place
from segrpc.service.engine.waiting import until
from segrpc.service.engine.work import EncodeWork


class SharedEncode:
    """An encoding that is under way or done, and how many use it.

    Args:
        device: Where it runs.
        place: The place that the work has there.
    """

    def __init__(self, device: Device, place: Place) -> None:
        # Its own token: it goes on while anyone needs it, whoever asked first.
        self.token = CancelToken()
        self.task = asyncio.create_task(device.run(place, self.token))
        self.users = 0


class SharedEncodes:
    """The encodings that are in use, by model and image. Lives on the event loop."""

    def __init__(self) -> None:
        self._encodes: dict[tuple[str, str], SharedEncode] = {}
        self._count = 0

    @property
    def count(self) -> int:
        """How many images were encoded."""
        return self._count

    @asynccontextmanager
    async def use(
        self,
        device: Device,
        work: EncodeWork,
        token: CancelToken,
        times: StageTimes,
        stale: SharedEncode | None,
    ) -> AsyncIterator[SharedEncode]:
        """Have an image encoded, or wait for the encoding that is under way; the embedding is kept inside the context.

        The encoding is cancelled when nobody waits for it any more; then this returns when it has ended.

        Args:
            device: Where to encode.
            work: What to encode.
            token: Says how long to wait.
            times: Gets the times of the encoding, or of the wait for somebody else's.
            stale: An encoding that turned out to be of no use, because its embedding is gone.

        Raises:
            DeadlineError: If the token says to stop.
            OverloadedError: If the device has no room for another encoding.
            WorkerLost, SegrpcError: As `Backend.run`.
        """
        token.check()  # or work would start that has to be stopped at once
        key = (work.model, work.digest)
        encode = self._encodes.get(key)
        own = encode is None or encode is stale
        if encode is None or encode is stale:
            encode = self._encodes[key] = SharedEncode(device, device.admit(work, token))
            encode.task.add_done_callback(self._encoded)
        encode.users += 1
        start = time.perf_counter()
        try:
            encoded = await until(encode.task, token)
            times.add(encoded.times if own else StageTimes(queue=time.perf_counter() - start))
            yield encode
        finally:
            encode.users -= 1
            over = encode.users == 0 or _failed(encode.task)
            if over and self._encodes.get(key) is encode:
                del self._encodes[key]
            if encode.users == 0:
                encode.token.cancel()
                await asyncio.wait({encode.task})
                if not _failed(encode.task):
                    device.backend.release(*key)

    def _encoded(self, task: "asyncio.Task[Any]") -> None:
        if not _failed(task) and task.result().times.encode_image > 0:
            self._count += 1


def _failed(task: "asyncio.Task[Any]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
