"""Human review of pairs: what reviewers see and decide, in one SQLite file, and what the next build makes of it.

For the build (both calls are cheap to repeat, and nothing that anybody decided is ever lost by them):

    open_queue(pairs, database, rounds, remarks)   the pairs that people are to look at now; copies what they must see
    decisions(database)                            {candidate key: Decision}, {} where nobody has reviewed yet
    judged(pair, decided)                          the pair as reviewers left it, a Rejection, or None: not decided yet

A decision counts for what was seen: reference, target and prompt together. If a build puts another picture or prompt
under the same key, the pair is new and the old decision rests until its picture comes back. By convention the file is
DIR/review.sqlite of a build's folder; `python -m data_synth review DIR` shows it (data_synth.review.server).

Reviewers are blind: nobody sees what others said of a pair before they have decided on it. Everyone goes through the
queue in an order of their own, so that two who start together rarely meet on a pair; where they do, it is one opinion
more. A share of the pairs wants several opinions, from which agreement is computed, and a tie asks for one more.
"""

import hashlib
import json
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

from data_synth.records import Pair, Rejection
from data_synth.review.agreement import Agreement, agreement
from imagine.errors import ConfigError, ImagineError

FILE = "review.sqlite"
VERDICTS = ("keep", "fix", "reject")
REASONS = (  # in the order of the keys 1 to 8; rejections are counted by them
    "another person",
    "prompt not followed",
    "copy of the reference",
    "deformed face or body",
    "blurred or broken picture",
    "text or watermark",
    "unsuitable",
    "something else",
)
REVIEWERS_DIFFER = "reviewers differ"  # the reason where as many keep as reject
OPEN_SENT = 50  # how many open pairs a page is told of at a time
LONGEST_NAME, LONGEST_CAPTION = 40, 2000
_FORMAT = 1
_CHUNK = 64  # pairs a transaction while the queue is filled: reviewers wait for no more than that
_SCHEMA = (
    """CREATE TABLE pictures (hash TEXT PRIMARY KEY, image BLOB NOT NULL)""",
    """CREATE TABLE pairs (
    number INTEGER PRIMARY KEY,
    fingerprint TEXT NOT NULL UNIQUE,      -- of key, reference, target and prompt
    key TEXT NOT NULL,                     -- the candidate's
    reference TEXT NOT NULL,               -- hashes of pictures
    target TEXT NOT NULL,
    shown TEXT NOT NULL,                   -- JSON: prompt, aims, measures, ...
    current INTEGER NOT NULL DEFAULT 0     -- 1: in the queue now
)""",
    # a log: a change of mind is a new row, and undo marks the newest
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
    """What was asked for is not, or no longer, in the queue."""


@dataclass(frozen=True)
class Opinion:
    """What one reviewer thinks of one pair now."""

    reviewer: str
    verdict: str  # one of VERDICTS
    reason: str = ""  # of a rejection: one of REASONS
    caption: str = ""  # of a fix: the caption as it should be


@dataclass(frozen=True)
class Decision:
    """What the reviewers of one pair decided together."""

    key: str  # the candidate's
    verdict: str  # one of VERDICTS
    reason: str  # of a rejection
    caption: str  # of a fix
    reviewers: tuple[str, ...]
    fingerprint: str  # of what they saw: `fingerprint(pair)`


# --- for the build ----------------------------------------------------------------------------------------------------


def open_queue(
    pairs: Iterable[Pair],
    database: Path,
    rounds: Mapping[str, Sequence[float | None]] | None = None,
    remarks: Mapping[str, Sequence[str]] | None = None,
) -> int:
    """Make these pairs the queue, and return how many there are; decisions on pairs seen before hold.

    By the target's key, `rounds` gives its identity similarity after 0, 1, 2 ... rounds of refinement, and `remarks`
    what filters said, a sentence each; both are asked once their pair has been taken from `pairs`, and may be filled
    meanwhile. The queue changes as a whole at the end: a build that is killed on the way leaves the old one. Pairs that
    nobody decided on and that are no longer wanted are forgotten, with their pictures.
    """
    _create(database)
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
    """What was decided on each pair of the queue, by candidate key; {} where there is no review yet.

    More than half decide between keeping (keep or fix) and rejecting; a tie is a rejection with the reason
    "reviewers differ". If any of those who keep a pair fixed its caption, the newest such caption holds. A rejection's
    reason is the one most often given, and the earliest of equally frequent ones.
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
    """The pair as its reviewers left it, or a Rejection of step "review"; None where nobody decided on just this."""
    decision = decided.get(pair.target.key)
    if decision is None or decision.fingerprint != fingerprint(pair):
        return None
    names = ", ".join(decision.reviewers)
    if decision.verdict == "reject":
        return Rejection(pair.target.key, "review", decision.reason, f"Reviewed by {names}.")
    return replace(pair, spec=replace(pair.spec, prompt=decision.caption)) if decision.verdict == "fix" else pair


def fingerprint(pair: Pair) -> str:
    """64 hexadecimal digits of what a reviewer judges: key, both pictures and the prompt."""
    parts = [pair.target.key, _hash(pair.reference.image), _hash(pair.target.image), pair.spec.prompt]
    return _hash(json.dumps(parts).encode())


# --- for reviewers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Review:
    """The queue as reviewers work through it. Safe to use from several threads and processes at once.

    A share `overlap` of the pairs, always the same ones, wants `opinions` opinions; the others want one.
    Everything that a reviewer can get wrong raises an ImagineError with one sentence.
    """

    database: Path
    opinions: int = 2
    overlap: float = 0.2

    def state(self, reviewer: str) -> dict[str, Any]:
        """Where everybody stands: {"done", "open"} pair numbers for this reviewer, {"progress", "agreement"} of all."""
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
        """All that the page shows of one pair; what others think of it only once this reviewer has decided."""
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
        """The picture file with this hash."""
        with _transaction(self.database) as connection:
            row = connection.execute("SELECT image FROM pictures WHERE hash = ?", (hash_,)).fetchone()
        if row is None:
            raise GoneError("This picture is no longer in the queue: reload the page.")
        return bytes(row[0])

    def decide(self, number: int, opinion: Opinion) -> None:
        """Write down an opinion; it takes the place of the reviewer's earlier one, and saying it twice changes nothing.

        Reviewer and caption are tidied (blanks, line ends). Raises GoneError if the pair is not in the queue.
        """
        opinion = _checked(opinion)
        with _transaction(self.database, write=True) as connection:
            row = connection.execute("SELECT shown FROM pairs WHERE number = ? AND current", (number,)).fetchone()
            if row is None:
                raise GoneError(f"Pair {number} is no longer in the queue: reload the page.")
            if opinion.verdict == "fix" and opinion.caption == json.loads(row[0])["prompt"]:
                raise ConfigError("The caption is as it was: change it, or keep the pair.")
            if _opinions(connection, number).get(number, {}).get(opinion.reviewer) == opinion:
                return
            connection.execute(
                "INSERT INTO decisions (pair, reviewer, verdict, reason, caption, decided_at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (number, opinion.reviewer, opinion.verdict, opinion.reason, opinion.caption, _now()),
            )

    def undo(self, reviewer: str) -> int | None:
        """Take back the reviewer's newest decision in the queue; returns its pair's number, or None: there is none.

        What the reviewer had decided on that pair before, if anything, holds again.
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
            connection.execute("UPDATE decisions SET undone_at = ? WHERE number = ?", (_now(), row[0]))
        return int(row[1])

    def _needs_opinion(self, digest: str, opinions: Mapping[str, Opinion]) -> bool:
        """Whether one more opinion is wanted."""
        several = int(digest[:8], 16) < self.overlap * 2**32
        tie = 2 * _rejecting(opinions.values()) == len(opinions) > 0
        return tie or len(opinions) < (self.opinions if several else 1)


def reviewer_name(name: str) -> str:
    """The name with its blanks tidied, in Unicode's composed form, so that one person is one reviewer."""
    tidy = _tidy(name)
    if not 1 <= len(tidy) <= LONGEST_NAME:
        raise ConfigError(f"Give a reviewer's name of 1 to {LONGEST_NAME} characters.")
    return tidy


# --- inside -----------------------------------------------------------------------------------------------------------


def _checked(opinion: Opinion) -> Opinion:
    reviewer, caption = reviewer_name(opinion.reviewer), _tidy(opinion.caption)
    if opinion.verdict not in VERDICTS:
        raise ConfigError(f"There is no verdict {opinion.verdict!r}: give one of {', '.join(VERDICTS)}.")
    if opinion.verdict == "reject" and opinion.reason not in REASONS:
        raise ConfigError(f"There is no reason {opinion.reason!r}: give one of {', '.join(REASONS)}.")
    if opinion.verdict == "fix" and not 1 <= len(caption) <= LONGEST_CAPTION:
        raise ConfigError(f"Give a caption of 1 to {LONGEST_CAPTION} characters.")
    reason = opinion.reason if opinion.verdict == "reject" else ""
    return Opinion(reviewer, opinion.verdict, reason, caption if opinion.verdict == "fix" else "")


def _tidy(text: str) -> str:
    tidy = unicodedata.normalize("NFC", " ".join(text.split()))
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in tidy):
        raise ConfigError("The text holds control characters: type it again.")
    return tidy


