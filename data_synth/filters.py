"""Decide which candidates become pairs, from their measurements and a few thresholds.

The functions use measurements only, never pictures, so a changed threshold generates no picture again. `rejection`
judges one candidate alone, `best` chooses among the candidates of one target, and `near_duplicates` compares the whole
build. Each filter has fixed reasons, and `STAGES` is the order in which filters are applied and reported.

The default thresholds are for photos and an ArcFace-class recogniser. Published ones: Movie Gen (arXiv 2410.13720)
drops synthetic pairs below a cosine of 0.7. Two real photos of one person have a median of about 0.46 (WithAnyone,
arXiv 2510.14975), so a pair near 1 is a copy. With this project's judge, two renders of one person have a mean of 0.74.
Measure your own recogniser on real pairs before you choose thresholds.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_synth.records import Candidate, Measures, Rejection

# filter name: reasons of its rejections, in the order in which the filters are applied
STAGES: Mapping[str, tuple[str, ...]] = {
    "faces": ("too few faces", "too many faces"),
    "identity": ("too unlike the reference", "too like the reference"),
    "difference": ("pose and expression as in the reference",),
    "quality": ("poor quality",),
    "sharpness": ("blurred",),
    "text": ("writing nobody asked for",),
    "measured": ("a number that could not be measured",),
    "choice": ("another try is better",),
    "duplicates": ("nearly the same as another picture",),
    "review": ("rejected by a person",),
}
MOST_DISTANCE = 10  # of near-duplicates: a larger one matches different pictures, and makes the hash bands too narrow


class FilterSettings(BaseModel):
    """The thresholds of the filters; None switches a filter off."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    faces: int | None = Field(default=1, ge=1)  # the exact number of faces
    similarity: tuple[float, float] | None = (0.5, 0.97)  # lowest and highest cosine to the reference
    difference: float | None = Field(default=0.2, ge=0, le=1)  # at least; 0.2 is one of five attributes
    quality: float | None = Field(default=0.3, ge=0, le=1)  # at least
    sharpness: float | None = Field(default=5e-4, ge=0)  # at least; imagine.people.faces calls a lower value blurred
    text: float | None = Field(default=0.01, ge=0, le=1)  # at most this share of the picture
    # near-duplicates differ in at most this many of 64 bits; use 0 or 1 for the world, whose portraits look alike
    duplicates: int | None = Field(default=2, ge=0, le=MOST_DISTANCE)

    @model_validator(mode="after")
    def _band_is_one(self) -> "FilterSettings":
        if self.similarity is not None and not -1 <= self.similarity[0] <= self.similarity[1] <= 1:
            raise ValueError(
                f"similarity {list(self.similarity)} is not a valid range: give two cosines, the lower one first"
            )
        return self


def rejection(key: str, measures: Measures, settings: FilterSettings) -> Rejection | None:
    """Return the rejection by the first filter, in the order of STAGES, that a candidate fails, or None if it passes.

    A candidate also fails, after all other filters, if a measurement that a filter needs is missing. The exception is
    `text`, which is unknown where the prompt asks for writing.
    """
    failed = _failed(measures, settings)
    return None if failed is None else Rejection(key, "filter", *failed)


def _failed(measures: Measures, settings: FilterSettings) -> tuple[str, str] | None:
    """Return the reason and the sentence of the first failure."""
    if settings.faces is not None and measures.faces != settings.faces:
        reason = STAGES["faces"][0 if measures.faces < settings.faces else 1]
        return reason, f"Faces found: {measures.faces}; required: {settings.faces}."
    if settings.similarity is not None and measures.similarity is not None:
        low, high = settings.similarity
        if measures.similarity < low:
            return STAGES["identity"][0], f"Similarity {measures.similarity:.3f}, below the minimum of {low:g}."
        if measures.similarity > high:
            return STAGES["identity"][1], f"Similarity {measures.similarity:.3f}, above the maximum of {high:g}."
    for name in ("difference", "quality", "sharpness"):
        value, least = getattr(measures, name), getattr(settings, name)
        if None not in (value, least) and value < least:
            return STAGES[name][0], f"{name.capitalize()} {value:.4g}, below the minimum of {least:g}."
    if settings.text is not None and measures.text is not None and measures.text > settings.text:
        return STAGES["text"][
            0
        ], f"Writing on {measures.text:.1%} of the picture, above the maximum of {settings.text:.1%}."
    unknown = [
        name
        for name in ("similarity", "difference", "quality", "sharpness")
        if getattr(settings, name) is not None and getattr(measures, name) is None
    ]
    return (STAGES["measured"][0], f"Not measured: {', '.join(unknown)}.") if unknown else None


