"""Store the human review of pairs in one SQLite file: the queue, the reviewers' opinions, and the decisions.

A build calls these functions. They may be repeated at any time and never delete an opinion:

    open_queue(pairs, database, rounds, remarks)   set the pairs to review, with everything that the page shows
    decisions(database)                            {candidate key: Decision}, {} if there is no review yet
    judged(pair, decided)                          the pair after review, a Rejection, or None without a decision

A decision applies to exactly what was shown: reference, target and prompt together. If a build puts another picture or
prompt under the same key, the pair is new, and the old decision applies again only if its picture and prompt return.
By convention the file is DIR/review.sqlite in a build's folder, and `python -m data_synth review DIR` serves it
(data_synth.review.server).

Reviews are blind: a reviewer sees the opinions of others on a pair only after deciding on it. Each reviewer has a
different order of the queue, so reviewers who start at the same time rarely work on the same pair; if they do, the pair
gets one more opinion. A share of the pairs needs several opinions, from which the agreement is computed. A tie needs
one more opinion.
"""

import hashlib
import json
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_synth.records import Pair, Rejection
from imagine.agreement import Agreement, agreement
from imagine.errors import ConfigError, ImagineError
from imagine.local_database import create_tables, now, transaction

FILE = "review.sqlite"
VERDICTS = ("keep", "fix", "reject")
REASONS = (  # in the order of the keys 1 to 8; rejections are counted by reason
    "another person",
    "prompt not followed",
    "copy of the reference",
    "deformed face or body",
    "blurred or broken picture",
    "text or watermark",
    "unsuitable",
    "something else",
)
REVIEWERS_DIFFER = "reviewers differ"  # the reason if as many reviewers keep as reject
OPEN_SENT = 50  # maximum number of open pairs in one state
LONGEST_NAME, LONGEST_CAPTION = 40, 2000
_FORMAT = 1
_CHUNK = 64  # pairs per transaction while the queue is filled; small, so that reviewers hardly wait
_SCHEMA = (
    """CREATE TABLE pictures (hash TEXT PRIMARY KEY, image BLOB NOT NULL)""",
    """CREATE TABLE pairs (
    number INTEGER PRIMARY KEY,
    fingerprint TEXT NOT NULL UNIQUE,      -- of key, reference, target and prompt
    key TEXT NOT NULL,                     -- of the candidate
    reference TEXT NOT NULL,               -- hashes of pictures
    target TEXT NOT NULL,
    shown TEXT NOT NULL,                   -- JSON: prompt, aims, measures, ...
    current INTEGER NOT NULL DEFAULT 0     -- 1: in the queue now
)""",
    # A log: a changed opinion is a new row, and undo marks the newest row.
    """CREATE TABLE decisions (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    pair INTEGER NOT NULL REFERENCES pairs(number),
    reviewer TEXT NOT NULL,
    verdict TEXT NOT NULL CHECK (verdict IN ('keep', 'fix', 'reject')),
    reason TEXT NOT NULL,
    caption TEXT NOT NULL,
    decided_at TEXT NOT NULL,              -- UTC
    undone_at TEXT
)""",
    "CREATE INDEX decisions_by_pair ON decisions (pair, reviewer)",
    f"PRAGMA user_version = {_FORMAT}",
)


class GoneError(ImagineError):
    """Raised when a pair or picture is not, or no longer, in the queue."""


@dataclass(frozen=True)
class Opinion:
    """The current opinion of one reviewer on one pair."""

    reviewer: str
    verdict: str  # one of VERDICTS
    reason: str = ""  # of a rejection: one of REASONS
    caption: str = ""  # of a fix: the corrected caption


@dataclass(frozen=True)
class Decision:
    """The combined decision of the reviewers of one pair."""

    key: str  # of the candidate
    verdict: str  # one of VERDICTS
    reason: str  # of a rejection
    caption: str  # of a fix
    reviewers: tuple[str, ...]
    fingerprint: str  # of what was shown: `fingerprint(pair)`


# --- for the build ----------------------------------------------------------------------------------------------------


