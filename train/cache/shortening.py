"""Cut captions that are longer than a text encoder takes: at the end of a sentence, else of a phrase, else of a word.

A caption that is cut is counted and named in `cut_captions.json` in its gallery's folder, and in the log, because one
long caption must neither stop a run nor lose words silently.
"""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

from train.run.checkpoint import write_json

log = logging.getLogger("train")
Fits = Callable[[str], bool]
_ENDS = (
    re.compile(r"[.!?…][\"'”’)\]]*(?=\s|$)|[。！？]"),
    re.compile(r"[,;:](?=\s|$)|[，；：、]"),
    re.compile(r"(?=\s)"),
)
_LEAST_LEFT = 0.5  # share of what fits that a cut at the end of a sentence or of a phrase must leave
_NAMED = 100  # most records that are named per encoder
_LOGGED = 3  # most records that are logged one by one, per encoder and gallery


def shorten(text: str, fits: Fits) -> str:
    """Return the text if it fits, else its longest beginning that fits and ends with a sentence, a phrase or a word.

    A sentence's end is preferred to a phrase's, and that to a word's, unless less than half of what fits would be left.
    """
    if fits(text):
        return text
    short, long = 0, len(text)
    while long - short > 1:  # text[:short] fits and text[:long] does not
        middle = (short + long) // 2
        short, long = (middle, long) if fits(text[:middle]) else (short, middle)
    for end in _ENDS:
        places = [found.end() for found in end.finditer(text, 0, long) if found.end() <= short]
        for place in reversed(places):
            cut = text[:place].rstrip()
            if place < short * _LEAST_LEFT:
                break
            if cut and fits(cut):
                return cut
    return text[:short].rstrip()


class CutCaptions:
    """Counts and names the captions of a gallery that were cut, in a file of the gallery's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.counts: dict[str, dict[str, int | list[str]]] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # no caption was cut yet, or the process was killed while it wrote
            self.counts = {}
        self._logged: dict[str, int] = {}

    def add(self, encoder: str, name: str) -> None:
        """Count a record whose caption was cut for an encoder; a record that is named already is not counted again."""
        known = self.counts.setdefault(encoder, {"captions": 0, "records": []})
        count, names = known["captions"], known["records"]
        assert isinstance(count, int) and isinstance(names, list)
        if name in names:
            return
        known["captions"] = count + 1
        if len(names) < _NAMED:
            names.append(name)
        number = self._logged[encoder] = self._logged.get(encoder, 0) + 1
        if number <= _LOGGED:
            log.warning(
                "%s: the caption of %s is longer than %s takes and is cut at the end of a sentence or phrase.%s",
                self.path.parent.name, name, encoder,
                f" Further ones are listed in {self.path}." if number == _LOGGED else "",
            )  # fmt: skip

    def save(self) -> None:
        """Write the file, if a caption was cut."""
        if self.counts:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.counts)
