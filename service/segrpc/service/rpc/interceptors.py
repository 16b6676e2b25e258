"""The boundary of every call: who calls, parsing, errors to statuses, request ids, telling observers, draining."""

import asyncio
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from segrpc.service.admission.ledger import Ledger
from segrpc.service.admission.limits import Resource
from segrpc.service.errors import DrainingError, MalformedMessageError, SegrpcError
from segrpc.service.identity.authenticator import Authenticator
from segrpc.service.identity.principal import ANONYMOUS, Principal
from segrpc.service.rpc.caller import CallContext, credentials_of, trace_parent_of
from segrpc.service.rpc.offload import COPY_BYTES, sized
from segrpc.service.rpc.status import CHALLENGE_KEY, DETAILS_KEY, challenge_of, internal_status, status_of
from segrpc.service.telemetry.call import Call, Observer

log = logging.getLogger("segrpc.rpc")

T = TypeVar("T")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"  # generic for type checkers only

TRAVEL_SECONDS = 0.5  # that a call may take to reach us

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_OWN_SERVICES = "/segrpc."
UNKNOWN_METHOD = "/other"  # what gRFC A66 calls methods that are not registered: their names are the callers' own
_OPEN_SERVICES = "/grpc.health."  # load balancers have no credentials


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps every handler.

    Messages reach it as bytes, because grpc answers UNKNOWN to bytes that it cannot parse; what handlers raise leaves
    it as a status of the table in `segrpc.service.rpc.status`. Who calls is found out before anything that the
    caller sent is parsed; in a stream keys are looked at again for each message, so that one that was withdrawn ends.

    Args:
        authenticator: Finds out who calls.
        ledger: Counts calls and the bytes of their messages, and refuses what is too much.
        observers: Are told of every call.

    Attributes:
        draining: Set by `drain`; long calls look at it.
    """

    def __init__(self, authenticator: Authenticator, ledger: Ledger, observers: Sequence[Observer] = ()) -> None:
        self._authenticator = authenticator
        self._ledger = ledger
        self._observers = tuple(observers)
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = asyncio.Event()

    @property
    def active(self) -> int:
        """How many calls of the segmentation and model services are in progress."""
        return self._active

    async def drain(self, seconds: float) -> bool:
        """Refuse new calls of the segmentation and model services; wait for those in progress.

        Args:
            seconds: How long to wait at most.

        Returns:
            Whether all have ended.
        """
        self.draining.set()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Replace a handler by a wrapped one."""
        handler = await continuation(handler_call_details)
        if handler is None:
            self._count_unknown()
            return None
        method = handler_call_details.method
        parse, serialise = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary:
            wrapped = self._unary_unary(method, parse, handler.unary_unary, serialise)
            return handler._replace(request_deserializer=None, response_serializer=None, unary_unary=wrapped)  # type: ignore[attr-defined,no-any-return]
        if handler.stream_unary:
            wrapped = self._stream_unary(method, parse, handler.stream_unary, serialise)
            return handler._replace(request_deserializer=None, response_serializer=None, stream_unary=wrapped)  # type: ignore[attr-defined,no-any-return]
        if handler.unary_stream:
            wrapped = self._to_stream(method, _one_parser(method, parse), handler.unary_stream, serialise)
            return handler._replace(request_deserializer=None, response_serializer=None, unary_stream=wrapped)  # type: ignore[attr-defined,no-any-return]
        wrapped = self._to_stream(method, self._stream_parser(method, parse), handler.stream_stream, serialise)
        return handler._replace(request_deserializer=None, response_serializer=None, stream_stream=wrapped)  # type: ignore[attr-defined,no-any-return]

    def _count_unknown(self) -> None:
        """Tell the observers of a call of a method that there is not; grpc answers UNIMPLEMENTED by itself."""
        record = Call(UNKNOWN_METHOD, own=False, observers=self._observers, status="UNIMPLEMENTED")
        record.begin()
        record.end()

    def _unary_unary(self, method: str, parse: Any, behaviour: Any, serialise: Any) -> Any:
        async def answer(raw: bytes, context: Any) -> bytes:
            async with self._call(method, context, serialise) as call:
                call.record.received_bytes = len(raw)
                with self._ledger.held(Resource.IN_FLIGHT_BYTES, call.principal.name, len(raw)):
                    request = await sized(len(raw), COPY_BYTES, _parser(method, parse), raw)
                    call.adopt(request)
                    response = await behaviour(request, call.context)
                if isinstance(response, bytes):  # the handler serialised it, because it is large
                    data = response
                else:
                    data = await sized(response.ByteSize(), COPY_BYTES, serialise, response)
                call.record.sent_bytes = len(data)
                return data

        return answer

    def _stream_unary(self, method: str, parse: Any, behaviour: Any, serialise: Any) -> Any:
        async def answer(raw: AsyncIterator[bytes], context: Any) -> bytes:
            async with self._call(method, context, serialise) as call:
                response = await behaviour(self._stream_parser(method, parse)(raw, call), call.context)
                return call.context.serialised(response)

        return answer

    def _to_stream(self, method: str, parse: Callable[[Any, "_Call"], Any], behaviour: Any, serialise: Any) -> Any:
        """Wrap a handler that answers with a stream: an async generator, or a coroutine that writes."""
        if inspect.isasyncgenfunction(behaviour):

            async def generate(raw: Any, context: Any) -> AsyncIterator[bytes]:
                async with self._call(method, context, serialise, Resource.STREAMS) as call:
                    async for response in behaviour(parse(raw, call), call.context):
                        yield call.context.serialised(response)

            return generate

        async def answer(raw: Any, context: Any) -> Any:
            async with self._call(method, context, serialise, Resource.STREAMS) as call:
                return await behaviour(parse(raw, call), call.context)

        return answer

    def _stream_parser(self, method: str, parse: Any) -> Callable[[AsyncIterator[bytes], "_Call"], AsyncIterator[Any]]:
        parse_one = _parser(method, parse)

        async def parsed(raw: AsyncIterator[bytes], call: "_Call") -> AsyncIterator[Any]:
            async for message in raw:
                self._renew(method, call)
                call.record.received_bytes += len(message)
                request = parse_one(message)
                if not call.record.request_id:
                    call.adopt(request)
                yield request
            # A stream whose client left looks to its reader like one that was half-closed. Another read finds nothing,
            # but until it tells so gRPC has told of the client too, and cancels this call.
            await call.context.read()

        return parsed

    def _renew(self, method: str, call: "_Call") -> None:
        """Look again at who calls, and at what they may do; raise if the stream may not go on."""
        before = call.principal
        principal = call.principal = self._authenticator.renew(before, call.authorization)
        if principal is not before and method.startswith(_OWN_SERVICES):
            principal.check_method(name_of_method(method))
            if call.record.model:
                principal.check_model(call.record.model)

    @asynccontextmanager
    async def _call(
        self, method: str, context: Any, serialise: Any, counted: Resource = Resource.REQUESTS
    ) -> AsyncIterator["_Call"]:
        """Find out who calls, turn what is raised inside into a status, count the call and tell the observers."""
        own = method.startswith(_OWN_SERVICES)
        record = Call(method, own, self._observers, trace_parent_of(context))
        call = _Call(CallContext(context, ANONYMOUS, record, serialise))
        record.begin()
        try:
            if own:
                self._begin()
            if not method.startswith(_OPEN_SERVICES):
                call.authorization, certificate = credentials_of(context)
                call.principal = await self._authenticator.authenticate(call.authorization, certificate)
            if own:
                call.principal.check_method(name_of_method(method))
            with self._ledger.held(counted, call.principal.name) if own else nullcontext():
                yield call
            record.status = "OK"
        except grpc.aio.AbortError:
            record.status, record.error = "UNKNOWN", "aborted by its handler"
            raise
        except SegrpcError as error:
            status = status_of(error, record.request_id)
            record.status, record.reason, record.error = _CODES[status.code].name, error.reason, error.message
            await _abort(context, status, challenge_of(error))
        except grpc.aio.InternalError:
            # What grpc tells a writer whose client left. Nobody will see the status.
            await context.abort(grpc.StatusCode.CANCELLED, "the client left")
        except Exception:
            error_id = record.request_id or uuid.uuid4().hex
            record.status = record.reason = "INTERNAL"
            record.error = f"a bug; its traceback has the id {error_id}"
            log.exception("bug in %s, error id %s", method, error_id)
            await _abort(context, internal_status(error_id))
        finally:
            if own:
                self._end()
            if ran_out_of_time(record, context.time_remaining(), streams=counted is Resource.STREAMS):
                record.status = "DEADLINE_EXCEEDED"
            record.end()

    def _begin(self) -> None:
        self._active += 1
        self._idle.clear()
        if self.draining.is_set():
            raise DrainingError("the server is shutting down; ask another, or this one later", retry_after=1.0)

    def _end(self) -> None:
        self._active -= 1
        if not self._active:
            self._idle.set()


