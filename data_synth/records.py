"""The frozen records that the steps of a build hand on; nothing here computes.

A build turns references into pairs: reference -> ask (what its target should show) -> candidates (pictures that try)
-> one of them, measured, or a rejection with its reason. Pictures are files as bytes, so that records can be kept,
hashed and sent to another machine as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reference:
    """One photo of one person, as imported."""

    key: str  # its name in everything that follows: letters, digits, "-" and "_"; equal content has equal keys
    image: bytes = field(repr=False)  # a JPEG, PNG or WebP file
    person: str | None = None  # who it is, where the import knows: equal for photos of one person
    caption: str = ""  # what the import says it shows; "" where it says nothing
    facts: Mapping[str, Any] = field(default_factory=dict)  # the import's other fields: licence, address, attributes


@dataclass(frozen=True)
class TargetSpec:
    """What one target should show: one of possibly several for a reference."""

    key: str  # the reference's key with a number: "KEY-0", "KEY-1"
    reference: str  # the reference's key
    caption: str  # the dense caption of the reference, from the captioner
    prompt: str  # the caption rewritten: the sentence for the generator, and the pair's caption in training
    aims: Mapping[str, str] = field(default_factory=dict)  # what was changed on purpose: {"expression": "smiling", ...}
    seed: int = 0  # of the pictures made for it


@dataclass(frozen=True)
class Candidate:
    """One picture that tries to be the target."""

    key: str  # the ask's key with attempt and round: "KEY-0-1-2" is attempt 1 after two rounds of refinement
    ask: str  # the key of its target specification; stored under this name
    image: bytes = field(repr=False)  # a PNG file
    attempt: int = 0  # which of several tries
    round: int = 0  # 0: as the generator made it; n: after n rounds of refinement
    facts: Mapping[str, Any] = field(default_factory=dict)  # what the backend says of it, such as exact attributes


@dataclass(frozen=True)
class Measures:
    """What is measured of a candidate, for filters and report; a number that cannot be had is None."""

    faces: int  # how many faces are found
    similarity: float | None = None  # cosine of its identity embedding to the reference's, -1 to 1
    difference: float | None = None  # how unlike the reference it is in pose, expression and the like, 0 (a copy) to 1
    quality: float | None = None  # 0 to 1
    sharpness: float | None = None  # variance of the Laplacian of the face crop, 0 to about 1
    text: float | None = None  # share of the picture that looks like a watermark or writing nobody asked for, 0 to 1
    picture_hash: str = ""  # 16 hexadecimal digits of a perceptual hash
    attributes: Mapping[str, str] = field(default_factory=dict)  # what a reader sees: {"expression": "smiling", ...}


@dataclass(frozen=True)
class Rejection:
    """Why something did not become a pair."""

    key: str  # of the reference, ask or candidate
    step: str  # "import", "caption", "rewrite", "generate", "refine", "filter", "review"
    reason: str  # a few words, always the same ones: it is counted by them
    detail: str = ""  # one sentence for a person: numbers, the file's name


@dataclass(frozen=True)
class Pair:
    """One finished SynPair."""

    reference: Reference
    spec: TargetSpec
    target: Candidate
    measures: Measures


@dataclass(frozen=True)
class Case:
    """One measured candidate, and what became of it: no rejection means that it is a pair."""

    reference: Reference
    spec: TargetSpec
    candidate: Candidate
    measures: Measures
    rejection: Rejection | None = None


@dataclass(frozen=True)
class LostTarget:
    """One target of which no candidate could be measured, for good: to its person's group it is one that failed."""

    reference: Reference
    spec: TargetSpec | None = None  # None: it could not even be asked for
