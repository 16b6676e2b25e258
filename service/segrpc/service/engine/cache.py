"""Embeddings of images that were seen lately, on the device and in the host's memory."""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from segrpc.service.admission.shares import Shares
from segrpc.service.engine.base import Flushed
from segrpc.service.engine.work import Holdings
from segrpc.service.images.decode import ImageHeader
from segrpc.service.models.base import Embedding, PromptableModel

Key = tuple[str, str]  # model name, image digest: a served model has one precision


@dataclass(frozen=True, slots=True)
class CachedImage:
    """An encoded image.

    Attributes:
        embedding: What the model made of it.
        header: Its size and orientation.
    """

    embedding: Embedding
    header: ImageHeader


@dataclass(frozen=True, slots=True)
class _Entry:
    image: CachedImage
    model: PromptableModel
    owner: str


class _Tier:
    """Entries from the least to the most recently used, their size, and whose they are."""

    def __init__(self, max_bytes: int, share: float) -> None:
        self.max_bytes = max_bytes
        self._shares = Shares(max_bytes, share)
        self.entries: OrderedDict[Key, _Entry] = OrderedDict()
        self.nbytes = 0

    def put(self, key: Key, entry: _Entry) -> None:
        self.pop(key)
        self.entries[key] = entry
        self._count(entry, entry.image.embedding.nbytes)

    def pop(self, key: Key) -> _Entry | None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self._count(entry, -entry.image.embedding.nbytes)
        return entry

    def clear(self) -> None:
        for key in list(self.entries):
            self.pop(key)

    def first_to_go(self, keys: Iterable[Key]) -> Key | None:
        """Choose what makes room, of some from the least to the most recently used."""
        return self._shares.first_to_go((self.entries[key].owner, key) for key in keys)

    def _count(self, entry: _Entry, nbytes: int) -> None:
        self.nbytes += nbytes
        self._shares.add(entry.owner, nbytes)


class EmbeddingCache:
    """A least-recently-used cache of two tiers, each with a budget in bytes; safe to use from several threads.

    What the device's tier has no room for goes to the host's tier, if the model can move it
    (`PromptableModel.offload`); on a hit it comes back. What the host's tier has no room for is dropped.

    In each tier an owner that has more than its share makes room before others do (`Shares`).

    Two kinds of embeddings stay on the device although they are above the budget: the one used last, so that any budget
    works, and those that are pinned, because somebody who had them encoded is about to use them.

    Args:
        device_bytes: The budget of the embeddings on the device.
        host_bytes: The budget of those that left it.
        share: The part of each that is one owner's share, above 0, at most 1.
    """

    def __init__(self, device_bytes: int, host_bytes: int = 0, share: float = 1.0) -> None:
        self._device, self._host = _Tier(device_bytes, share), _Tier(host_bytes, share)
        self._pins: dict[Key, int] = {}
        # Also held while embeddings are moved: a few milliseconds, and a hit during a move would be a costly miss.
        self._lock = threading.Lock()

    def get(self, key: Key) -> CachedImage | None:
        """Return an image, and count it as used; None if it is not at hand."""
        with self._lock:
            entry = self._device.entries.get(key)
            if entry is not None:
                self._device.entries.move_to_end(key)
                return entry.image
            moved = self._host.pop(key)
            if moved is None:
                return None
            back = replace(moved.image, embedding=moved.model.restore(moved.image.embedding))
            self._device.put(key, replace(moved, image=back))
            self._make_room()
            return back

    def put(self, key: Key, image: CachedImage, model: PromptableModel, *, owner: str = "", pin: bool = False) -> None:
        """Keep an image that a model encoded.

        Args:
            key: Its key; an image that is there under it is replaced.
            image: The image.
            model: The model, which is asked to move it.
            owner: Whose it is.
            pin: Whether to keep it whatever the budget, until `release` is called as often as it was pinned.
        """
        with self._lock:
            self._host.pop(key)
            self._device.put(key, _Entry(image, model, owner))
            if pin:
                self._pin(key)
            self._make_room()

    def pin(self, key: Key) -> CachedImage | None:
        """Pin an image that is at hand; see `put`. Returns it, or None if it is not at hand."""
        with self._lock:
            self._pin(key)
        image = self.get(key)
        if image is None:
            self.release(key)
        return image

    def release(self, key: Key) -> None:
        """Take a pin back; nothing happens if there is none."""
        with self._lock:
            left = self._pins.pop(key, 0) - 1
            if left > 0:
                self._pins[key] = left
            self._make_room()

    def clear(self) -> None:
        """Drop all, whether pinned or not, because memory is needed at once."""
        with self._lock:
            self._device.clear()
            self._host.clear()

    def flush(self) -> Flushed:
        """Drop all but what is pinned; return what that was."""
        with self._lock:
            count, nbytes = 0, 0
            for tier in (self._device, self._host):
                for key in [key for key in tier.entries if key not in self._pins]:
                    count, nbytes = count + 1, nbytes + tier.entries[key].image.embedding.nbytes
                    tier.pop(key)
            return Flushed(count, nbytes)

    def holdings(self) -> Holdings:
        """Report what is held."""
        with self._lock:
            device, host = self._device, self._host
            return Holdings(len(device.entries), device.nbytes, len(host.entries), host.nbytes)

    def _pin(self, key: Key) -> None:
        self._pins[key] = self._pins.get(key, 0) + 1

    def _make_room(self) -> None:
        while self._device.nbytes > self._device.max_bytes:
            newest = next(reversed(self._device.entries))
            key = self._device.first_to_go(
                key for key in self._device.entries if key != newest and key not in self._pins
            )
            if key is None:
                return
            entry = self._device.pop(key)
            assert entry is not None  # it was chosen from there
            self._move_to_host(key, entry)

    def _move_to_host(self, key: Key, entry: _Entry) -> None:
        if entry.image.embedding.nbytes > self._host.max_bytes:
            return
        moved = entry.model.offload(entry.image.embedding)
        if moved is None:
            return
        self._host.put(key, replace(entry, image=replace(entry.image, embedding=moved)))
        while self._host.nbytes > self._host.max_bytes and (oldest := self._host.first_to_go(self._host.entries)):
            self._host.pop(oldest)
