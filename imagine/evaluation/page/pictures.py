"""Pictures inside the page, as data: small JPEG files in base64."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from imagine.evaluation import report
from imagine.evaluation.page.document import escape

THUMBNAIL = 160  # pixels of the longer side
_QUALITY = 82


@dataclass(frozen=True)
class Shown:
    """One picture beside its reference, with a line of text."""

    picture: Image.Image | None
    reference: Image.Image | None
    text: str


def figures(shown: Sequence[Shown]) -> str:
    """Return a grid of pictures beside their references; a picture that is None could not be read."""
    return '<div class="pictures">' + "".join(_figure(each) for each in shown) + "</div>"


def whole(image: Image.Image, alt: str) -> str:
    """Return one wide picture in a frame that scrolls."""
    return f'<div class="scroll"><img class="samples" src="{data(image)}" alt="{escape(alt)}"></div>'


def data(image: Image.Image, side: int | None = None) -> str:
    """Return a picture as a data address; `side` limits its longer side in pixels."""
    image = image.convert("RGB")
    if side is not None and max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _figure(shown: Shown) -> str:
    images = [("reference", shown.reference), ("picture", shown.picture or report.blank())]
    tags = "".join(f'<img src="{data(i, THUMBNAIL)}" alt="{name}">' for name, i in images if i is not None)
    return f"<figure>{tags}<figcaption>{escape(shown.text)}</figcaption></figure>"
