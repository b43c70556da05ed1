"""Redraw small faces in a second pass: select them, crop a square at the model's own size, and paste the result back.

A face that covers only a few latents cannot resemble a person. The second pass crops the face with its surroundings,
enlarges the crop, adds noise up to a level and denoises it again with the person's identity (SDEdit, arXiv 2108.01073).
After every step the surroundings are restored (RePaint, arXiv 2201.09865, without its jumps), and the result is blended
into the picture with a soft edge. This module holds only geometry and tensor operations; the caller supplies the face
finder and the drawing: `imagine.pipeline.pipeline`, or `imagine.stock.second_pass` for stock pipelines.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from imagine.pipeline.sampling import Inputs
from imagine.records import FaceBox
from imagine.request import finite, whole


@dataclass(frozen=True)
class RefineFaces:
    """Which faces the second pass redraws, and how; lengths are in units of the face box (brow to chin, ear to ear)."""

    below: float = (
        0.35  # upper limit of a small face: its box's longer side, as a fraction of the picture's shorter side
    )
    strength: float = 0.6  # start noise level; a higher level shows more of the person and less of the pose
    steps: int | None = None  # None: as many as the first pass took from that noise level on
    around: float = 2.4  # side of the redrawn square, in units of the box's longer side
    reach: float = 1.4  # axes of the pasted ellipse, in units of the box's sides; includes forehead and jaw
    edge: float = 0.3  # fraction of the ellipse's radius over which it fades out

    @classmethod
    def read(cls, given: "RefineFaces | bool | None", output_type: str, default: bool) -> "RefineFaces | None":
        """Read a call's refine_faces; if it is None, use the weights' `default`. Return None for no second pass.

        Raises ConfigError that names the wrong setting.
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
        """Return the noise level at which each step begins; `steps` is the first pass's number of steps."""
        count = self.steps or max(1, round(self.strength * steps))
        return [self.strength * (count - number) / count for number in range(count)]

    def window(self, whole: Window) -> Window:
        """Convert a window of the full schedule to fractions of the part that the second pass repeats."""
        if whole == Window():
            return whole
        # The small offset keeps a step that begins exactly at an edge on the same side of it despite rounding.
        start, end = ((share - 1 + self.strength) / self.strength - 1e-9 for share in (whole.start, whole.end))
        return Window(max(start, 0.0), max(end, 0.0))


@dataclass(frozen=True)
class SmallFace:
    """One face to redraw: indices of its picture and person, its box, and the square around it.

    place: left, top, right, bottom in pixels.
    """

    picture: int
    person: int
    box: FaceBox
    place: tuple[int, int, int, int]


@dataclass(frozen=True)
class SecondPass:
    """What the second pass needs from the first: start latents, identity strength and people, one row per picture."""

    settings: RefineFaces
    levels: list[float]
    window: Window
    start: Tensor
    strength: Tensor
    people: list[list[Persona]]
    inputs: Inputs

    @property
    def active(self) -> list[bool]:
        """Whether the identity acts in each step; at noise level s of a linear schedule, a fraction 1 - s is done."""
        return [self.window.contains(1 - level) for level in self.levels]

    def small_faces(
        self, pictures: Tensor, side: int, finder: FaceFinder
    ) -> tuple[list[tuple[list[SmallFace], Tensor]], dict[int, str]]:
        """Return the small faces of pictures (B, 3, H, W) in 0..1, in batches with their squares of `side` pixels.

        Also return one sentence for each picture whose faces cannot be assigned to its people.
        """
        if not any(self.active):
            return [], {}
        counts = [len(people) if strength else 0 for people, strength in zip(self.people, self.strength, strict=True)]
        faces, notes = find_small_faces(pictures, counts, finder, self.settings, side)
        max_batch = len(self.start)  # the first pass had enough memory for a batch of this size
        return crop_squares(pictures, [self._with_person(face) for face in faces], side, max_batch), notes

    def _with_person(self, face: SmallFace) -> SmallFace:
        """Return a face with its person, who is only known by the place from the left."""
        regions = None if self.inputs.regions is None else self.inputs.regions[face.picture]
        return replace(face, person=people_from_left(regions, len(self.people[face.picture]))[face.person])


