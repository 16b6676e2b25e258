"""Who calls, what they may do, and that nobody sees what another has: keys and tokens, over real servers."""

import http.server
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from segrpc.client import (
    AsyncSegmentationClient,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    SegmentationClient,
    SegmentationError,
    UnauthenticatedError,
)
from segrpc.service.identity.keys import new_key, toml_of
from segrpc.v1.refine_pb2 import RefineConfig, RefineRequest
from segrpc.v1.segmentation_service_pb2 import EncodeImageRequest, SegmentRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import Image, Point, Prompt
from tests.blackbox.failure import Failure, failure_of, parse
from tests.server_process import ServerProcess, connect, raw
from tests.tcp_proxy import TcpProxy
from tests.third_party import config_of_gated
from tests.tokens import AUDIENCE, ISSUER, Issuer, key_set
from tests.web_server import web_server

CLICK: dict[str, Any] = {"points": [(100, 100)]}
GATED, GRABCUT = "gated", "grabcut"
KEYS = {name: new_key() for name in ("alice", "bob", "lister", "grabcutter", "nobody")}


def as_bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, third_party: dict[str, str]) -> Iterator[ServerProcess]:
    """A server with two models that knows callers by their keys."""
    folder = tmp_path_factory.mktemp("guarded")
    limits = {
        "lister": 'methods = ["ListModels", "GetModel"]\n',
        "grabcutter": f'models = ["{GRABCUT}"]\n',
        "nobody": "models = []\n",
    }
    keys = "".join(toml_of(name, key) + limits.get(name, "") for name, key in KEYS.items())
    (folder / "keys.toml").write_text(keys)
    config = folder / "config.toml"
    config.write_text(
        f'keys_file = "{folder / "keys.toml"}"\n{config_of_gated(folder)}[[models]]\nname = "{GRABCUT}"\n'
    )
    with ServerProcess("--config", str(config), log=folder / "log", environment=third_party) as server:
        yield server


def client(server: ServerProcess, name: str, **options: Any) -> SegmentationClient:
    return SegmentationClient(server.target, token=KEYS[name], **options)


@pytest.fixture
def alice(guarded: ServerProcess) -> Iterator[SegmentationClient]:
    with client(guarded, "alice") as opened:
        yield opened


@pytest.fixture
def bob(guarded: ServerProcess) -> Iterator[SegmentationClient]:
    with client(guarded, "bob") as opened:
        yield opened


# Who calls


def unauthenticated(server: ServerProcess, *metadata: tuple[str, str]) -> tuple[Failure, str]:
    """Call with bytes that are no message, and return what is said about the credential, and the challenge."""
    with connect(server) as channel, pytest.raises(grpc.RpcError) as caught:
        raw(channel, "/segrpc.v1.SegmentationService/Segment")(b"\xff\xff", metadata=metadata)
    error: Any = caught.value
    return parse(error), dict(error.trailing_metadata()).get("www-authenticate", "")


@pytest.mark.parametrize(
    ("values", "reason", "error"),
    [
        ([], "CREDENTIAL_MISSING", False),
        (["Bearer"], "CREDENTIAL_INVALID", True),
        (["Bearer wrong"], "CREDENTIAL_INVALID", True),
        ([f"Basic {KEYS['alice']}"], "CREDENTIAL_INVALID", True),
        ([KEYS["alice"]], "CREDENTIAL_INVALID", True),
        ([f"Bearer {KEYS['alice']}", f"Bearer {KEYS['bob']}"], "CREDENTIAL_INVALID", True),
        ([f"Bearer {KEYS['alice'][:-1]}"], "CREDENTIAL_INVALID", True),
    ],
)
def test_who_is_not_known_is_told_so_before_the_message_is_looked_at(
    guarded: ServerProcess, values: list[str], reason: str, error: bool
) -> None:
    failure, challenge = unauthenticated(guarded, *(("authorization", value) for value in values))
    assert (failure.code, failure.reason, failure.domain) == (
        grpc.StatusCode.UNAUTHENTICATED,
        reason,
        "segrpc.v1",
    )
    assert challenge == 'Bearer realm="segrpc"' + (', error="invalid_token"' if error else "")


def test_the_scheme_may_be_written_in_any_case(guarded: ServerProcess) -> None:
    failure, _ = unauthenticated(guarded, ("authorization", f"bearer {KEYS['alice']}"))
    assert failure.reason == "MALFORMED_MESSAGE"


