"""`imagine app`: the web app for one person, on the server of `imagine serve` with a state folder of its own."""

import argparse
import os
import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from pathlib import Path
from typing import Any

from imagine.cli import arguments
from imagine.cli.serve import add_server, check_model, check_packages, read_settings
from imagine.errors import ConfigError
from imagine.paths import PACKAGE, folder_to_fill

FOLDER = Path("~/.imagine/app")
PAGES = PACKAGE / "app"
DAY = 86_400.0
# Pictures are kept until they are deleted in the app, and photos for a day; personas end with their consent, as usual.
KEPT = {"keep_pictures": 36_500 * DAY, "keep_photos": DAY}
START_TIMEOUT = 60.0  # seconds for the server to answer before no browser is opened


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = arguments.add_command(commands, "app", "draw people in the browser: the web app, on this machine", run)
    command.add_argument("--no-open", action="store_true", help="only print the address, and open no browser")
    add_server(command, FOLDER)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Serve the app until the process is asked to stop."""
    check_packages()
    settings = read_settings(options, app=PAGES, log_level="warning", **KEPT)
    if not settings.on_loopback:
        raise ConfigError(
            f"The app is for this machine only, and the settings name the host {settings.host}: leave `host` out, or "
            "serve the app to others with imagine serve and its setting `app`."
        )
    folder_to_fill(settings.folder)
    check_model(options, settings)
    from imagine.serving.server import serve

    address = f"http://{settings.host}:{settings.port}/"
    if not options.json:
        print(f"The app is at {address} (Ctrl-C stops it). Its pictures are in {settings.folder}.", flush=True)
    if not options.no_open and not options.json and _has_display():
        threading.Thread(target=_open, args=(address,), daemon=True).start()
    serve(settings)
    return {"lines": ["Stopped."], "stopped": True}


def _has_display() -> bool:
    """Return whether a browser would open in a window, and not as text in this terminal."""
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _open(address: str) -> None:
    """Open the browser once the server answers; the address is printed in any case."""
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}healthz", timeout=1):
                webbrowser.open(address)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