def people_from_left(regions: Tensor | None, count: int) -> list[int]:
    """Return the indices of a picture's people from left to right: by their regions, else in the order of the prompt.

    regions: (people, height, width), or None.
    """
    if regions is None:
        return list(range(count))
    columns = torch.arange(regions.shape[-1]) + 0.5
    weights = regions[:count].float().cpu().sum(1)  # (people, columns)
    centres = ((weights * columns).sum(1) / weights.sum(1).clamp(min=1e-6)).tolist()
    return sorted(range(count), key=lambda person: centres[person])


def crop_squares(
    pictures: Tensor, faces: Sequence[SmallFace], side: int, max_batch: int
) -> list[tuple[list[SmallFace], Tensor]]:
    """Crop faces out of pictures (B, 3, H, W) as squares (faces, 3, side, side), at most `max_batch` faces in each.

    All of them are cropped before any is pasted back, which changes pixels of its neighbours.
    """
    batches = [list(faces[first : first + max_batch]) for first in range(0, len(faces), max_batch)]
    return [(some, torch.cat([crop_square(pictures, face, (side, side)) for face in some])) for some in batches]


def paste_squares(
    pictures: Tensor,
    faces: Sequence[SmallFace],
    drawn: Iterable[Tensor | None],
    settings: RefineFaces,
    within: Tensor | None = None,
) -> list[SmallFace]:
    """Paste redrawn squares (3, S, S) in 0..1 into pictures (B, 3, H, W), in place; None stands for one to leave out.

    `within` (B, 1, H, W) multiplies the opacity of what is pasted. Return the faces that were pasted.
    """
    pasted = []
    for face, square in zip(faces, drawn, strict=True):
        if square is not None:
            put_back(pictures, face, square, settings, within)
            pasted.append(face)
    return pasted


