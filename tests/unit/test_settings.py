import json
import os
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from segrpc.service.errors import ConfigurationError
from segrpc.service.models.sam2.catalog import VARIANTS
from segrpc.service.schemas import ModelDeploymentConfig, violations_of
from segrpc.service.settings import GiB, MiB, Settings


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what the developer's shell may have set."""
    for name in list(os.environ):
        if name.upper().startswith("SEGRPC_"):
            monkeypatch.delenv(name)


def load(toml: str = "", *, folder: Path | None = None, **given: Any) -> Settings:
    if folder is None:
        return Settings.load(None, given)
    file = folder / "config.toml"
    file.write_text(toml, "utf-8")
    return Settings.load(file, given)


def wrong(toml: str = "", *, folder: Path | None = None, **given: Any) -> dict[str, str]:
    """Return what is wrong with settings, by field."""
    with pytest.raises(ValidationError) as caught:
        load(toml, folder=folder, **given)
    return {violation.field: violation.description for violation in violations_of(caught.value)}


def test_without_any_source_the_defaults_hold() -> None:
    settings = load()
    assert (settings.listen, settings.model, settings.checkpoint) == ("127.0.0.1:50051", "", None)
    assert (settings.max_image_bytes, settings.embedding_cache_bytes) == (64 * MiB, 2 * GiB)
    assert (settings.media_root, settings.allowed_host, settings.allow_private_addresses) == ((), (), False)


def test_the_stronger_source_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml = "max_prompts = 1\nmax_points = 1\nmax_pending_decodes = 1"
    monkeypatch.setenv("SEGRPC_MAX_PROMPTS", "2")
    monkeypatch.setenv("SEGRPC_MAX_POINTS", "2")
    monkeypatch.setenv("SEGRPC_MAX_SESSIONS", "2")
    settings = load(toml, folder=tmp_path, max_prompts="3", log_level="error")
    assert (settings.max_prompts, settings.max_points, settings.max_pending_decodes) == (3, 2, 1)
    assert (settings.max_sessions, settings.log_level, settings.threads) == (2, "error", 0)


def test_a_list_is_replaced_by_the_stronger_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml = 'allowed_host = ["a.example"]\nmedia_root = ["/a"]'
    assert load(toml, folder=tmp_path).media_root == (Path("/a"),)
    monkeypatch.setenv("SEGRPC_ALLOWED_HOST", '["b.example", "c.example"]')
    monkeypatch.setenv("SEGRPC_MEDIA_ROOT", '["/b"]')
    settings = load(toml, folder=tmp_path, media_root=["/c", "/d"])
    assert settings.allowed_host == ("b.example", "c.example")
    assert settings.media_root == (Path("/c"), Path("/d"))


def test_an_empty_variable_counts_as_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_PROMPTS", "MEDIA_ROOT", "CHECKPOINT", "MODELS"):
        monkeypatch.setenv(f"SEGRPC_{name}", "")
    settings = load("max_prompts = 5", folder=tmp_path)
    assert (settings.max_prompts, settings.media_root, settings.checkpoint, settings.models) == (5, (), None, ())


