"""Find the faces in an opened photo, choose one, and cut out the square that the vision encoder reads.

`photos` opens the photo before this step, and the vision encoder follows it. `crop_faces` defines the geometry for
training and inference: the same code crops a photo for a persona and a training batch that was rendered on a GPU.

A finder is any object with `find(image)`. All finders return the same kind of box, from brow to chin and from ear to
ear, as in the portrait world. The boxes of finders with other conventions are converted by constant factors, which are
stated where they are used:

- `CascadeFinder`: the frontal-face cascade that comes with scikit-image. Needs no download. It finds photographed faces
  from the front, tilted up to about 40 degrees, and misses faces that are turned halfway to the side.
- `LearnedFinder`: our own small network (`finder`), trained on the portrait world with its drawings and turned heads.
- `CombinedFinder`: several finders, with duplicates merged. `default_finder` combines the two above.
- `InsightFaceFinder`: optional, for photos of all kinds: `pip install -e '.[faces]'` and a model pack.
- `KnownBoxesFinder`: boxes that the caller already has.
"""

import importlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from imagine.errors import FaceError, ImagineError, WeightsError
from imagine.people import photo_finder
from imagine.people.finder import Finder, decode, letterbox, load_finder
from imagine.people.photo_finder import YuNetFinder
from imagine.records import FaceBox, FaceCrop

CROP_SIDE = 1.75  # side of the crop, in units of the longer side of the face box, to include hair, ears and chin
CROP_RISE = 0.15  # how far the crop's centre is above the box's, in units of its height: there is more hair than neck
MASK_AXES = (0.46, 0.5)  # semi-axes of the visible ellipse, in units of the crop's side
TILE = 0.6  # side of a tile of `find_in_tiles`, in units of the picture's side
MASK_EDGE = 0.1  # the mask fades over this part of the radius
SMALL_FACE = 0.5  # a crop enlarged beyond 1 / SMALL_FACE counts as small
BLURRED = 5e-4  # sharpness below this counts as blurred: a blur of about 4 % of the face's width
DOUBTFUL = 0.65  # a face with a lower score is reported as doubtful
SCORE_SHARE = 0.75  # faces with less than this share of the best score are never chosen by size or place
UPRIGHT_SCORE = 0.9  # landmarks of faces with at least this score are trusted to say that the photo is upright
TURN_GAIN = 0.05  # a turned picture is used if its best score exceeds that of the picture as given by this,
TURNED_SCORE = 0.75  # and exceeds this
LEARNED = "learned"  # the name of our own finder in `FaceBox.finder`
DRAWING_SCORE = 0.65  # best score of our own finder from which a picture counts as a drawing of the portrait world
DRAWING_MARGIN = 0.1  # how much lower our own finder may score than a sure photo finder in a drawing
TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}

FaceChoice = Literal["largest", "centre"] | int


# --- cropping: the same in training and inference ---------------------------------------------------------------------
def crop_faces(images: Tensor, boxes: Tensor, size: int, rolls: Tensor | None = None) -> Tensor:
    """Cut a background-masked square around one face box from each image; return (N, 3, size, size).

    images: (N, 3, H, W), 0 to 1. boxes: (N, 4), left, top, width, height in pixels. rolls: (N,), the angle of each
    face's eye line in radians (`FaceBox.roll`); the square is turned by it, so that the eyes are level. Pixels outside
    the picture or outside the ellipse are grey, 0.5. Differentiable in the images; each row depends on its own image
    and box only. Raises FaceError if the shapes do not match.
    """
    squares = crop_unmasked(images, boxes, size, rolls)
    mask = ellipse(size, squares.device)
    return (squares - 0.5) * mask + 0.5


