"""Embeddings of images that were seen lately."""

import threading
from collections import OrderedDict

from segrpc.service.models.base import Embedding

Key = tuple[str, str]  # model name, image digest: a served model has one precision


class EmbeddingCache:
    """A least-recently-used cache of embeddings with a budget in bytes; safe to use from several threads.

    Args:
        max_bytes: What the embeddings may take together. One that is larger by itself is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._embeddings: OrderedDict[Key, Embedding] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """What the embeddings take together, in bytes."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._embeddings)

    def get(self, key: Key) -> Embedding | None:
        """Return an embedding, or None if it is not at hand."""
        with self._lock:
            if key in self._embeddings:
                self._embeddings.move_to_end(key)
            return self._embeddings.get(key)

    def put(self, key: Key, embedding: Embedding) -> None:
        """Keep an embedding, and drop others if they no longer fit."""
        with self._lock:
            self._drop(key)
            if embedding.nbytes > self._max_bytes:
                return
            self._embeddings[key] = embedding
            self._nbytes += embedding.nbytes
            while self._nbytes > self._max_bytes:
                self._drop(next(iter(self._embeddings)))

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._embeddings.clear()
            self._nbytes = 0

    def _drop(self, key: Key) -> None:
        dropped = self._embeddings.pop(key, None)
        if dropped is not None:
            self._nbytes -= dropped.nbytes
