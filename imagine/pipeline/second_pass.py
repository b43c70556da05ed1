"""Small faces drawn once more: which ones, the square that is redrawn at the model's own size, and how it is put back.

A face of a few latents cannot look like anybody. So it is cut out with its surroundings, enlarged, noised to a level
and drawn again as its person (SDEdit, arXiv 2108.01073), while what lies round it is put back after every step
(RePaint, arXiv 2201.09865, without its jumps), and laid over the picture with a soft edge. Only geometry and tensors
live here; who calls brings the finder and draws: the pipeline, or for stock ones `stock_second_pass`.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from imagine.errors import ConfigError
from imagine.networks.diffusion import add_noise
from imagine.people.faces import FaceFinder
from imagine.people.persona import Persona
from imagine.pipeline.controls import Window
from imagine.pipeline.sampling import GuidedDenoiser
from imagine.records import FaceBox
from imagine.request import finite, whole


@dataclass(frozen=True)
class RefineFaces:
    """Which faces a second pass redraws, and how; lengths are in units of the face box (brow to chin, ear to ear)."""

    below: float = 0.35  # faces whose longer side is less than this share of the picture's shorter one
    strength: float = 0.6  # the noise level that redrawing begins at: more is more of the person and less of the pose
    steps: int | None = None  # None: as many as the first pass took from that level on
    around: float = 2.4  # side of the square that is redrawn, by the box's longer side
    reach: float = 1.4  # the ellipse that is put back, by the box's sides: with forehead and jaw
    edge: float = 0.3  # it fades over this part of its radius

    @classmethod
    def read(cls, given: "RefineFaces | bool | None", output_type: str, default: bool) -> "RefineFaces | None":
        """What a call gave as refine_faces, or what is `default` with these weights; None: no second pass.

        Raises ConfigError, naming the setting.
        """
        if given is None:
            given = default and output_type != "latent"
        if given is False:
            return None
        settings = cls() if given is True else given
        if not isinstance(settings, RefineFaces):
            raise ConfigError(f"refine_faces={given!r} must be True, False or a RefineFaces(...).")
        if output_type == "latent":
            raise ConfigError("refine_faces needs pictures: choose output_type pil, np or pt, or leave it out.")
        for name in ("below", "strength", "around", "reach", "edge"):
            if finite(f"RefineFaces.{name}", getattr(settings, name)) <= 0:
                raise ConfigError(f"RefineFaces.{name}={getattr(settings, name)} must be more than 0.")
        if settings.strength > 1 or settings.edge > 1 or settings.around < 1:
            raise ConfigError("RefineFaces: strength and edge must be at most 1, and around at least 1.")
        if settings.steps is not None:
            whole("RefineFaces.steps", settings.steps)
        return settings

    def levels(self, steps: int) -> list[float]:
        """The noise level at which each step begins, when the first pass took so many."""
        count = self.steps or max(1, round(self.strength * steps))
        return [self.strength * (count - number) / count for number in range(count)]

    def window(self, whole: Window) -> Window:
        """A window of the whole way from noise to picture, in shares of the part that is walked again."""
        if whole == Window():
            return whole
        # A step that begins just at an edge must fall on the same side of it, whatever division makes of both.
        start, end = ((share - 1 + self.strength) / self.strength - 1e-9 for share in (whole.start, whole.end))
        return Window(max(start, 0.0), max(end, 0.0))


@dataclass(frozen=True)
class SmallFace:
    """One face to be redrawn: in which picture, whose, where, and the square (left, top, right, bottom) around it."""

    picture: int
    person: int
    box: FaceBox
    place: tuple[int, int, int, int]


# Squares (faces, 3, S, S) in 0..1, in and out; None in place of one that is not to be shown.
Redraw = Callable[[Sequence[SmallFace], Tensor], Iterable[Tensor | None]]


@dataclass(frozen=True)
class SecondPass:
    """What the second pass takes over from the first: start latents, strength and people, a row per picture."""

    settings: RefineFaces
    levels: list[float]
    window: Window
    start: Tensor
    strength: Tensor
    people: list[list[Persona]]
    denoiser: GuidedDenoiser

    @property
    def active(self) -> list[bool]:
        """Whether the person acts, step by step: at noise level s of a straight schedule a share 1 - s is done."""
        return [self.window.contains(1 - level) for level in self.levels]

    def refine(
        self,
        pictures: Tensor,
        side: int,
        finder: FaceFinder,
        redraw: Callable[[Sequence[SmallFace], Tensor, "SecondPass"], Tensor],
    ) -> tuple[int, list[str]]:
        """Redraw the small faces of pictures (B, 3, H, W) in 0..1, in place, as squares of `side` pixels.

        Return how many there were, and a sentence for each picture where it is unclear which face is whose.
        """
        if not any(self.active):
            return 0, []
        shown = [len(people) if strength else 0 for people, strength in zip(self.people, self.strength, strict=True)]
        faces, notes = find_small_faces(pictures, shown, finder, self.settings, side)
        max_batch = len(self.start)  # at once: as many as the first pass drew, which had the memory for it
        drawn = redraw_faces(
            pictures, faces, side, self.settings, lambda some, squares: redraw(some, squares, self), max_batch
        )
        return len(drawn), notes


def redraw_faces(
    pictures: Tensor,
    faces: Sequence[SmallFace],
    side: int,
    settings: RefineFaces,
    redraw: Redraw,
    max_batch: int,
    within: Tensor | None = None,
) -> list[SmallFace]:
    """Cut faces out of pictures (B, 3, H, W) in 0..1 as squares of `side` pixels, redraw them, and put them back.

    In place, `max_batch` at a time, and only so far as `within` (B, 1, H, W) lets them show. Return those put back.
    """
    squares = [crop_square(pictures, face, (side, side)) for face in faces]  # all before any is put back
    shown = list[SmallFace]()
    for first in range(0, len(faces), max_batch):
        some = faces[first : first + max_batch]
        for face, drawn in zip(some, redraw(some, torch.cat(squares[first : first + max_batch])), strict=True):
            if drawn is not None:
                put_back(pictures, face, drawn, settings, within)
                shown.append(face)
    return shown


def find_small_faces(
    pictures: Tensor,
    people: Sequence[int],
    finder: FaceFinder,
    settings: RefineFaces,
    side: int,
    within: Tensor | None = None,
) -> tuple[list[SmallFace], list[str]]:
    """The faces of pictures (B, 3, H, W) in 0..1 that are small, and a sentence for each picture where it is unclear
    which face is whose; `people` says how many each shows.

    One whose square has `side` pixels or more is not small: redrawn at that size it would lose. Where `within`
    (B, 1, H, W) is 0, nothing is looked for.
    """
    faces, notes = list[SmallFace](), list[str]()
    for picture, count in enumerate(people):
        if count:
            pixels = (pictures[picture].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous().numpy()
            image = Image.fromarray(pixels)
            found = [box for box in finder.find(image) if within is None or _lies_in(box, within[picture, 0])]
            small, note = small_faces(found, count, picture, image.size, settings)
            faces += [face for face in small if face.place[2] - face.place[0] < side]
            notes += [note] if note else []
    return faces, notes


def _lies_in(box: FaceBox, region: Tensor) -> bool:
    """Whether a face's middle lies where the region (H, W) is more than half."""
    column, row = (
        min(max(int(centre), 0), longest - 1) for centre, longest in zip(box.centre, region.shape[::-1], strict=True)
    )
    return bool(region[row, column] > 0.5)


