"""Tell photographs from drawings of the portrait world, because neither judge judges the other's kind of picture."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from imagine.errors import ConfigError
from imagine.networks.weights import default_folder
from imagine.people import photo_finder
from imagine.people.faces import (
    LEARNED,
    AutoFinder,
    CascadeFinder,
    FaceFinder,
    LearnedFinder,
    default_finder,
)
from imagine.people.photo_finder import YuNetFinder

SHARE = 0.9  # of the pictures must be of the wrong kind: single pictures are told apart less surely


def refuse_photographs(drawings: FaceFinder | None, pictures: Sequence[Image.Image | None], fewest: int = 1) -> None:
    """Raise ConfigError if nearly all of these pictures are photographs of people.

    drawings: the finder of faces in drawings; without our own learned finder nothing can be told. fewest: the number of
    pictures from which the answer is sure enough. The finders take 19 of 20 portraits of the portrait world for
    drawings; pictures of several people should be given as squares around the faces.
    """
    if not isinstance(drawings, LearnedFinder):
        return
    finder = AutoFinder(drawings, YuNetFinder() if photo_finder.is_installed() else CascadeFinder())
    known = [picture for picture in pictures if picture is not None]
    count = sum(_kind(finder, picture) == "photograph" for picture in known)
    if len(known) >= fewest and count > SHARE * len(known):
        raise ConfigError(
            f"{count} of {len(known)} pictures are photographs, but this suite's judge knows only drawings of the "
            "portrait world: use --suite photos with a folder of photos."
        )


def refuse_drawings(pictures: Sequence[Image.Image | None], folder: Path | None = None) -> None:
    """Raise ConfigError if nearly all of these pictures are drawings of the portrait world."""
    finder = default_finder(default_folder() / "finder" if folder is None else folder)
    if not isinstance(finder, AutoFinder):
        return
    known = [picture for picture in pictures if picture is not None]
    count = sum(_kind(finder, picture) == "drawing" for picture in known)
    if count > SHARE * len(known):
        raise ConfigError(
            f"{count} of {len(known)} pictures are drawings of the portrait world, which the recogniser of "
            "photographs cannot judge: use --suite portraits, or weights that draw photographs."
        )


def _kind(finder: AutoFinder, picture: Image.Image) -> str:
    """Return "photograph", "drawing", or "" for a picture without a face."""
    faces = finder.find(picture)
    if not faces:
        return ""
    return "drawing" if faces[0].finder == LEARNED else "photograph"
