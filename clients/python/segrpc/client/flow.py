"""What a client does, without doing it: sequences of calls as generators.

A flow yields a `Call`, is sent the response, and returns the result. A failed call is thrown into it as a
`SegmentationError`. The drivers in `sync` and `aio` perform the calls, so that the sequences exist once for both.
"""

import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar

from grpc_health.v1 import health_pb2

from segrpc.client import codec
from segrpc.client.codec import EncodedFile, ImageLike, MaskEncoding, TensorType
from segrpc.client.errors import NotFoundError
from segrpc.client.types import Embedding, EncodedImage, ImageInfo, ModelInfo, SegmentationResult
from segrpc.v1 import model_service_pb2, refine_pb2, segmentation_service_pb2, types_pb2

INLINE_BYTES = 2**20  # larger files are uploaded in chunks: one large message stalls other calls on both sides
CHUNK_BYTES = 2**20
REMEMBERED_IMAGES = 4096

Service = Literal["segmentation", "models", "health"]

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Call:
    """A call to perform.

    Attributes:
        service: Which stub has the method.
        method: The method's name.
        request: The message, or an iterator of messages for a client stream.
    """

    service: Service
    method: str
    request: Any


Flow: TypeAlias = Generator[Call, Any, R]


class SegmentOptions(TypedDict, total=False):
    """The options of `segment`, besides the image.

    Attributes:
        points: Clicks, ``x, y`` in pixels: ``[num_points, 2]`` for one prompt, ``[num_prompts][num_points][2]`` for
            several.
        labels: 1 (on the object, the default) or 0 (off it) for each point, nested like the points.
        boxes: ``x_min, y_min, x_max, y_max`` in pixels: ``[4]`` for one prompt, ``[num_prompts][4]`` for several.
        mask_input: Logits of an earlier mask: ``[256, 256]`` or ``[1, 256, 256]`` for one prompt,
            ``[num_prompts, 1, 256, 256]`` for several.
        model: The name of the model. Default: the server's default.
        multimask_output: Whether each prompt gets several candidates (the default) or one.
        num_multimask_outputs: How many candidates. Default: 3.
        return_logits: Whether to return the logits.
        return_image_embedding: Whether to return the embedding.
        embedding: An embedding that the same model returned for this image, instead of encoding it.
        tensor_dtype: The type of returned tensors: ``float32`` (the default), ``float16`` or ``bfloat16``.
        mask_encoding: How masks travel: ``coco_rle`` (the default), ``run_lengths`` or ``png``.
        session_id: A name for a series of calls; with ``reset_predictor=False`` the image may be None.
        reset_predictor: False uses the series' current image again.
        request_id: A name for the server's log. Default: a random one.
    """

    points: Any
    labels: Any
    boxes: Any
    mask_input: Any
    model: str
    multimask_output: bool
    num_multimask_outputs: int
    return_logits: bool
    return_image_embedding: bool
    embedding: Embedding | None
    tensor_dtype: TensorType
    mask_encoding: MaskEncoding
    session_id: str
    reset_predictor: bool
    request_id: str


class EncodeOptions(TypedDict, total=False):
    """The options of `encode`, besides the image; each as in `SegmentOptions`."""

    model: str
    return_image_embedding: bool
    tensor_dtype: TensorType
    request_id: str


class SentImages:
    """The digests of images that a server has been sent; bounded, and safe to use from several threads."""

    def __init__(self) -> None:
        self._digests: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, digest: str) -> bool:
        return digest in self._digests

    def add(self, digest: str) -> None:
        """Remember a digest, and forget the oldest if there are too many."""
        with self._lock:
            self._digests[digest] = None
            self._digests.move_to_end(digest)
            if len(self._digests) > REMEMBERED_IMAGES:
                self._digests.popitem(last=False)

    def discard(self, digest: str) -> None:
        """Forget a digest."""
        with self._lock:
            self._digests.pop(digest, None)


def segment(image: ImageLike | None, sent: SentImages, options: SegmentOptions) -> Flow[SegmentationResult]:
    """Segment an image; see `SegmentOptions`.

    Raises:
        ValueError: If shapes or lengths do not fit, or there is no image and no session to take it from.
    """
    return (yield from segment_file(None if image is None else codec.load_image(image), sent, options))


def segment_file(file: EncodedFile | None, sent: SentImages, options: SegmentOptions) -> Flow[SegmentationResult]:
    """Segment an image that is already loaded; otherwise as `segment`."""
    request = _segment_request(options)

    def send(message: types_pb2.Image | None) -> Call:
        request.ClearField("image")
        if message is not None:
            request.image.CopyFrom(message)
        return Call("segmentation", "Segment", request)

    if file is None:
        if options.get("reset_predictor", True):
            raise ValueError("image is None: give an image, or reset_predictor=False and a session_id")
        response = yield send(None)
    else:
        response = yield from _with_image(file, sent, send)
    return codec.segmentation_result(response)


