import base64
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from segrpc.service.errors import ImageFetchError, ImageTooLargeError, InvalidFieldError, UriNotAllowedError
from segrpc.service.images.decode import ImageLimits
from segrpc.service.images.sources import SourcePolicy, read_source, read_uri
from tests.unit.images.pictures import encode, picture

JPEG = encode(picture(), "JPEG")
PNG = encode(picture(), "PNG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A media root with an image, beside a file that is nobody's business."""
    root = tmp_path / "media"
    (root / "sub folder").mkdir(parents=True)
    (root / "image.jpg").write_bytes(JPEG)
    (root / "sub folder" / "100% #1.png").write_bytes(PNG)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "media-old").mkdir()
    (tmp_path / "media-old" / "image.jpg").write_bytes(b"secret")
    return root


@pytest.fixture
def policy(root: Path) -> SourcePolicy:
    return SourcePolicy(media_roots=(root,))


def test_bytes_are_taken_as_they_are() -> None:
    assert read_source(PNG) is PNG
    with pytest.raises(ImageTooLargeError):
        read_source(PNG, limits=ImageLimits(max_bytes=len(PNG) - 1))


@pytest.mark.parametrize("read", [read_source, read_uri])
@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "DATA:image/png;charset=x;BASE64," + base64.b64encode(PNG).decode(),
        "data:;base64," + base64.b64encode(PNG).decode().rstrip("="),
        "data:image/png;base64," + quote(base64.b64encode(PNG).decode(), safe=""),
        "data:image/png;base64," + base64.encodebytes(PNG).decode(),
        "data:image/png," + quote(PNG),
    ],
    ids=["base64", "upper-case", "unpadded", "percent-and-base64", "lines", "percent"],
)
def test_data_urls(uri: str, read: Callable[..., bytes]) -> None:
    assert read(uri, SourcePolicy(), ImageLimits()) == PNG


