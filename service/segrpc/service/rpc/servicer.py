"""The services: each method converts in, asks the engine once, converts out."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from segrpc.service.admission.limits import Resource
from segrpc.service.engine.base import CancelToken, EncodeJob, SegmentJob
from segrpc.service.errors import (
    CapabilityMissingError,
    ConfigNotFirstError,
    ImageNotFoundError,
    InvalidFieldError,
    NoPredictorStateError,
    SegrpcError,
)
from segrpc.service.images.known import KnownImage
from segrpc.service.images.upload import Upload
from segrpc.service.rpc import convert
from segrpc.service.rpc.offload import CONVERT_BYTES, COPY_BYTES, sized
from segrpc.service.rpc.refine import RefineStream
from segrpc.service.rpc.services import Services
from segrpc.service.rpc.sources import find_image
from segrpc.v1 import model_service_pb2, refine_pb2, segmentation_service_pb2
from segrpc.v1.model_service_pb2_grpc import ModelServiceServicer
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceServicer

HEADER_ONCE = "the first message, and only the first, must be the header"

Context = Any  # a `CallContext`, for the stubs grpc.aio's context, which is generic in types that nobody has


class SegmentationServicer(SegmentationServiceServicer):
    """``segrpc.v1.SegmentationService``.

    Args:
        services: What it needs of the server.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._engine = services.engine
        self._images = services.images
        self._limits = services.limits

    async def Segment(  # type: ignore[override]  # noqa: N802 - a serialised response
        self, request: segmentation_service_pb2.SegmentRequest, context: Context
    ) -> bytes:
        """Segment objects in one image."""
        start, token = time.perf_counter(), CancelToken(context.time_remaining())
        model = convert.find_model(self._engine.models, context.principal, request.model, "model")
        context.call.model = model.name
        self._engine.check(model.name, context.principal.name, token)
        for field in ("request_id", "session_id"):
            convert.check_name(field, getattr(request, field))
        convert.check_prompt_limits(request, self._limits.max_prompts, self._limits.max_points)
        dtype = convert.tensor_dtype(request.output.tensor_dtype, "output.tensor_dtype")
        image = await self._session_image(request, context)
        try:
            given = await sized(request.ByteSize(), CONVERT_BYTES, convert.segmentation_input, request, image.data)
            asked = time.perf_counter()
            job = SegmentJob(model.name, image.key, given, dtype, image.header, image.owner)
            result = await self._engine.segment(job, token)
        except SegrpcError as error:
            raise convert.in_request_terms(error) from error.__cause__
        context.call.computed("segment", model.name, result.times, asked)
        encoding = request.output.mask_encoding
        return await sized(
            convert.copied_bytes(result.output, encoding),
            COPY_BYTES,
            convert.segment_response,
            request.request_id,
            model.name,
            image.digest,
            result,
            encoding,
            time.perf_counter() - start,
        )

    async def EncodeImage(  # type: ignore[override]  # noqa: N802 - a serialised response
        self, request: segmentation_service_pb2.EncodeImageRequest, context: Context
    ) -> bytes:
        """Compute the embedding of an image ahead of the first click."""
        start, token = time.perf_counter(), CancelToken(context.time_remaining())
        model = convert.find_model(self._engine.models, context.principal, request.model, "model")
        context.call.model = model.name
        convert.check_name("request_id", request.request_id)
        dtype = convert.tensor_dtype(request.tensor_dtype, "tensor_dtype")
        image = await find_image(self._images, context.principal.name, request.image, "image")
        if not model.metadata.embeddings:
            raise CapabilityMissingError(f"model {model.name!r} has no embeddings")
        job = EncodeJob(model.name, image.key, image.data, request.return_image_embedding, dtype, image.owner)
        asked = time.perf_counter()
        result = await self._engine.encode(job, token)
        context.call.computed("encode", model.name, result.times, asked)
        return await asyncio.to_thread(
            convert.encode_image_response,
            request.request_id,
            model.name,
            image.digest,
            result,
            time.perf_counter() - start,
        )

    async def UploadImage(  # noqa: N802
        self, requests: AsyncIterator[segmentation_service_pb2.UploadImageRequest], context: Context
    ) -> segmentation_service_pb2.UploadImageResponse:
        """Take an image in chunks."""
        owner, limits, patience = context.principal.name, self._limits, self._services.patience
        first = await patience.read(requests, "the header")
        if first is None:
            raise ConfigNotFirstError("the stream ended before its header")
        if first.WhichOneof("payload") != "header":
            raise ConfigNotFirstError(HEADER_ONCE)
        header = first.header
        upload = Upload(header.size, header.digest, limits.max_image_bytes, limits.max_chunk_bytes)
        with self._services.ledger.held(Resource.IN_FLIGHT_BYTES, owner, header.size):
            while (request := await patience.read(requests, "a chunk of the image")) is not None:
                if request.WhichOneof("payload") == "header":
                    raise ConfigNotFirstError(HEADER_ONCE)
                upload.add(request.chunk.offset, request.chunk.data)
            image = await asyncio.to_thread(lambda: self._images.from_data(owner, upload.finish()))
        return segmentation_service_pb2.UploadImageResponse(image=convert.image_info(image.digest, image.header))

    async def Refine(  # type: ignore[override]  # noqa: N802 - it writes to the context instead of yielding
        self, requests: AsyncIterator[refine_pb2.RefineRequest], context: Context
    ) -> None:
        """Serve an interactive session."""
        await RefineStream(self._services, requests, context).run()

    async def _session_image(self, request: segmentation_service_pb2.SegmentRequest, context: Context) -> KnownImage:
        """Find the image of a request, which may be the current one of its session."""
        owner, caller, session_id = context.principal.name, context.caller, request.session_id
        keep = request.HasField("reset_predictor") and not request.reset_predictor
        if not keep:
            image = await find_image(self._images, owner, request.image, "image")
            if session_id:
                self._services.current_images.set(caller, session_id, image.digest)
            return image
        if request.HasField("image"):
            raise InvalidFieldError.of("image", "must be unset when reset_predictor is false: the session's is used")
        if not session_id:
            raise NoPredictorStateError("reset_predictor is false, but no session_id says whose image to keep")
        digest = self._services.current_images.get(caller, session_id)
        try:
            return self._images.from_digest(owner, digest)
        except ImageNotFoundError:
            raise NoPredictorStateError(
                f"the image of session {session_id!r} had to make room: send it again, with reset_predictor true"
            ) from None


class ModelServicer(ModelServiceServicer):
    """``segrpc.v1.ModelService``.

    Args:
        services: What it needs of the server.
    """

    def __init__(self, services: Services) -> None:
        self._engine = services.engine
        self._limits = services.limits

    async def ListModels(  # noqa: N802
        self, request: model_service_pb2.ListModelsRequest, context: Context
    ) -> model_service_pb2.ListModelsResponse:
        """List the models that are served."""
        return model_service_pb2.ListModelsResponse(models=self._models(context))

    async def GetModel(  # noqa: N802
        self, request: model_service_pb2.GetModelRequest, context: Context
    ) -> model_service_pb2.GetModelResponse:
        """Describe one model."""
        name = convert.find_model(self._engine.models, context.principal, request.name, "name").name
        context.call.model = name
        return model_service_pb2.GetModelResponse(model=next(m for m in self._models(context) if m.name == name))

    def _models(self, context: Context) -> list[model_service_pb2.Model]:
        usable = convert.usable_models(self._engine.models, context.principal)
        return [convert.model_message(model, i == 0, self._limits) for i, model in enumerate(usable)]
