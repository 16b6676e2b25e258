"""``segrpc-server``: serve models, and fetch checkpoints."""

import argparse
import asyncio
import json
import signal
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from segrpc.service.engine.base import EngineOptions
from segrpc.service.engine.factory import create_engine
from segrpc.service.engine.logs import configure_logging
from segrpc.service.errors import SegrpcError
from segrpc.service.identity.keys import new_key, toml_of
from segrpc.service.models.sam2.catalog import VARIANTS
from segrpc.service.rpc.server import Server, image_limits
from segrpc.service.schemas import violations_of
from segrpc.service.settings import Settings

_FILE_ONLY = {"models"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments without the program's name. Default: those of the process.

    Returns:
        The exit status: 0 if all went well, 1 if not, 2 for wrong usage.
    """
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except ValidationError as error:
        found = "; ".join(f"{v.field or 'settings'}: {v.description}" for v in violations_of(error))
        print(f"segrpc-server: {found}", file=sys.stderr)
        return 2
    except (SegrpcError, OSError, tomllib.TOMLDecodeError) as error:
        print(f"segrpc-server: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="segrpc-server", description="Promptable image segmentation over gRPC.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve models",
        description="Serve models. Every option is also read from the environment (SEGRPC_LISTEN for --listen, and so "
        "on; lists as JSON) and from the TOML file of --config (listen = ...); the command line wins. SIGTERM ends the "
        "calls in progress and stops; SIGUSR1 prints what is held at the moment as a line of JSON.",
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    _add_settings(serve)
    serve.set_defaults(run=_serve)
    pull = commands.add_parser(
        "pull",
        help="fetch the checkpoint of a SAM 2 model",
        description="Fetch a published checkpoint from the Hugging Face hub, check it, and keep it for `serve`.",
    )
    pull.add_argument("model", choices=sorted(VARIANTS), metavar="MODEL", help=f"one of {', '.join(sorted(VARIANTS))}")
    pull.add_argument("--hub-id", default="", help="another repository with a checkpoint of that size and file name")
    pull.set_defaults(run=_pull)
    key = commands.add_parser(
        "key",
        help="make an API key",
        description="Make an API key. The key goes to standard error, this once; its table for the file of "
        "--keys-file, which has only a hash, to standard output: segrpc-server key alice >> keys.toml.",
    )
    key.add_argument("name", metavar="NAME", help="whose key it is")
    key.set_defaults(run=_key)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of the settings; pydantic checks the values."""
    for name, field in Settings.model_fields.items():
        if name in _FILE_ONLY:
            continue
        flag, help_text = f"--{name.replace('_', '-')}", (field.description or "").replace("%", "%%")
        if field.default not in (None, "", (), PydanticUndefined):
            help_text += f" (default: {field.default})"
        options: dict[str, Any] = {"dest": f"settings.{name}", "default": argparse.SUPPRESS, "help": help_text}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = name.rsplit("_", maxsplit=1)[-1].upper()
            options["action"] = "append" if field.default == () else "store"
        parser.add_argument(flag, **options)


def _serve(args: argparse.Namespace) -> int:
    prefix = "settings."
    given = {name.removeprefix(prefix): value for name, value in vars(args).items() if name.startswith(prefix)}
    settings = Settings.load(args.config, given)
    configure_logging(settings.log_level.upper(), settings.log_format)
    asyncio.run(_serve_until_told(settings))
    return 0


async def _serve_until_told(settings: Settings) -> None:
    options = EngineOptions(
        models=settings.deployments(),
        limits=image_limits(settings),
        cache_bytes=settings.embedding_cache_bytes,
        host_cache_bytes=settings.host_embedding_cache_bytes,
        max_pending_encodes=settings.max_pending_encodes,
        max_pending_decodes=settings.max_pending_decodes,
        principal_share=settings.principal_share,
        hang_seconds=settings.hang_seconds,
        devices=settings.device_names(),
        log_level=settings.log_level.upper(),
        log_format=settings.log_format,
    )
    engine = create_engine(settings.engine, options)
    server = Server(settings, engine)
    address = await server.start()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    asyncio.get_running_loop().add_signal_handler(
        signal.SIGUSR1, lambda: print(json.dumps(asdict(server.stats())), flush=True)
    )
    names = ", ".join(model.name for model in engine.models)
    print(f"segrpc-server is serving {names} on {address}", flush=True)
    await told.wait()
    await server.stop()


def _pull(args: argparse.Namespace) -> int:
    # Imported here: torch takes seconds to import, and is not there without the extra.
    from segrpc.service.models.sam2.checkpoint import build_model, read_checkpoint
    from segrpc.service.models.sam2.hub import pull

    variant = VARIANTS[args.model]
    print(f"fetching {variant.filename} from {args.hub_id or variant.hub_id}", file=sys.stderr)
    file = pull(variant, args.hub_id)
    build_model(read_checkpoint(file), variant.config, "cpu", f"the fetched checkpoint {str(file)!r}")
    print(f"{args.model} is ready at {file}\nserve it with: segrpc-server serve --model {args.model}")
    return 0


def _key(args: argparse.Namespace) -> int:
    key = new_key()
    block = toml_of(args.name, key)
    print(f"the key of {args.name}, which is shown only now:\n{key}\n", file=sys.stderr)
    print(block)
    return 0


if __name__ == "__main__":
    sys.exit(main())
