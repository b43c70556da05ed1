"""Arguments that several commands share, and the functions that convert and check their values."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

Command = Callable[[argparse.Namespace], dict[str, Any]]  # returns the fields of --json, and "lines" for people


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one sentence and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help.\n")


def add_command(commands: Any, name: str, summary: str, run: Command) -> Any:
    """Add a command to the parser's `commands` and return its own parser; `summary` has no capital and no full stop."""
    command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print the result as one JSON object, without progress")
    return command


def add_weights(command: Any) -> None:
    """Add --weights, the folder that a pipeline is loaded from."""
    command.add_argument("--weights", type=Path, metavar="DIR", help="folder of weights (default: the shipped weights)")


def add_device(command: Any) -> None:
    """Add --device, where the networks run."""
    command.add_argument(
        "--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="where to run (default: auto, which takes a GPU if torch finds one, else the CPU)",
    )  # fmt: skip


def add_face(command: Any) -> None:
    """Add --face, which face of a photo to use."""
    command.add_argument(
        "--face", type=face, default="largest", metavar="WHICH",
        help="face to use in a photo: largest, centre, or a number from 0, the largest (default: largest)",
    )  # fmt: skip


def add_no_face(command: Any) -> None:
    """Add --on-no-face, what to do with a photo in which no face is found."""
    command.add_argument(
        "--on-no-face", choices=["error", "whole"], default="error",
        help="if a photo shows no face: stop with an error, or use the whole photo (default: error)",
    )  # fmt: skip


def add_finder(command: Any) -> None:
    """Add --finder, the detector of faces in photos."""
    command.add_argument(
        "--finder", choices=["default", "insightface"], default="default",
        help="face detector (default: YuNet for photographs, the weights' own for drawings); insightface needs the "
        "extra `faces` and a model pack on the disk",
    )  # fmt: skip


def add_passphrase(command: Any) -> None:
    """Add --passphrase-file, which encrypts and decrypts personas."""
    command.add_argument(
        "--passphrase-file", type=Path, metavar="FILE",
        help="file whose first line is the passphrase of encrypted personas",
    )  # fmt: skip


def days(text: str) -> "int | None":
    """Convert the value of --expires-after: a number of days, or "never"."""
    return None if text == "never" else _convert(text, int, lambda value: 1 <= value <= 36_500, "days, or never")


def add_marks(command: Any) -> None:
    """Add the switches of the marks that pictures get (docs/provenance.md)."""
    switch = argparse.BooleanOptionalAction
    command.add_argument("--metadata", action=switch, default=True, help="write the settings into the picture's file, "
                         "where other programs read them (default: yes)")  # fmt: skip
    command.add_argument("--metadata-prompt", action=switch, default=True, help="write the prompt among "
                         "these settings (default: yes)")  # fmt: skip
    command.add_argument("--credentials", action=switch, default=True, help="sign the file with content credentials, "
                         "C2PA (default: yes)")  # fmt: skip
    command.add_argument("--watermark", action=switch, default=None, help="hide a watermark in the pixels (default: "
                         "from 256 pixels a side on, where it is reliable)")  # fmt: skip


def add_safety(command: Any) -> None:
    """Add --safety, a classifier of photos and pictures."""
    command.add_argument("--safety", type=Path, metavar="DIR", help="folder of an image classifier of transformers, "
                         "which checks photos and pictures (default: none)")  # fmt: skip


def positive(text: str) -> int:
    """Convert an argument to a whole number of at least 1."""
    return _convert(text, int, lambda value: value >= 1, "a whole number of at least 1")


def non_negative(text: str) -> int:
    """Convert an argument to a whole number of at least 0."""
    return _convert(text, int, lambda value: value >= 0, "a whole number of at least 0")


def seed(text: str) -> int:
    """Convert an argument to a seed, a whole number that fits into 63 bits."""
    return _convert(text, int, lambda value: 0 <= value < 2**63, f"a whole number from 0 to {2**63 - 1}")


def small_seed(text: str) -> int:
    """Convert an argument to a seed of 32 bits, from which other seeds are computed."""
    return _convert(text, int, lambda value: 0 <= value < 2**32, f"a whole number from 0 to {2**32 - 1}")


def finite_float(text: str) -> float:
    """Convert an argument to a finite number."""
    return _convert(text, float, lambda value: abs(value) < float("inf"), "a finite number")


def face(text: str) -> "str | int":
    """Convert the value of --face."""
    if text in ("largest", "centre"):
        return text
    return _convert(text, int, lambda value: value >= 0, "largest, centre, or a whole number of at least 0")


def window(text: str) -> tuple[float, float]:
    """Convert START:END, two fractions from 0 to 1 in ascending order."""
    expected = "START:END, two fractions of the steps such as 0:0.8"
    fractions = [_convert(each, float, lambda value: 0 <= value <= 1, expected) for each in text.split(":")]
    if len(fractions) != 2 or fractions[0] > fractions[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return fractions[0], fractions[1]


def _convert(text: str, kind: Callable[[str], Any], fits: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value