def refuse_unknown(options: Mapping[str, Any], kind: type[Any]) -> None:
    """Raise TypeError if there are options that ``kind``, a TypedDict, does not have."""
    unknown = options.keys() - kind.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")


def _segment_request(options: SegmentOptions) -> segmentation_service_pb2.SegmentRequest:
    refuse_unknown(options, SegmentOptions)
    request = segmentation_service_pb2.SegmentRequest(
        request_id=options.get("request_id") or uuid.uuid4().hex,
        model=options.get("model", ""),
        prompts=codec.prompt_messages(
            options.get("points"), options.get("labels"), options.get("boxes"), options.get("mask_input")
        ),
        output=codec.output_options(options),
        session_id=options.get("session_id", ""),
        reset_predictor=options.get("reset_predictor"),
    )
    embedding = options.get("embedding")
    if embedding is not None:
        request.image_embedding.CopyFrom(codec.tensor_message(embedding.image_embedding))
        request.high_resolution_features.extend(map(codec.tensor_message, embedding.high_resolution_features))
    return request


def encode(image: ImageLike, sent: SentImages, options: EncodeOptions) -> Flow[EncodedImage]:
    """Encode an image ahead of the first click."""
    refuse_unknown(options, EncodeOptions)
    request = segmentation_service_pb2.EncodeImageRequest(
        request_id=options.get("request_id") or uuid.uuid4().hex,
        model=options.get("model", ""),
        return_image_embedding=options.get("return_image_embedding", False),
        tensor_dtype=codec.data_type(options.get("tensor_dtype", "float32")),
    )

    def send(message: types_pb2.Image) -> Call:
        request.image.CopyFrom(message)
        return Call("segmentation", "EncodeImage", request)

    response = yield from _with_image(codec.load_image(image), sent, send)
    return codec.encoded_image(response)


def upload(image: ImageLike, sent: SentImages) -> Flow[ImageInfo]:
    """Upload an image in chunks.

    Raises:
        ValueError: If the image is a URI or a digest.
    """
    file = codec.load_image(image)
    if not file.data:
        raise ValueError("only files, bytes, arrays and PIL images can be uploaded")
    response = yield _upload_call(file)
    sent.add(file.digest)
    return codec.image_info(response.image)


def models() -> Flow[list[ModelInfo]]:
    """List the models that are served; the first is the default."""
    response = yield Call("models", "ListModels", model_service_pb2.ListModelsRequest())
    return [codec.model_info(model) for model in response.models]


def model(name: str) -> Flow[ModelInfo]:
    """Describe one model; an empty name is the default model's."""
    response = yield Call("models", "GetModel", model_service_pb2.GetModelRequest(name=name))
    return codec.model_info(response.model)


def health(service: str) -> Flow[bool]:
    """Tell whether the server, or one of its services, is ready; an unknown service is not."""
    try:
        response = yield Call("health", "Check", health_pb2.HealthCheckRequest(service=service))
    except NotFoundError:
        return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _with_image(file: EncodedFile, sent: SentImages, send: Callable[[types_pb2.Image], Call]) -> Flow[Any]:
    """Send a request about an image: by digest if the server has seen it, otherwise with or after the file."""
    if not file.data:
        return (yield send(codec.image_message(file)))
    if file.digest in sent:
        try:
            return (yield send(codec.image_message(file, by_digest=True)))
        except NotFoundError as error:
            if error.reason != "IMAGE_NOT_FOUND":
                raise
            sent.discard(file.digest)
    if len(file.data) > INLINE_BYTES:
        yield _upload_call(file)
        sent.add(file.digest)
        return (yield send(codec.image_message(file, by_digest=True)))
    response = yield send(codec.image_message(file))
    sent.add(file.digest)
    return response


def _upload_call(file: EncodedFile) -> Call:
    return Call("segmentation", "UploadImage", _upload_messages(file))


def _upload_messages(file: EncodedFile) -> Iterator[segmentation_service_pb2.UploadImageRequest]:
    yield segmentation_service_pb2.UploadImageRequest(header=upload_header(file))
    for chunk in image_chunks(file):
        yield segmentation_service_pb2.UploadImageRequest(chunk=chunk)


def upload_header(file: EncodedFile) -> refine_pb2.UploadHeader:
    """Announce an image that follows in chunks."""
    return refine_pb2.UploadHeader(size=len(file.data), digest=file.digest)


def image_chunks(file: EncodedFile) -> Iterator[refine_pb2.ImageChunk]:
    """Cut an image into chunks, each made when it is asked for."""
    for offset in range(0, len(file.data), CHUNK_BYTES):
        yield refine_pb2.ImageChunk(offset=offset, data=file.data[offset : offset + CHUNK_BYTES])