def find_small_faces(
    pictures: Tensor,
    people: Sequence[int],
    finder: FaceFinder,
    settings: RefineFaces,
    side: int,
    within: Tensor | None = None,
) -> tuple[list[SmallFace], dict[int, str]]:
    """Return the small faces of pictures (B, 3, H, W) in 0..1, and notes by the index of their picture.

    `people` is the number of people in each picture. The notes hold one sentence for each picture whose faces cannot be
    assigned to its people. A face whose square has `side` pixels or more is not small, because redrawing it at `side`
    pixels would lose detail. Faces whose centre lies where `within` (B, 1, H, W) is at most 0.5 are ignored.
    """
    faces, notes = list[SmallFace](), dict[int, str]()
    for picture, count in enumerate(people):
        if count:
            pixels = (pictures[picture].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous().numpy()
            image = Image.fromarray(pixels)
            found = [box for box in finder.find(image) if within is None or _is_inside(box, within[picture, 0])]
            small, note = small_faces(found, count, picture, image.size, settings)
            faces += [face for face in small if face.place[2] - face.place[0] < side]
            notes |= {picture: note} if note else {}
    return faces, notes


def _is_inside(box: FaceBox, region: Tensor) -> bool:
    """Return whether the region (H, W) is above 0.5 at a face's centre."""
    column, row = (
        min(max(int(centre), 0), longest - 1) for centre, longest in zip(box.centre, region.shape[::-1], strict=True)
    )
    return bool(region[row, column] > 0.5)


def small_faces(
    found: Sequence[FaceBox], people: int, picture: int, size: tuple[int, int], settings: RefineFaces
) -> tuple[list[SmallFace], str]:
    """Return the small faces of one picture (width, height), each with its person, or a note why there are none.

    One person is assigned to the largest face. Several people are assigned to the faces from left to right, in the
    order in which the prompt names them, provided that as many faces were found.
    """
    if (people > 1 and len(found) != people) or not found:
        count = {0: "no face was", 1: "one face was"}.get(len(found), f"{len(found)} faces were")
        who = "one person" if people == 1 else f"{people} people"
        return [], f"Picture {picture + 1}: {count} found for {who}, so no face was refined."
    largest = max(found, key=lambda box: box.width * box.height)
    mine = sorted(found, key=lambda box: box.centre[0]) if people > 1 else [largest]
    limit = settings.below * min(size)
    return [
        SmallFace(picture, person, box, square_around(box, size, settings.around))
        for person, box in enumerate(mine)
        if max(box.width, box.height) < limit
    ], ""


def square_around(box: FaceBox, size: tuple[int, int], around: float) -> tuple[int, int, int, int]:
    """Return the square (left, top, right, bottom) around a face, moved or shrunk if needed to fit in the picture."""
    side = max(1, min(round(around * max(box.width, box.height)), *size))
    left, top = (
        min(max(round(centre - side / 2), 0), longest - side) for centre, longest in zip(box.centre, size, strict=True)
    )
    return left, top, left + side, top + side


def ellipse_around(box: FaceBox, place: tuple[int, int, int, int], reach: float, edge: float) -> Tensor:
    """Return the opacity (height, width) in 0..1 of the redrawn pixels of `place`: an ellipse with a soft edge."""
    rows = torch.arange(place[1], place[3]) + 0.5 - box.centre[1]
    columns = torch.arange(place[0], place[2]) + 0.5 - box.centre[0]
    down, across = rows / (reach * box.height / 2), columns / (reach * box.width / 2)
    radius = (down[:, None].square() + across[None, :].square()).sqrt()
    return ((1 - radius) / edge).clamp(0, 1)


def crop_square(pictures: Tensor, face: SmallFace, size: tuple[int, int]) -> Tensor:
    """Crop a face's square from pictures (B, 3, H, W) in 0..1 and resize it to (1, 3, height, width)."""
    left, top, right, bottom = face.place
    return _resized(pictures[face.picture : face.picture + 1, :, top:bottom, left:right], size)


def put_back(
    pictures: Tensor, face: SmallFace, drawn: Tensor, settings: RefineFaces, within: Tensor | None = None
) -> None:
    """Blend a redrawn square (3, height, width) into its picture, in place; pixels with zero opacity do not change."""
    left, top, right, bottom = face.place
    old = pictures[face.picture, :, top:bottom, left:right]
    new = _resized(drawn[None], (bottom - top, right - left))[0]
    opacity = ellipse_around(face.box, face.place, settings.reach, settings.edge).to(old.device)
    if within is not None:
        opacity = opacity * within[face.picture, 0, top:bottom, left:right].to(old.device)
    pictures[face.picture, :, top:bottom, left:right] = old + opacity * (new - old)


def visible_latents(faces: Sequence[SmallFace], latents: Tensor, settings: RefineFaces) -> Tensor:
    """Return a mask (faces, 1, h, w) of the latents (faces, c, h, w) that cover at least one visible pixel."""
    return torch.cat([
        covered_latents(ellipse_around(face.box, face.place, settings.reach, settings.edge), latents) for face in faces
    ])  # fmt: skip


def covered_latents(opacity: Tensor, latents: Tensor) -> Tensor:
    """Return a mask (1, 1, h, w) of the latents that cover at least one pixel of nonzero opacity (height, width)."""
    return F.adaptive_max_pool2d(opacity[None, None], latents.shape[-2:]).to(latents.device) > 0


def keep_outside(
    clean: Tensor, noise: Tensor, levels: Sequence[float], redrawn: Tensor
) -> Callable[..., dict[str, Tensor]]:
    """Return a step callback that restores the clean latents, noised to the step's end level, where not `redrawn`.

    clean, noise: (batch, channels, h, w). levels: noise level at which each step begins. redrawn: (batch, 1, h, w),
    bool. All three may be sequences of tokens (batch, tokens, channels or 1) instead.
    """
    ends = [*levels[1:], 0.0]

    def put_back(pipe: Any, number: int, timestep: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        noised = add_noise(clean, noise, torch.full((len(clean),), ends[number], device=clean.device))
        return {"latents": torch.where(redrawn, tensors["latents"], noised.to(tensors["latents"]))}

    return put_back


def noise_from_latents(start: Tensor, shape: Sequence[int]) -> Tensor:
    """Return noise that is a function of a picture's start latents only, on their device.

    The noise thus depends on the call's generator without drawing from it: refining a face changes neither the other
    pictures of the batch nor what the generator draws afterwards.
    """
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed_of(start))).to(start.device)


def seed_of(values: Tensor) -> int:
    """Return a seed computed from a tensor: start latents, or a generator's state."""
    return zlib.crc32(values.detach().float().cpu().contiguous().numpy().tobytes())


def _resized(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(pictures, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
