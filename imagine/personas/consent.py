"""The consent that a persona records: who agreed to what, when, and until when.

A persona is made to show one person again, so it is personal data of that person. Whoever enrolls a person states on
which basis; the statement travels in the persona's file, and an expired one is refused. It records what was stated and
proves nothing. Only the basis is written into pictures, never the note.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from typing import Any

from imagine.errors import ConfigError, ConsentError

BASES = {
    "self": "the person in the photos enrolled themselves",
    "agreed": "the person in the photos agreed",
    "invented": "the person is invented",
}
UNRECORDED = "not recorded"  # the basis of a persona without consent
DAYS = 365  # of validity, unless the caller says otherwise
LONGEST_NOTE = 1000  # characters
WORDING = "1"  # version of the sentences in BASES


@dataclass(frozen=True)
class Consent:
    """One statement of consent. `given` and `expires` are dates; `expires` is the last valid day, None for no end."""

    basis: str  # a key of BASES
    given: date
    expires: date | None
    note: str = ""
    wording: str = WORDING

    @classmethod
    def state(cls, basis: str, note: str = "", days: int | None = DAYS, today: date | None = None) -> "Consent":
        """Return a consent given today that is valid for `days` days; None: without an end.

        Raises ConfigError for an unknown basis, a wrong number of days or a note that is too long.
        """
        if basis not in BASES:
            raise ConfigError(f"consent={basis!r} is unknown: choose {', '.join(BASES)}.")
        if days is not None and (isinstance(days, bool) or not isinstance(days, int) or not 1 <= days <= 36_500):
            raise ConfigError(f"A consent cannot be valid for {days!r} days: give a whole number from 1 to 36500.")
        if len(note) > LONGEST_NOTE:
            raise ConfigError(f"The note on the consent has {len(note)} characters: shorten it to {LONGEST_NOTE}.")
        given = today or today_utc()
        return cls(basis, given, None if days is None else given + timedelta(days=days), note)

    def is_valid(self, today: date | None = None) -> bool:
        """Return whether the consent has not expired."""
        return self.expires is None or (today or today_utc()) <= self.expires

    def check(self, what: str, today: date | None = None) -> None:
        """Raise ConsentError if the consent for `what`, such as "This persona", has expired."""
        if not self.is_valid(today):
            raise ConsentError(
                f"{what} may not be used, because its consent expired on {self.expires}: ask the person again, and "
                "enroll the photos anew, or delete it with `imagine persona delete`."
            )

    def as_dict(self) -> dict[str, Any]:
        """Return plain words, ready for JSON."""
        expires = None if self.expires is None else self.expires.isoformat()
        return {
            "basis": self.basis, "given": self.given.isoformat(), "expires": expires, "note": self.note,
            "wording": self.wording,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, plain: Any) -> "Consent":
        """Return the consent that `as_dict` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        if plain["basis"] not in BASES:
            raise ValueError(plain["basis"])
        given, ends = date.fromisoformat(plain["given"]), plain["expires"]
        expires = None if ends is None else date.fromisoformat(ends)
        return cls(plain["basis"], given, expires, str(plain.get("note", "")), str(plain.get("wording", WORDING)))


def joined(consents: Sequence[Consent | None]) -> Consent | None:
    """Return the consent for a person enrolled from several sources, or None if one of them has none.

    It expires with the first of them. Different bases become "agreed", and the notes are listed.
    """
    found = [each for each in consents if each is not None]
    if not found or len(found) < len(consents):
        return None
    bases, notes = {each.basis for each in found}, dict.fromkeys(each.note for each in found if each.note)
    ends = [each.expires for each in found if each.expires is not None]
    basis = found[0].basis if len(bases) == 1 else "agreed"
    note = "; ".join(notes)[:LONGEST_NOTE]
    return Consent(basis, max(each.given for each in found), min(ends, default=None), note, found[0].wording)


def to_text(consent: Consent | None) -> str:
    """Return a consent as JSON; "null" for none."""
    return json.dumps(None if consent is None else consent.as_dict())


def from_text(text: str) -> Consent | None:
    """Return the consent in `to_text`'s JSON. Raises ValueError if it is damaged."""
    try:
        plain = json.loads(text)
        return None if plain is None else Consent.from_dict(plain)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("the consent cannot be read") from error


def today_utc() -> date:
    """Return the present date in UTC, so that a persona expires everywhere at once."""
    return datetime.now(timezone.utc).date()
