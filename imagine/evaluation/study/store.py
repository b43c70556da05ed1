"""The human study in one SQLite file: trials with their pictures, and every answer.

The study is blind: what the page gets never names a system, and the sides of a pair are random for each rater. Each
rater has an order of their own. A trial needs `opinions` answers; attention checks are for every rater.
"""

import hashlib
import sqlite3
import unicodedata
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagine.errors import ConfigError, ImagineError
from imagine.evaluation.study.trials import CHOICES, PAIR_QUESTIONS, PASSES, QUESTIONS, Trial
from imagine.local_database import create_tables, now, transaction
from imagine.paths import shorten_path

FILE = "study.sqlite"
OPEN_SENT = 30  # maximum number of open trials in one state
LONGEST_NAME = 40
_FORMAT = 1
_SCHEMA = (
    "CREATE TABLE pictures (hash TEXT PRIMARY KEY, image BLOB NOT NULL)",
    """CREATE TABLE trials (
    number INTEGER PRIMARY KEY,
    fingerprint TEXT NOT NULL UNIQUE,
    trial_case TEXT NOT NULL,
    question TEXT NOT NULL,
    prompt TEXT NOT NULL,
    system TEXT NOT NULL,
    other TEXT NOT NULL,                   -- the second system of a pair, or ''
    reference TEXT NOT NULL,               -- hashes of pictures
    picture TEXT NOT NULL,
    other_picture TEXT NOT NULL,
    expected TEXT NOT NULL                 -- of an attention check, or ''
)""",
    # A log: a changed answer is a new row, and undo marks the newest row.
    """CREATE TABLE answers (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    trial INTEGER NOT NULL REFERENCES trials(number),
    rater TEXT NOT NULL,
    answer TEXT NOT NULL,                  -- strong, weak, fail; or a, tie, b
    left_side TEXT NOT NULL,               -- which picture of a pair was on the left: a or b, or ''
    seconds REAL NOT NULL,
    answered_at TEXT NOT NULL,             -- UTC
    undone_at TEXT
)""",
    "CREATE INDEX answers_by_trial ON answers (trial, rater)",
    f"PRAGMA user_version = {_FORMAT}",
)


class GoneError(ImagineError):
    """Raised when a trial or picture is not in the study."""


@dataclass(frozen=True)
class Answer:
    """One current answer, with the trial it answers."""

    rater: str
    answer: str
    case: str
    question: str
    systems: tuple[str, ...]
    expected: str
    left: str
    seconds: float
    answered_at: str


def create(database: Path, trials: Sequence[Trial]) -> int:
    """Add trials to a study, which is created if there is none, and return their number; earlier ones are kept."""
    database.parent.mkdir(parents=True, exist_ok=True)
    create_tables(database, _SCHEMA)
    with _transaction(database, write=True) as connection:
        for trial in trials:
            _insert(connection, trial)
    return len(trials)


