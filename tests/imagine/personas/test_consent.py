"""Consents: what they record, when they expire, and how they join."""

from datetime import date

import pytest

from imagine.errors import ConfigError, ConsentError
from imagine.personas.consent import Consent, from_text, joined, to_text

DAY = date(2026, 3, 1)


def test_a_consent_is_valid_up_to_its_last_day_and_then_refused_in_a_sentence() -> None:
    consent = Consent.state("agreed", "by letter", days=10, today=DAY)
    assert consent.is_valid(date(2026, 3, 11)) and not consent.is_valid(date(2026, 3, 12))
    with pytest.raises(ConsentError) as caught:
        consent.check("The persona ann", date(2026, 3, 12))
    assert str(caught.value).startswith("The persona ann may not be used, because its consent expired on 2026-03-11")
    assert Consent.state("self", days=None, today=DAY).is_valid(date(9999, 1, 1))


def test_text_keeps_everything() -> None:
    consent = Consent.state("self", 'said "yes"\nÜ', today=DAY)
    assert from_text(to_text(consent)) == consent and from_text(to_text(None)) is None


@pytest.mark.parametrize("text", ["{}", "[", '{"basis": "x"}', '{"basis": "self", "given": "soon", "expires": null}'])
def test_damaged_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="consent"):
        from_text(text)


@pytest.mark.parametrize("wrong", [{"basis": "maybe"}, {"days": 0}, {"days": True}, {"note": "x" * 1001}])
def test_wrong_statements_are_refused(wrong) -> None:
    with pytest.raises(ConfigError):
        Consent.state(**{"basis": "self", **wrong})


def test_the_join_ends_with_the_first_and_is_missing_where_one_is_missing() -> None:
    one, two = Consent.state("self", "a", 10, DAY), Consent.state("agreed", "b", 5, DAY)
    both = joined([one, two])
    assert both is not None and both.expires == two.expires and both.note == "a; b" and both.basis == "agreed"
    assert joined([one, None]) is None and joined([]) is None
