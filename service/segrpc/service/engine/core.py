"""The models of one device and their embeddings: what happens to a work, stage by stage. No asyncio, no sockets.

A core is used by two threads: one encodes (`Core.encode`), the other decodes (`Core.decode`).
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from segrpc.service.engine.base import CancelToken, EngineOptions, SegmentResult, ServedModel, StageTimes
from segrpc.service.engine.cache import CachedImage, EmbeddingCache
from segrpc.service.engine.work import (
    DecodeWork,
    EmbeddingMissing,
    EncodedImage,
    EncodeWork,
    FlushWork,
    Holdings,
    PredictWork,
    Ticket,
    TouchWork,
)
from segrpc.service.errors import OutOfMemoryError
from segrpc.service.images.decode import ImageHeader, ImageLimits, decode_image
from segrpc.service.models.base import (
    Decoded,
    DecodeRequest,
    PromptableModel,
    SegmentationModel,
    assemble_output,
    check_capabilities,
    decode_requests,
)
from segrpc.service.models.registry import create_model
from segrpc.service.schemas import CompressedRLE, ModelDeploymentConfig, SegmentationInput, SegmentationOutput

Stage = Literal["decode_image", "encode_image", "decode_mask", "postprocess"]

T = TypeVar("T")

LOOK_SECONDS = 1.0  # between two looks at the memory of devices, which cost more than the rest of an answer


@dataclass(slots=True)
class _Prepared:
    """A work whose embedding is at hand and whose prompts were checked.

    Attributes:
        done: How many of its requests have been answered; `decoded` and `masks` have the answers.
    """

    ticket: Ticket
    work: DecodeWork
    model: PromptableModel
    image: CachedImage
    requests: list[DecodeRequest]
    times: StageTimes
    done: int = 0
    decoded: list[Decoded] = field(default_factory=list)
    masks: list[list[CompressedRLE]] = field(default_factory=list)


class Core:
    """Does the work of one device.

    Args:
        options: Which models, and what they may take.
        device: Where they run, such as ``cuda:0``, for the models that can be told. Empty: where they choose.
    """

    def __init__(self, options: EngineOptions, device: str = "") -> None:
        self._limits: ImageLimits = options.limits
        self._models = {config.name: _create(config, device) for config in options.models}
        self._cache = EmbeddingCache(options.cache_bytes, options.host_cache_bytes, options.principal_share)
        self._memory: tuple[tuple[str, int], ...] = ()
        self._next_look = 0.0

    def load(self) -> tuple[ServedModel, ...]:
        """Load the models, one after the other.

        Raises:
            ModelLoadError: If one cannot be loaded.
        """
        for model in self._models.values():
            model.load_model()
        return tuple(
            ServedModel(name, model.metadata, isinstance(model, PromptableModel))
            for name, model in self._models.items()
        )

    def unload(self) -> None:
        """Free what the models and the cache hold. The core is not used again afterwards."""
        self._cache.clear()
        for model in self._models.values():
            model.unload()
        self._models.clear()

    @property
    def batches(self) -> bool:
        """Whether a model gains from prompts of several works at once."""
        return any(isinstance(model, PromptableModel) and model.batches for model in self._models.values())

    def holdings(self) -> Holdings:
        """Report what the cache holds, and what is taken of devices that have memory of their own."""
        return replace(self._cache.holdings(), device_memory=self._device_memory())

    def _device_memory(self) -> tuple[tuple[str, int], ...]:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            found = [(model.metadata.device, model.device_memory()) for model in self._models.values()]
            # Models on one device share the process's memory there.
            self._memory = tuple({device: nbytes for device, nbytes in found if nbytes is not None}.items())
        return self._memory

    def release(self, model: str, digest: str) -> None:
        """Let an embedding go that an `EncodeWork` had kept."""
        self._cache.release((model, digest))

    def encode(self, tickets: Sequence[Ticket]) -> Sequence[Ticket]:
        """Do works of the encode lane, one by one: `EncodeWork` and `PredictWork`. None needs a second turn."""
        for ticket in tickets:
            work, token = ticket.work, ticket.token
            try:
                token.check()
                if isinstance(work, EncodeWork):
                    ticket.settle(self._encode(work, token))
                elif isinstance(work, PredictWork):
                    ticket.settle(self._predict(work))
                else:
                    raise TypeError(f"{type(work).__name__} is no work of this lane")
            except Exception as error:  # noqa: BLE001 - whatever went wrong is for whoever waits
                ticket.settle(error)
        return ()

    def decode(self, tickets: Sequence[Ticket]) -> Sequence[Ticket]:
        """Do works of the decode lane: `TouchWork`, `DecodeWork` and `FlushWork`.

        Prompts of several works go to a model together if it `batches`. Otherwise each prompt is a turn: nobody waits
        for all of somebody's, and those of a caller who leaves are not computed to the end.

        Returns:
            The tickets of works that have more prompts.
        """
        together: dict[str, list[_Prepared]] = {}
        unfinished: list[Ticket] = []
        for ticket in tickets:
            try:
                ticket.token.check()
                if isinstance(ticket.work, FlushWork):
                    ticket.settle(self._cache.flush())
                    continue
                if isinstance(ticket.work, TouchWork):
                    image = self._cached(ticket.work.model, ticket.work.digest)
                    ticket.settle(EncodedImage(image.header, StageTimes()))
                    continue
                prepared = ticket.progress or self._prepare(ticket)
            except Exception as error:  # noqa: BLE001
                ticket.settle(error)
                continue
            finally:
                # It knows its ticket: a circle would keep the embedding until Python looks for circles.
                ticket.progress = None
            if prepared.model.batches:
                together.setdefault(prepared.work.model, []).append(prepared)
            elif self._decode_next(prepared):
                ticket.progress = prepared
                unfinished.append(ticket)
        for group in together.values():
            self._decode(group)
        return unfinished

    def _encode(self, work: EncodeWork, token: CancelToken) -> EncodedImage:
        times = StageTimes()
        model = self._promptable(work.model)
        key = (work.model, work.digest)
        # Another image of the same digest may have come first: after a restart, or when its first reader gave up.
        cached = self._cache.pin(key)
        if cached is not None:
            return EncodedImage(cached.header, times)
        with _timed(times, "decode_image"):
            decoded = decode_image(work.image, self._limits)
        token.check()
        with _timed(times, "encode_image"):
            embedding = self._with_memory(work.model, lambda: model.embed(decoded.pixels))
        header = ImageHeader(decoded.width, decoded.height, decoded.exif_orientation)
        self._cache.put(key, CachedImage(embedding, header), model, owner=work.owner, pin=True)
        return EncodedImage(header, times)

    def _predict(self, work: PredictWork) -> SegmentResult:
        times = StageTimes()
        model = self._models[work.model]
        given = work.input.model_copy(update={"image": work.image})
        with _timed(times, "decode_mask"):
            output = self._with_memory(work.model, lambda: model.predict(given))
        _check_output(output, given, work.header, work.model)
        return SegmentResult(output, work.header, times)

    def _prepare(self, ticket: Ticket) -> _Prepared:
        work = ticket.work
        if not isinstance(work, DecodeWork):
            raise TypeError(f"{type(work).__name__} is no work of this lane")
        model = self._promptable(work.model)
        check_capabilities(work.input, model.metadata, work.model)
        image = self._given(model, work) or self._cached(work.model, work.digest)
        times = StageTimes()
        with _timed(times, "decode_mask"):
            requests = decode_requests(work.input, image.embedding, model.metadata, work.model)
        return _Prepared(ticket, work, model, image, requests, times)

    def _given(self, model: PromptableModel, work: DecodeWork) -> CachedImage | None:
        embedding, features, header = work.input.image_embedding, work.input.high_resolution_features, work.header
        if embedding is None or features is None or header is None:
            return None
        imported = self._with_memory(
            work.model, lambda: model.import_embedding(embedding, features, header.width, header.height)
        )
        return CachedImage(imported, header)

    def _cached(self, model: str, digest: str) -> CachedImage:
        image = self._cache.get((model, digest))
        if image is None:
            raise EmbeddingMissing
        return image

    def _decode_next(self, one: _Prepared) -> bool:
        """Answer the next prompt of a work, and settle it after the last; tell whether there are more."""
        model, name, header = one.model, one.work.model, one.image.header
        requests = one.requests[one.done : one.done + 1]  # none, if only the embedding is wanted
        try:
            if requests:
                with _timed(one.times, "decode_mask"):
                    decoded = self._with_memory(name, lambda: model.decode(requests))
                one.ticket.token.check()
                with _timed(one.times, "postprocess"):
                    sizes = [(header.width, header.height)] * len(decoded)
                    one.masks += self._with_memory(name, lambda: model.to_masks_of_all(decoded, sizes))
                one.decoded += decoded
                one.done += 1
                one.times.batch = 1
            if one.done < len(one.requests):
                return True
            one.ticket.settle(self._assemble(one, one.decoded, one.masks))
        except Exception as error:  # noqa: BLE001
            one.ticket.settle(error)
        return False

    def _decode(self, group: Sequence[_Prepared]) -> None:
        """Decode works on one model together, then finish them one by one."""
        model, name = group[0].model, group[0].work.model
        requests = [request for one in group for request in one.requests]
        start = time.perf_counter()
        try:
            decoded = self._with_memory(name, lambda: model.decode(requests)) if requests else []
        except Exception as error:  # noqa: BLE001
            if len(group) == 1:
                group[0].ticket.settle(error)
                return
            # One of them may be to blame, or they are too many together.
            for one in group:
                self._decode([one])
            return
        spent = time.perf_counter() - start
        rest = iter(decoded)
        answers: list[tuple[_Prepared, list[Decoded]]] = []
        for one in group:
            one.times.decode_mask += spent
            one.times.batch = len(group)
            answers.append((one, [next(rest) for _ in one.requests]))
        self._finish(answers)

    def _finish(self, answers: Sequence[tuple[_Prepared, list[Decoded]]]) -> None:
        """Make the masks of works on one model together, then settle them one by one."""
        wanted: list[tuple[_Prepared, list[Decoded]]] = []
        for one, decoded in answers:
            try:
                one.ticket.token.check()
                wanted.append((one, decoded))
            except Exception as error:  # noqa: BLE001
                one.ticket.settle(error)
        if not wanted:
            return
        model, name = wanted[0][0].model, wanted[0][0].work.model
        sizes = [(one.image.header.width, one.image.header.height) for one, decoded in wanted for _ in decoded]
        start = time.perf_counter()
        try:
            every = [each for _, decoded in wanted for each in decoded]
            masks = iter(self._with_memory(name, lambda: model.to_masks_of_all(every, sizes)))
        except Exception as error:  # noqa: BLE001
            if len(wanted) == 1:
                wanted[0][0].ticket.settle(error)
                return
            for answer in wanted:
                self._finish([answer])
            return
        spent = time.perf_counter() - start
        for one, decoded in wanted:
            one.times.postprocess += spent
            try:
                one.ticket.settle(self._assemble(one, decoded, list(itertools.islice(masks, len(decoded)))))
            except Exception as error:  # noqa: BLE001
                one.ticket.settle(error)

    def _assemble(self, one: _Prepared, decoded: Sequence[Decoded], masks: list[list[CompressedRLE]]) -> SegmentResult:
        work, header = one.work, one.image.header

        def assemble() -> SegmentationOutput:
            return assemble_output(one.model, work.input, one.image.embedding, decoded, masks, work.tensor_dtype)

        with _timed(one.times, "postprocess"):
            output = self._with_memory(work.model, assemble)
        _check_output(output, work.input, header, work.model)
        return SegmentResult(output, header, one.times)

    def _promptable(self, name: str) -> PromptableModel:
        model = self._models[name]
        if not isinstance(model, PromptableModel):
            raise TypeError(f"model {name!r} has no separate encoding")
        return model

    def _with_memory(self, model: str, work: Callable[[], T]) -> T:
        """Run work; when memory runs out, empty the cache and try once more."""
        try:
            return work()
        except (OutOfMemoryError, MemoryError):
            self._cache.clear()
        try:
            return work()
        except MemoryError as error:
            raise OutOfMemoryError(f"no memory left for model {model!r}; send smaller or fewer requests") from error


@contextmanager
def _timed(times: StageTimes, stage: Stage) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        setattr(times, stage, getattr(times, stage) + time.perf_counter() - start)


def _create(config: ModelDeploymentConfig, device: str) -> SegmentationModel:
    model = create_model(config)
    if device and model.takes_device:
        return create_model(config.model_copy(update={"model_params": {**config.model_params, "device": device}}))
    return model


def _check_output(output: SegmentationOutput, input: SegmentationInput, header: ImageHeader, model: str) -> None:  # noqa: A002
    """Hold a model, which may be a third party's, to what clients rely on."""
    if len(output.masks) != input.num_prompts:
        raise RuntimeError(f"model {model!r} answered {len(output.masks)} of {input.num_prompts} prompts")
    if any(mask.size != (header.height, header.width) for row in output.masks for mask in row):
        raise RuntimeError(f"model {model!r} made masks that are not of the image's size")
