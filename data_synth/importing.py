"""Import photos as the references of a build; a photo that cannot be used is counted with a reason and never raises.

Every layout that training reads is supported (`imagine.shards`), at any fsspec address: webdataset shards, a folder
with metadata, a folder of pictures with optional texts beside them. A folder of people has one folder of photos per
person. If the person of each photo is known, from the last layout or from the records' identity, the photos
are cleaned as in PhotoMaker (arXiv 2312.04461, section 3.3): from each photo the import takes the face most similar to
the person's other photos, and it rejects photos without a similar face.

The order is fixed and the first of several duplicates is kept, so the same photos always give the same references.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any, Literal, Protocol, cast

import numpy as np
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from data_synth.backends.contracts import Draft, Failed
from data_synth.backends.measuring import picture_hash
from data_synth.backends.recognisers import KnownFace, Recogniser
from data_synth.records import Candidate, Reference, Rejection, TargetSpec
from imagine.errors import BadRecordError, ConfigError, ImagineError, PictureError, WeightsError
from imagine.people.photos import Photo, read_photo
from imagine.shards.facts import RECORD_IS_READ, box_problem
from imagine.shards.reading import Record, Records, holds_records, open_records
from imagine.shards.writing import check_picture

UNREADABLE = "a file that cannot be read"
DAMAGED = "a damaged picture or none"
TOO_SMALL = "a picture that is too small"
SAME_FILE = "the same file as another"
NEAR_DUPLICATE = "nearly the same picture as another"
NO_FACE = "no face"
SEVERAL_FACES = "more than one face"
SMALL_FACE = "a face that is too small"
RECOGNISER_CRASHED = "a photo that breaks the recogniser"
STRANGER = "a stranger among the photos of a person"
TOO_FEW_PHOTOS = "too few photos of a person"

_BATCH = 16  # photos per call of the recogniser
_MIN_SPREAD = 0.05  # smallest assumed spread of the similarities between photos of one person


class ImportSettings(BaseModel):
    """Where the photos are, and which of them are accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str  # an address: a folder, one .tar, a glob, or braces as in s3://bucket/{00000..00012}.tar
    # auto: records if the address holds shards or metadata, else pictures
    kind: Literal["auto", "records", "pictures", "people"] = "auto"
    least_side: int = Field(default=64, ge=32)  # minimum shorter side in pixels; PhotoMaker: 512
    least_face: float = Field(default=24, ge=1)  # minimum longer side of the face's box in pixels; PhotoMaker: 256
    # some: one or more; the import takes the largest, or in a folder of people the person's own
    faces: Literal["one", "some", "unchecked"] = "one"
    # near-duplicates differ in at most this many of 64 bits; None: keep them
    # use 0 for the world, whose portraits look alike
    duplicates: int | None = Field(default=2, ge=0, le=10)
    licence: str = ""  # of photos without their own licence
    least_photos: int = Field(default=2, ge=1)  # minimum per person, in a folder of people
    # a photo counts as a stranger's if its similarity is this many spreads below the median of the person's photos
    outliers: float = Field(default=4.0, gt=0)
    # a photo below it counts as a stranger's, regardless of the spread
    least_similarity: float = Field(default=0.2, ge=-1, le=1)


class FaceCache(Protocol):
    """A cache of the faces that a recogniser found, by photo key, so that it processes each photo only once."""

    def find(self, keys: Sequence[str]) -> Mapping[str, tuple[KnownFace, ...]]:
        """Return the faces of those photos that are in the cache."""
        ...

    def save(self, found: Mapping[str, tuple[KnownFace, ...]]) -> None:
        """Add the faces of photos to the cache."""
        ...


@dataclass(frozen=True)
class _FoundPhoto:
    """A photo that was found but not read yet."""

    name: str  # shown in messages
    read: Callable[[], bytes]
    person: str | None = None
    caption: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _OpenedPhoto:
    """A photo that was opened, and its faces, largest first; `faces` is None if they were not looked for."""

    reference: Reference
    name: str
    image: Image.Image = field(repr=False)
    scale: float  # pixels of the stored picture per pixel of `image`
    faces: Sequence[KnownFace] | None = None


