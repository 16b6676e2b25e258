"""All that an operator can set, in one frozen object that the command line builds.

Sources, the stronger first: the command line, ``SEGRPC_*`` environment variables, the TOML file, the defaults below.
"""

import json
import tomllib
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import BeforeValidator, ByteSize, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from segrpc.service.admission.limits import Limits, share_of
from segrpc.service.engine.factory import EngineKind
from segrpc.service.engine.logs import LogFormat
from segrpc.service.errors import ConfigurationError
from segrpc.service.images.policy import SourcePolicy
from segrpc.service.models.sam2.catalog import VARIANTS, name_for_file
from segrpc.service.rle import MAX_PIXELS
from segrpc.service.schemas import FloatType, ModelDeploymentConfig

MiB = 2**20
GiB = 2**30
PROCESS_BYTES = 128 * MiB  # about what the server's process takes while it holds nothing

T = TypeVar("T")


def is_loopback(host: str) -> bool:
    """Tell whether a host, as a literal address or ``localhost``, is this machine only."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _from_json(value: Any) -> Any:
    """Read a list from the environment; the other sources give lists."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f'is no list in JSON, such as ["a", "b"]: {error}') from error


Many = Annotated[tuple[T, ...], NoDecode, BeforeValidator(_from_json)]
Seconds = Annotated[float, Field(allow_inf_nan=False)]


