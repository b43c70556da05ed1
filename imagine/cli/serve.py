"""`imagine serve`: serve pictures of many people over HTTP, and make the API keys for that."""

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

from imagine.cli import arguments, base
from imagine.cli.loading import weights_folder
from imagine.errors import ConfigError
from imagine.paths import as_path, folder_to_fill, kind_of, shorten_path

NEEDED = ("alembic", "fastapi", "multipart", "prometheus_client", "sqlalchemy", "uvicorn")
FOLDER = Path("~/.imagine/server")


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = arguments.add_command(commands, "serve", "serve pictures over HTTP, to one person or to many", run)
    add_server(command, FOLDER)
    command.add_argument("--host", metavar="ADDRESS", help="address to listen on; other machines can reach "
                         "0.0.0.0, and then need an API key (default: 127.0.0.1)")  # fmt: skip
    command.add_argument("--database", metavar="URL", help="such as postgresql+psycopg://USER@HOST/NAME (default: "
                         "SQLite in the folder)")  # fmt: skip
    command.add_argument("--workers", type=arguments.non_negative, metavar="N", help="worker processes; 0 if they run "
                         "elsewhere (default: 1)")  # fmt: skip
    command.add_argument("--allow-origin", action="append", metavar="ORIGIN", help="web origin that may call the API, "
                         "such as https://example.org; repeat it for more")  # fmt: skip
    command.add_argument("--allow-host", action="append", metavar="NAME", help="further host name of this server")
    command.add_argument("--log-prompts", action="store_true", help="also log prompts; photos are never logged")
    keys = command.add_mutually_exclusive_group()
    keys.add_argument("--create-key", metavar="NAME", help="make an API key, print it once, and end")
    keys.add_argument("--list-keys", action="store_true", help="list the API keys, and end")
    keys.add_argument("--revoke-key", metavar="ID", help="revoke an API key, and end")


def add_server(command: Any, folder: Path) -> None:
    """Add the arguments of every command that starts the server."""
    command.add_argument("--port", type=_port, metavar="N", help="port to listen on (default: 8188)")
    arguments.add_weights(command)
    arguments.add_device(command)
    command.add_argument("--folder", type=Path, default=folder, metavar="DIR", help="folder of the database, personas "
                         f"and pictures (default: {folder})")  # fmt: skip
    command.add_argument("--max-batch", type=arguments.positive, metavar="N", help="pictures denoised together on a "
                         "device (default: 8)")  # fmt: skip
    command.add_argument("--settings", type=Path, metavar="FILE", help="YAML file with further settings, as "
                         "docs/serving.md lists them")  # fmt: skip
    base.add_sources(command)
    command.set_defaults(online=base.is_online)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Serve until the process is asked to stop, or change the keys."""
    check_packages()
    settings = read_settings(options)
    folder_to_fill(settings.folder)
    if options.create_key is not None or options.list_keys or options.revoke_key is not None:
        return _change_keys(options, settings)
    check_model(options, settings)
    from imagine.serving.server import serve

    if not options.json:
        print(f"Serving on http://{settings.host}:{settings.port} (Ctrl-C stops it).", flush=True)
    serve(settings)
    return {"lines": ["Stopped."], "stopped": True}


def check_model(options: argparse.Namespace, settings: Any) -> None:
    """Report a mistake in the choice of the model before anything starts. Raises ImagineError."""
    if settings.base is None:
        weights_folder(options.weights)
    elif settings.base.ip_adapter is not None:
        from imagine.bases.public_adapters import preset_of, public_adapter

        preset_of(public_adapter(settings.base.ip_adapter), settings.base.preset)


def check_packages() -> None:
    """Raise ConfigError unless the packages of the extra `serve` are installed."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"The server needs more packages ({', '.join(missing)}): pip install 'imagine-yourself-open[serve]'."
        )


def read_settings(options: argparse.Namespace, **usual: Any) -> Any:
    """Return the settings of the file over the `usual` ones, with the command line above both. Raises ConfigError."""
    from pydantic import ValidationError

    from imagine.serving.settings import ServeSettings

    given = usual | ({} if options.settings is None else _read_file(options.settings))
    for name in ("host", "port", "database", "workers", "max_batch"):
        if getattr(options, name, None) is not None:
            given[name] = getattr(options, name)
    given |= {"folder": as_path(options.folder).absolute(), "device": options.device}
    if options.weights is not None:
        given["weights"] = as_path(options.weights).absolute()
    if (chosen := base.base_settings(options)) is not None:
        given["base"] = chosen
    if getattr(options, "allow_origin", None):
        given["origins"] = tuple(options.allow_origin)
    if getattr(options, "allow_host", None):
        given["hosts"] = tuple(options.allow_host)
    if getattr(options, "log_prompts", None):
        given["log_prompts"] = True
    try:
        return ServeSettings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(ServeSettings.model_fields))
            raise ConfigError(f"There is no setting {name!r}: choose from {known}.") from error
        raise ConfigError(f"The setting {name} is wrong ({first['msg']}): {first['input']!r}.") from error


def _read_file(path: Path) -> dict[str, Any]:
    import yaml

    if kind_of(as_path(path), ConfigError) != "file":
        raise ConfigError(f"There is no file {shorten_path(path)} of settings: check the path of --settings.")
    try:
        found = yaml.safe_load(as_path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{shorten_path(path)} is not a YAML file of settings: {str(error).splitlines()[0]}."
        ) from error
    if not isinstance(found or {}, dict):
        raise ConfigError(f"{shorten_path(path)} must hold one setting per line, such as max_batch: 16.")
    return {str(name): value for name, value in (found or {}).items()}


def _change_keys(options: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """Create, list or revoke API keys."""
    from imagine.serving.store.store import Store

    store = Store.open(settings)
    try:
        if options.create_key is not None:
            key = store.access.create_key(options.create_key[:200])
            return {"lines": [key, "Keep this key: only its hash is stored. A running server must be restarted before "
                              "it asks for its first key."], "key": key}  # fmt: skip
        if options.revoke_key is not None:
            if not store.access.revoke_key(options.revoke_key):
                raise ConfigError(f"There is no valid key {options.revoke_key!r}: --list-keys shows them.")
            return {"lines": [f"{options.revoke_key} is revoked."], "revoked": options.revoke_key}
        rows = store.access.list_keys()
    finally:
        store.close()
    listed = [{"id": row.id, "name": row.name, "created": row.created, "revoked": row.revoked} for row in rows]
    lines = [
        f"{key['id']}  {_day(key['created'])}  {key['name']}{'  revoked' if key['revoked'] else ''}" for key in listed
    ]
    return {"lines": lines or ["There are no keys."], "keys": listed}


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def _port(text: str) -> int:
    value = arguments.non_negative(text)
    if value > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return value
