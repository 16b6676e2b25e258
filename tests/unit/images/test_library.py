from pathlib import Path

import pytest
from pydantic import ByteSize

from segrpc.service.admission.ledger import Ledger
from segrpc.service.admission.limits import Limits
from segrpc.service.errors import (
    ImageNotFoundError,
    ImageTooLargeError,
    ImageUndecodableError,
    InvalidFieldError,
    UriNotAllowedError,
)
from segrpc.service.images.decode import ImageHeader, ImageLimits, digest_of
from segrpc.service.images.library import ImageLibrary
from segrpc.service.images.policy import SourcePolicy
from segrpc.service.images.store import ImageStore
from tests.unit.images.pictures import HEIGHT, WIDTH, encode, exif, picture

ME, YOU = "me", "you"
PNG = encode(picture(), "PNG")
TURNED = encode(picture(), "PNG", exif=exif(6))


@pytest.fixture
def store() -> ImageStore:
    return ImageStore()


@pytest.fixture
def library(store: ImageStore, tmp_path: Path) -> ImageLibrary:
    """A library that may read one folder with an image."""
    (tmp_path / "picture.png").write_bytes(PNG)
    (tmp_path / "text.png").write_bytes(b"text")
    return ImageLibrary(store, SourcePolicy(media_roots=(tmp_path,)), ImageLimits())


@pytest.mark.parametrize(("data", "size", "orientation"), [(PNG, (WIDTH, HEIGHT), 1), (TURNED, (HEIGHT, WIDTH), 6)])
def test_a_file_is_looked_at_and_kept(
    library: ImageLibrary, store: ImageStore, data: bytes, size: tuple[int, int], orientation: int
) -> None:
    image = library.from_data(ME, data)
    assert (image.data, image.digest) == (data, digest_of(data))
    assert image.header == ImageHeader(*size, orientation)
    assert library.from_digest(ME, image.digest) == image
    assert len(store) == 1


def test_a_uri_gives_what_its_bytes_give(library: ImageLibrary, tmp_path: Path) -> None:
    image = library.from_uri(ME, (tmp_path / "picture.png").as_uri())
    (tmp_path / "picture.png").unlink()
    assert library.from_digest(ME, image.digest) == image == library.from_data(ME, PNG)


def test_the_same_image_from_two_sources_is_kept_once(library: ImageLibrary, store: ImageStore, tmp_path: Path) -> None:
    library.from_data(ME, PNG)
    library.from_uri(ME, (tmp_path / "picture.png").as_uri())
    assert (len(store), store.nbytes) == (1, len(PNG))


def test_what_is_refused_is_not_kept(library: ImageLibrary, store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        library.from_data(ME, b"")
    assert caught.value.violations[0].field == "data"
    with pytest.raises(ImageUndecodableError):
        library.from_data(ME, b"text")
    with pytest.raises(ImageUndecodableError):
        library.from_uri(ME, (tmp_path / "text.png").as_uri())
    with pytest.raises(UriNotAllowedError):
        library.from_uri(ME, "file:///etc/passwd")
    assert len(store) == 0


@pytest.mark.parametrize("limits", [ImageLimits(max_bytes=len(PNG) - 1), ImageLimits(max_pixels=WIDTH * HEIGHT - 1)])
def test_limits_hold_for_every_source(store: ImageStore, tmp_path: Path, limits: ImageLimits) -> None:
    (tmp_path / "picture.png").write_bytes(PNG)
    library = ImageLibrary(store, SourcePolicy(media_roots=(tmp_path,)), limits)
    with pytest.raises(ImageTooLargeError):
        library.from_data(ME, PNG)
    with pytest.raises(ImageTooLargeError):
        library.from_uri(ME, (tmp_path / "picture.png").as_uri())
    assert len(store) == 0


def test_an_image_that_does_not_fit_the_store_can_be_used_but_not_found_again() -> None:
    library = ImageLibrary(
        ImageStore(Ledger(Limits(image_store_bytes=ByteSize(len(PNG) - 1)))), SourcePolicy(), ImageLimits()
    )
    image = library.from_data(ME, PNG)
    assert image.data == PNG
    with pytest.raises(ImageNotFoundError, match=image.digest):
        library.from_digest(ME, image.digest)


def test_bytes_are_not_shown_where_an_image_is_printed(library: ImageLibrary) -> None:
    image = library.from_data(ME, PNG)
    assert image.digest in repr(image)
    assert "PNG" not in repr(image)


def test_nobody_finds_what_another_has(library: ImageLibrary) -> None:
    mine = library.from_data(ME, PNG)
    with pytest.raises(ImageNotFoundError):
        library.from_digest(YOU, mine.digest)
    yours = library.from_data(YOU, PNG)
    assert yours.digest == mine.digest
    assert yours.key != mine.key  # nor what caches have of it
    assert library.from_data("", PNG).key == mine.digest
