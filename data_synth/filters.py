"""Which candidates become pairs: pure functions of what was measured, and of settings that are thresholds only.

Nothing here looks at a picture, so another threshold costs no picture. `rejection` judges one candidate by itself,
`best` chooses among the tries for one ask, `near_duplicates` compares the whole build. Each filter has one reason, and
`STAGES` is the order in which they are asked and shown.

The default thresholds are for photos and an ArcFace-class recogniser. Published ones: Movie Gen (arXiv 2410.13720)
drops synthetic pairs below a cosine of 0.7, while two real photos of one person have a median of about 0.46
(WithAnyone, arXiv 2510.14975), so that near 1 a pair is a copy. With our judge, real renders of one person have a mean
of 0.74. Measure your own recogniser on real pairs before you choose.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_synth.records import Candidate, Measures, Rejection

# what each filter is called, in the order in which they are asked: reason of its rejections
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
MOST_DISTANCE = 10  # of near-duplicates: beyond it, different pictures are called the same, and bands become too narrow


class FilterSettings(BaseModel):
    """Thresholds; None switches that filter off."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    faces: int | None = Field(default=1, ge=1)  # exactly so many
    similarity: tuple[float, float] | None = (0.5, 0.97)  # lowest and highest cosine to the reference
    difference: float | None = Field(default=0.2, ge=0, le=1)  # at least; one of five attributes is 0.2
    quality: float | None = Field(default=0.3, ge=0, le=1)  # at least
    sharpness: float | None = Field(default=5e-4, ge=0)  # at least; imagine.people.faces calls less than this blurred
    text: float | None = Field(default=0.01, ge=0, le=1)  # at most this share of the picture
    # bits of 64 in which near-duplicates differ, at most; the world's portraits are all composed alike: there 0 or 1
    duplicates: int | None = Field(default=2, ge=0, le=MOST_DISTANCE)

    @model_validator(mode="after")
    def _band_is_one(self) -> "FilterSettings":
        if self.similarity is not None and not -1 <= self.similarity[0] <= self.similarity[1] <= 1:
            raise ValueError(f"similarity {list(self.similarity)} is no band: give the lower of two cosines first")
        return self


def rejection(key: str, measures: Measures, settings: FilterSettings) -> Rejection | None:
    """The first filter that a candidate fails by itself, in the order of STAGES, or None if it passes them all.

    A number that a filter needs and that could not be had fails too, after the others: what nobody measured is not
    good. Text is the exception, because it is unknown where writing was asked for.
    """
    failed = _failed(measures, settings)
    return None if failed is None else Rejection(key, "filter", *failed)


def _failed(measures: Measures, settings: FilterSettings) -> tuple[str, str] | None:
    """Reason and sentence of the first failure."""
    if settings.faces is not None and measures.faces != settings.faces:
        reason = STAGES["faces"][0 if measures.faces < settings.faces else 1]
        return reason, f"Faces: {measures.faces}, where {settings.faces} should be."
    if settings.similarity is not None and measures.similarity is not None:
        low, high = settings.similarity
        if measures.similarity < low:
            return STAGES["identity"][0], f"Similarity {measures.similarity:.3f}, at least {low:g} is wanted."
        if measures.similarity > high:
            return STAGES["identity"][1], f"Similarity {measures.similarity:.3f}, at most {high:g} is wanted."
    for name in ("difference", "quality", "sharpness"):
        value, least = getattr(measures, name), getattr(settings, name)
        if None not in (value, least) and value < least:
            return STAGES[name][0], f"{name.capitalize()} {value:.4g}, at least {least:g} is wanted."
    if settings.text is not None and measures.text is not None and measures.text > settings.text:
        return STAGES["text"][0], f"Writing on {measures.text:.1%} of the picture, at most {settings.text:.1%} may be."
    unknown = [
        name
        for name in ("similarity", "difference", "quality", "sharpness")
        if getattr(settings, name) is not None and getattr(measures, name) is None
    ]
    return (STAGES["measured"][0], f"Not measured: {', '.join(unknown)}.") if unknown else None


