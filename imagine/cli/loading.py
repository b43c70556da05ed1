"""Load what commands work with: the weights folder, the pipeline on its device, and the face detector.

Heavy libraries are imported inside the functions, after everything that can be checked without them.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagine.cli.progress import Display
from imagine.errors import ConfigError, PictureError, WeightsError
from imagine.paths import as_path, kind_of, shorten_path, why_no_file

if TYPE_CHECKING:
    from imagine.people.faces import FaceFinder
    from imagine.people.persona import Persona
    from imagine.pipeline.pipeline import ImaginePipeline
    from imagine.provenance.marks import Marks


def weights_folder(given: Path | None) -> Path:
    """Return the folder of --weights, by default the shipped weights. Raises WeightsError if it is not ours."""
    from imagine.networks.weights import PIPELINE, default_folder, read_index
    from imagine.pipeline.families import class_names

    if given is None:
        return default_folder()
    folder = as_path(given)
    if kind_of(folder, WeightsError) != "folder":
        raise WeightsError(
            f"There is no folder {shorten_path(given)}: name a folder of weights, or leave --weights out."
        )
    if (kind := read_index(folder, class_names())["_class_name"]) != PIPELINE:
        raise WeightsError(
            f"{given} holds a {kind}, but this command takes imagine's own weights only: draw with it by `imagine "
            "generate --base`, as docs/bases.md describes."
        )
    return folder


def load_pipeline(options: argparse.Namespace, display: Display) -> "ImaginePipeline":
    """Load the pipeline of --weights with the detector of --finder, and move it to --device."""
    display.report("importing the libraries")
    folder = weights_folder(options.weights)
    finder = load_finder(getattr(options, "finder", "default"))
    from imagine.people.doctor import device_for
    from imagine.pipeline.pipeline import ImaginePipeline

    device = device_for(options.device)  # raises an error for an absent device before anything is loaded
    display.report("loading the model")
    pipe = ImaginePipeline.from_pretrained(folder, finder=finder)
    pipe.set_progress_bar_config(disable=True)
    load_safety(pipe, options)
    return pipe.to(device)


def load_safety(pipe: Any, options: argparse.Namespace) -> None:
    """Give the pipeline the classifier of --safety, if there is one."""
    if (safety := getattr(options, "safety", None)) is not None:
        from imagine.people.safety import ImageClassifier

        pipe.safety = ImageClassifier(safety)


def load_finder(name: str) -> "FaceFinder | None":
    """Return the face detector of --finder; None means the default one."""
    if name == "default":
        return None
    from imagine.people.faces import InsightFaceFinder

    return InsightFaceFinder()


def marks_of(options: argparse.Namespace) -> "Marks":
    """Return the switches of the marks that a command was given."""
    from imagine.provenance.marks import Marks

    return Marks(options.metadata, options.metadata_prompt, options.credentials, options.watermark)


def check_photos(paths: Sequence[str]) -> None:
    """Raise PictureError unless all paths are files. Their content is checked when they are opened."""
    for path in paths:
        if (kind := kind_of(as_path(path), PictureError)) != "file":
            raise PictureError(why_no_file(path, kind))


def read_passphrase(file: Path | None) -> str | None:
    """Return the first line of the file of --passphrase-file, or None without one.

    Raises ConfigError if the line is empty or the file cannot be read.
    """
    if file is None:
        return None
    path = as_path(file)
    if (kind := kind_of(path, ConfigError)) != "file":
        raise ConfigError(why_no_file(file, kind, "passphrase file"))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shorten_path(file)} cannot be read as text: save the passphrase as UTF-8.") from error
    if not lines or not lines[0].strip():
        raise ConfigError(f"{shorten_path(file)} has no passphrase in its first line: write one there.")
    return lines[0]


def opened(reference: str, passphrase: str | None) -> "str | Persona":
    """Return the reference, or the persona if it is an encrypted persona file and there is a passphrase."""
    if passphrase is None or as_path(reference).suffix != ".safetensors":
        return reference
    from imagine.people.persona import Persona

    return Persona.load(reference, passphrase)


def silence_libraries(online: bool = False) -> None:
    """Keep the libraries from printing messages, and from using the network unless `online`."""
    offline = () if online else ("HF_HUB_OFFLINE",)
    for name in (*offline, "HF_HUB_DISABLE_TELEMETRY", "NO_ALBUMENTATIONS_UPDATE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # operations that a Mac's GPU lacks run on its CPU
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of torch's profiler, which `plan --check` uses
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    logging.getLogger("xformers").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