def import_references(
    settings: ImportSettings, recogniser: Recogniser | None = None, known: FaceCache | None = None
) -> Iterator[Reference | Rejection]:
    """Yield a Reference for every usable photo, in a fixed order, and a Rejection (step "import") for every other one.

    A reference's facts are the fields of its record, its "file", its "licence", and the "box" of its face if one was
    found: left, top, width, height in pixels of the stored picture in its upright orientation. A rejection's key is the
    photo's name.
    recogniser: loaded; None leaves faces unchecked. known: the cache of its earlier results.
    The photos of one person come one after the other, both from a folder of people and from records with an identity.
    Strangers among them are rejected if faces are checked. A problem with a single photo is never raised.
    Raises ConfigError if the address holds no photos, or for a folder of people without a recogniser; ImagineError if
    the recogniser fails at every photo.
    """
    kind = _kind(settings)
    checked = recogniser is not None and settings.faces != "unchecked"
    if kind == "people" and not checked:
        raise ConfigError(
            "A folder of people needs a check of the faces: name a recogniser and do not set faces to unchecked."
        )
    found = _records(settings) if kind == "records" else _pictures(settings, kind == "people")
    found = found if kind == "people" else _group_by_person(found)
    inspected = _find_faces(_open_photos(found, settings), settings, recogniser, known)
    # Each record is a reference on its own, so the minimum per person applies only to a folder of people.
    min_photos = settings.least_photos if kind == "people" else 1
    for some in _split_by_person(inspected):
        if isinstance(some, Rejection):
            yield some
        elif checked and some[0].reference.person is not None:
            yield from _without_strangers(some, settings, min_photos)
        else:
            yield from map(_as_reference, some)


def mined_drafts(references: Iterable[Reference], max_per_photo: int = 4) -> list[Draft]:
    """Return drafts of real pairs: each photo of a person is paired with up to `max_per_photo` other photos as targets.

    The prompt of a pair is its target's caption, which may be empty; the candidate holds the photo's own file. People
    with one photo, and references without a person, give no pair. The result does not depend on the order of the
    references.
    """
    people: dict[str, list[Reference]] = {}
    for reference in sorted(references, key=lambda one: one.key):
        if reference.person is not None:
            people.setdefault(reference.person, []).append(reference)
    drafts = []
    for photos in people.values():
        for place, reference in enumerate(photos):
            for number in range(min(max_per_photo, len(photos) - 1)):
                target = photos[(place + number + 1) % len(photos)]
                spec = TargetSpec(f"{reference.key}-{number}", reference.key, reference.caption, target.caption)
                facts = {**target.facts, "photo": target.key}
                drafts.append(Draft(reference, spec, Candidate(f"{spec.key}-0-0", spec.key, target.image, facts=facts)))
    return drafts


def strangers(embeddings: NDArray[np.float32], outliers: float = 4.0, least_similarity: float = 0.2) -> list[int]:
    """Return the indices, ascending, of those unit embeddings (N, D) of one person's photos that show another person.

    Each photo's similarity is the median of its cosines to the others, so strangers do not affect the result while they
    are fewer than half. A photo is a stranger's if its similarity is `outliers` spreads below the median over all
    photos (the spread is the median absolute deviation, scaled to a standard deviation, at least 0.05), or below
    `least_similarity`. PhotoMaker uses 8 standard deviations; among a few photos, a stranger increases that deviation
    until it is no longer found.
    """
    if len(embeddings) < 2:
        return []
    cosines = embeddings @ embeddings.T
    np.fill_diagonal(cosines, np.nan)
    likeness = np.nanmedian(cosines, axis=1)
    middle = float(np.median(likeness))
    spread = max(1.4826 * float(np.median(np.abs(likeness - middle))), _MIN_SPREAD)
    lowest = max(middle - outliers * spread, least_similarity)
    return [int(number) for number in np.flatnonzero(likeness < lowest)]


# --- finding photos ---------------------------------------------------------------------------------------------------
def _kind(settings: ImportSettings) -> str:
    if settings.kind != "auto":
        return settings.kind
    try:
        filesystem, path = url_to_fs(settings.source)
        if not filesystem.isdir(path):
            return "records"  # a shard, a glob, or nothing, which open_records reports
        return "records" if holds_records(filesystem, path) else "pictures"
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{settings.source} cannot be opened ({error}): check the address.") from error