def crop_unmasked(images: Tensor, boxes: Tensor, size: int, rolls: Tensor | None = None) -> Tensor:
    """Cut the squares of `crop_faces` without the mask; sharpness is measured on them."""
    if images.ndim != 4 or boxes.shape != (images.shape[0], 4):
        raise FaceError(
            f"Give one box for each picture: pictures {tuple(images.shape)} and boxes {tuple(boxes.shape)} do not fit."
        )
    images, boxes = images.float(), boxes.to(images.device, torch.float32)
    width, height = boxes[:, 2], boxes[:, 3]
    side = CROP_SIDE * torch.maximum(width, height).clamp(min=1)
    middle = torch.stack((boxes[:, 0] + width / 2, boxes[:, 1] + height / 2), dim=1)
    rise = CROP_RISE * height
    if rolls is None or not bool(rolls.any()):
        rolls, centre = None, torch.stack((middle[:, 0], middle[:, 1] - rise), dim=1)
    else:
        rolls = rolls.to(boxes)
        centre = middle + torch.stack((rise * rolls.sin(), -rise * rolls.cos()), dim=1)
    # A box filter against aliasing: one sample per source pixel, then a mean. Rows with the same count are batched.
    counts = [max(1, math.ceil(value / size - 1e-4)) for value in side.tolist()]
    out = images.new_empty(len(images), 3, size, size)
    for count in sorted(set(counts)):
        rows = [row for row, own in enumerate(counts) if own == count]
        turns = None if rolls is None else rolls[rows]
        out[rows] = _sample(images[rows], centre[rows], side[rows], turns, size, count)
    return out