def open_queue(
    pairs: Iterable[Pair],
    database: Path,
    rounds: Mapping[str, Sequence[float | None]] | None = None,
    remarks: Mapping[str, Sequence[str]] | None = None,
) -> int:
    """Make these pairs the queue and return their number. Earlier decisions on the same pairs stay valid.

    rounds: target key -> identity similarity after 0, 1, 2, ... rounds of refinement. remarks: target key -> sentences
    from filters. Both are read after their pair was taken from `pairs`, so the caller may fill them while it yields
    pairs. The queue is replaced at once at the end, so a build that is killed before leaves the old queue. Pairs that
    have no decision and are no longer in the queue are deleted, with their pictures.
    """
    create_tables(database, _SCHEMA)
    wanted: list[tuple[str]] = []
    remaining = iter(pairs)
    while chunk := list(islice(remaining, _CHUNK)):
        with _transaction(database, write=True) as connection:
            for pair in chunk:
                details = _details_json(
                    pair, (rounds or {}).get(pair.target.key, ()), (remarks or {}).get(pair.target.key, ())
                )
                wanted.append((_insert(connection, pair, details),))
    with _transaction(database, write=True) as connection:
        connection.execute("UPDATE pairs SET current = 0")
        connection.executemany("UPDATE pairs SET current = 1 WHERE fingerprint = ?", wanted)
        connection.execute("DELETE FROM pairs WHERE NOT current AND number NOT IN (SELECT pair FROM decisions)")
        connection.execute(
            "DELETE FROM pictures WHERE hash NOT IN (SELECT reference FROM pairs UNION SELECT target FROM pairs)"
        )
    return len(set(wanted))


def decisions(database: Path) -> dict[str, Decision]:
    """Return the decision on each reviewed pair of the queue, by candidate key; {} if there is no review yet.

    The majority decides between keeping (keep or fix) and rejecting; a tie is a rejection with the reason "reviewers
    differ". If the pair is kept and any reviewer fixed its caption, the newest fixed caption applies. A rejection has
    the most frequent reason, or the earliest of equally frequent ones.
    """
    if not database.exists():
        return {}
    with _transaction(database) as connection:
        opinions = _opinions(connection)
        rows = connection.execute("SELECT number, key, fingerprint FROM pairs WHERE current").fetchall()
    return {
        key: _combined_decision(key, digest, opinions[number]) for number, key, digest in rows if opinions.get(number)
    }


def judged(pair: Pair, decided: Mapping[str, Decision]) -> Pair | Rejection | None:
    """Return the pair after review, a Rejection of step "review", or None without a decision on exactly this pair."""
    decision = decided.get(pair.target.key)
    if decision is None or decision.fingerprint != fingerprint(pair):
        return None
    names = ", ".join(decision.reviewers)
    if decision.verdict == "reject":
        return Rejection(pair.target.key, "review", decision.reason, f"Reviewed by {names}.")
    return replace(pair, spec=replace(pair.spec, prompt=decision.caption)) if decision.verdict == "fix" else pair


def fingerprint(pair: Pair) -> str:
    """Return a hash, 64 hexadecimal digits, of what a reviewer judges: key, both pictures and the prompt."""
    parts = [pair.target.key, _hash(pair.reference.image), _hash(pair.target.image), pair.spec.prompt]
    return _hash(json.dumps(parts).encode())