def small_faces(
    found: Sequence[FaceBox], people: int, picture: int, size: tuple[int, int], settings: RefineFaces
) -> tuple[list[SmallFace], str]:
    """The faces of one picture (width, height) that are small, each with its person, or a note why none is.

    One person is the largest face; several are taken from left to right, in the order of the sentence, if the picture
    shows as many faces.
    """
    if (people > 1 and len(found) != people) or not found:
        count = {0: "no face was", 1: "one face was"}.get(len(found), f"{len(found)} faces were")
        who = "one person" if people == 1 else f"{people} people"
        return [], f"Picture {picture + 1}: {count} found for {who}, so that none was refined."
    largest = max(found, key=lambda box: box.width * box.height)
    mine = sorted(found, key=lambda box: box.centre[0]) if people > 1 else [largest]
    limit = settings.below * min(size)
    return [
        SmallFace(picture, person, box, square_around(box, size, settings.around))
        for person, box in enumerate(mine)
        if max(box.width, box.height) < limit
    ], ""


def square_around(box: FaceBox, size: tuple[int, int], around: float) -> tuple[int, int, int, int]:
    """The square round a face as left, top, right, bottom, moved and if need be shrunk to lie within the picture."""
    side = max(1, min(round(around * max(box.width, box.height)), *size))
    left, top = (
        min(max(round(centre - side / 2), 0), longest - side) for centre, longest in zip(box.centre, size, strict=True)
    )
    return left, top, left + side, top + side