def _sample(images: Tensor, centre: Tensor, side: Tensor, rolls: Tensor | None, size: int, count: int) -> Tensor:
    height, width = images.shape[-2:]
    steps = (torch.arange(size * count, device=images.device) + 0.5) / (size * count) - 0.5
    if rolls is None:
        across = (centre[:, :1] + side[:, None] * steps) * (2 / width) - 1  # grid_sample's coordinates: -1 to 1
        down = (centre[:, 1:] + side[:, None] * steps) * (2 / height) - 1
        across, down = across[:, None, :].expand(-1, len(steps), -1), down[:, :, None].expand(-1, -1, len(steps))
    else:
        right, below = side[:, None, None] * steps[None, None, :], side[:, None, None] * steps[None, :, None]
        cosine, sine = rolls.cos()[:, None, None], rolls.sin()[:, None, None]
        across = (centre[:, 0, None, None] + cosine * right - sine * below) * (2 / width) - 1
        down = (centre[:, 1, None, None] + sine * right + cosine * below) * (2 / height) - 1
    grid = torch.stack((across, down), dim=-1)
    # grid_sample pads with zeros; shifting by 0.5 makes the padding mid grey.
    fine = F.grid_sample(images - 0.5, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 0.5
    return F.avg_pool2d(fine, count) if count > 1 else fine


def ellipse(size: int, device: "torch.device | str" = "cpu") -> Tensor:
    """Return the soft mask (size, size): 1 on the face, 0 on and outside the ellipse with MASK_AXES."""
    axis = (torch.arange(size, device=device) + 0.5) / size - 0.5
    radius = ((axis[None, :] / MASK_AXES[0]).square() + (axis[:, None] / MASK_AXES[1]).square()).sqrt()
    return ((1 - radius) / MASK_EDGE).clamp(0, 1)


def crop_face(
    image: Image.Image,
    finder: "FaceFinder",
    size: int,
    face: FaceChoice = "largest",
    on_no_face: Literal["error", "whole"] = "error",
) -> FaceCrop:
    """Return the chosen face of an opened photo (see `photos.open_photo`) and a sentence on the photo's quality.

    face: "largest", "centre" (nearest to the picture's centre), or an index in the list of faces, largest first.
    on_no_face: "error", or "whole" to use the whole picture, unmasked.
    Raises FaceError if there is no such face.
    """
    if on_no_face not in ("error", "whole"):
        raise FaceError(f"on_no_face={on_no_face!r} is unknown: choose 'error' or 'whole'.")
    _check_choice(face)
    upright, found, turned = find_upright(image, finder)
    if not found and on_no_face == "error":
        raise FaceError(
            "No face was found in the photo: give one that shows the face from the front, large and well lit, "
            "or pass on_no_face='whole' to use the whole picture."
        )
    if not found:
        square = letterbox(image, size)[0]
        quality = "No face was found, so the whole picture was used and the likeness will be poor."
        return FaceCrop(_to_image(square), None, (), -1, sharpness(square), quality)
    index = choose_face(found, face, upright.size)
    box = found[index]
    edges = torch.tensor([[box.left, box.top, box.width, box.height]])
    square = crop_unmasked(_to_tensor(upright)[None], edges, size, torch.tensor([box.roll]))[0]
    masked = (square - 0.5) * ellipse(size) + 0.5
    face_sharpness = sharpness(square)
    quality = _quality(found, index, face, size, face_sharpness, turned)
    return FaceCrop(_to_image(masked), box, found, index, face_sharpness, quality, turned)


def find_upright(image: Image.Image, finder: "FaceFinder") -> tuple[Image.Image, tuple[FaceBox, ...], int]:
    """Find the faces of a picture that may lie on its side or upside down.

    Return the picture turned upright, its faces, largest first, and the turn in degrees counter-clockwise. The other
    turns are tried only if no face is found or the best face does not look upright. A turn is used only if its best
    score is clearly higher.
    """
    best = image, tuple(sorted(finder.find(image), key=_area, reverse=True)), 0
    if any(_looks_upright(face) for face in best[1]) or isinstance(finder, KnownBoxesFinder):
        return best
    for turn, transpose in TURNS.items():
        turned = image.transpose(transpose)
        found = tuple(sorted(finder.find(turned), key=_area, reverse=True))
        if _upright_score(found) > max(_upright_score(best[1]) + TURN_GAIN, TURNED_SCORE):
            best = turned, found, turn
    return best


def _looks_upright(face: FaceBox) -> bool:
    """Return whether a face is certainly upright; a face without landmarks counts as upright."""
    return not face.landmarks or (face.score >= UPRIGHT_SCORE and _has_upright_landmarks(face))


def _has_upright_landmarks(face: FaceBox) -> bool:
    """Return whether the eyes lie above the mouth and the eye line is nearer to level than to upright."""
    eyes, mouth = (np.mean(face.landmarks[first : first + 2], axis=0) for first in (0, 3))
    return bool(mouth[1] > eyes[1]) and abs(face.roll) < math.pi / 4


def _upright_score(found: Sequence[FaceBox]) -> float:
    """Return the best score of the faces, where a face with landmarks that are not upright counts half."""
    halves = (0.5 if face.landmarks and not _has_upright_landmarks(face) else 1.0 for face in found)
    return max((half * face.score for half, face in zip(halves, found, strict=True)), default=0.0)


def sharpness(square: Tensor) -> float:
    """Return the variance of the Laplacian of a square's brightness (3, S, S), 0 to 1, inside the face ellipse.

    This is the measure LAPV of Pertuz, Puig and Garcia (Pattern Recognition 46, 2013). It is taken at the crop's own
    size, because finer detail never reaches the vision encoder.
    """
    grey = square.mean(dim=0)[None, None]
    kernel = grey.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    edges = F.conv2d(grey, kernel)[0, 0]
    inside = ellipse(square.shape[-1])[1:-1, 1:-1] >= 1
    return float(edges[inside].var()) if int(inside.sum()) > 1 else 0.0


def _check_choice(face: FaceChoice) -> None:
    is_valid = face in ("largest", "centre") or (isinstance(face, int) and not isinstance(face, bool) and face >= 0)
    if not is_valid:
        raise FaceError(f"face={face!r} is unknown: choose 'largest', 'centre' or a number from 0 (the largest) on.")


def choose_face(found: Sequence[FaceBox], face: FaceChoice, size: tuple[int, int]) -> int:
    """Return the index of the chosen face. "largest" and "centre" pass over faces with a much lower score."""
    surest = max(box.score for box in found)
    likely = [place for place, box in enumerate(found) if box.score >= SCORE_SHARE * surest]
    if face == "largest":
        return likely[0]
    if face == "centre":
        middle = (size[0] / 2, size[1] / 2)
        return min(likely, key=lambda place: math.dist(found[place].centre, middle))
    assert isinstance(face, int)
    if face >= len(found):
        have = "one face" if len(found) == 1 else f"{len(found)} faces"
        choices = "0" if len(found) == 1 else f"0 (the largest) to {len(found) - 1}"
        raise FaceError(f"The photo holds {have}, so there is no face={face}: choose {choices}.")
    return face


def _quality(
    found: tuple[FaceBox, ...], index: int, face: FaceChoice, size: int, face_sharpness: float, turned: int
) -> str:
    box = found[index]
    problems = []
    if turned:
        side = {90: "on its right side", 180: "upside down", 270: "on its left side"}[turned]
        problems.append(f"the photo lies {side}, so it was turned by {turned} degrees counter-clockwise")
    if box.score < DOUBTFUL:
        problems.append(
            f"it is doubtful that this is a face (score {box.score:.2f}), so look at the crop (--save-crop FILE, or "
            "faces[i].crop)"
        )
    if len(found) > 1 and not isinstance(face, int):
        chosen = "the largest" if face == "largest" else "the one nearest to the centre"
        problems.append(
            f"the photo holds {len(found)} faces and {chosen} was used (face={index}); pass face=0 (the "
            f"largest) to face={len(found) - 1} to choose another"
        )
    if CROP_SIDE * max(box.width, box.height) < SMALL_FACE * size:
        problems.append(
            f"the face is only {round(box.width)} pixels wide, so a closer photo will give a better likeness"
        )
    if face_sharpness < BLURRED:
        problems.append("the face looks blurred, so a sharper photo will give a better likeness")
    if not problems:
        return "good"
    sentence = "; ".join(problems)
    return sentence[0].upper() + sentence[1:] + "."


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 255


def _to_image(square: Tensor) -> Image.Image:
    pixels = (square.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels)


# --- finding ----------------------------------------------------------------------------------------------------------
class FaceFinder(Protocol):
    """An object that finds the faces of an RGB picture."""

    def find(self, image: Image.Image) -> tuple[FaceBox, ...]:
        """Return every face, largest first; an empty tuple if there is none."""
        ...


def default_finder(folder: Path | None = None) -> FaceFinder:
    """Return the finder for pictures of any kind: photographs, and drawings if `folder` (weights/finder) has a network.

    YuNet finds the faces of photographs; without its packages, the cascade does.
    """
    photos: PhotoFinder = YuNetFinder() if photo_finder.is_installed() else CascadeFinder()
    if folder is None or not folder.is_dir():
        return photos
    return AutoFinder(LearnedFinder.from_folder(folder), photos)


def non_maximum_suppression(boxes: Sequence[FaceBox], overlap: float = 0.4) -> tuple[FaceBox, ...]:
    """Keep, of boxes that overlap too much, the one with the highest score (non-maximum suppression); largest first.

    Two boxes are the same face if intersection over union exceeds `overlap`, or if one is almost entirely in the other.
    """
    kept: list[FaceBox] = []
    for box in sorted(boxes, key=lambda box: box.score, reverse=True):
        if all(_overlap(box, other) <= overlap and _containment(box, other) <= 0.75 for other in kept):
            kept.append(box)
    return tuple(sorted(kept, key=_area, reverse=True))


def _area(box: FaceBox) -> float:
    return box.width * box.height


def _intersection(one: FaceBox, two: FaceBox) -> float:
    across = min(one.left + one.width, two.left + two.width) - max(one.left, two.left)
    down = min(one.top + one.height, two.top + two.height) - max(one.top, two.top)
    return max(0.0, across) * max(0.0, down)


def _overlap(one: FaceBox, two: FaceBox) -> float:
    common = _intersection(one, two)
    return common / max(_area(one) + _area(two) - common, 1e-6)


def _containment(one: FaceBox, two: FaceBox) -> float:
    return _intersection(one, two) / max(min(_area(one), _area(two)), 1e-6)


class KnownBoxesFinder:
    """Returns boxes that are known in advance: of rendered pictures, or from a caller's own finder."""

    def __init__(self, boxes: Sequence[FaceBox]) -> None:
        self.boxes = tuple(sorted(boxes, key=_area, reverse=True))

    def find(self, image: Image.Image) -> tuple[FaceBox, ...]:
        """Return the known boxes, whatever the picture."""
        return self.boxes


class CombinedFinder:
    """Runs several finders and merges their boxes; of two boxes of one face, the one with the higher score is kept."""

    def __init__(self, finders: Sequence[FaceFinder]) -> None:
        self.finders = tuple(finders)

    def find(self, image: Image.Image) -> tuple[FaceBox, ...]:
        """Return every face that any of the finders finds."""
        return non_maximum_suppression([box for finder in self.finders for box in finder.find(image)])


class PhotoFinder(FaceFinder, Protocol):
    """A finder for photographs."""

    sure: float  # score from which a find is certainly a face


class AutoFinder:
    """Choose one finder per picture: our own network for drawings of the portrait world, another for photographs.

    Our network must find a face with a score of at least `DRAWING_SCORE`, in the whole picture or, for a sheet of
    people, three in its tiles (`LearnedFinder.find_in_tiles`). If the photo finder is sure of faces too, the picture
    is a drawing if our network finds all of them and another strong face, or three strong faces in all. Otherwise the
    higher scores decide: our network's finds of the same faces must score at most `DRAWING_MARGIN` less. In a drawing,
    our network decides, and sure faces that it missed are added; in every other picture the photo finder decides alone.

    Measured with the shipped network and YuNet: 96 % of 128 renders and all of 48 sheets of four renders are taken for
    drawings; so are 1 of 24 photographs, 1 of 96 crops of them, none of 24 sheets of four, and none of 15 objects.
    """

    def __init__(self, drawings: "LearnedFinder", photos: PhotoFinder) -> None:
        self.drawings, self.photos = drawings, photos

    def find(self, image: Image.Image) -> tuple[FaceBox, ...]:
        """Return every face that the picture's own finder finds, largest first."""
        photographed, drawn = self.photos.find(image), self.drawings.find(image)
        if not drawn:
            return photographed
        tiles = [face for tile in self.drawings.find_in_tiles(image) for face in tile]
        ours = non_maximum_suppression([*drawn, *tiles])
        sure = [face for face in photographed if face.score >= self.photos.sure]
        if not _is_drawing(drawn, ours, sure):
            return photographed
        missed = [face for face in sure if all(_containment(face, other) <= 0.5 for other in ours)]
        return tuple(sorted([*ours, *missed], key=_area, reverse=True))


def finder_of_drawings(finder: FaceFinder) -> FaceFinder:
    """Return the finder for pictures that weights of the portrait world draw.

    Such pictures are known to be drawings, and their faces may be too unclear for the rule of `AutoFinder`.
    """
    return CombinedFinder((finder.drawings, CascadeFinder())) if isinstance(finder, AutoFinder) else finder


def _is_drawing(drawn: Sequence[FaceBox], ours: Sequence[FaceBox], sure: Sequence[FaceBox]) -> bool:
    """Return whether a picture is a drawing (see `AutoFinder`).

    drawn: our network's faces in the whole picture; ours: with those of the tiles; sure: the photo finder's.
    """
    strong = [face for face in ours if face.score >= DRAWING_SCORE]
    if not any(face.score >= DRAWING_SCORE for face in drawn) and len(strong) < 3:
        return False
    if not sure:
        return True
    missed = [face for face in sure if all(_containment(other, face) <= 0.5 for other in ours)]
    more = [face for face in strong if all(_containment(face, other) <= 0.5 for other in sure)]
    if not missed and (more or len(strong) >= 3):
        return True
    both = []
    for other in sure:
        same = [face.score for face in strong if _containment(face, other) > 0.5]
        both += [(max(same), other.score)] if same else []
    if 2 * len(both) < len(sure):
        return False
    return sum(one for one, _ in both) >= sum(other - DRAWING_MARGIN for _, other in both)


class LearnedFinder:
    """Finds faces with our own small network. `threshold` is the lowest probability that counts as a face."""

    def __init__(self, network: Finder, threshold: float = 0.4) -> None:
        self.network, self.threshold = network.eval(), threshold

    @classmethod
    def from_folder(cls, folder: Path) -> "LearnedFinder":
        """Load the network of a weights/finder folder. Raise WeightsError unless it fits exactly."""
        return cls(load_finder(folder))

    @torch.inference_mode()
    def find(self, image: Image.Image) -> tuple[FaceBox, ...]:
        """Return every face in the whole picture, scaled to the network's own input size."""
        square, scale, corner = letterbox(image, self.network.side)
        device = next(self.network.parameters()).device
        boxes, scores = decode(self.network(square[None].to(device)), self.network.side)
        found = [
            FaceBox(
                (left - corner[0]) / scale,
                (top - corner[1]) / scale,
                width / scale,
                height / scale,
                score,
                finder=LEARNED,
            )
            for (left, top, width, height), score in zip(boxes[0].tolist(), scores[0].tolist(), strict=True)
            if score >= self.threshold
        ]
        return non_maximum_suppression([box for box in found if _centred_within(box, image.size)])

    def find_in_tiles(self, image: Image.Image) -> list[tuple[FaceBox, ...]]:
        """Return, for each of four overlapping tiles, its faces of `DRAWING_SCORE` or more, in the picture's pixels.

        In a sheet of several people each face is small in the whole picture; tiles of 60 % of its sides show it larger.
        """
        width, height = round(TILE * image.width), round(TILE * image.height)
        corners = [(left, top) for left in (0, image.width - width) for top in (0, image.height - height)]
        tiles = []
        for left, top in corners:
            found = self.find(image.crop((left, top, left + width, top + height)))
            whole = [face for face in found if face.score >= DRAWING_SCORE and not _touches_edge(face, width, height)]
            tiles.append(tuple(replace(face, left=face.left + left, top=face.top + top) for face in whole))
        return tiles


def _touches_edge(face: FaceBox, width: int, height: int) -> bool:
    """Return whether a box reaches over the edge of its tile, which then shows only a part of the face."""
    return face.left < 0 or face.top < 0 or face.left + face.width > width or face.top + face.height > height


def _centred_within(box: FaceBox, size: tuple[int, int]) -> bool:
    return 0 <= box.centre[0] < size[0] and 0 <= box.centre[1] < size[1]


class CascadeFinder:
    """scikit-image's bundled LBP cascade (Liao et al., ICB 2007), with a second check of every hit.

    On its own the cascade finds every frontal face in a group photo, and twice as many hands, shirts and poker chips:
    its count of neighbouring hits does not separate them. A real face, however, is found again when the picture around
    it is mirrored, slightly rotated and rescaled. A scan of the whole picture therefore proposes candidates, and
    further scans of such views verify them; the number of hits in these views is the score. If the first scan finds
    nothing, larger and padded scans look for small or tightly cropped faces.
    """

    # The cascade's window is square, from the middle of the forehead to the chin and from ear to ear. In units of the
    # window: how far our box is shifted right and down, and its width and height.
    window = (0.0, 0.02, 1.0, 1.0)
    sure = 0.5

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold
        self._cascade: Any = None  # loaded with the first picture, since importing scikit-image takes a second

    def find(self, image: Image.Image) -> tuple[FaceBox, ...]:
        """Return every photographed face from the front; its score grows with the hits in the second check."""
        for side, pad in ((320, 0.0), (256, 0.3), (640, 0.0)):
            if side == 640 and max(image.size) <= 320:
                continue
            found = self._search(image, side, pad)
            if found:
                return found
        return ()

    def _search(self, image: Image.Image, side: int, pad: float) -> tuple[FaceBox, ...]:
        margin = round(pad * max(image.size))
        canvas = Image.new("RGB", (image.width + 2 * margin, image.height + 2 * margin), (128, 128, 128))
        canvas.paste(image, (margin, margin))
        scale = min(1.0, side / max(canvas.size))
        small = _resized(canvas, scale)
        # The second check needs more detail than the scan.
        finer = min(1.0, 2 * scale)
        detailed = _resized(canvas, finer)
        boxes: list[FaceBox] = []
        for left, top, width in _clusters(self._hits(small, 24, min(small.size)) / scale):
            square = self._refine_hit(detailed, (left * finer, top * finer, width * finer))
            if square is not None:
                left, top, width, score = square[0] / finer, square[1] / finer, square[2] / finer, square[3]
                boxes.append(self._to_box(left - margin, top - margin, width, score))
        return non_maximum_suppression(
            [box for box in boxes if box.score >= self.threshold and _centred_within(box, image.size)]
        )

    def _to_box(self, left: float, top: float, width: float, score: float) -> FaceBox:
        right, down, wide, high = self.window
        return FaceBox(left + right * width, top + down * width, wide * width, high * width, score, finder="cascade")

    def _hits(self, image: Image.Image, smallest: int, largest: int) -> np.ndarray[Any, Any]:
        """Return every window that passes the cascade, unmerged: (hits, 3), left, top, width."""
        if self._cascade is None:
            feature, data = importlib.import_module("skimage.feature"), importlib.import_module("skimage.data")
            self._cascade = feature.Cascade(data.lbp_frontal_face_cascade_filename())
        if largest < smallest:
            return np.zeros((0, 3))
        hits = self._cascade.detect_multi_scale(
            img=np.asarray(image), scale_factor=1.1, step_ratio=1, min_size=(smallest, smallest),
            max_size=(largest, largest), min_neighbor_number=1, intersection_score_threshold=1.0,
        )  # fmt: skip
        return np.array([(hit["c"], hit["r"], hit["width"]) for hit in hits], dtype=np.float64).reshape(-1, 3)

    def _refine_hit(
        self, image: Image.Image, square: tuple[float, float, float]
    ) -> tuple[float, float, float, float] | None:
        """Return left, top, width and score after two rounds of checks, or None if the first round fails.

        Round one covers a wide area and finds the face's actual position and tilt. Round two scans closely around that
        position and gives the score. (Real faces get 100 to 300 votes there, fists and badges fewer than 60.)
        """
        centre_x, centre_y, width = square[0] + square[2] / 2, square[1] + square[2] / 2, square[2]
        tilt = 0.0
        for turns in ((-30.0, -15.0, 0.0, 15.0, 30.0), (-8.0, 0.0, 8.0)):
            views = [
                self._votes(image, centre_x, centre_y, width, tilt + turn, flip) for turn in turns for flip in (1, -1)
            ]
            votes = np.concatenate(views)
            if len(votes) < 6:
                return None
            centre_x, centre_y, width = np.median(votes, axis=0).tolist()
            counts = np.array([len(view) for view in views], dtype=np.float64)
            tilt += float((counts * np.repeat(turns, 2)).sum() / counts.sum())
        score = 1 - math.exp(-len(votes) / 100)
        return centre_x - width / 2, centre_y - width / 2, width, score

    def _votes(
        self, image: Image.Image, centre_x: float, centre_y: float, width: float, angle: float, flip: int
    ) -> np.ndarray[Any, Any]:
        """Scan one view, rotated by `angle` degrees and mirrored if flip is -1; return (votes, 3), centre and width."""
        side, zoom = 48, 1.7 * width / 48  # picture pixels per pixel of the view
        cosine, sine = math.cos(math.radians(angle)) * zoom, math.sin(math.radians(angle)) * zoom
        matrix = np.array([[flip * cosine, -sine], [flip * sine, cosine]])
        origin = np.array([centre_x, centre_y]) - matrix @ np.array([side / 2, side / 2])
        view = image.transform(
            (side, side),
            Image.Transform.AFFINE,
            (matrix[0, 0], matrix[0, 1], origin[0], matrix[1, 0], matrix[1, 1], origin[1]),
            Image.Resampling.BILINEAR,
        )
        hits = self._hits(view, 24, 44)
        centres = (hits[:, :2] + hits[:, 2:] / 2) @ matrix.T + origin
        widths = hits[:, 2] * zoom
        near = np.hypot(centres[:, 0] - centre_x, centres[:, 1] - centre_y) < 0.3 * width
        return np.column_stack((centres, widths))[near]


def _resized(image: Image.Image, scale: float) -> Image.Image:
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)


