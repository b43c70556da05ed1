"""The browser of tests, its pages, and the small servers that they visit.

The fixtures `browser` and `open_page` in tests/conftest.py are made of these.
"""

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize, sync_playwright

from imagine.local_server import LocalServer

DESKTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}
SECONDS = 60_000  # milliseconds that a page may take for anything, on a slow machine

OpenPage = Callable[..., Page]


def chromium() -> str | None:
    """Return the installed browser, or the one from `playwright install chromium`, or None."""
    if found := shutil.which("chromium") or shutil.which("chromium-browser"):
        return found
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).is_file() else None


@contextlib.contextmanager
def launched(program: str) -> Iterator[Browser]:
    """Run the browser without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--disable-gpu"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opening(browser: Browser) -> Iterator[OpenPage]:
    """Give a function that opens an address in a new context, as if on another computer, and close all at the end.

    Raise AssertionError at the end if a page printed to its console, raised an error, or asked another place than the
    address that was opened. Requests that fail are left to the tests.
    """
    contexts: list[BrowserContext] = []
    messages: list[str] = []
    asked: list[str] = []
    allowed = ["data:", "blob:"]

    def opened(address: str, **settings: Any) -> Page:
        parts = urlsplit(address)
        allowed.append(f"{parts.scheme}://{parts.netloc}/" if parts.netloc else address)
        contexts.append(browser.new_context(**{"viewport": DESKTOP, **settings}))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("console", lambda message: messages.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [text for text in messages if not text.startswith("Failed to load resource")] == []
    assert [each for each in asked if not each.startswith(tuple(allowed))] == []


@contextlib.contextmanager
def served(server: LocalServer) -> Iterator[str]:
    """Run one of the library's small local servers in a thread, and give its address."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.address
        server.shutdown()
        thread.join()
