"""Encoder and decoder as CUDA graphs: on a GPU, launching the hundreds of small kernels of a call is what costs.

A graph is recorded for each shape of a call and replayed from then on. It always reads and writes the same memory, so a
replay copies its inputs there and clones what comes out. Replays must follow one another: they do on one stream, and a
lock keeps what belongs to one together. A call on another stream goes without, as does one that cannot be recorded.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from segrpc.service.models.sam2.decoder import FastDecoder
from segrpc.service.models.sam2.decoder_image import FastFeatures

log = logging.getLogger("segrpc.sam2")

# How many prompts a recorded call may have. Others are filled up to the next one, so that few graphs do for all.
BATCHES = (1, 2, 4, 8, 16)
_MAX_POINTS = 10  # of a prompt: larger calls gain less
_MAX_GRAPHS = 64
_WARM_UPS = 3  # calls before a recording: libraries set themselves up in the first ones, which cannot be recorded

Points = tuple[Tensor, Tensor]
Found = tuple[Tensor, Tensor, Tensor]
_Shape = tuple[int, int, bool, bool]  # prompts, points of each, whether with mask inputs, whether three masks

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Graph(Generic[T]):
    """A recorded call, and where its outputs are after each replay: to be cloned."""

    graph: torch.cuda.CUDAGraph
    outputs: T


class GraphedEncoder:
    """Computes an image's feature maps through a graph. Safe to use from several threads.

    Args:
        encode: Computes maps of an image on a CUDA device.
        image: An image of the shape and type that all have.
        stream: The stream that calls are made on, this one too.
    """

    def __init__(self, encode: Callable[[Tensor], Sequence[Tensor]], image: Tensor, stream: torch.cuda.Stream) -> None:
        self._encode = encode
        self._image = image.clone()
        self._stream = stream
        self._lock = threading.Lock()
        aside = torch.cuda.Stream(stream.device)  # type: ignore[no-untyped-call]
        self._recorded = _record(lambda: encode(self._image), aside)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Compute the maps of an image."""
        if self._recorded is None or torch.cuda.current_stream() != self._stream:
            return list(self._encode(image))
        with self._lock:
            self._image.copy_(image)
            self._recorded.graph.replay()
            return [one.clone() for one in self._recorded.outputs]


class GraphedDecoder:
    """Decodes like a `FastDecoder`, through graphs where that is possible. Safe to use from several threads.

    Args:
        decoder: On a CUDA device.
        stream: The stream that calls are made on.
    """

    def __init__(self, decoder: FastDecoder, stream: torch.cuda.Stream) -> None:
        self._decoder = decoder
        self._stream = stream
        self._aside = torch.cuda.Stream(stream.device)  # type: ignore[no-untyped-call]
        self._graphs: OrderedDict[_Shape, tuple[_Graph[Found], Points | None]] = OrderedDict()
        # What all graphs read: the image of each prompt, and mask inputs. What they need meanwhile comes from one pool.
        self._features: list[FastFeatures] = []
        self._masks: Tensor | None = None
        self._pool = torch.cuda.graph_pool_handle()
        self._lock = threading.Lock()
        self._usable = True

    def decode(
        self, features: Sequence[FastFeatures], points: Points | None, masks: Tensor | None, multimask: bool
    ) -> Found:
        """See `FastDecoder.decode`."""
        count, num_points = len(features), points[0].shape[1] if points else 0
        size = next((size for size in BATCHES if size >= count), None)
        if size is not None and num_points <= _MAX_POINTS and torch.cuda.current_stream() == self._stream:
            with self._lock:
                found = self._replay((size, num_points, masks is not None, multimask), features, points, masks)
            if found is not None:
                return found
        return self._decoder.decode(features, points, masks, multimask)

    def _replay(
        self, shape: _Shape, features: Sequence[FastFeatures], points: Points | None, masks: Tensor | None
    ) -> Found | None:
        if not self._usable:
            return None
        self._give(shape[0], features, masks)
        found = self._graphs.get(shape) or self._record(shape, points)
        if found is None:
            return None
        self._graphs.move_to_end(shape)
        recorded, own_points = found
        for ours, theirs in zip(own_points or (), points or (), strict=True):
            ours[: len(theirs)] = theirs
        recorded.graph.replay()
        logits, scores, object_scores = (one[: len(features)].clone() for one in recorded.outputs)
        return logits, scores, object_scores

    def _give(self, size: int, features: Sequence[FastFeatures], masks: Tensor | None) -> None:
        """Copy images and mask inputs to where graphs read them. Places that nobody fills keep what they have."""
        for ours, theirs in zip(self._features, features, strict=False):
            for one, other in zip(ours.tensors, theirs.tensors, strict=True):
                one.copy_(other)
        while len(self._features) < size:
            self._features.append(features[min(len(self._features), len(features) - 1)].moved(torch.clone))
        if masks is not None:
            if self._masks is None:
                self._masks = masks.new_zeros((BATCHES[-1], *masks.shape[1:]))
            self._masks[: len(masks)] = masks

    def _record(self, shape: _Shape, points: Points | None) -> tuple[_Graph[Found], Points | None] | None:
        size, _, masked, multimask = shape
        own_points = None if points is None else (_filled(points[0], size), _filled(points[1], size))
        features = self._features[:size]
        masks = self._masks[:size] if masked and self._masks is not None else None
        call = partial(self._decoder.decode, features, own_points, masks, multimask)
        recorded = _record(call, self._aside, self._pool)
        if recorded is None:
            self._usable = False
            self._graphs.clear()
            return None
        if len(self._graphs) >= _MAX_GRAPHS:
            self._graphs.popitem(last=False)
        self._graphs[shape] = recorded, own_points
        return self._graphs[shape]


def _record(call: Callable[[], T], aside: torch.cuda.Stream, pool: Any = None) -> _Graph[T] | None:
    """Record what a call does on the device; None, with a word in the log, if that is not possible.

    Args:
        call: What to record.
        aside: A stream of its own to record on: what other threads put on it would be recorded as well, and graphs that
            run at the same time must not share the workspace that libraries have for each stream.
        pool: The memory that it takes meanwhile; graphs that follow one another may share it.
    """
    graph = torch.cuda.CUDAGraph()
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    try:
        # Weights that autocast keeps would be freed when it ends, and replays read what is not there any more.
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    call()
            torch.cuda.current_stream().wait_stream(aside)
            # Another thread, which encodes or decodes meanwhile, must not disturb the recording.
            with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                outputs = call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.warning("CUDA graphs are not used, because recording one failed: %s", error)
        return None
    return _Graph(graph, outputs)


def _filled(tensor: Tensor, size: int) -> Tensor:
    """Repeat the first row as often as rows are missing; a copy."""
    return torch.cat([tensor, tensor[:1].expand(size - len(tensor), *tensor.shape[1:])])
