"""The decoder as CUDA graphs: on a GPU, launching the few hundred small kernels of a click is what costs.

A graph is recorded for each shape of a call and replayed from then on. It always reads and writes the same memory, so a
replay copies its inputs there and clones what comes out.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segrpc.service.models.sam2.decoder import FastDecoder
from segrpc.service.models.sam2.decoder_image import FastFeatures

log = logging.getLogger("segrpc.sam2")

# What is larger gains less, and each graph keeps the memory of its call: some 50 MB for each prompt.
_MAX_BATCH, _MAX_POINTS, _MAX_GRAPHS = 4, 10, 16
_WARM_UPS = 3  # calls before a recording: libraries set themselves up in the first ones, which cannot be recorded

Points = tuple[Tensor, Tensor]
Found = tuple[Tensor, Tensor, Tensor]
_Shape = tuple[int, int, bool, bool]  # prompts, points of each, whether with mask inputs, whether three masks


@dataclass(frozen=True, slots=True)
class _Graph:
    """A recorded call: its inputs are to be overwritten, its outputs to be cloned."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: Found


class GraphedDecoder:
    """Decodes like a `FastDecoder`, through graphs where that is possible. Safe to use from several threads.

    Replays share memory, so they must follow one another: they do on one stream, and a lock keeps what belongs to one
    together. A call on another stream gets the decoder itself, as does one that cannot be recorded.

    Args:
        decoder: On a CUDA device.
        stream: The stream that calls are made on.
    """

    def __init__(self, decoder: FastDecoder, stream: torch.cuda.Stream) -> None:
        self._decoder = decoder
        self._stream = stream
        self._graphs: OrderedDict[_Shape, _Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._usable = True

    def decode(
        self, features: Sequence[FastFeatures], points: Points | None, masks: Tensor | None, multimask: bool
    ) -> Found:
        """See `FastDecoder.decode`."""
        shape = (len(features), points[0].shape[1] if points else 0, masks is not None, multimask)
        small = shape[0] <= _MAX_BATCH and shape[1] <= _MAX_POINTS
        if small and torch.cuda.current_stream() == self._stream:
            with self._lock:
                recorded = self._graphs.get(shape) or self._record(shape, features, points, masks, multimask)
                if recorded is not None:
                    self._graphs.move_to_end(shape)
                    return _replay(recorded, _tensors(features, points, masks))
        return self._decoder.decode(features, points, masks, multimask)

    def _record(
        self,
        shape: _Shape,
        features: Sequence[FastFeatures],
        points: Points | None,
        masks: Tensor | None,
        multimask: bool,
    ) -> _Graph | None:
        if not self._usable:
            return None
        own_features = [one.moved(torch.clone) for one in features]
        own_points = (points[0].clone(), points[1].clone()) if points else None
        own_masks = None if masks is None else masks.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    self._decoder.decode(own_features, own_points, own_masks, multimask)
            torch.cuda.current_stream().wait_stream(aside)
            # Each graph has a pool of its own. Another thread, which encodes meanwhile, must not disturb the recording.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = self._decoder.decode(own_features, own_points, own_masks, multimask)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._usable = False
            self._graphs.clear()
            log.warning("CUDA graphs are not used, because recording one failed: %s", error)
            return None
        if len(self._graphs) >= _MAX_GRAPHS:
            self._graphs.popitem(last=False)
        self._graphs[shape] = _Graph(graph, _tensors(own_features, own_points, own_masks), outputs)
        return self._graphs[shape]


def _replay(recorded: _Graph, given: tuple[Tensor, ...]) -> Found:
    for ours, theirs in zip(recorded.inputs, given, strict=True):
        ours.copy_(theirs)
    recorded.graph.replay()
    logits, scores, object_scores = recorded.outputs
    return logits.clone(), scores.clone(), object_scores.clone()


def _tensors(features: Sequence[FastFeatures], points: Points | None, masks: Tensor | None) -> tuple[Tensor, ...]:
    """List all inputs of a call, in one order."""
    found = [tensor for one in features for tensor in (one.tokens, one.medium, one.fine, one.first_kvq)]
    return (*found, *(points or ()), *(() if masks is None else (masks,)))