def _records(settings: ImportSettings) -> Iterator[_FoundPhoto | Rejection]:
    """Yield the photos of shards or of a metadata file, and a rejection for each broken record."""
    records = open_records(settings.source, captions=False)
    for record in records:
        yield _FoundPhoto(record.key, record.read, record.identity, record.caption, _facts_of(record, record.key))
    yield from _broken(records)


def _facts_of(record: Record, file: str) -> dict[str, Any]:
    facts = {**record.extra, "captions": dict(record.captions), "source": record.source, "file": file}
    facts["box"] = None if record.box is None else list(record.box)
    return {name: value for name, value in facts.items() if value not in (None, "", {})}


def _broken(records: Records) -> Iterator[Rejection]:
    for reason, names in records.problems.items():
        if reason not in RECORD_IS_READ:
            yield from (_rejected(name, reason, f"{name}: {reason}.") for name in names)


def _group_by_person(found: Iterable[_FoundPhoto | Rejection]) -> Iterator[_FoundPhoto | Rejection]:
    """Move all photos of a person to the place of the first one; no photo is read."""
    places: dict[str, int] = {}
    waiting = list(found)
    order = [
        number if isinstance(one, Rejection) or one.person is None else places.setdefault(one.person, number)
        for number, one in enumerate(waiting)
    ]
    return (waiting[number] for number in sorted(range(len(waiting)), key=order.__getitem__))


def _pictures(settings: ImportSettings, people: bool) -> Iterator[_FoundPhoto | Rejection]:
    """Yield the pictures below a folder, sorted by path; `people`: the first folder level names the person."""
    records = open_records(settings.source, captions=False, only_pictures=True)
    if not len(records):
        raise ConfigError(f"There are no pictures at {settings.source}: check the address.")
    for record in records:
        name = records.file(record)
        person = name.split("/", 1)[0] if people and "/" in name else record.identity
        if people and "/" not in name:
            yield _rejected(name, TOO_FEW_PHOTOS, f"{name} is not inside a person's folder.")
            continue
        yield _FoundPhoto(name, record.read, person, record.caption, _facts_of(record, name))
    yield from _broken(records)


# --- opening photos and finding faces ---------------------------------------------------------------------------------
def _open_photos(
    found: Iterable[_FoundPhoto | Rejection], settings: ImportSettings
) -> Iterator[_OpenedPhoto | Rejection]:
    """Open the photos and reject those that are unreadable, too small or duplicates."""
    seen = _DuplicateIndex(settings.duplicates)
    for one in found:
        if isinstance(one, Rejection):
            yield one
            continue
        try:
            content = one.read()
        except Exception as error:  # each filesystem raises its own errors
            yield _rejected(one.name, UNREADABLE, f"{one.name}: {error}")
            continue
        yield _open_photo(one, content, settings, seen)


def _open_photo(
    found: _FoundPhoto, content: bytes, settings: ImportSettings, seen: "_DuplicateIndex"
) -> _OpenedPhoto | Rejection:
    side = _shorter_side(content)
    if side is not None and side < settings.least_side:
        return _rejected(found.name, TOO_SMALL, f"{found.name} is {side} pixels on its shorter side.")
    try:
        photo = read_photo(content)
    except PictureError as error:
        return _rejected(found.name, DAMAGED, f"{found.name}: {error}")
    key = hashlib.sha256(content).hexdigest()[:20]
    before, reason = seen.add(key, picture_hash(photo.image), found.name)
    if before is not None:
        return _rejected(found.name, reason, f"{found.name} matches {before}.")
    # img2dataset uses the American spelling
    licence = found.facts.get("licence") or found.facts.get("license") or settings.licence
    facts = {**found.facts, **({"licence": str(licence)} if licence else {})}
    stored, scale = _stored(content, photo), max(photo.size) / max(photo.image.size)
    if stored is not content:  # the file now holds `photo.image`, so boxes refer to its pixels
        facts |= {"box": [value / scale for value in facts["box"]]} if "box" in facts else {}
        scale = 1.0
    width, height = (side * scale for side in photo.image.size)
    if "box" in facts and box_problem(facts["box"], width, height):
        del facts["box"]  # the recogniser's box is used instead
    return _OpenedPhoto(Reference(key, stored, found.person, found.caption, facts), found.name, photo.image, scale)