def _clusters(hits: np.ndarray[Any, Any], slack: float = 0.25) -> list[tuple[float, float, float]]:
    """Merge hits (n, 3) that nearly coincide: return the mean left, top and width of each group, most hits first."""
    groups: list[list[np.ndarray[Any, Any]]] = []
    for hit in hits:
        for group in groups:
            mean = np.mean(group, axis=0)
            if np.abs(hit - mean).max() <= slack * min(hit[2], mean[2]):
                group.append(hit)
                break
        else:
            groups.append([hit])
    groups.sort(key=len, reverse=True)
    means = [np.mean(group, axis=0).tolist() for group in groups]
    return [(left, top, width) for left, top, width in means]


class InsightFaceFinder:
    """InsightFace's detectors (SCRFD, RetinaFace). Optional; its model packs are for non-commercial research only.

    model: a folder of ONNX files (a model pack), one detector file, or the name of a pack in `root`/models.
    Nothing is downloaded, although insightface itself would download a missing pack; here it is an error.
    """

    # Its boxes begin near the hairline, ours at the middle of the forehead. In units of the box's height.
    brow = 0.12

    def __init__(
        self, model: "str | Path" = "buffalo_l", root: "str | Path" = "~/.insightface", threshold: float = 0.5
    ) -> None:
        path = model_pack(model, Path(root).expanduser())
        try:
            importlib.import_module("insightface")
        except ImportError as error:
            raise ImagineError("This finder needs insightface: install it with pip install -e '.[faces]'.") from error
        self.detector = _detector(path)
        self.detector.prepare(-1, det_thresh=threshold, input_size=(640, 640))

    def find(self, image: Image.Image) -> tuple[FaceBox, ...]:
        """Return every face with the detector's score; faces too large for the first pass are found in later ones."""
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])  # insightface reads BGR
        fixed = isinstance(self.detector.input_shape[2], int)
        for side in (None,) if fixed else (None, 320, 160):
            edges, points = self.detector.detect(pixels, input_size=side and (side, side))
            if len(edges):
                marks = [()] * len(edges) if points is None else [tuple(map(tuple, each)) for each in points.tolist()]
                found = [self._to_box(row, mark) for row, mark in zip(edges.tolist(), marks, strict=True)]
                return non_maximum_suppression(found)
        return ()

    def _to_box(self, row: Sequence[float], landmarks: tuple[tuple[float, float], ...]) -> FaceBox:
        left, top, right, bottom, score = row
        brow = top + self.brow * (bottom - top)
        return FaceBox(left, brow, right - left, bottom - brow, score, landmarks, finder="insightface")