def test_streams_and_reflection_need_a_credential_and_health_does_not(guarded: ServerProcess) -> None:
    with SegmentationClient(guarded.target) as stranger:
        assert stranger.health()
        with pytest.raises(UnauthenticatedError), stranger.refine(b"x"):
            pass
        with pytest.raises(UnauthenticatedError):
            stranger.upload(b"x")
    with connect(guarded) as channel:
        for version in ("v1", "v1alpha"):
            method: Any = channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
            listing = b"\x3a\x01*"  # list_services
            failure = failure_of(lambda method=method: next(method(iter([b"\x3a\x01*"]))))  # type: ignore[misc]
            assert failure.code == grpc.StatusCode.UNAUTHENTICATED
            assert b"SegmentationService" in next(method(iter([listing]), metadata=as_bearer(KEYS["alice"])))


def test_the_log_names_who_called_and_shows_no_key(guarded: ServerProcess, alice: SegmentationClient) -> None:
    alice.models()
    unauthenticated(guarded, *as_bearer("a-key-that-leaked"))
    # Calls are logged after they are answered.
    guarded.wait_for(lambda _: "/segrpc.v1.ModelService/ListModels principal='key:alice'" in guarded.log_text())
    log = guarded.log_text()
    assert not any(key in log for key in [*KEYS.values(), "a-key-that-leaked"])