def _combined_decision(key: str, digest: str, opinions: Mapping[str, Opinion]) -> Decision:
    """One decision out of several opinions, which come oldest first."""
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
    """Pair number -> reviewer -> the opinion that holds now, oldest first; of one pair, or of all in the queue."""
    rows = connection.execute(
        "SELECT pair, reviewer, verdict, reason, caption FROM decisions JOIN pairs ON pairs.number = pair "
        f"WHERE undone_at IS NULL AND {'current' if number is None else 'pair = ?'} ORDER BY decisions.number",
        () if number is None else (number,),
    )
    opinions: dict[int, dict[str, Opinion]] = {}
    for pair, reviewer, verdict, reason, caption in rows:
        of_pair = opinions.setdefault(pair, {})
        of_pair.pop(reviewer, None)  # so that a changed mind counts as new
        of_pair[reviewer] = Opinion(reviewer, verdict, reason, caption)
    return opinions


def _decided(connection: sqlite3.Connection, reviewer: str) -> dict[int, None]:
    """The pairs of the queue that this reviewer has decided on, the last one last."""
    rows = connection.execute(
        "SELECT pair FROM decisions JOIN pairs ON pairs.number = pair "
        "WHERE reviewer = ? AND undone_at IS NULL AND current GROUP BY pair ORDER BY max(decisions.number)",
        (reviewer,),
    )
    return dict.fromkeys(number for (number,) in rows)


def _details_json(pair: Pair, rounds: Sequence[float | None], remarks: Sequence[str]) -> str:
    """What the page says beside the pictures, as JSON."""
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
    """Lay the pair down, outside the queue if it is new, and return its fingerprint."""
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


def _create(database: Path) -> None:
    """Make an empty review, if there is none yet, not even of a build that was killed right here."""
    try:
        with closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _SCHEMA:
                    connection.execute(statement)
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{database} cannot be used ({error}): move it away, or give another folder.") from error


@contextmanager
def _transaction(database: Path, write: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection with one transaction: all of it happens, or nothing.

    Plain rollback journals, not WAL: reviewers write a row a second, and the review stays one file that can be mailed.
    """
    if not database.is_file():
        raise ConfigError(f"There is no review at {database}: run a build with a review first, or give its folder.")
    address = f"{database.resolve().as_uri()}?mode=rw"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=30, isolation_level=None)) as connection:
            if connection.execute("PRAGMA user_version").fetchone()[0] != _FORMAT:
                raise ConfigError(f"{database} is not a review of this version: move it away and build again.")
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            with connection:
                yield connection
    except sqlite3.IntegrityError:
        raise  # our fault, not the file's
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{database} cannot be used ({error}): try again, or move it away.") from error


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