def model_pack(model: "str | Path", root: Path) -> Path:
    """Return the file or folder for a model name; a pack that was unzipped one folder too deep is found too.

    Raises WeightsError if there is none.
    """
    for path in (Path(model).expanduser(), root / "models" / model):
        if path.is_file():
            return path
        if path.is_dir():
            inner = [folder for folder in path.iterdir() if folder.is_dir() and any(folder.glob("*.onnx"))]
            return inner[0] if len(inner) == 1 and not any(path.glob("*.onnx")) else path
    raise WeightsError(
        f"There is no InsightFace model pack {model}: unzip one (non-commercial licence) into {root / 'models'}, "
        "or give the folder that holds its ONNX files."
    )


def _detector(path: Path) -> Any:
    if path.is_file():
        model = importlib.import_module("insightface.model_zoo.model_zoo").get_model(
            str(path.resolve()), providers=["CPUExecutionProvider"]
        )
        if getattr(model, "taskname", None) != "detection":
            raise WeightsError(f"{path} is not a face detector: give InsightFace's detection model.")
        return model
    analysis = importlib.import_module("insightface.app.face_analysis").FaceAnalysis
    try:
        pack = analysis(name=str(path.resolve()), allowed_modules=["detection"], providers=["CPUExecutionProvider"])
    except AssertionError as error:  # insightface's only word for it
        raise WeightsError(f"{path} holds no face detector: give the folder with the pack's ONNX files.") from error
    return pack.det_model