@dataclass(frozen=True)
class Study:
    """A study in its file. opinions: the number of answers that each trial needs."""

    database: Path
    opinions: int = 3

    def state(self, rater: str) -> dict[str, Any]:
        """Return a rater's progress and the open trials in the rater's order. Raises ConfigError for a bad name."""
        name = rater_name(rater)
        with _transaction(self.database) as connection:
            rows = connection.execute(
                "SELECT t.number, t.expected, "
                "(SELECT count(DISTINCT rater) FROM answers WHERE trial = t.number AND undone_at IS NULL), "
                "EXISTS (SELECT 1 FROM answers WHERE trial = t.number AND rater = ? AND undone_at IS NULL) "
                "FROM trials t",
                (name,),
            ).fetchall()
        done = [number for number, _, _, mine in rows if mine]
        open_ = [n for n, expected, answers, mine in rows if not mine and (expected or answers < self.opinions)]
        open_.sort(key=lambda number: _shuffled(name, number))
        return {
            "rater": name,
            "progress": {"trials": len(rows), "yours": len(done), "open": len(open_)},
            "open": open_[:OPEN_SENT],
        }

    def trial(self, number: int, rater: str) -> dict[str, Any]:
        """Return what the page shows of a trial, without the names of systems. Raises GoneError without it."""
        name = rater_name(rater)
        with _transaction(self.database) as connection:
            row = _trial_row(connection, number)
            mine = connection.execute(
                "SELECT answer FROM answers WHERE trial = ? AND rater = ? AND undone_at IS NULL ORDER BY number DESC",
                (number, name),
            ).fetchone()
        pictures = [row["picture"]] if not row["other"] else [row["picture"], row["other_picture"]]
        left = _left_side(name, number) if row["other"] else ""
        question = (PAIR_QUESTIONS if row["other"] else QUESTIONS)[row["question"]]
        return {
            "number": number, "kind": "pair" if row["other"] else "single", "question": question,
            "prompt": row["prompt"], "reference": row["reference"],
            "pictures": pictures[::-1] if left == "b" else pictures,
            "mine": None if mine is None else _as_shown(mine[0], left),
        }  # fmt: skip

    def answer(self, number: int, rater: str, answer: str, seconds: float = 0.0) -> None:
        """Save an answer as the page gives it: strong, weak or fail; or left, tie or right for a pair.

        Raises ConfigError for another answer, and GoneError without the trial.
        """
        name = rater_name(rater)
        with _transaction(self.database, write=True) as connection:
            row = _trial_row(connection, number)
            left = _left_side(name, number) if row["other"] else ""
            allowed = ("left", "tie", "right") if left else PASSES
            if answer not in allowed:
                raise ConfigError(f"There is no answer {answer!r} to this question: give {', '.join(allowed)}.")
            connection.execute(
                "UPDATE answers SET undone_at = ? WHERE trial = ? AND rater = ? AND undone_at IS NULL",
                (now(), number, name),
            )
            connection.execute(
                "INSERT INTO answers (trial, rater, answer, left_side, seconds, answered_at) VALUES (?, ?, ?, ?, ?, ?)",
                (number, name, _as_stored(answer, left), left, seconds, now()),
            )

    def undo(self, rater: str) -> int | None:
        """Take back the rater's newest answer and return its trial; None if there is none."""
        name = rater_name(rater)
        with _transaction(self.database, write=True) as connection:
            row = connection.execute(
                "SELECT number, trial FROM answers WHERE rater = ? AND undone_at IS NULL ORDER BY number DESC", (name,)
            ).fetchone()
            if row is None:
                return None
            connection.execute("UPDATE answers SET undone_at = ? WHERE number = ?", (now(), row[0]))
            return int(row[1])

    def picture(self, digest: str) -> bytes:
        """Return a picture file. Raises GoneError without it."""
        with _transaction(self.database) as connection:
            row = connection.execute("SELECT image FROM pictures WHERE hash = ?", (digest,)).fetchone()
        if row is None:
            raise GoneError("There is no such picture in this study.")
        return bytes(row[0])

    def answers(self) -> list[Answer]:
        """Return all current answers, in the order in which they were given."""
        with _transaction(self.database) as connection:
            rows = connection.execute(
                "SELECT a.rater, a.answer, t.trial_case, t.question, t.system, t.other, t.expected, a.left_side, "
                "a.seconds, a.answered_at FROM answers a JOIN trials t ON t.number = a.trial "
                "WHERE a.undone_at IS NULL ORDER BY a.number"
            ).fetchall()
        return [
            Answer(row[0], row[1], row[2], row[3], tuple(filter(None, row[4:6])), row[6], row[7], row[8], row[9])
            for row in rows
        ]


def rater_name(given: str) -> str:
    """Return a rater's name without surplus spaces. Raises ConfigError if it is empty or too long."""
    name = " ".join("".join(c for c in given if unicodedata.category(c)[0] != "C" or c == " ").split())
    if not name or len(name) > LONGEST_NAME:
        raise ConfigError(f"The name of a rater has 1 to {LONGEST_NAME} characters: give another one.")
    return name


def _as_stored(answer: str, left: str) -> str:
    if not left or answer == "tie":
        return answer
    right = "b" if left == "a" else "a"
    return left if answer == "left" else right


def _as_shown(answer: str, left: str) -> str:
    if not left or answer == "tie":
        return answer
    return "left" if answer == left else "right"


def _left_side(rater: str, number: int) -> str:
    return CHOICES[0] if _shuffled(f"side {rater}", number)[0] < "8" else CHOICES[2]


def _shuffled(rater: str, number: int) -> str:
    return hashlib.sha256(f"{rater} {number}".encode()).hexdigest()


def _trial_row(connection: sqlite3.Connection, number: int) -> sqlite3.Row:
    connection.row_factory = sqlite3.Row
    row: sqlite3.Row | None = connection.execute("SELECT * FROM trials WHERE number = ?", (number,)).fetchone()
    connection.row_factory = None
    if row is None:
        raise GoneError(f"There is no trial {number} in this study.")
    return row


def _insert(connection: sqlite3.Connection, trial: Trial) -> None:
    hashes = []
    for path in (trial.reference, *trial.pictures):
        content = path.read_bytes()
        hashes.append(hashlib.sha256(content).hexdigest())
        connection.execute("INSERT OR IGNORE INTO pictures VALUES (?, ?)", (hashes[-1], content))
    other, other_picture = (trial.systems[1], hashes[2]) if len(trial.systems) > 1 else ("", "")
    facts = (trial.case, trial.question, trial.prompt, trial.systems[0], other, *hashes[:2], other_picture)
    digest = hashlib.sha256("\0".join((*facts, trial.expected)).encode()).hexdigest()
    connection.execute(
        "INSERT OR IGNORE INTO trials (fingerprint, trial_case, question, prompt, system, other, reference, picture, "
        "other_picture, expected) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (digest, *facts, trial.expected),
    )


def _transaction(database: Path, write: bool = False) -> AbstractContextManager[sqlite3.Connection]:
    shown = shorten_path(database)
    return transaction(
        database,
        _FORMAT,
        f"There is no study at {shown}: name pictures with --pictures NAME=DIR first.",
        f"{shown} is not a study of this version: move it away.",
        write,
    )