class _Call:
    """What the boundary learns of a call.

    Args:
        context: What the handler gets as its context.

    Attributes:
        authorization: The credential that came with it, as `credentials_of` returns it.
    """

    def __init__(self, context: CallContext) -> None:
        self.context = context
        self.record = context.call
        self.authorization: Sequence[str] = ()

    @property
    def principal(self) -> Principal:
        """Who calls; anonymous until that is known."""
        return self.context.principal

    @principal.setter
    def principal(self, principal: Principal) -> None:
        self.context.principal = principal
        self.record.principal = principal.name

    def adopt(self, request: Any) -> None:
        """Take the message's own id, or invent one and put it into the message. A stream's is in its config."""
        if "config" in request.DESCRIPTOR.fields_by_name and request.HasField("config"):
            request = request.config
        if "request_id" in request.DESCRIPTOR.fields_by_name:
            request.request_id = request.request_id or uuid.uuid4().hex
            self.record.request_id = request.request_id[:128]


def name_of_method(method: str) -> str:
    """Return a method's name, as keys and tokens list it, from that of its call."""
    return method.rpartition("/")[2]


def ran_out_of_time(record: Call, remaining: float | None, *, streams: bool) -> bool:
    """Tell whether a call ended because its time was over, which looks like something else.

    A client's clock runs out before ours, by as long as the call took to come: then it cancels.

    Args:
        record: What is known of the call.
        remaining: Seconds until its deadline, by our clock; None without a deadline.
        streams: Whether the client sends a stream of messages, of which one says that it is finished.
    """
    if remaining is None or record.status not in ("CANCELLED", "OK"):
        return False
    # A stream that was cut off looks like one that was half-closed.
    cut_off = record.status == "CANCELLED" or (streams and not record.finished)
    return remaining <= (TRAVEL_SECONDS if cut_off else 0)


def _parser(method: str, parse: Any) -> Callable[[bytes], Any]:
    def parsed(raw: bytes) -> Any:
        try:
            return parse(raw)
        except DecodeError:
            raise MalformedMessageError(f"the {len(raw)} bytes are no message that {method} takes") from None

    return parsed


def _one_parser(method: str, parse: Any) -> Callable[[bytes, _Call], Any]:
    def parsed(raw: bytes, call: _Call) -> Any:
        call.record.received_bytes = len(raw)
        return _parser(method, parse)(raw)

    return parsed


async def _abort(context: Any, status: status_pb2.Status, challenge: str = "") -> None:
    trailers: tuple[tuple[str, str | bytes], ...] = ((DETAILS_KEY, status.SerializeToString()),)
    if challenge:
        trailers += ((CHALLENGE_KEY, challenge),)
    await context.abort(_CODES[status.code], status.message, trailers)
