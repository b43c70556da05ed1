"""The trainer's log on a terminal."""

import logging
import sys


def configure_logging() -> None:
    """Send the trainer's log lines to stderr; on a terminal through rich, so that the progress bar stays intact."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("train")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
