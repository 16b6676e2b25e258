"""One model and its embeddings: what happens to a job, stage by stage. No threads, no sockets."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from segrpc.service.engine.base import (
    CancelToken,
    EncodeJob,
    EncodeResult,
    SegmentJob,
    SegmentResult,
    StageTimes,
)
from segrpc.service.engine.cache import EmbeddingCache
from segrpc.service.errors import CapabilityMissingError, InvalidFieldError, OutOfMemoryError
from segrpc.service.images.decode import ImageHeader, ImageLimits, decode_image, read_header
from segrpc.service.models.base import (
    Embedding,
    PromptableModel,
    SegmentationModel,
    assemble_output,
    check_capabilities,
    decode_requests,
)
from segrpc.service.schemas import SegmentationInput, SegmentationOutput

Stage = Literal["decode_image", "encode_image", "decode_mask", "postprocess"]

T = TypeVar("T")


class ModelCore:
    """Runs jobs on one loaded model; called from one thread at a time.

    Args:
        name: The name that the model is served under.
        model: The model, loaded.
        cache: Where embeddings are kept; may be shared with other models.
        limits: What images must keep to.
    """

    def __init__(self, name: str, model: SegmentationModel, cache: EmbeddingCache, limits: ImageLimits) -> None:
        self._name = name
        self._model = model
        self._cache = cache
        self._limits = limits

    def segment(self, job: SegmentJob, token: CancelToken) -> SegmentResult:
        """Answer an input.

        Raises:
            SegrpcError: If the input is wrong, the model cannot do it, or the token says to stop.
        """
        return self._with_memory(lambda: self._segment(job, token))

    def encode(self, job: EncodeJob, token: CancelToken) -> EncodeResult:
        """Encode an image and keep the embedding.

        Raises:
            SegrpcError: As `segment`.
        """
        return self._with_memory(lambda: self._encode(job, token))

    def _segment(self, job: SegmentJob, token: CancelToken) -> SegmentResult:
        times = StageTimes()
        image = _image_of(job.input)
        check_capabilities(job.input, self._model.metadata, self._name)
        # The size is in the header: wrong coordinates are found before the costly stages.
        header = read_header(image, self._limits)
        violations = tuple(job.input.violations_in(header.width, header.height))
        if violations:
            raise InvalidFieldError.of_all(violations)
        if isinstance(self._model, PromptableModel):
            output = self._prompt(self._model, job, image, header, times, token)
        else:
            token.check()
            with _timed(times, "decode_mask"):
                output = self._model.predict(job.input)
        _check_output(output, job.input, header, self._name)
        return SegmentResult(output, header, times)

    def _prompt(
        self,
        model: PromptableModel,
        job: SegmentJob,
        image: bytes,
        header: ImageHeader,
        times: StageTimes,
        token: CancelToken,
    ) -> SegmentationOutput:
        given, features = job.input.image_embedding, job.input.high_resolution_features
        if given is not None and features is not None:
            embedding = model.import_embedding(given, features, header.width, header.height)
            times.embedding_cached = True
        else:
            embedding = self._embed(model, job.digest, image, times, token)
        requests = decode_requests(job.input, embedding, model.metadata, self._name)
        token.check()
        with _timed(times, "decode_mask"):
            decoded = model.decode(requests)
        token.check()
        with _timed(times, "postprocess"):
            masks = [model.to_masks(one, header.width, header.height) for one in decoded]
            return assemble_output(model, job.input, embedding, decoded, masks, job.tensor_dtype)

    def _encode(self, job: EncodeJob, token: CancelToken) -> EncodeResult:
        model = self._model
        if not isinstance(model, PromptableModel) or not model.metadata.embeddings:
            raise CapabilityMissingError(f"model {self._name!r} has no embeddings")
        times = StageTimes()
        header = read_header(job.image, self._limits)
        embedding = self._embed(model, job.digest, job.image, times, token)
        if not job.return_embedding:
            return EncodeResult(None, [], header, times)
        with _timed(times, "postprocess"):
            image_embedding, features = model.export_embedding(embedding, job.tensor_dtype)
        return EncodeResult(image_embedding, features, header, times)

    def _embed(
        self, model: PromptableModel, digest: str, image: bytes, times: StageTimes, token: CancelToken
    ) -> Embedding:
        key = (self._name, digest)
        cached = self._cache.get(key)
        if cached is not None:
            times.embedding_cached = True
            return cached
        token.check()
        with _timed(times, "decode_image"):
            pixels = decode_image(image, self._limits).pixels
        token.check()
        with _timed(times, "encode_image"):
            embedding = model.embed(pixels)
        self._cache.put(key, embedding)
        return embedding

    def _with_memory(self, work: Callable[[], T]) -> T:
        """Run work; when memory runs out, empty the cache and try once more."""
        try:
            return work()
        except (OutOfMemoryError, MemoryError):
            self._cache.clear()
        try:
            return work()
        except MemoryError as error:
            raise OutOfMemoryError(
                f"no memory left for model {self._name!r}; send smaller or fewer requests"
            ) from error


@contextmanager
def _timed(times: StageTimes, stage: Stage) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        setattr(times, stage, getattr(times, stage) + time.perf_counter() - start)


def _image_of(input: SegmentationInput) -> bytes:  # noqa: A002
    if not isinstance(input.image, bytes):
        raise TypeError("a job's image must be the encoded file as bytes")
    return input.image


def _check_output(output: SegmentationOutput, input: SegmentationInput, header: ImageHeader, model: str) -> None:  # noqa: A002
    """Hold a model, which may be a third party's, to what clients rely on."""
    if len(output.masks) != input.num_prompts:
        raise RuntimeError(f"model {model!r} answered {len(output.masks)} of {input.num_prompts} prompts")
    if any(mask.size != (header.height, header.width) for row in output.masks for mask in row):
        raise RuntimeError(f"model {model!r} made masks that are not of the image's size")