@pytest.mark.parametrize("uri", ["data:image/png;base64", "data:;base64,%%%", "data:;base64,AAAAA", "data:;base64,é"])
def test_malformed_data_urls(uri: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        read_uri(uri)
    assert caught.value.violations[0].field == "uri"


@pytest.mark.parametrize("data", [PNG, JPEG])
def test_plain_base64_is_for_python_only(data: bytes) -> None:
    for text in (base64.b64encode(data).decode(), base64.encodebytes(data).decode()):
        assert read_source(text) == data
        with pytest.raises(InvalidFieldError, match=r"must begin with data:, file:, http: or https:"):
            read_uri(text)


def test_sizes_are_limited() -> None:
    limits = ImageLimits(max_bytes=len(PNG) - 1)
    for text in (base64.b64encode(PNG).decode(), "data:," + quote(PNG)):
        with pytest.raises(ImageTooLargeError):
            read_source(text, limits=limits)


@pytest.mark.parametrize(
    "uri", ["", "image.jpg", "/media/image.jpg", "ftp://example.org/x", "javascript:1", "C:\\x.jpg", "//x/y"]
)
def test_a_client_must_send_a_scheme_that_is_known(uri: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        read_uri(uri)
    assert caught.value.violations[0].field == "uri"


def test_files_in_a_media_root(root: Path, policy: SourcePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    other = root / "sub folder" / "100% #1.png"
    assert read_source(root / "image.jpg", policy) == JPEG
    assert read_source(str(other), policy) == PNG
    assert read_uri(f"file://{root}/image.jpg", policy) == JPEG
    assert read_uri(f"FILE://localhost{root}/image.jpg", policy) == JPEG
    assert read_uri(other.as_uri(), policy) == PNG
    assert read_uri(f"file:{root}/sub%20folder/../image.jpg", policy) == JPEG
    monkeypatch.chdir(root)
    assert read_source("image.jpg", policy) == JPEG
    assert read_source("image.jpg", SourcePolicy(media_roots=(Path(),))) == JPEG


def test_by_default_no_file_is_read(root: Path) -> None:
    with pytest.raises(UriNotAllowedError, match="--media-root"):
        read_source(root / "image.jpg")
    with pytest.raises(UriNotAllowedError, match="--media-root"):
        read_uri(f"file://{root}/image.jpg")


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "sub folder/../../secret.jpg", "../media-old/image.jpg", "missing/../../secret.jpg"]
)
def test_nothing_else_is_read_and_nothing_told_about_it(root: Path, policy: SourcePolicy, name: str) -> None:
    def message(path: str) -> str:
        with pytest.raises(UriNotAllowedError) as caught:
            read_uri(f"file://{quote(path)}", policy)
        shown, _, rest = caught.value.message.partition(" may not be read")
        assert shown.strip("'").removesuffix("...") in path  # long paths are cut
        return rest

    assert (root / name).resolve().is_file()
    path = f"{root}/{name}"
    assert (
        message(path)
        == message(path + "-missing")
        == message("/etc/passwd")
        == message("/")
        == message(str(root.parent))
    )
    encoded = quote(path, safe="").replace(".", "%2E").replace("%2F", "/", 1)
    with pytest.raises(UriNotAllowedError):
        read_uri(f"file://{encoded}", policy)


def test_what_is_outside_is_not_even_looked_at(root: Path, policy: SourcePolicy) -> None:
    # If the way through a link outside of the root counted, the answer would tell that there is such a link.
    (root.parent / "link").symlink_to("/usr/bin")
    for name in ("link", "missing"):
        assert read_source(f"{root.parent}/{name}/../media/image.jpg", policy) == JPEG


def test_links_may_not_lead_out(root: Path, policy: SourcePolicy) -> None:
    (root / "inside.jpg").symlink_to("image.jpg")
    (root / "outside.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "nowhere.jpg").symlink_to(root.parent / "missing.jpg")
    (root / "folder").symlink_to(root.parent)
    assert read_source(root / "inside.jpg", policy) == JPEG
    for name in ("outside.jpg", "nowhere.jpg", "folder/secret.jpg"):
        with pytest.raises(UriNotAllowedError):
            read_source(root / name, policy)
    assert read_source(root / "folder" / "media" / "image.jpg", policy) == JPEG


def test_links_may_lead_to_another_root_and_a_root_may_be_a_link(root: Path) -> None:
    second = root.parent / "second"
    second.symlink_to(root / "sub folder")
    (root / "link.jpg").symlink_to(root.parent / "media-old" / "image.jpg")
    policy = SourcePolicy(media_roots=(root, root.parent / "media-old", second))
    assert read_source(root / "link.jpg", policy) == b"secret"
    assert read_source(second / "100% #1.png", policy) == PNG


def test_files_that_cannot_be_read(root: Path, policy: SourcePolicy) -> None:
    (root / "circle").symlink_to("circle")
    os.mkfifo(root / "pipe")
    (root / "closed").mkdir()
    for name in (
        "missing.jpg",
        "missing/x.jpg",
        "image.jpg/x",
        "circle",
        "n" * 300,
        "pipe",
        "sub folder",
        ".",
        "closed",
    ):
        with pytest.raises(ImageFetchError):
            read_source(root / name, policy)
    with pytest.raises(ImageFetchError, match="cannot be read: No such file"):
        read_source(root / "missing.jpg", policy)
    with pytest.raises(ImageFetchError, match="no regular file"):
        read_source(root / "pipe", policy)


def test_what_is_no_regular_file_is_not_even_opened(
    root: Path, policy: SourcePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Opening makes some devices act. A socket cannot be opened: that it is no file must be known before.
    with socket.socket(socket.AF_UNIX) as bound:
        monkeypatch.chdir(root)  # the name of a socket must be short
        bound.bind("socket")
        with pytest.raises(ImageFetchError, match="no regular file"):
            read_source(root / "socket", policy)


@pytest.mark.parametrize(
    "path", ["/dev/zero", "/dev/stdin", "/proc/self/environ", "/proc/self/fd/0", "/proc/self/root"]
)
def test_links_to_devices_and_to_what_the_process_has_open(root: Path, policy: SourcePolicy, path: str) -> None:
    (root / "link").symlink_to(path)
    for uri in (f"file://{root}/link", f"file://{path}", f"file://{root}/link/etc/passwd"):
        with pytest.raises(UriNotAllowedError):
            read_uri(uri, policy)


@pytest.mark.parametrize("swapped", ["image.jpg", "folder"])
def test_links_that_appear_after_the_check_are_not_followed(root: Path, policy: SourcePolicy, swapped: str) -> None:
    """Something inside and a link to the outside change places all the time; what is outside must never be read."""
    outside = root.parent / "outside"
    for folder, content in ((outside, b"secret"), (root / "folder", JPEG)):
        folder.mkdir()
        (folder / "image.jpg").write_bytes(content)
    (outside / "link").symlink_to(root.parent / "secret.jpg" if swapped == "image.jpg" else outside)
    inside, aside, link = root / swapped, outside / "aside", outside / "link"
    stop = threading.Event()

    def read() -> bytes:
        return read_source(root / swapped if swapped == "image.jpg" else root / "folder/image.jpg", policy)

    def swap() -> None:
        while not stop.is_set():
            inside.rename(aside)
            link.rename(inside)
            inside.rename(link)
            aside.rename(inside)

    swapping = threading.Thread(target=swap)
    swapping.start()
    found = Counter[bytes | type[Exception]]()
    try:
        for _ in range(3000):
            try:
                found[read()] += 1
            except (UriNotAllowedError, ImageFetchError) as error:
                found[type(error)] += 1
    finally:
        stop.set()
        swapping.join()
    assert b"secret" not in found, found
    assert read() == JPEG


def test_a_missing_root_is_no_bug(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    policy = SourcePolicy(media_roots=(tmp_path / "missing", tmp_path / "circle"))
    for name in ("missing/image.jpg", "circle/image.jpg"):
        with pytest.raises(ImageFetchError):
            read_source(tmp_path / name, policy)


def test_large_files_are_not_read(root: Path, policy: SourcePolicy) -> None:
    with (root / "large").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on disk, but would not fit into memory
    with pytest.raises(ImageTooLargeError, match="1099511627776 bytes"):
        read_source(root / "large", policy)


@pytest.mark.parametrize(
    "uri",
    ["file:image.jpg", "file://", "file://other/image.jpg", "file:///media/a?b", "file:///media/a#b", "file://[x/y"],
)
def test_malformed_file_urls(uri: str, policy: SourcePolicy) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        read_uri(uri, policy)
    assert caught.value.violations[0].field == "uri"


def test_paths_that_no_file_can_have(root: Path, policy: SourcePolicy) -> None:
    with pytest.raises(InvalidFieldError):
        read_uri(f"file://{root}/a%00b", policy)
    with pytest.raises(InvalidFieldError):
        read_source(f"{root}/\ud800", policy)
    with pytest.raises(UriNotAllowedError):
        read_uri("file:///etc/a%00b", policy)


def test_long_texts_are_not_repeated_in_messages() -> None:
    with pytest.raises(UriNotAllowedError) as caught:
        read_source("x" * 10**6)
    assert len(caught.value.message) < 500