# --- for reviewers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Review:
    """The reviewers' access to the queue. Several threads and processes may use it concurrently.

    A share `overlap` of the pairs, always the same ones, needs `opinions` opinions; the others need one.
    Invalid input by a reviewer raises an ImagineError with one sentence.
    """

    database: Path
    opinions: int = 2
    overlap: float = 0.2

    def state(self, reviewer: str) -> dict[str, Any]:
        """Return this reviewer's pair numbers ("done", "open"), and the "progress" and "agreement" of all reviewers."""
        reviewer = reviewer_name(reviewer)
        with _transaction(self.database) as connection:
            opinions = _opinions(connection)
            pairs = connection.execute("SELECT number, fingerprint FROM pairs WHERE current").fetchall()
            done = _decided(connection, reviewer)
        needs = {number: self._needs_opinion(digest, opinions.get(number, {})) for number, digest in pairs}
        open_ = [(number, digest) for number, digest in pairs if needs[number] and number not in done]
        open_.sort(key=lambda pair: _hash(f"{reviewer} {pair[1]}".encode()))
        return {
            "reviewer": reviewer,
            "done": list(done),
            "open": [number for number, _ in open_[:OPEN_SENT]],
            "progress": {
                "pairs": len(pairs),
                "decided": sum(bool(opinions.get(number)) for number, _ in pairs),
                "complete": sum(not missing for missing in needs.values()),
                "yours": len(done),
                "open": len(open_),
            },
            "agreement": asdict(_pair_agreement(opinions)),
        }

    def pair(self, number: int, reviewer: str) -> dict[str, Any]:
        """Return everything that the page shows of one pair; others' opinions only after this reviewer has decided."""
        reviewer = reviewer_name(reviewer)
        with _transaction(self.database) as connection:
            row = connection.execute(
                "SELECT key, fingerprint, reference, target, shown FROM pairs WHERE number = ? AND current", (number,)
            ).fetchone()
            opinions = _opinions(connection, number).get(number, {})
        if row is None:
            raise GoneError(f"Pair {number} is no longer in the queue: reload the page.")
        mine = opinions.pop(reviewer, None)
        return {
            "number": number,
            "key": row[0],
            "reference": row[2],
            "target": row[3],
            **json.loads(row[4]),
            "open": mine is None and self._needs_opinion(row[1], opinions),
            "mine": asdict(mine) if mine else None,
            "others": [asdict(opinion) for opinion in opinions.values()] if mine else [],
        }

    def picture(self, hash_: str) -> bytes:
        """Return the picture file with this hash."""
        with _transaction(self.database) as connection:
            row = connection.execute("SELECT image FROM pictures WHERE hash = ?", (hash_,)).fetchone()
        if row is None:
            raise GoneError("This picture is no longer in the queue: reload the page.")
        return bytes(row[0])

    def decide(self, number: int, opinion: Opinion) -> None:
        """Save an opinion in place of the reviewer's earlier one; repeating the same opinion changes nothing.

        White space in the reviewer's name and the caption is normalised. Raises GoneError if the pair is not in the
        queue, and ConfigError if the opinion is invalid.
        """
        opinion = _checked(opinion)
        with _transaction(self.database, write=True) as connection:
            row = connection.execute("SELECT shown FROM pairs WHERE number = ? AND current", (number,)).fetchone()
            if row is None:
                raise GoneError(f"Pair {number} is no longer in the queue: reload the page.")
            if opinion.verdict == "fix" and opinion.caption == json.loads(row[0])["prompt"]:
                raise ConfigError("The caption is unchanged: edit it, or keep the pair.")
            if _opinions(connection, number).get(number, {}).get(opinion.reviewer) == opinion:
                return
            connection.execute(
                "INSERT INTO decisions (pair, reviewer, verdict, reason, caption, decided_at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (number, opinion.reviewer, opinion.verdict, opinion.reason, opinion.caption, now()),
            )

    def undo(self, reviewer: str) -> int | None:
        """Undo the reviewer's newest opinion in the queue; return its pair's number, or None if there is none.

        The reviewer's previous opinion on that pair, if there was one, applies again.
        """
        reviewer = reviewer_name(reviewer)
        with _transaction(self.database, write=True) as connection:
            row = connection.execute(
                "SELECT decisions.number, pair FROM decisions JOIN pairs ON pairs.number = pair "
                "WHERE reviewer = ? AND undone_at IS NULL AND current ORDER BY decisions.number DESC LIMIT 1",
                (reviewer,),
            ).fetchone()
            if row is None:
                return None
            connection.execute("UPDATE decisions SET undone_at = ? WHERE number = ?", (now(), row[0]))
        return int(row[1])

    def _needs_opinion(self, digest: str, opinions: Mapping[str, Opinion]) -> bool:
        """Return whether the pair needs another opinion."""
        several = int(digest[:8], 16) < self.overlap * 2**32
        tie = 2 * _rejecting(opinions.values()) == len(opinions) > 0
        return tie or len(opinions) < (self.opinions if several else 1)


def reviewer_name(name: str) -> str:
    """Return the name in Unicode's composed form with normalised white space, so that each person has one name."""
    tidy = _tidy(name)
    if not 1 <= len(tidy) <= LONGEST_NAME:
        raise ConfigError(f"The reviewer's name is empty or too long: give 1 to {LONGEST_NAME} characters.")
    return tidy


# --- inside -----------------------------------------------------------------------------------------------------------


def _checked(opinion: Opinion) -> Opinion:
    reviewer, caption = reviewer_name(opinion.reviewer), _tidy(opinion.caption)
    if opinion.verdict not in VERDICTS:
        raise ConfigError(f"There is no verdict {opinion.verdict!r}: give one of {', '.join(VERDICTS)}.")
    if opinion.verdict == "reject" and opinion.reason not in REASONS:
        raise ConfigError(f"There is no reason {opinion.reason!r}: give one of {', '.join(REASONS)}.")
    if opinion.verdict == "fix" and not 1 <= len(caption) <= LONGEST_CAPTION:
        raise ConfigError(f"The caption is empty or too long: give 1 to {LONGEST_CAPTION} characters.")
    reason = opinion.reason if opinion.verdict == "reject" else ""
    return Opinion(reviewer, opinion.verdict, reason, caption if opinion.verdict == "fix" else "")


