from pathlib import Path

import pytest

from segrpc.service.admission.limits import Limits, Resource
from segrpc.service.admission.limits_file import read_limits
from segrpc.service.errors import ConfigurationError

STREAMS, IMAGES = Resource.STREAMS, Resource.IMAGE_BYTES


def read(folder: Path, text: str, **defaults: int) -> Limits:
    file = folder / "limits.toml"
    file.write_text(text)
    return read_limits(file, Limits.model_validate(defaults), lambda limits: None)


def test_a_file_replaces_what_it_names(tmp_path: Path) -> None:
    text = 'max_streams = 20\nprincipal_share = 0.25\n[principals."key:alice"]\nimage_store_bytes = "1KiB"\n'
    limits = read(tmp_path, text, max_streams=1, max_requests=7)
    assert [limits.of_all(resource) for resource in (STREAMS, Resource.REQUESTS)] == [20, 7]
    assert [limits.of_one(STREAMS, name) for name in ("key:alice", "key:bob", "")] == [5, 5, 20]
    assert [limits.of_one(IMAGES, name) for name in ("key:alice", "key:bob")] == [1024, 2**28]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_streams = 0", "max_streams"),
        ("max_stream = 1", "max_stream"),
        ("principal_share = 2", "principal_share"),
        ("max_streams = ", "Invalid value"),
        ('[principals."key:alice"]\nmax_streams = -1', "max_streams"),
        ('[principals."key:alice"]\nprincipal_share = 0.1', "principal_share"),
        ("[principals.alice]\nmax_streams = 1", "'alice' must be a principal's whole name, such as key:alice"),
        ('[principals."keys:alice"]\nmax_streams = 1', "'keys:alice' must be"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read(tmp_path, text)


def test_limits_that_do_not_fit_the_settings_are_wrong(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("")

    def check(limits: Limits) -> None:
        raise ConfigurationError("they do not fit")

    with pytest.raises(ValueError, match="they do not fit"):
        read_limits(file, Limits(), check)
