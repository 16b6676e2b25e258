"""The handler of Refine: one stream, and the session that it is attached to.

Four tasks share the work: one reads messages, one computes rounds, one writes responses, one looks out for the
server's shutdown. In ``grpc.aio`` a stream that was cancelled, that expired or whose connection broke looks to its
reader like one that was half-closed. So only an explicit ``finish`` ends a session; every other end detaches it.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from typing import Any, TypeVar

from segrpc.service.admission.limits import Resource
from segrpc.service.engine.base import CancelToken, EncodeJob, SegmentJob, SegmentResult
from segrpc.service.errors import (
    ChunkOffsetError,
    ConfigNotFirstError,
    DrainingError,
    InvalidFieldError,
    OverloadedError,
    SegrpcError,
    WorkerUnavailableError,
)
from segrpc.service.images.known import KnownImage
from segrpc.service.images.upload import Upload
from segrpc.service.rpc import convert, refine_convert
from segrpc.service.rpc.outbox import Outbox
from segrpc.service.rpc.services import Services
from segrpc.service.rpc.sources import find_image
from segrpc.service.schemas import FloatType
from segrpc.service.sessions.edits import Scene
from segrpc.service.sessions.session import Event, ObjectResult, Plan, Rejection, Session
from segrpc.service.sessions.store import Attachment
from segrpc.v1 import refine_pb2, types_pb2

T = TypeVar("T")

QUEUE_TRIES = 5  # of a round, while the engine's queue is full
WORKER_TRIES = 2  # of a round that the engine gave up because its worker was lost: the edit may be what ends it
DEFAULT_RETRY_AFTER = 1.0  # seconds
DRAINING_RETRY_AFTER = 1.0  # seconds
CONFIG_ONCE = "the config comes once, at the beginning"


class RefineStream:
    """One call of Refine.

    Args:
        services: What it needs of the server.
        requests: The client's messages.
        context: The context of the call, a `CallContext`.
    """

    def __init__(self, services: Services, requests: AsyncIterator[refine_pb2.RefineRequest], context: Any) -> None:
        self._services = services
        self._requests = requests
        self._context = context
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # the session was taken away
        self._wake = asyncio.Event()  # there may be something to compute, or to read
        self._token = CancelToken()
        self._input_over = False
        self._finished = False

    async def run(self) -> None:
        """Serve the stream until its end.

        Raises:
            SegrpcError: If the protocol was broken, the session was taken away, or the server cannot go on.
        """
        config = await self._unless_draining(self._first())
        # By itself, because `write` notes only afterwards that it sent them: a status after a first write that was cut
        # off would send them again, and be lost.
        await self._context.send_initial_metadata(())
        attachment = await self._unless_draining(self._attach(config))
        clean = False
        try:
            await self._serve(config, attachment)
            self._context.call.finished = clean = self._finished  # and all that was sent before it is answered
        finally:
            if clean:
                self._services.sessions.close(attachment)
            else:
                self._services.sessions.detach(attachment)

    # Opening

    async def _unless_draining(self, work: Coroutine[Any, Any, T]) -> T:
        """Do a part of the opening; a session that is not open when the server shuts down is of no use any more."""
        opening = asyncio.ensure_future(work)
        draining = asyncio.ensure_future(self._services.draining.wait())
        try:
            await asyncio.wait({opening, draining}, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                raise DrainingError("the server is shutting down; begin anew elsewhere", DRAINING_RETRY_AFTER)
            return opening.result()
        finally:
            await _cancel([opening, draining])

    async def _first(self) -> refine_pb2.RefineConfig:
        request = await self._services.patience.read(self._requests, "the config")
        if request is None or request.WhichOneof("payload") != "config":
            raise ConfigNotFirstError("the first message must be the config")
        return request.config

    async def _attach(self, config: refine_pb2.RefineConfig) -> Attachment:
        convert.check_name("config.request_id", config.request_id)
        source = config.WhichOneof("source")
        if source == "resume":
            return self._resume(config)
        model = convert.find_model(self._services.engine.models, self._context.principal, config.model, "config.model")
        self._context.call.model = model.name
        options = refine_convert.refine_options(config, model.name, model.metadata)
        convert.tensor_dtype(config.output.tensor_dtype, "config.output.tensor_dtype")
        if source == "image":
            image = await find_image(self._services.images, self._owner, config.image, "config.image")
        elif source == "upload":
            image = await self._receive_image(config.upload)
        else:
            raise InvalidFieldError.of("config", "must have an image, an upload or a session to resume")
        scene = Scene(image.header.width, image.header.height, model.name, model.metadata, self._max_points)
        return self._services.sessions.open(image, scene, options, self._end)

    @property
    def _max_points(self) -> int:
        return self._services.limits.max_points

    @property
    def _owner(self) -> str:
        owner: str = self._context.principal.name
        return owner

    def _resume(self, config: refine_pb2.RefineConfig) -> Attachment:
        resume, sessions = config.resume, self._services.sessions
        # Whoever asks wrongly takes nothing away from the stream that has the session.
        session = sessions.find(self._owner, resume.session_id, resume.resume_token)
        self._context.call.model = model = session.scene.model
        self._context.principal.check_model(model)  # which may have changed since it was opened
        if config.model not in ("", model):
            raise InvalidFieldError.of("config.model", f"is {config.model!r}; the session works with {model!r}")
        session.check_revision(resume.last_revision)
        return sessions.resume(self._owner, resume.session_id, resume.resume_token, self._end)

    def _end(self, reason: SegrpcError) -> None:
        """Note that the session was taken away: from now on this stream must neither look at it nor change it."""
        if not self._ended.done():
            self._ended.set_exception(reason)

    @property
    def _taken(self) -> bool:
        return self._ended.done()

    async def _receive_image(self, header: refine_pb2.UploadHeader) -> KnownImage:
        """Put the image together that follows in chunks."""
        limits = self._services.limits
        try:
            upload = Upload(header.size, header.digest, limits.max_image_bytes, limits.max_chunk_bytes)
            with self._services.ledger.held(Resource.IN_FLIGHT_BYTES, self._owner, header.size):
                while not upload.complete:
                    request = await self._services.patience.read(self._requests, "a chunk of the image")
                    payload = None if request is None else request.WhichOneof("payload")
                    if payload == "config":
                        raise ConfigNotFirstError(CONFIG_ONCE)
                    if request is None or payload != "image":
                        raise ChunkOffsetError(f"the image is not complete: {upload.received} of {header.size} bytes")
                    upload.add(request.image.offset, request.image.data)
                    await self._send(refine_convert.upload_progress(upload.received))
                return await asyncio.to_thread(lambda: self._services.images.from_data(self._owner, upload.finish()))
        except InvalidFieldError as error:
            raise refine_convert.upload_terms(error) from None

    # Serving

    async def _serve(self, config: refine_pb2.RefineConfig, attachment: Attachment) -> None:
        session, sessions = attachment.session, self._services.sessions
        outbox = Outbox(keep_all=session.options.every_edit)
        missed = session.resume(config.resume.last_revision) if attachment.resumed else []
        outbox.put(refine_convert.opened(attachment, time.time() + sessions.idle_seconds))
        for event in missed:
            outbox.put(event)
        # In this order of importance, if several fail at once.
        tasks = [
            asyncio.ensure_future(work)
            for work in (
                self._ended,
                self._read(attachment, outbox),
                self._compute(session, outbox),
                self._write(config.output, outbox),
                self._watch(session, outbox),
            )
        ]
        writing = tasks[3]
        warming = asyncio.create_task(self._warm(session))
        try:
            # The writer is the last to finish its work; all others end only by failing, or before it.
            while not writing.done():
                done, _ = await asyncio.wait(
                    [task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED
                )
                failed = [task for task in tasks if task in done and task.exception() is not None]
                if failed:
                    await failed[0]
        finally:
            await _cancel([*tasks, warming])

    async def _read(self, attachment: Attachment, outbox: Outbox) -> None:
        session = attachment.session
        async for request in self._requests:
            if self._taken:
                return
            self._services.sessions.touch(attachment)
            if self._take(request, session, outbox):
                break
            await outbox.room()
            while session.full:
                self._wake.clear()
                await self._wake.wait()
        self._input_over = True
        self._wake.set()

    def _take(self, request: refine_pb2.RefineRequest, session: Session, outbox: Outbox) -> bool:
        """Take a message; return whether it is the last."""
        match request.WhichOneof("payload"):
            case "edit":
                self._context.call.edits += 1
                if request.seq < 1:
                    raise InvalidFieldError.of("seq", "is required for edits: 1 or more, rising from edit to edit")
                rejection = session.receive(refine_convert.edit(request))
                if rejection is not None:
                    outbox.put(rejection)
            case "cancel":
                for cancelled in session.cancel_through(request.cancel.seq):
                    outbox.put(cancelled)
                    self._token.cancel()
            case "finish":
                self._finished = True
            case "config":
                raise ConfigNotFirstError(CONFIG_ONCE)
            case "image":
                raise ChunkOffsetError("the image is complete, or was not announced in chunks")
            case _:
                raise InvalidFieldError.of("payload", "is required, and none is set that this version knows")
        self._wake.set()
        return self._finished

    async def _compute(self, session: Session, outbox: Outbox) -> None:
        while True:
            await outbox.room()
            if self._taken:
                return
            start, plan = time.perf_counter(), session.plan()
            if plan is None:
                if self._input_over:
                    break
                self._wake.clear()
                await self._wake.wait()
                continue
            for event in await self._outcome(session, plan, start):
                outbox.put(event)
            self._wake.set()
        outbox.close()

    async def _outcome(self, session: Session, plan: Plan, start: float) -> list[Event]:
        """Compute what a plan needs, and make it the session's state.

        Nothing comes of it if its edits were cancelled meanwhile, or if the session was taken away: then they are
        pending still.
        """
        try:
            result = await self._round(session, plan) if plan.input is not None else None
        except DrainingError:
            raise
        except SegrpcError as error:
            return [] if plan.cancelled or self._taken else session.reject(plan, error)
        if plan.cancelled or self._taken:
            return []
        return session.commit(plan, result, time.perf_counter() - start)

    async def _round(self, session: Session, plan: Plan) -> SegmentResult | None:
        """Ask the engine; ask again while the worker or the queue is not available."""
        assert plan.input is not None  # the caller looked
        image = session.image
        job = SegmentJob(session.scene.model, image.key, plan.input, header=image.header, owner=image.owner)
        tries = 0
        while not plan.cancelled:
            self._token, tries, asked = CancelToken(), tries + 1, time.perf_counter()
            try:
                result = await self._services.engine.segment(job, self._token)
                self._context.call.computed("round", job.model, result.times, asked)
                return result
            except (OverloadedError, WorkerUnavailableError) as error:
                if tries >= (QUEUE_TRIES if isinstance(error, OverloadedError) else WORKER_TRIES):
                    raise
                await asyncio.sleep(error.retry_after or DEFAULT_RETRY_AFTER)
        return None

    async def _write(self, output: types_pb2.OutputOptions, outbox: Outbox) -> None:
        dtype: FloatType | None = None
        if output.return_logits:
            dtype = convert.tensor_dtype(output.tensor_dtype, "config.output.tensor_dtype")
        while (item := await outbox.get()) is not None:
            if isinstance(item, Rejection):
                response = refine_convert.rejected(item)
            elif isinstance(item, ObjectResult):
                work = partial(refine_convert.result, item, output.mask_encoding, dtype)
                # PNG files take milliseconds to make, runs do not.
                is_png = output.mask_encoding == types_pb2.MASK_ENCODING_PNG
                response = await asyncio.to_thread(work) if is_png else work()
            else:
                response = item
            await self._send(response)

    async def _send(self, response: refine_pb2.RefineResponse) -> None:
        await self._services.patience.write(self._context, response)

    async def _watch(self, session: Session, outbox: Outbox) -> None:
        await self._services.draining.wait()
        seconds = self._services.drain_seconds
        outbox.put(refine_convert.draining(session.revision, session.applied_seq, time.time() + seconds))
        await asyncio.sleep(seconds)
        raise DrainingError("the server is shutting down; begin anew elsewhere", DRAINING_RETRY_AFTER)

    async def _warm(self, session: Session) -> None:
        """Encode the image ahead of the first edit. If that fails, the first edit tells."""
        image = session.image
        job = EncodeJob(session.scene.model, image.key, image.data, owner=image.owner)
        with contextlib.suppress(SegrpcError):
            asked = time.perf_counter()
            result = await self._services.engine.encode(job, CancelToken())
            self._context.call.computed("warm_up", job.model, result.times, asked)


async def _cancel(tasks: list[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