def _shorter_side(content: bytes) -> int | None:
    """Return the shorter side in pixels, from the header, or None if the header cannot be read."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return min(image.size)
    except Exception:  # decoders raise many kinds of errors here; read_photo reports the damage in one sentence
        return None


def _stored(content: bytes, photo: Photo) -> bytes:
    """Return a file that shards accept: the photo's own if it is complete and of a supported format, else a PNG.

    A truncated file may open and still be incomplete.
    """
    try:
        check_picture(photo.name, content)
        return content
    except BadRecordError:
        pass
    file = io.BytesIO()
    photo.image.save(file, format="PNG")
    return file.getvalue()


class _DuplicateIndex:
    """An index of the accepted photos that finds duplicates: their hashes are equal in one of `distance` + 1 bands."""

    def __init__(self, distance: int | None) -> None:
        self.distance = distance
        self.keys: dict[str, str] = {}
        edges = np.linspace(0, 64, (distance or 0) + 2).astype(int).tolist()
        self.band_edges = list(pairwise(edges))
        self.bands: list[dict[int, list[tuple[int, str]]]] = [{} for _ in self.band_edges]

    def add(self, key: str, digits: str, name: str) -> tuple[str | None, str]:
        """Return the name of an earlier duplicate and the reason, or add the photo and return (None, "")."""
        if key in self.keys:
            return self.keys[key], SAME_FILE
        number = int(digits, 16)
        parts = [(number >> low) & ((1 << (high - low)) - 1) for low, high in self.band_edges]
        if self.distance is not None:
            for band, part in zip(self.bands, parts, strict=True):
                for other, before in band.get(part, ()):
                    if (number ^ other).bit_count() <= self.distance:
                        return before, NEAR_DUPLICATE
        self.keys[key] = name
        for band, part in zip(self.bands, parts, strict=True):
            band.setdefault(part, []).append((number, name))
        return None, ""


def _find_faces(
    opened: Iterable[_OpenedPhoto | Rejection],
    settings: ImportSettings,
    recogniser: Recogniser | None,
    known: FaceCache | None,
) -> Iterator[_OpenedPhoto | Rejection]:
    """Add the faces to the photos, in batches, and reject photos whose faces do not meet the settings."""
    opened = iter(opened)
    while some := list(islice(opened, _BATCH)):
        photos = [one for one in some if isinstance(one, _OpenedPhoto)]
        found = iter([None] * len(photos) if recogniser is None else _faces(photos, recogniser, known))
        for one in some:
            yield one if isinstance(one, Rejection) else _with_faces(one, next(found), settings)


def _faces(
    photos: Sequence[_OpenedPhoto], recogniser: Recogniser, known: FaceCache | None
) -> list[tuple[KnownFace, ...] | Failed]:
    """Return the faces of each photo, from the cache if possible; add newly found faces to the cache."""
    before = {} if known is None else known.find([one.reference.key for one in photos])
    new = [one for one in photos if one.reference.key not in before]
    found = dict(zip((one.reference.key for one in new), _recognised(new, recogniser) if new else (), strict=True))
    if known is not None:
        known.save({key: faces for key, faces in found.items() if not isinstance(faces, Failed)})
    found.update(before)
    return [found[one.reference.key] for one in photos]


def _recognised(photos: Sequence[_OpenedPhoto], recogniser: Recogniser) -> list[tuple[KnownFace, ...] | Failed]:
    """Return the faces of each photo. If a batch fails, retry its photos singly, so that only the faulty ones fail.

    Errors of settings or weights are raised. If each of several photos fails, ImagineError is raised.
    """
    try:
        return recogniser.recognise([one.image for one in photos])
    except (ConfigError, WeightsError):
        raise
    except Exception:  # a network may raise any error on unusual pixels
        found: list[tuple[KnownFace, ...] | Failed] = []
        broken = 0
        for one in photos:
            try:
                found += recogniser.recognise([one.image])
            except (ConfigError, WeightsError):
                raise
            except Exception as error:
                cause, broken = f"{type(error).__name__}: {error}", broken + 1
                found.append(Failed(RECOGNISER_CRASHED, cause))
        if broken == len(photos) > 1:
            raise ImagineError(
                f"The recogniser {type(recogniser).__name__} failed at all of {broken} photos ({cause}): correct this, "
                "or choose another recogniser."
            ) from None
        return found


def _with_faces(
    photo: _OpenedPhoto, faces: tuple[KnownFace, ...] | Failed | None, settings: ImportSettings
) -> _OpenedPhoto | Rejection:
    """Return the photo with its sufficiently large faces, or a rejection."""
    if isinstance(faces, Failed):
        return _rejected(photo.name, faces.reason, f"{photo.name}: {faces.sentence}")
    if faces is None or settings.faces == "unchecked":
        return replace(photo, faces=faces)
    large = tuple(face for face in faces if _longer_side(face) * photo.scale >= settings.least_face)
    if not faces:
        return _rejected(photo.name, NO_FACE, f"No face was found in {photo.name}.")
    if not large:
        size = _longer_side(faces[0]) * photo.scale
        return _rejected(photo.name, SMALL_FACE, f"The largest face in {photo.name} is {size:.0f} pixels high or wide.")
    if settings.faces == "one" and len(large) > 1:
        return _rejected(photo.name, SEVERAL_FACES, f"{len(large)} faces were found in {photo.name}.")
    return replace(photo, faces=large)


def _longer_side(face: KnownFace) -> float:
    return max(face.box.width, face.box.height)


def _as_reference(photo: _OpenedPhoto, face: int = 0) -> Reference:
    """Return the reference, with the box of one face added unless its record already has a box."""
    if not photo.faces or "box" in photo.reference.facts:
        return photo.reference
    box = photo.faces[face].box
    edges = [round(value * photo.scale, 2) for value in (box.left, box.top, box.width, box.height)]
    return replace(photo.reference, facts={**photo.reference.facts, "box": edges})


# --- people -----------------------------------------------------------------------------------------------------------
def _split_by_person(inspected: Iterable[_OpenedPhoto | Rejection]) -> Iterator[list[_OpenedPhoto] | Rejection]:
    """Yield lists of consecutive photos of one person, photos without a person one by one, and rejections unchanged."""
    photos: list[_OpenedPhoto] = []
    for one in inspected:
        if isinstance(one, Rejection):
            yield one
            continue
        if photos and photos[-1].reference.person != one.reference.person:
            yield photos
            photos = []
        if one.reference.person is None:
            yield [one]
        else:
            photos.append(one)
    if photos:
        yield photos


def _without_strangers(
    photos: Sequence[_OpenedPhoto], settings: ImportSettings, min_photos: int
) -> Iterator[Reference | Rejection]:
    """Reject strangers among one person's photos, and all photos if fewer than `min_photos` remain."""
    chosen, embeddings = _most_similar_faces(photos)
    out = set(strangers(embeddings, settings.outliers, settings.least_similarity))
    kept = len(photos) - len(out)
    for number, (photo, face) in enumerate(zip(photos, chosen, strict=True)):
        if number in out:
            yield _rejected(
                photo.name,
                STRANGER,
                f"The face in {photo.name} is unlike the other photos of {photo.reference.person}.",
            )
        elif kept < min_photos:
            yield _rejected(
                photo.name,
                TOO_FEW_PHOTOS,
                f"Usable photos of {photo.reference.person}: {kept}; required: {min_photos}.",
            )
        else:
            yield _as_reference(photo, face)


def _most_similar_faces(photos: Sequence[_OpenedPhoto]) -> tuple[list[int], NDArray[np.float32]]:
    """Return per photo the face most similar to the other photos' largest faces: its index, and embeddings (N, D)."""
    faces = [cast("Sequence[KnownFace]", photo.faces) for photo in photos]  # never None here, because faces are checked
    largest = np.stack([some[0].embedding for some in faces])
    chosen = []
    for number, some in enumerate(faces):
        others = np.delete(largest, number, axis=0)
        likeness = [float(np.median(others @ face.embedding)) if len(others) else 0.0 for face in some]
        chosen.append(int(np.argmax(likeness)))
    return chosen, np.stack([some[face].embedding for some, face in zip(faces, chosen, strict=True)])


def _rejected(name: str, reason: str, detail: str) -> Rejection:
    """Return a rejection whose key is the photo's name, because a rejected photo has no key."""
    return Rejection(name, "import", reason, detail)