def stage_of(reason: str) -> str | None:
    """The name in STAGES of the filter that gives this reason; None for a reason of another step."""
    return next((name for name, reasons in STAGES.items() if reason in reasons), None)


def best(tries: Sequence[tuple[Candidate, Measures]]) -> tuple[int, list[Rejection]]:
    """Of several tries for one ask that passed: the number of the one to keep, and rejections of the others.

    The one most like the reference stays, since the band has taken out the copies; of equals the more different one,
    then the one whose key sorts first. Raises ValueError if there is none.
    """
    if not tries:
        raise ValueError("there is nothing to choose from")

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
    """Which pictures of a build are too close to another: {key to reject: key that stays}.

    hashes: key -> 16 hexadecimal digits of `measuring.picture_hash`. distance: bits that may differ, up to
    MOST_DISTANCE.
    Keys are taken in sorted order; one stays unless a key that stays is within `distance`. So what is found follows
    from the set of pictures alone, not from the order or the batches in which they were made.

    100,000 pictures take seconds: two hashes that differ in at most d bits are equal in one of d + 1 bands (Manku, Jain
    and Das Sarma, "Detecting near-duplicates for web crawling", WWW 2007), so that only those are compared.
    Raises ValueError for a hash or a distance that is none.
    """
    if not 0 <= distance <= MOST_DISTANCE:
        raise ValueError(f"distance {distance} is out of range: give 0 to {MOST_DISTANCE}")
    first: dict[int, str] = {}  # of pictures with one hash the first stays or goes, and the others go with it
    taken: dict[str, str] = {}
    for key in sorted(hashes):
        if len(hashes[key]) != 16:
            raise ValueError(f"{hashes[key]!r} is no picture hash: 16 hexadecimal digits are wanted")
        stays = first.setdefault(int(hashes[key], 16), key)
        if stays != key:
            taken[key] = stays
    keys = list(first.values())
    near = _near(np.fromiter(first, np.uint64, len(first)), distance)
    goes: dict[int, int] = {}
    for earlier, later in near.tolist():  # by the later one, then by the earlier one
        if earlier not in goes and later not in goes:
            goes[later] = earlier
    found = {keys[later]: keys[earlier] for later, earlier in goes.items()}
    return {**found, **{key: found.get(stays, stays) for key, stays in taken.items()}}


def duplicate_rejections(hashes: Mapping[str, str], settings: FilterSettings) -> list[Rejection]:
    """`near_duplicates` as rejections, sorted by key; none if the filter is off. Pictures without a hash stay."""
    if settings.duplicates is None:
        return []
    found = near_duplicates({key: digits for key, digits in hashes.items() if digits}, settings.duplicates)
    reason = STAGES["duplicates"][0]
    return [Rejection(key, "filter", reason, f"{found[key]} was kept.") for key in sorted(found)]


def _near(values: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """Pairs (P, 2) of numbers of values at most `distance` bits apart, sorted by the second, then the first."""
    pairs = [np.zeros((0, 2), np.int64)]
    edges = np.linspace(0, 64, distance + 2).astype(int).tolist()
    for low, high in itertools.pairwise(edges):
        band = (values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")  # equal bands side by side, each run in rising order
        band = band[order]
        places = np.arange(len(values))
        for step in range(1, len(values)):  # each with the next of its run, then with the one after that ...
            places = places[places + step < len(values)]
            places = places[band[places] == band[places + step]]
            if not len(places):
                break
            both = np.column_stack((order[places], order[places + step]))
            pairs.append(both[_ones(values[both[:, 0]] ^ values[both[:, 1]]) <= distance])
    found = np.unique(np.concatenate(pairs)[:, ::-1], axis=0)[:, ::-1]
    return found


def _ones(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """How many bits are set, by adding neighbours (numpy has a function for it only from version 2 on)."""
    values = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    values = (values & np.uint64(0x3333333333333333)) + ((values >> np.uint64(2)) & np.uint64(0x3333333333333333))
    values = (values + (values >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (values * np.uint64(0x0101010101010101)) >> np.uint64(56)