def stage_of(reason: str) -> str | None:
    """Return the name in STAGES of the filter with this reason, or None for a reason of another step."""
    return next((name for name, reasons in STAGES.items() if reason in reasons), None)


def best(tries: Sequence[tuple[Candidate, Measures]]) -> tuple[int, list[Rejection]]:
    """Choose among the passed candidates of one target: return the index of the best, and rejections of the others.

    The best is the one most similar to the reference; the similarity filter has already removed copies. Ties go to the
    one with the larger difference, then to the one whose key sorts first. Raises ValueError if there is no candidate.
    """
    if not tries:
        raise ValueError("there is no candidate to choose from: give at least one")

    def rank(number: int) -> tuple[float, float, str]:
        candidate, measures = tries[number]
        similarity = -1.0 if measures.similarity is None else measures.similarity
        return -similarity, -(measures.difference or 0.0), candidate.key

    kept = min(range(len(tries)), key=rank)
    detail = f"{tries[kept][0].key} was kept."
    reason = STAGES["choice"][0]
    others = [Rejection(one.key, "filter", reason, detail) for n, (one, _) in enumerate(tries) if n != kept]
    return kept, others


# --- near-duplicates --------------------------------------------------------------------------------------------------
def near_duplicates(hashes: Mapping[str, str], distance: int) -> dict[str, str]:
    """Find pictures that are too close to another one and return {rejected key: kept key}.

    hashes: key -> 16 hexadecimal digits of `measuring.picture_hash`. distance: the maximum number of differing bits, up
    to MOST_DISTANCE.
    Keys are processed in sorted order; a key is kept unless an earlier kept key is within `distance`. The result
    depends only on the set of pictures, not on the order or the batches in which they were made.

    100,000 pictures take seconds, because only hashes with an equal band are compared: two hashes that differ in at
    most d bits are equal in at least one of d + 1 bands (Manku, Jain and Das Sarma, "Detecting near-duplicates for web
    crawling", WWW 2007).
    Raises ValueError for an invalid hash or distance.
    """
    if not 0 <= distance <= MOST_DISTANCE:
        raise ValueError(f"distance {distance} is out of range: give 0 to {MOST_DISTANCE}")
    first: dict[int, str] = {}  # hash: the first key with it, which represents all keys with the same hash
    taken: dict[str, str] = {}
    for key in sorted(hashes):
        if len(hashes[key]) != 16:
            raise ValueError(f"{hashes[key]!r} is no picture hash: give 16 hexadecimal digits")
        stays = first.setdefault(int(hashes[key], 16), key)
        if stays != key:
            taken[key] = stays
    keys = list(first.values())
    near = _near(np.fromiter(first, np.uint64, len(first)), distance)
    goes: dict[int, int] = {}
    for earlier, later in near.tolist():  # sorted by the later one, then by the earlier one
        if earlier not in goes and later not in goes:
            goes[later] = earlier
    found = {keys[later]: keys[earlier] for later, earlier in goes.items()}
    return {**found, **{key: found.get(stays, stays) for key, stays in taken.items()}}


def duplicate_rejections(hashes: Mapping[str, str], settings: FilterSettings) -> list[Rejection]:
    """Return `near_duplicates` as rejections, sorted by key, or [] if the filter is off. Ignore empty hashes."""
    if settings.duplicates is None:
        return []
    found = near_duplicates({key: digits for key, digits in hashes.items() if digits}, settings.duplicates)
    reason = STAGES["duplicates"][0]
    return [Rejection(key, "filter", reason, f"{found[key]} was kept.") for key in sorted(found)]


def _near(values: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """Return index pairs (P, 2) of values at most `distance` bits apart, sorted by the second index, then the first."""
    pairs = [np.zeros((0, 2), np.int64)]
    edges = np.linspace(0, 64, distance + 2).astype(int).tolist()
    for low, high in itertools.pairwise(edges):
        band = (values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")  # equal bands become neighbours, each run in rising order
        band = band[order]
        places = np.arange(len(values))
        for step in range(1, len(values)):  # compare each with the next in its run, then with the one after it, ...
            places = places[places + step < len(values)]
            places = places[band[places] == band[places + step]]
            if not len(places):
                break
            both = np.column_stack((order[places], order[places + step]))
            pairs.append(both[_ones(values[both[:, 0]] ^ values[both[:, 1]]) <= distance])
    found = np.unique(np.concatenate(pairs)[:, ::-1], axis=0)[:, ::-1]
    return found


def _ones(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Count the set bits by adding neighbouring fields (numpy has a function for it only since version 2)."""
    values = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    values = (values & np.uint64(0x3333333333333333)) + ((values >> np.uint64(2)) & np.uint64(0x3333333333333333))
    values = (values + (values >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (values * np.uint64(0x0101010101010101)) >> np.uint64(56)