class KeysFile:
    """A file of keys that an operator changes while a server reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, *tables: str) -> None:
        """Replace it as a whole, as editors do."""
        draft = self.path.with_suffix(".new")
        draft.write_text("".join(tables))
        draft.replace(self.path)


@pytest.fixture(scope="module")
def changing(
    tmp_path_factory: pytest.TempPathFactory, third_party: dict[str, str]
) -> Iterator[tuple[ServerProcess, KeysFile]]:
    """A server whose file of keys each test writes anew."""
    folder = tmp_path_factory.mktemp("changing")
    keys = KeysFile(folder / "keys.toml")
    keys.write()
    config = folder / "config.toml"
    config.write_text(f'keys_file = "{keys.path}"\n{config_of_gated(folder)}')
    with ServerProcess("--config", str(config), log=folder / "log", environment=third_party) as server:
        yield server, keys


def test_a_withdrawn_key_and_a_new_one_count_at_once(changing: tuple[ServerProcess, KeysFile]) -> None:
    server, keys = changing
    old, new = new_key(), new_key()
    keys.write(toml_of("alice", old))
    with (
        SegmentationClient(server.target, token=old) as before,
        SegmentationClient(server.target, token=new) as after,
    ):
        before.models()
        with pytest.raises(UnauthenticatedError):
            after.models()
        keys.write("[[keys]\n")  # broken: what was read before stays
        before.models()
        assert "cannot be used; what was read before stays" in server.log_text()
        keys.write(toml_of("alice", new))
        after.models()
        with pytest.raises(UnauthenticatedError) as caught:
            before.models()
    assert caught.value.reason == "CREDENTIAL_INVALID"


def test_an_open_stream_ends_when_its_key_is_withdrawn(changing: tuple[ServerProcess, KeysFile], photo: bytes) -> None:
    server, keys = changing
    leaked, other, new = new_key(), new_key(), new_key()
    keys.write(toml_of("alice", leaked), toml_of("bob", other))
    with (
        SegmentationClient(server.target, token=leaked) as thief,
        SegmentationClient(server.target, token=other) as bob,
    ):
        session, undisturbed = thief.refine(photo), bob.refine(photo)
        session.open()
        undisturbed.open()
        assert session.click(100, 100).revision == 1
        keys.write(toml_of("alice", new), toml_of("bob", other))
        with pytest.raises(UnauthenticatedError) as caught:
            session.click(30, 30)
        assert caught.value.reason == "CREDENTIAL_INVALID"
        assert undisturbed.click(100, 100).revision == 1
        undisturbed.finish()
    # What it had made is there for whoever is alice now.
    with (
        SegmentationClient(server.target, token=new) as alice,
        alice.resume(session.session_id, session.resume_token) as resumed,
    ):
        assert resumed.click(30, 30).revision == 2


def test_a_key_that_goes_to_somebody_else_takes_no_stream_along(
    changing: tuple[ServerProcess, KeysFile], photo: bytes
) -> None:
    server, keys = changing
    key = new_key()
    keys.write(toml_of("alice", key))
    with SegmentationClient(server.target, token=key) as opened:
        session = opened.refine(photo)
        session.open()
        keys.write(toml_of("bob", key))
        with pytest.raises(NotFoundError) as caught:  # bob connects again, and asks for alice's session
            session.click(100, 100)
    assert caught.value.reason == "SESSION_NOT_FOUND"


def test_a_session_goes_on_with_the_key_that_comes_after(
    changing: tuple[ServerProcess, KeysFile], photo: bytes
) -> None:
    server, keys = changing
    valid = new_key()
    keys.write(toml_of("alice", valid))
    with (
        SegmentationClient(server.target, token=lambda: valid) as opened,
        opened.refine(photo) as session,
    ):
        session.click(100, 100)
        valid = new_key()
        keys.write(toml_of("alice", valid))
        assert session.click(30, 30, label=0).revision == 2


@pytest.mark.parametrize(
    ("left", "reason"),
    [('methods = ["ListModels"]\n', "METHOD_NOT_ALLOWED"), ("models = []\n", "MODEL_NOT_ALLOWED")],
)
def test_an_open_stream_may_do_what_its_key_allows_by_now(
    changing: tuple[ServerProcess, KeysFile], photo: bytes, left: str, reason: str
) -> None:
    server, keys = changing
    key = new_key()
    keys.write(toml_of("alice", key))
    with SegmentationClient(server.target, token=key) as opened:
        session = opened.refine(photo)
        session.open()
        session.click(100, 100)
        keys.write(toml_of("alice", key), left)
        with pytest.raises(PermissionDeniedError) as caught:
            session.click(30, 30)
    assert caught.value.reason == reason


# What they may do


def test_a_method_that_the_key_does_not_have(guarded: ServerProcess, photo: bytes) -> None:
    with client(guarded, "lister") as lister:
        assert [model.name for model in lister.models()] == [GATED, GRABCUT]
        for call in (
            lambda: lister.segment(photo, **CLICK),
            lambda: lister.encode(photo),
            lambda: lister.upload(photo),
            lambda: lister.refine(photo).open(),
        ):
            with pytest.raises(PermissionDeniedError) as caught:
                call()
            assert caught.value.reason == "METHOD_NOT_ALLOWED"


def test_a_model_that_the_key_does_not_have(guarded: ServerProcess, photo: bytes) -> None:
    with client(guarded, "grabcutter") as grabcutter:
        (model,) = grabcutter.models()
        assert (model.name, model.is_default) == (GRABCUT, True)
        assert grabcutter.segment(photo, **CLICK).model == GRABCUT  # the first that it may use is its default
        for call in (
            lambda: grabcutter.segment(photo, model=GATED, **CLICK),
            lambda: grabcutter.encode(photo, model=GATED),
            lambda: grabcutter.refine(photo, model=GATED).open(),
            lambda: grabcutter.model(GATED),
        ):
            with pytest.raises(PermissionDeniedError) as caught:
                call()
            assert caught.value.reason == "MODEL_NOT_ALLOWED"
        with pytest.raises(NotFoundError):
            grabcutter.model("sam9")
    with client(guarded, "nobody") as nobody:
        assert nobody.models() == []
        with pytest.raises(PermissionDeniedError):
            nobody.segment(photo, **CLICK)


# What they have


def by_digest(server: ServerProcess, name: str, digest: str) -> list[Failure]:
    """Ask for an image by its digest in every way there is."""
    image, metadata = Image(digest=digest), as_bearer(KEYS[name])
    segment = SegmentRequest(image=image, prompts=[Prompt(points=[Point(x=1, y=1)])], request_id="r")
    with connect(server) as channel:
        stub = SegmentationServiceStub(channel)
        open_it = RefineRequest(config=RefineConfig(image=image, request_id="r"))
        return [
            failure_of(lambda: stub.Segment(segment, metadata=metadata)),
            failure_of(lambda: stub.EncodeImage(EncodeImageRequest(image=image, request_id="r"), metadata=metadata)),
            failure_of(lambda: next(stub.Refine(iter([open_it]), metadata=metadata))),
        ]


def test_the_digest_of_anothers_image_is_unknown_in_every_call(
    guarded: ServerProcess, alice: SegmentationClient, photo: bytes
) -> None:
    digest = alice.upload(photo).digest
    unseen = "sha256:" + "0" * 64
    for failure, unknown in zip(by_digest(guarded, "bob", digest), by_digest(guarded, "bob", unseen), strict=True):
        assert failure.reason == "IMAGE_NOT_FOUND"
        assert failure.message.replace(digest, unseen) == unknown.message
        assert (failure.code, failure.fields, failure.retry_delay) == (
            unknown.code,
            unknown.fields,
            unknown.retry_delay,
        )


def test_the_cache_does_not_tell_who_has_an_image(
    alice: SegmentationClient, bob: SegmentationClient, photo: bytes
) -> None:
    image = photo + b"x"  # bytes after the end of a JPEG: an image that no other test has
    asked: dict[str, Any] = {"model": GATED, **CLICK}
    assert not alice.segment(image, **asked).timing.embedding_cached
    assert alice.segment(image, **asked).timing.embedding_cached
    first = bob.segment(image, **asked)
    assert not first.timing.embedding_cached
    assert first.timing.encode_image > 0  # it was computed: neither the flag nor the time tells
    assert bob.segment(image, **asked).timing.embedding_cached


def test_a_session_belongs_to_who_opened_it(alice: SegmentationClient, bob: SegmentationClient, photo: bytes) -> None:
    with alice.refine(photo, model=GRABCUT) as session:
        session.click(100, 100)
        with pytest.raises(NotFoundError) as caught:
            bob.resume(session.session_id, session.resume_token).open()
        assert caught.value.reason == "SESSION_NOT_FOUND"
        with pytest.raises(NotFoundError) as unknown:
            bob.resume("0" * 32, session.resume_token).open()
        assert caught.value.message == unknown.value.message.replace("0" * 32, session.session_id)
        assert session.click(30, 30, label=0).revision == 2  # nobody took it away
        session.detach()
    with pytest.raises(NotFoundError):
        bob.resume(session.session_id, session.resume_token).open()
    with alice.resume(session.session_id, session.resume_token) as resumed:
        assert resumed.undo().revision == 3


def test_a_name_of_a_series_is_the_principals_on_every_connection(
    guarded: ServerProcess, alice: SegmentationClient, bob: SegmentationClient, photo: bytes
) -> None:
    kept: dict[str, Any] = {"session_id": "mine", "reset_predictor": False, "model": GRABCUT, **CLICK}
    alice.segment(photo, session_id="mine", model=GRABCUT, **CLICK)
    with client(guarded, "alice") as elsewhere:
        assert elsewhere.segment(None, **kept).image == alice.segment(None, **kept).image
    with pytest.raises(PreconditionError) as caught:
        bob.segment(None, **kept)
    assert caught.value.reason == "NO_PREDICTOR_STATE"


# The client


def test_a_session_asks_for_a_token_each_time_it_connects(guarded: ServerProcess, photo: bytes) -> None:
    asked: list[str] = []

    def token() -> str:
        asked.append("token")
        return KEYS["alice"]

    with TcpProxy(guarded.target) as proxy, SegmentationClient(proxy.target, token=token) as opened:
        with opened.refine(photo, model=GRABCUT) as session:
            session.click(100, 100)
            assert len(asked) == 1
            proxy.cut()
            assert session.click(30, 30, label=0).revision == 2
        assert len(asked) > 1


async def test_asyncio_waits_for_a_token(guarded: ServerProcess, photo: bytes) -> None:
    async def token() -> str:
        return KEYS["alice"]

    async with AsyncSegmentationClient(guarded.target, token=token) as opened:
        assert len(await opened.models()) == 2
        async with opened.refine(photo, model=GRABCUT) as session:
            assert (await session.click(100, 100)).revision == 1


async def test_a_token_that_cannot_be_had_ends_a_session_with_a_reason(guarded: ServerProcess, photo: bytes) -> None:
    def token() -> str:
        raise OSError("the vault is closed")

    with SegmentationClient(guarded.target, token=token) as opened:
        with pytest.raises(UnauthenticatedError, match="the vault is closed"), opened.refine(photo):
            pass
        with pytest.raises(UnauthenticatedError, match="the vault is closed"):
            opened.models()
    async with AsyncSegmentationClient(guarded.target, token=token) as opened_async:
        with pytest.raises(UnauthenticatedError, match="the vault is closed"):
            async with opened_async.refine(photo):
                pass


# JSON Web Tokens


@dataclass
class Web:
    """A web server on the loopback interface that publishes keys."""

    text: str = ""
    requests: int = 0
    url: str = ""


@pytest.fixture
def web() -> Iterator[Web]:
    state = Web()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests += 1
            self.send_response(200 if state.text else 503)
            self.end_headers()
            self.wfile.write(state.text.encode())

        def log_message(self, *args: object) -> None:
            pass

    with web_server(Handler) as host:
        state.url = f"http://{host}/jwks"
        yield state


def with_tokens(jwks: str, *options: str, log: Path) -> ServerProcess:
    issuer = ("--jwt-issuer", ISSUER, "--jwt-audience", AUDIENCE, "--jwt-jwks", jwks)
    return ServerProcess(*issuer, *options, log=log)


def reason_of(target: str, token: str) -> str:
    with SegmentationClient(target, token=token) as asking:
        try:
            asking.models()
        except SegmentationError as error:
            return error.reason
    return ""


def test_tokens_of_an_issuer(web: Web, tmp_path: Path, photo: bytes) -> None:
    first, second = Issuer("first"), Issuer("second", "RS256")
    web.text = key_set(first)
    with with_tokens(web.url, "--jwt-refresh-seconds", "1e-9", log=tmp_path / "log") as server:
        assert reason_of(server.target, first.token()) == ""
        assert reason_of(server.target, first.token(exp=1)) == "CREDENTIAL_EXPIRED"
        assert reason_of(server.target, first.token(aud="other")) == "CREDENTIAL_INVALID"
        assert reason_of(server.target, first.token(iss="other")) == "CREDENTIAL_INVALID"
        assert reason_of(server.target, new_key()) == "CREDENTIAL_INVALID"
        assert web.requests == 1
        assert reason_of(server.target, second.token()) == "CREDENTIAL_INVALID"
        assert web.requests == 2  # an unknown key was looked for
        web.text = key_set(first, second)
        assert reason_of(server.target, second.token()) == ""
        assert web.requests == 3
        restricted = first.token(segrpc_methods=["ListModels"])
        with SegmentationClient(server.target, token=restricted) as asking:
            asking.models()
            with pytest.raises(PermissionDeniedError):
                asking.segment(photo, **CLICK)
    log = server.log_text()
    assert "principal='jwt:alice'" in log
    assert restricted not in log


def test_strangers_cannot_make_the_server_ask_the_issuer_all_the_time(web: Web, tmp_path: Path) -> None:
    known = Issuer("known")
    web.text = key_set(known)
    with with_tokens(web.url, "--jwt-refresh-seconds", "3600", log=tmp_path / "log") as server:
        assert reason_of(server.target, known.token()) == ""
        for i in range(5):
            assert reason_of(server.target, Issuer(f"forged-{i}").token()) == "CREDENTIAL_INVALID"
    assert web.requests == 1


def test_an_issuer_that_does_not_answer(web: Web, tmp_path: Path) -> None:
    with with_tokens(web.url, log=tmp_path / "log") as server, connect(server) as channel:
        listing = raw(channel, "/segrpc.v1.ModelService/ListModels")
        failure = failure_of(lambda: listing(b"", metadata=as_bearer(Issuer("known").token())))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "IDENTITY_UNAVAILABLE")
    assert failure.retry_delay == 30


def test_keys_and_tokens_together_name_different_principals(tmp_path: Path, photo: bytes) -> None:
    issuer, key = Issuer("known"), new_key()
    (tmp_path / "jwks.json").write_text(key_set(issuer))
    (tmp_path / "keys.toml").write_text(toml_of("alice", key))
    keys = ("--keys-file", str(tmp_path / "keys.toml"))
    with (
        with_tokens(str(tmp_path / "jwks.json"), *keys, log=tmp_path / "log") as server,
        SegmentationClient(server.target, token=key) as by_key,
        SegmentationClient(server.target, token=issuer.token("alice")) as by_token,
    ):
        digest = by_key.upload(photo).digest
        with pytest.raises(NotFoundError):
            by_token.segment(digest, **CLICK)