class Settings(BaseSettings):
    """The settings of a server; see each field's description (``segrpc-server serve --help`` prints them)."""

    model_config = SettingsConfigDict(env_prefix="SEGRPC_", frozen=True, extra="forbid", env_ignore_empty=True)

    listen: str = Field("127.0.0.1:50051", description="address to listen on, HOST:PORT; port 0 takes a free one")
    model: str = Field("", description="model to serve; default: told from the checkpoint, or grabcut without one")
    checkpoint: Path | None = Field(None, description="SAM 2 checkpoint file; default: the one that `pull` fetched")
    hub_id: str = Field("", description="repository of the Hugging Face hub to use instead of the published one")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: FloatType = Field("float32", description="float32, bfloat16 or float16: the precision of SAM 2")
    decoder: Literal["fast", "reference"] = Field(
        "fast", description="fast: equal to the reference up to rounding; reference: its own, bit for bit, and slower"
    )
    encoder: Literal["fast", "reference", "int8"] | None = Field(
        None,
        description="the same for encoding images, where fast is in float32 on a CPU; int8: faster there, on CPUs with "
        "VNNI, but masks change a little; default: as decoder",
    )
    devices: str = Field("", description="several devices, such as cuda:0,cuda:1: a worker process for each")
    engine: EngineKind = Field(
        "process",
        description="process: models run in worker processes, restarted if they end; inline: in the server's own",
    )
    threads: int = Field(0, ge=0, description="threads for computing on the CPU; 0: as torch chooses")
    models: Many[ModelDeploymentConfig] = Field(
        (), description="several models, as [[models]] tables of the TOML file with name, model and model_params"
    )

    max_image_bytes: ByteSize = Field(ByteSize(64 * MiB), gt=0, description="largest encoded image")
    max_image_pixels: int = Field(64_000_000, gt=0, le=MAX_PIXELS, description="largest image, width times height")
    max_prompts: int = Field(64, gt=0, description="most prompts in a request")
    max_points: int = Field(1024, gt=0, description="most points in a prompt")
    max_chunk_bytes: ByteSize = Field(ByteSize(1 * MiB), gt=0, description="largest chunk of an upload")
    max_message_bytes: ByteSize = Field(ByteSize(32 * MiB), gt=0, description="largest message that is received")
    max_pending_encodes: int = Field(
        64, gt=0, description="images that may be encoded or wait for it, on each device; more are refused"
    )
    max_pending_decodes: int = Field(
        64, gt=0, description="jobs whose prompts may be decoded or wait for it, on each device; more are refused"
    )
    max_requests: int = Field(1024, gt=0, description="calls that are answered at once, beside streams")
    max_streams: int = Field(1024, gt=0, description="streams of Refine at once")
    max_streams_per_connection: int = Field(
        1024, gt=0, description="calls and streams on one connection at once; a client waits with more"
    )
    in_flight_bytes: ByteSize = Field(
        ByteSize(1 * GiB), gt=0, description="memory for messages that are being answered, and announced uploads"
    )
    principal_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="the part that one principal may have of max_requests, max_streams, max_open_sessions, "
        "session_bytes, image_store_bytes, in_flight_bytes and max_pending_*, where callers are identified; "
        "whoever has more than this of the embeddings or of max_sessions makes room first when they are used up",
    )
    limits_file: Path | None = Field(
        None,
        description="TOML file of limits for all and for single principals, stronger than these; read when it changes",
    )
    memory_bytes: ByteSize = Field(
        ByteSize(0),
        ge=0,
        description="memory that the server's own process may hold; above it, images known by digest are let go, then "
        "uploads, large messages and sessions are refused; the budgets must fit into it. 0: no such limit",
    )
    image_store_bytes: ByteSize = Field(ByteSize(1 * GiB), gt=0, description="memory for images known by digest")
    embedding_cache_bytes: ByteSize = Field(
        ByteSize(2 * GiB), gt=0, description="memory for embeddings on each device; the one used last is always kept"
    )
    host_embedding_cache_bytes: ByteSize = Field(
        ByteSize(4 * GiB),
        ge=0,
        description="memory of the host for embeddings that a GPU has no room for; for each GPU",
    )
    max_sessions: int = Field(10_000, gt=0, description="series of stateless calls whose current image is remembered")
    max_open_sessions: int = Field(1024, gt=0, description="interactive sessions, with a stream or waiting for one")
    session_bytes: ByteSize = Field(ByteSize(2 * GiB), gt=0, description="memory for interactive sessions")
    session_idle_seconds: Seconds = Field(600.0, gt=0, description="how long an unused session is kept")
    session_detached_seconds: Seconds = Field(120.0, gt=0, description="how long a session waits to be resumed")

    tls_certificate: Path | None = Field(
        None, description="certificate chain in PEM: serve with TLS; read when it changes"
    )
    tls_key: Path | None = Field(None, description="the certificate's private key in PEM")
    tls_client_ca: Path | None = Field(
        None, description="authorities in PEM: clients must have certificates of theirs, which say who they are"
    )
    keys_file: Path | None = Field(
        None, description="TOML file of API keys, as `segrpc-server key` makes them; read when it changes"
    )
    jwt_issuer: str = Field("", description="take JSON Web Tokens of this issuer (their claim iss)")
    jwt_audience: str = Field("", description="the audience that tokens must be meant for (their claim aud)")
    jwt_jwks: str = Field("", description="the issuer's public keys, as JWKS: a file or an https URL")
    jwt_refresh_seconds: Seconds = Field(
        30.0, gt=0, description="shortest time between two looks at the URL of jwt_jwks, for keys that are unknown"
    )
    insecure: bool = Field(False, description="listen beyond the loopback interface without TLS or without credentials")

    media_root: Many[Path] = Field((), description="folder whose files clients may name; may be repeated")
    allowed_host: Many[str] = Field((), description="host whose URLs clients may name; may be repeated")
    allow_private_addresses: bool = Field(False, description="allow hosts on private and loopback addresses")
    fetch_timeout: Seconds = Field(10.0, gt=0, description="seconds for fetching an image by URL")

    reflection: bool = Field(True, description="answer gRPC server reflection")
    keepalive_seconds: Seconds = Field(
        60.0, ge=1, description="silence of a connection after which the server asks whether its client is still there"
    )
    max_connection_age_seconds: Seconds = Field(
        0.0,
        ge=0,
        description="after so long clients open a new connection, and may find another server; streams that are open "
        "go on; 0: never",
    )
    stall_seconds: Seconds = Field(
        60.0,
        gt=0,
        description="how long a stream may wait for its client: for the config, a chunk, an answer to be read",
    )
    hang_seconds: Seconds = Field(
        600.0,
        ge=0,
        description="after so long without an answer that it owes a worker process counts as stuck: the log is told "
        "where its threads are, and another takes its place; more than the slowest image takes. 0: never",
    )
    drain_seconds: Seconds = Field(30.0, ge=0, description="how long calls in progress may take after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged")
    log_format: LogFormat = Field("text", description="text, or json: an object in each line")
    metrics_listen: str = Field(
        "", description="address to answer Prometheus on, HOST:PORT, or PORT on 127.0.0.1; default: none"
    )
    admin_listen: str = Field(
        "",
        description="address of this machine to answer operators on, HOST:PORT, or PORT on 127.0.0.1; default: none",
    )
    otlp_endpoint: str = Field(
        "",
        description="URL to send metrics and traces to, OTLP over HTTP, such as http://127.0.0.1:4318; default: none",
    )

    @field_validator("metrics_listen", "admin_listen")
    @classmethod
    def _check_side_port(cls, listen: str) -> str:
        if not listen:
            return listen
        return cls._check_listen(listen if ":" in listen else f"127.0.0.1:{listen}")

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, listen: str) -> str:
        host, _, port = listen.rpartition(":")
        # gRPC would take a port above 65535 for another one.
        if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
            raise ValueError(f"{listen!r} must be HOST:PORT with a port of 0 to 65535")
        return listen

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_otlp_endpoint(cls, endpoint: str) -> str:
        url = urlsplit(endpoint)
        if endpoint and not (url.scheme in ("http", "https") and url.hostname):
            raise ValueError(f"{endpoint!r} must be an http or https URL, such as http://127.0.0.1:4318")
        return endpoint.rstrip("/")

    @field_validator("jwt_jwks")
    @classmethod
    def _check_jwks(cls, jwks: str) -> str:
        scheme, found, rest = jwks.partition("://")
        plain = found and scheme == "http" and is_loopback(urlsplit(jwks).hostname or "")
        if found and not plain and (scheme != "https" or not rest):
            raise ValueError(f"{jwks!r} must be a file, an https URL, or an http URL on the loopback interface")
        return jwks

    @field_validator("allowed_host")
    @classmethod
    def _check_allowed_host(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return SourcePolicy(allowed_hosts=hosts).allowed_hosts

    @field_validator("devices")
    @classmethod
    def _check_devices(cls, devices: str) -> str:
        if devices and not all(name.strip() for name in devices.split(",")):
            raise ValueError(f"{devices!r} must be names separated by commas, such as cuda:0,cuda:1")
        return devices

    @model_validator(mode="after")
    def _check_one_device(self) -> Self:
        if self.devices and "device" in self.model_fields_set:
            raise ValueError("give either device or devices")
        return self

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        if self.models and (self.model or self.checkpoint):
            raise ValueError("give either model and checkpoint, or [[models]] tables")
        names = [config.name for config in self.models]
        if len(set(names)) != len(names):
            raise ValueError("two [[models]] tables have the same name")
        return self

    @property
    def identifies(self) -> bool:
        """Whether callers must say who they are."""
        return bool(self.tls_client_ca or self.keys_file or self.jwt_issuer)

    def check_security(self) -> None:
        """Look whether the settings of transport and identity go together, and are safe where the server listens.

        Raises:
            ConfigurationError: If not.
        """
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigurationError("tls_certificate and tls_key need each other")
        if self.tls_client_ca and not self.tls_certificate:
            raise ConfigurationError("tls_client_ca needs tls_certificate and tls_key")
        if len({bool(self.jwt_issuer), bool(self.jwt_audience), bool(self.jwt_jwks)}) > 1:
            raise ConfigurationError("jwt_issuer, jwt_audience and jwt_jwks need each other")
        if self.admin_listen and not is_loopback(self.admin_listen.rpartition(":")[0]):
            raise ConfigurationError(
                f"admin_listen {self.admin_listen} must be on the loopback interface, such as 127.0.0.1:9465: "
                "there nobody is asked who they are"
            )
        if self.insecure or is_loopback(self.listen.rpartition(":")[0]):
            return
        missing = [
            *([] if self.tls_certificate else ["TLS (tls_certificate, tls_key)"]),
            *([] if self.identifies else ["credentials (keys_file, jwt_issuer or tls_client_ca)"]),
        ]
        if missing:
            raise ConfigurationError(
                f"{self.listen} can be reached from other machines, but there is no {' and no '.join(missing)}; "
                "set them, listen on 127.0.0.1, or give --insecure to let anybody in"
            )

    def check_limits(self, limits: Limits) -> None:
        """Look whether limits leave room for what a single call may bring, and fit into the memory.

        Raises:
            ConfigurationError: If not.
        """
        needed = max(self.max_message_bytes, self.max_image_bytes)
        share = share_of(limits.in_flight_bytes, limits.principal_share if self.identifies else 1.0)
        if share < needed:
            raise ConfigurationError(
                f"a caller may have {share} bytes in flight (in_flight_bytes, principal_share), but one call may need "
                f"{needed} (max_message_bytes, max_image_bytes)"
            )
        parts = {
            "the process itself": PROCESS_BYTES,
            "image_store_bytes": limits.image_store_bytes,
            "session_bytes": limits.session_bytes,
            "in_flight_bytes": limits.in_flight_bytes,
        }
        if self.engine == "inline":
            parts["embedding_cache_bytes"] = self.embedding_cache_bytes
            parts["host_embedding_cache_bytes"] = self.host_embedding_cache_bytes
        if self.memory_bytes and sum(parts.values()) > self.memory_bytes:
            listed = ", ".join(f"{name} {size}" for name, size in parts.items())
            raise ConfigurationError(
                f"memory_bytes is {self.memory_bytes}, but the budgets are {sum(parts.values())} together: {listed}; "
                "make them smaller, or allow more"
            )

    def limits(self) -> Limits:
        """Return how much may be taken, by all and by one."""
        return Limits(**{name: getattr(self, name) for name in Limits.model_fields if name in type(self).model_fields})

    def device_names(self) -> tuple[str, ...]:
        """Return the names of `devices`; empty if the models choose where to run."""
        return tuple(name.strip() for name in self.devices.split(",")) if self.devices else ()

    def deployments(self) -> tuple[ModelDeploymentConfig, ...]:
        """Return what to serve, the default first: the [[models]] tables, or the one model of the plain options."""
        if self.models:
            return self.models
        of_model = {"checkpoint", "hub_id", "device", "dtype", "decoder", "encoder", "threads"}
        params = {name: getattr(self, name) for name in self.model_fields_set & of_model}
        if self.checkpoint is None:
            return (ModelDeploymentConfig(name=self.model or "grabcut", model_params=params),)
        published = name_for_file(self.checkpoint)
        name = self.model or published or self.checkpoint.stem
        # A checkpoint of another name: its size is told from its weights.
        registered = "" if self.model in VARIANTS or (not self.model and published) else "sam2"
        return (ModelDeploymentConfig(name=name, model=registered, model_params=params),)

    @classmethod
    def load(cls, config: Path | None, given: dict[str, Any]) -> Self:
        """Build the settings.

        Args:
            config: A TOML file, or None.
            given: What the command line gave, by field name.

        Raises:
            pydantic.ValidationError: If a value is wrong or a name unknown.
            OSError: If the file cannot be read.
            tomllib.TOMLDecodeError: If it is no TOML.
        """
        try:
            from_file = tomllib.loads(config.read_text("utf-8")) if config else {}
        except UnicodeDecodeError as error:
            raise OSError(f"{config} is not encoded in UTF-8: {error}") from error

        class Sourced(cls):  # type: ignore[valid-type, misc] # the file differs from call to call
            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[Any, ...]:
                return init_settings, env_settings, lambda: from_file

        loaded: Self = Sourced(**given)
        return loaded