def _tidy(text: str) -> str:
    tidy = unicodedata.normalize("NFC", " ".join(text.split()))
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in tidy):
        raise ConfigError("The text contains control characters: remove them, or type it again.")
    return tidy


def _combined_decision(key: str, digest: str, opinions: Mapping[str, Opinion]) -> Decision:
    """Combine several opinions, oldest first, into one decision."""
    rejecting, all_ = _rejecting(opinions.values()), len(opinions)
    captions = [opinion.caption for opinion in opinions.values() if opinion.verdict == "fix"]
    verdict, reason, caption = "keep", "", ""
    if 2 * rejecting > all_:
        reasons = Counter(opinion.reason for opinion in opinions.values() if opinion.verdict == "reject")
        verdict, reason = "reject", reasons.most_common(1)[0][0]
    elif 2 * rejecting == all_:
        verdict, reason = "reject", REVIEWERS_DIFFER
    elif captions:
        verdict, caption = "fix", captions[-1]
    return Decision(key, verdict, reason, caption, tuple(sorted(opinions)), digest)


def _rejecting(opinions: Iterable[Opinion]) -> int:
    return sum(opinion.verdict == "reject" for opinion in opinions)


def _pair_agreement(opinions: Mapping[int, Mapping[str, Opinion]]) -> Agreement:
    verdicts = [{name: one.verdict for name, one in of_pair.items()} for of_pair in opinions.values()]
    return agreement(verdicts)


def _opinions(connection: sqlite3.Connection, number: int | None = None) -> dict[int, dict[str, Opinion]]:
    """Return pair number -> reviewer -> current opinion, oldest first, for one pair or for all in the queue."""
    rows = connection.execute(
        "SELECT pair, reviewer, verdict, reason, caption FROM decisions JOIN pairs ON pairs.number = pair "
        f"WHERE undone_at IS NULL AND {'current' if number is None else 'pair = ?'} ORDER BY decisions.number",
        () if number is None else (number,),
    )
    opinions: dict[int, dict[str, Opinion]] = {}
    for pair, reviewer, verdict, reason, caption in rows:
        of_pair = opinions.setdefault(pair, {})
        of_pair.pop(reviewer, None)  # so that a changed opinion moves to the end
        of_pair[reviewer] = Opinion(reviewer, verdict, reason, caption)
    return opinions


def _decided(connection: sqlite3.Connection, reviewer: str) -> dict[int, None]:
    """Return the pairs of the queue that this reviewer has decided on, oldest decision first."""
    rows = connection.execute(
        "SELECT pair FROM decisions JOIN pairs ON pairs.number = pair "
        "WHERE reviewer = ? AND undone_at IS NULL AND current GROUP BY pair ORDER BY max(decisions.number)",
        (reviewer,),
    )
    return dict.fromkeys(number for (number,) in rows)


def _details_json(pair: Pair, rounds: Sequence[float | None], remarks: Sequence[str]) -> str:
    """Return, as JSON, what the page shows beside the pictures."""
    measures = asdict(pair.measures)
    return json.dumps(
        {
            "prompt": pair.spec.prompt,
            "caption": pair.spec.caption,
            "aims": dict(pair.spec.aims),
            "seen": measures.pop("attributes"),
            "measures": {name: value for name, value in measures.items() if name != "picture_hash"},
            "round": pair.target.round,
            "rounds": list(rounds),
            "remarks": list(remarks),
        },
        ensure_ascii=False,
    )


def _insert(connection: sqlite3.Connection, pair: Pair, details: str) -> str:
    """Insert the pair, if new outside the queue, and return its fingerprint."""
    hashes = [_hash(image) for image in (pair.reference.image, pair.target.image)]
    connection.executemany(
        "INSERT OR IGNORE INTO pictures VALUES (?, ?)",
        zip(hashes, (pair.reference.image, pair.target.image), strict=True),
    )
    digest = fingerprint(pair)
    connection.execute(
        "INSERT INTO pairs (fingerprint, key, reference, target, shown) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (fingerprint) DO UPDATE SET shown = excluded.shown",
        (digest, pair.target.key, *hashes, details),
    )
    return digest


def _transaction(database: Path, write: bool = False) -> AbstractContextManager[sqlite3.Connection]:
    return transaction(
        database,
        _FORMAT,
        f"There is no review at {database}: run a build with `review` first, or give the folder of such a build.",
        f"{database} is not a review of this version: move it away and run the build again.",
        write,
    )


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