def ellipse_around(box: FaceBox, place: tuple[int, int, int, int], reach: float, edge: float) -> Tensor:
    """How much of the redrawn shows at each pixel of `place`, (height, width) in 0..1: an ellipse with a soft edge."""
    rows = torch.arange(place[1], place[3]) + 0.5 - box.centre[1]
    columns = torch.arange(place[0], place[2]) + 0.5 - box.centre[0]
    down, across = rows / (reach * box.height / 2), columns / (reach * box.width / 2)
    radius = (down[:, None].square() + across[None, :].square()).sqrt()
    return ((1 - radius) / edge).clamp(0, 1)


def crop_square(pictures: Tensor, face: SmallFace, size: tuple[int, int]) -> Tensor:
    """A face's square out of pictures (B, 3, H, W) in 0..1, at another size: (1, 3, height, width)."""
    left, top, right, bottom = face.place
    return _resized(pictures[face.picture : face.picture + 1, :, top:bottom, left:right], size)


def put_back(
    pictures: Tensor, face: SmallFace, drawn: Tensor, settings: RefineFaces, within: Tensor | None = None
) -> None:
    """Lay a redrawn square (3, height, width) over its picture, in place; pixels where none of it shows stay as is."""
    left, top, right, bottom = face.place
    old = pictures[face.picture, :, top:bottom, left:right]
    new = _resized(drawn[None], (bottom - top, right - left))[0]
    shown = ellipse_around(face.box, face.place, settings.reach, settings.edge).to(old.device)
    if within is not None:
        shown = shown * within[face.picture, 0, top:bottom, left:right].to(old.device)
    pictures[face.picture, :, top:bottom, left:right] = old + shown * (new - old)


def visible_latents(faces: Sequence[SmallFace], latents: Tensor, settings: RefineFaces) -> Tensor:
    """Which latents (faces, 1, h, w) of each square some of the shown pixels hang on, for latents (faces, c, h, w)."""
    return torch.cat([
        covered_latents(ellipse_around(face.box, face.place, settings.reach, settings.edge), latents) for face in faces
    ])  # fmt: skip


def covered_latents(opacity: Tensor, latents: Tensor) -> Tensor:
    """Which latents (1, 1, h, w) some of the shown pixels (height, width) hang on."""
    return F.adaptive_max_pool2d(opacity[None, None], latents.shape[-2:]).to(latents.device) > 0


def keep_outside(
    clean: Tensor, noise: Tensor, levels: Sequence[float], redrawn: Tensor
) -> Callable[..., dict[str, Tensor]]:
    """A callback that after every step puts back the clean latents, noised to the step's level, where not `redrawn`.

    clean, noise: (batch, channels, h, w). levels: at which each step begins. redrawn: (batch, 1, h, w), bool.
    """
    ends = [*levels[1:], 0.0]

    def put_back(pipe: Any, number: int, timestep: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        noised = add_noise(clean, noise, torch.full((len(clean),), ends[number], device=clean.device))
        return {"latents": torch.where(redrawn, tensors["latents"], noised)}

    return put_back


def noise_from_latents(start: Tensor, shape: Sequence[int]) -> Tensor:
    """Noise that follows from a picture's start latents alone, on their device.

    So it follows from the call's generator without drawing from it: neither a picture's neighbours nor what a generator
    is used for afterwards depend on whether a face was refined.
    """
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed_of(start))).to(start.device)


def seed_of(values: Tensor) -> int:
    """A seed that follows from numbers: start latents, or a generator's state."""
    return zlib.crc32(values.detach().float().cpu().contiguous().numpy().tobytes())


def _resized(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(pictures, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
