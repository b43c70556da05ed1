"""What follows from the answers of a study: pass rates, wins and ties, agreement of raters, and the answers as CSV."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import torch

from imagine.agreement import agreement
from imagine.evaluation.metrics.intervals import bootstrap_ratio, wilson
from imagine.evaluation.study.store import Answer
from imagine.evaluation.study.trials import CHOICES, PASSES, QUESTIONS

ATTENTIVE = 0.75  # share of attention checks that a rater must pass


def results(answers: Sequence[Answer], seed: int = 0) -> dict[str, Any]:
    """Return `raters`, `standalone`, `head_to_head` and `agreement`.

    Raters who fail more than a quarter of their attention checks are left out of everything else; `raters` says who.
    Every share has Wilson's interval, which takes answers as independent, and a bootstrap interval over cases, which
    does not.
    """
    raters = _raters(answers)
    kept = [each for each in answers if not each.expected and raters[each.rater]["kept"]]
    single = [each for each in kept if len(each.systems) == 1]
    pairs = [each for each in kept if len(each.systems) == 2]
    systems = sorted({each.systems[0] for each in single})
    names = sorted({each.systems for each in pairs})
    return {
        "raters": raters,
        "standalone": {
            system: {
                question: _passes([e for e in single if e.systems == (system,) and e.question == question], seed)
                for question in QUESTIONS
            }
            for system in systems
        },
        "head_to_head": {
            " against ".join(two): {
                question: _wins([e for e in pairs if e.systems == two and e.question == question], seed)
                for question in QUESTIONS
            }
            for two in names
        },
        "agreement": {
            kind: {question: _agreement([e for e in own if e.question == question]) for question in QUESTIONS}
            for kind, own in (("standalone", single), ("head_to_head", pairs))
        },
    }


def to_csv(answers: Sequence[Answer]) -> str:
    """Return every answer as one line of CSV, attention checks included."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["rater", "case", "question", "system_a", "system_b", "answer", "left", "expected", "seconds", "answered_at"]
    )
    for each in answers:
        two = each.systems[1] if len(each.systems) == 2 else ""
        writer.writerow(
            [_plain(each.rater), each.case, each.question, _plain(each.systems[0]), _plain(two), each.answer, each.left,
             each.expected, f"{each.seconds:.1f}", each.answered_at]
        )  # fmt: skip
    return file.getvalue()


def _plain(text: str) -> str:
    """Return a text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text[:1] in "=+-@" else text


def _raters(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    table = {}
    for name in sorted({each.rater for each in answers}):
        own = [each for each in answers if each.rater == name]
        checks = [_passes_check(each) for each in own if each.expected]
        share = sum(checks) / len(checks) if checks else None
        table[name] = {
            "answers": len(own) - len(checks), "checks": len(checks), "passed": share,
            "kept": share is None or share >= ATTENTIVE,
        }  # fmt: skip
    return table


def _passes_check(answer: Answer) -> bool:
    """Return whether an attention check was passed: the reference itself must pass, weakly at least."""
    return answer.answer == answer.expected or (answer.expected == "strong" and answer.answer == "weak")


def _passes(answers: Sequence[Answer], seed: int) -> dict[str, Any]:
    counts = {name: sum(each.answer == name for each in answers) for name in PASSES}
    passed = [(each.case, each.answer != "fail") for each in answers]
    return {"answers": len(answers), **counts, "pass": _share(passed, seed)}


def _wins(answers: Sequence[Answer], seed: int) -> dict[str, Any]:
    """Return the counts, and the shares in which the first system won, both tied, and the second won."""
    return {
        "answers": len(answers),
        **{
            name: _share([(each.case, each.answer == choice) for each in answers], seed)
            for name, choice in zip(("win", "tie", "lose"), CHOICES, strict=True)
        },
    }


def _share(outcomes: Sequence[tuple[str, bool]], seed: int) -> dict[str, Any]:
    count, total = sum(good for _, good in outcomes), len(outcomes)
    cases = sorted({case for case, _ in outcomes})
    low, high = wilson(count, total)
    share: dict[str, Any] = {"value": count / total if total else None, "wilson": [low, high], "bootstrap": None}
    if len(cases) > 1:
        good = torch.tensor([float(sum(g for c, g in outcomes if c == case)) for case in cases])
        all_ = torch.tensor([float(sum(c == case for c, _ in outcomes)) for case in cases])
        share["bootstrap"] = list(bootstrap_ratio(good, all_, seed))
    return share


def _agreement(answers: Sequence[Answer]) -> dict[str, Any]:
    items: dict[tuple[str, ...], dict[str, str]] = {}
    for each in answers:
        items.setdefault((each.case, *each.systems), {})[each.rater] = each.answer
    found = agreement(list(items.values()))
    two = [
        {"raters": [one.first, one.second], "items": one.num_pairs, "share": one.share, "kappa": one.kappa}
        for one in found.reviewers
    ]
    return {"items": found.num_pairs, "share": found.share, "fleiss": found.kappa, "pairs": two}
