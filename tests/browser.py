"""The browser of tests: the installed chromium, or the one of `playwright install chromium`."""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def chromium() -> str | None:
    """Return the installed browser, or the one from `playwright install chromium`, or None."""
    if found := shutil.which("chromium") or shutil.which("chromium-browser"):
        return found
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).is_file() else None