def test_every_option_can_be_given_by_each_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A valid value for each that is not its default, as text and as TOML gives it.
    special: dict[str, Any] = {
        "checkpoint": "/x.pt",
        "device": "cpu",
        "encoder": "reference",
        "listen": "0.0.0.0:1",
        "tls_certificate": "/c.pem",
        "tls_key": "/k.pem",
        "tls_client_ca": "/a.pem",
        "keys_file": "/k.toml",
        "models": [{"name": "m"}],
        "media_root": ["/m"],
        "allowed_host": ["h.example"],
        "principal_share": "0.25",
        "otlp_endpoint": "http://collector:4318",
    }
    for name, field in Settings.model_fields.items():
        default = field.default
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str) and choice != default]
        value: Any = not default if isinstance(default, bool) else choices[0] if choices else "7"
        value = special.get(name, value)
        given = getattr(load(**{name: value}), name)
        assert given != default, name
        with monkeypatch.context() as environment:
            as_text = json.dumps(value) if isinstance(value, list | bool) else value
            environment.setenv(f"SEGRPC_{name.upper()}", as_text)
            assert getattr(load(), name) == given
        file = tmp_path / "config.toml"
        if name == "models":
            file.write_text('[[models]]\nname = "m"')
        else:
            file.write_text(f"{name} = {json.dumps(value)}")
        assert getattr(Settings.load(file, {}), name) == given


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    assert list(wrong("max_promts = 1\n[limits]\nx = 1", folder=tmp_path)) == ["max_promts", "limits"]
    assert list(wrong(max_promts=1)) == ["max_promts"]
    assert list(wrong('[[models]]\nname = "a"\ncheckpoint = "x.pt"', folder=tmp_path)) == ["models[0].checkpoint"]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGRPC_MAX_POINTS", "many")
    assert set(wrong("max_pending_encodes = 0", folder=tmp_path, dtype="float64")) == {
        "max_points",
        "max_pending_encodes",
        "dtype",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        (4096, 4096),
        ("64MiB", 64 * MiB),
        ("2 GiB", 2 * GiB),
        ("1.5KiB", 1536),
        ("1kb", 1000),
        ("3MB", 3 * 10**6),
    ],
)
def test_sizes_in_bytes(text: str | int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(image_store_bytes=text).image_store_bytes == expected
    assert load(f"image_store_bytes = {json.dumps(text)}", folder=tmp_path).image_store_bytes == expected
    monkeypatch.setenv("SEGRPC_IMAGE_STORE_BYTES", str(text))
    assert load().image_store_bytes == expected


BAD: dict[str, list[Any]] = {
    "max_image_bytes": ["0", 0, "-1", "1 apple", "MiB", "", "inf"],
    "max_image_pixels": [0, 2**26 + 1, "1e6", 1.5],
    "max_prompts": [0, -1, "few"],
    "fetch_timeout": [0, -1, "nan", "inf", float("inf")],
    "session_idle_seconds": [0],
    "drain_seconds": [-0.1, "nan", "inf"],
    "listen": ["", "50051", ":50051", "localhost", "localhost:", "localhost:99999", "h:-1", "h:x"],
    "allowed_host": [["https://example.org"], ["a.example", "*"]],
    "media_root": ["/media", 3, [3]],
    "models": [[{"name": ""}], [{}], "x", [{"name": "m" * 129}]],
    "dtype": ["float64"],
    "decoder": ["slow", ""],
    "encoder": ["slow", ""],
    "log_level": ["INFO"],
    "reflection": ["maybe"],
    "threads": [-1],
    "max_streams": [0],
    "principal_share": [0, 1.5, "nan"],
    "jwt_jwks": ["http://example.org/jwks", "http://127.0.0.1.example.org/", "ftp://127.0.0.1/", "https://"],
    "jwt_refresh_seconds": [0, "inf"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_values_are_named(name: str, value: Any) -> None:
    (field,) = wrong(**{name: value})
    assert field.partition("[")[0] == name


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "0.0.0.0:65535", "[::1]:50051", "localhost:1"])
def test_addresses_to_listen_on(listen: str) -> None:
    assert load(listen=listen).listen == listen


@pytest.mark.parametrize("name", ["media_root", "allowed_host", "models"])
@pytest.mark.parametrize("text", ["/media", "[", "a,b"])
def test_a_list_in_the_environment_must_be_json(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"SEGRPC_{name.upper()}", text)
    found = wrong()
    assert list(found) == [name]
    assert 'is no list in JSON, such as ["a", "b"]' in found[name]


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    with pytest.raises(tomllib.TOMLDecodeError):
        load("listen = ", folder=tmp_path)
    with pytest.raises(FileNotFoundError):
        Settings.load(tmp_path / "missing.toml", {})
    file = tmp_path / "latin1.toml"
    file.write_bytes('hub_id = "\xfc"'.encode("latin-1"))
    with pytest.raises(OSError, match=r"latin1\.toml is not encoded in UTF-8"):
        Settings.load(file, {})


def test_settings_cannot_be_changed() -> None:
    settings = load()
    with pytest.raises(ValidationError, match="frozen"):
        settings.listen = "127.0.0.1:1"


def only(settings: Settings) -> ModelDeploymentConfig:
    (config,) = settings.deployments()
    return config


def test_without_a_model_grabcut_is_served() -> None:
    assert only(load()) == ModelDeploymentConfig(name="grabcut")
    assert only(load()).registered_name == "grabcut"


def test_a_model_by_name() -> None:
    for name in ("grabcut", "sam2.1-hiera-tiny", "of-another-package"):
        assert only(load(model=name)) == ModelDeploymentConfig(name=name)


def test_only_what_the_operator_set_reaches_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGRPC_DTYPE", "bfloat16")
    config = only(load("threads = 2", folder=tmp_path, model="sam2-hiera-large", device="auto"))
    assert config.model_params == {"dtype": "bfloat16", "threads": 2, "device": "auto"}
    config = only(load(model="sam2-hiera-large", hub_id="me/mine", max_prompts=3))
    assert config.model_params == {"dtype": "bfloat16", "hub_id": "me/mine"}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_published_checkpoint_names_its_model(name: str) -> None:
    file = Path("/weights") / VARIANTS[name].filename
    config = only(load(checkpoint=str(file)))
    assert (config.name, config.registered_name, config.model_params) == (name, name, {"checkpoint": file})


@pytest.mark.parametrize(
    ("file", "model", "name", "registered"),
    [
        ("mine.pt", "", "mine", "sam2"),
        ("mine.v2.pt", "", "mine.v2", "sam2"),
        ("mine.pt", "sam2.1-hiera-tiny", "sam2.1-hiera-tiny", "sam2.1-hiera-tiny"),
        ("mine.pt", "cells", "cells", "sam2"),
        ("mine.pt", "sam2", "sam2", "sam2"),
        ("sam2.1_hiera_tiny.pt", "cells", "cells", "sam2"),
        ("sam2.1_hiera_tiny.pt", "sam2-hiera-large", "sam2-hiera-large", "sam2-hiera-large"),
    ],
)
def test_a_checkpoint_of_any_name(file: str, model: str, name: str, registered: str) -> None:
    config = only(load(checkpoint=f"/weights/{file}", model=model))
    assert (config.name, config.registered_name) == (name, registered)
    assert config.model_params == {"checkpoint": Path("/weights") / file}


MODELS = """
device = "cpu"

[[models]]
name = "first"
model = "grabcut"
model_params = { iterations = 3 }

[[models]]
name = "second"
"""


def test_several_models_come_from_tables_and_the_first_is_the_default(tmp_path: Path) -> None:
    first, second = load(MODELS, folder=tmp_path).deployments()
    assert first == ModelDeploymentConfig(name="first", model="grabcut", model_params={"iterations": 3})
    assert second == ModelDeploymentConfig(name="second")


@pytest.mark.parametrize("given", [{"model": "grabcut"}, {"checkpoint": "/x.pt"}])
def test_tables_and_a_single_model_exclude_each_other(tmp_path: Path, given: dict[str, Any]) -> None:
    found = wrong(MODELS, folder=tmp_path, **given)
    assert "give either model and checkpoint, or [[models]] tables" in found[""]


def test_two_tables_of_one_name_are_refused(tmp_path: Path) -> None:
    assert "the same name" in wrong(MODELS.replace("second", "first"), folder=tmp_path)[""]


# Limits


def test_limits_come_from_the_settings() -> None:
    limits = load(max_streams=7, image_store_bytes="5MiB").limits()
    assert (limits.max_streams, limits.image_store_bytes, limits.principals) == (7, 5 * MiB, {})


def test_one_call_must_fit(tmp_path: Path) -> None:
    small = load(in_flight_bytes="100MiB")
    small.check_limits(small.limits())
    known = load(in_flight_bytes="100MiB", keys_file="/keys.toml")
    with pytest.raises(ConfigurationError, match=r"a caller may have 52428800 bytes in flight .* may need 67108864"):
        known.check_limits(known.limits())


@pytest.mark.parametrize(("engine", "fits"), [("process", True), ("inline", False)])
def test_budgets_must_fit_into_the_memory(engine: str, fits: bool) -> None:
    budgets: dict[str, Any] = {"image_store_bytes": "1GiB", "session_bytes": "1GiB", "in_flight_bytes": "1GiB"}
    settings = load(memory_bytes="4GiB", engine=engine, **budgets)
    if fits:
        settings.check_limits(settings.limits())
    else:
        with pytest.raises(
            ConfigurationError, match=r"memory_bytes is 4294967296, .* embedding_cache_bytes 2147483648"
        ):
            settings.check_limits(settings.limits())
    with pytest.raises(ConfigurationError, match="session_bytes 3221225472"):
        settings.check_limits(settings.limits().model_copy(update={"session_bytes": 3 * GiB}))


@pytest.mark.parametrize(
    ("given", "listen"),
    [
        ("", ""),
        ("9464", "127.0.0.1:9464"),
        ("0", "127.0.0.1:0"),
        ("0.0.0.0:9464", "0.0.0.0:9464"),
        ("[::1]:0", "[::1]:0"),
    ],
)
def test_other_ports_are_on_the_loopback_interface_unless_told(given: str, listen: str) -> None:
    settings = load(metrics_listen=given, admin_listen=given)
    assert (settings.metrics_listen, settings.admin_listen) == (listen, listen)


@pytest.mark.parametrize("given", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1"])
def test_administration_stays_on_this_machine(given: str) -> None:
    with pytest.raises(ConfigurationError, match="admin_listen"):
        load(admin_listen=given, insecure=True).check_security()
    load(admin_listen="[::1]:1").check_security()


@pytest.mark.parametrize("given", ["localhost", "127.0.0.1:99999", ":9464", "127.0.0.1:x", "-1"])
def test_a_port_for_metrics_that_is_none(given: str) -> None:
    assert "must be HOST:PORT" in wrong(metrics_listen=given)["metrics_listen"]


def test_a_receiver_of_telemetry_is_a_url() -> None:
    assert load(otlp_endpoint="http://127.0.0.1:4318/").otlp_endpoint == "http://127.0.0.1:4318"
    for given in ("127.0.0.1:4318", "grpc://collector:4317", "http://"):
        assert "http or https URL" in wrong(otlp_endpoint=given)["otlp_endpoint"]
