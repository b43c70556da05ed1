"""The frozen records that the steps of a build exchange.

A build turns references into pairs: reference -> target specification (what the target should show) -> candidates
(pictures generated for it) -> one measured candidate, or a rejection with its reason. Pictures are encoded files as
bytes, so records can be stored, hashed and sent to another machine unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reference:
    """One imported photo of one person."""

    key: str  # its name in all later records: letters, digits, "-" and "_"; equal content has equal keys
    image: bytes = field(repr=False)  # a JPEG, PNG or WebP file
    person: str | None = None  # equal for photos of one person; None: not known
    caption: str = ""  # from the import; "" if it has none
    # the other fields of the import: licence, address, attributes
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetSpec:
    """What one target should show; a reference may have several targets."""

    key: str  # the reference's key with a number: "KEY-0", "KEY-1"
    reference: str  # the reference's key
    caption: str  # the dense caption of the reference, from the captioner
    prompt: str  # the rewritten caption: the generator's prompt, and the pair's caption in training
    aims: Mapping[str, str] = field(default_factory=dict)  # the wished attributes: {"expression": "smiling", ...}
    seed: int = 0  # of the pictures generated for it


@dataclass(frozen=True)
class Candidate:
    """One picture generated for a target."""

    key: str  # the specification's key with attempt and round: "KEY-0-1-2" is attempt 1 after 2 refinements
    ask: str  # the key of its target specification; stored files use this field name
    image: bytes = field(repr=False)  # a PNG file
    attempt: int = 0  # which attempt, from 0
    round: int = 0  # 0: as generated; n: after n rounds of refinement
    facts: Mapping[str, Any] = field(default_factory=dict)  # reported by the backend, such as exact attributes


@dataclass(frozen=True)
class Measures:
    """The measurements of a candidate, for filters and reports; a missing measurement is None."""

    faces: int  # number of faces found
    similarity: float | None = None  # cosine of its identity embedding to the reference's, -1 to 1
    difference: float | None = None  # difference from the reference in pose, expression and the like, 0 (a copy) to 1
    quality: float | None = None  # 0 to 1
    sharpness: float | None = None  # variance of the Laplacian of the face crop, 0 to about 1
    text: float | None = None  # share of the picture that looks like a watermark or unwanted writing, 0 to 1
    picture_hash: str = ""  # 16 hexadecimal digits of a perceptual hash
    attributes: Mapping[str, str] = field(default_factory=dict)  # predicted attributes: {"expression": "smiling", ...}


@dataclass(frozen=True)
class Rejection:
    """The reason why a reference, target or candidate did not become a pair."""

    key: str  # of the reference, target specification or candidate
    step: str  # "import", "caption", "rewrite", "generate", "refine", "filter", "review"
    reason: str  # a fixed short text, used for counting
    detail: str = ""  # one sentence for the reader, with numbers or the file's name


@dataclass(frozen=True)
class Pair:
    """One finished pair of a reference and a target."""

    reference: Reference
    spec: TargetSpec
    target: Candidate
    measures: Measures


@dataclass(frozen=True)
class Case:
    """One measured candidate and its result: without a rejection it is a pair."""

    reference: Reference
    spec: TargetSpec
    candidate: Candidate
    measures: Measures
    rejection: Rejection | None = None


@dataclass(frozen=True)
class LostTarget:
    """One target without any measured candidate; it counts as a failure for its person's group."""

    reference: Reference
    spec: TargetSpec | None = None  # None: it failed before it had a specification
