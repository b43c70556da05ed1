"""Write the data card as one self-contained HTML page: tables, SVG charts and a few embedded pictures.

All text from outside (captions, names, reasons) is escaped, so that no metadata can run code in a reader's browser.
"""

import base64
import html
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_synth.card.facts import UNKNOWN, Card
from data_synth.filters import STAGES
from data_synth.records import Case
from imagine.errors import PictureError
from imagine.evaluation.report import Cell, contact_sheet
from imagine.people.photos import open_photo

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;margin:.5em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child,table.words td,table.words th{text-align:left}img{max-width:100%}
figure{display:inline-block;vertical-align:top;margin:.5em 1em .5em 0}
figcaption{font-size:13px;color:#555;max-width:330px}.behind{border-left:4px solid #b42318;padding:.2em 1em}
.even{border-left:4px solid #1a7f37;padding:.2em 1em}svg text{font:11px system-ui,sans-serif;fill:#333}
"""
_BEFORE, _AFTER = "#c9ced6", "#2f6fb0"
_COLUMNS = ("people", "candidates", "lost", "pairs", "pass_rate", "similarity")  # of a group of people
_PAIRS_PER_ROW = 3  # pairs in a row of the contact sheet
_TITLES = {"yaw": "head turn", "pitch": "chin", "roll": "head tilt"}


def write_card(card: Card, folder: Path) -> Path:
    """Write card.json and card.html into an existing folder and return the page's path."""
    text = json.dumps(card.facts, indent=1, ensure_ascii=False) + "\n"
    (folder / "card.json").write_text(text, encoding="utf-8", newline="\n")
    (folder / "card.html").write_text(page(card), encoding="utf-8", newline="\n")
    return folder / "card.html"


def page(card: Card) -> str:
    """Return the content of card.html."""
    facts = card.facts
    title = html.escape(str(facts["about"].get("title", "Pairs")))
    parts = [
        f"<h1>Data card: {title}</h1>", _counts(facts), _about(facts["about"]),
        "<h2>Groups that fall behind</h2>", _groups_behind(facts["behind"]),
        "<h2>People</h2>", _people(facts["people"]),
        "<h2>Pairs</h2>", _pair_sheet(card.pairs),
        "<h2>Distributions</h2>", _attributes(facts["attributes"]),
        "<h2>Identity similarity and difference, filter by filter</h2>", _histograms(facts["histograms"]),
        _rounds(facts["rounds"]),
        "<h2>Rejected</h2>", _rejected(facts["rejected"]), _examples(card.examples),
        "<h2>Limits of this card</h2>", f"<p>{_LIMITS}</p>",
    ]  # fmt: skip
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f"{head}<title>Data card: {title}</title><style>{_STYLE}</style>{''.join(parts)}</html>\n"


_LIMITS = (
    "Similarity comes from one recogniser, which recognises some people better than others: a group that falls behind "
    "may be generated worse, or only be recognised worse. Attributes come from the build or from a model, not from "
    "human annotation. Skin tone and age come only from the import; they are never guessed from a photo. Rejections by "
    "the import are listed by reason, not by group. The pictures are examples selected by a hash, not the best ones."
)


def _counts(facts: Mapping[str, Any]) -> str:
    counts = facts["counts"]
    return (
        f"<p>{counts['pairs']:,} pairs from {counts['candidates']:,} measured candidates for {counts['asks']:,} "
        f"targets of {counts['people']:,} people.</p>"
    )


def _about(about: Mapping[str, Any]) -> str:
    rows = [[name, _value_text(value)] for name, value in about.items() if name != "title"]
    return _table(["About", ""], rows, "words") if rows else ""


def _value_text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_value_text(one)}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _groups_behind(tested: Mapping[str, Any]) -> str:
    named = [
        f"<li><b>{_title(line['group'])}: {html.escape(line['value'])}</b>{' (aim)' * (line['kind'] == 'aims')}: "
        f"{line['measure'].replace('_', ' ')} {line['mean']:.3f}, all others {line['others']:.3f} "
        f"({line['count']:,} {'candidates' if line['kind'] == 'aims' else 'people'}, p = {line['p']:.1g})</li>"
        for line in tested["named"]
    ]
    few = ", ".join(f"{_title(line['group'])}: {html.escape(line['value'])}" for line in tested["too_few"])
    description = (
        f'<ul class="behind">{"".join(named)}</ul>' if named else f'<p class="even">{_no_group_behind(tested)}</p>'
    )
    return description + (f"<p>Too few for a test: {few}.</p>" if few else "") + f"<p>{html.escape(tested['how'])}</p>"


def _no_group_behind(tested: Mapping[str, Any]) -> str:
    return f"No group falls behind in {tested['tests']:,} tests." if tested["tests"] else "No group could be tested."


def _people(people: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    parts = []
    for name, table in people.items():
        if set(table) == {UNKNOWN}:
            parts.append(f"<p>{_title(name).capitalize()}: {UNKNOWN}.</p>")
            continue
        rows = [[value, *(_number(line[key]) for key in _COLUMNS)] for value, line in table.items()]
        parts.append(_table([name, *(key.replace("_", " ") for key in _COLUMNS)], rows))
    return "".join(parts)


def _attributes(attributes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return one bar chart per attribute: what the pairs show, with the wished share and three percentages."""
    description = (
        "Bars: the share of pairs whose target shows the value. Red ticks: the wished share. Columns: the share of all "
        "targets that aim at the value, of the pairs that aim at it, and of the pairs that show it."
    )
    return f"<p>{description}</p>" + "".join(_attribute(name, table) for name, table in attributes.items())


def _attribute(name: str, table: Mapping[str, Mapping[str, Any]]) -> str:
    asks, kept, shown = (
        sum(line[key] for line in table.values()) for key in ("asked", "asked_in_pairs", "shown_in_pairs")
    )
    known = set(table) != {UNKNOWN}
    if not known and not asks:
        return f"<figure><figcaption><b>{_title(name)}</b>: {UNKNOWN}</figcaption></figure>"
    rows = []
    for value, line in table.items():
        figures = [
            _share(line["asked"], asks),
            _share(line["asked_in_pairs"], kept),
            _share(line["shown_in_pairs"], shown),
        ]
        rows.append((value, line["shown_in_pairs"] / shown if shown else 0.0, line["wished"], figures))
    return f"<figure>{_bars(_title(name), rows)}</figure>"


def _bars(title: str, rows: Sequence[tuple[str, float, float | None, Sequence[str]]]) -> str:
    """Draw rows of (value, share as a bar, wished share as a tick or None, three percentages)."""
    width, step, left, long = 420, 18, 105, 150
    body = [
        _text(left + long + 40 + 50 * n, 12, head, "middle") for n, head in enumerate(("targets", "pairs", "shown"))
    ]
    longest = max([0.01, *(share for _, share, _, _ in rows), *(wish or 0.0 for _, _, wish, _ in rows)])
    for number, (value, share, wish, figures) in enumerate(rows):
        y = 18 + step * number
        body += [
            _text(left - 6, y + 12, value, "end"),
            _rectangle(left, y + 2, share / longest * long, step - 5, _AFTER),
        ]
        if wish is not None:
            body.append(_rectangle(left + wish / longest * long - 1, y, 2, step - 1, "#b42318"))
        body += [_text(left + long + 40 + 50 * n, y + 12, figure, "middle") for n, figure in enumerate(figures)]
    return _svg(width, 22 + step * len(rows), body, title) + f"<figcaption><b>{title}</b></figcaption>"


def _histograms(histograms: Mapping[str, Mapping[str, Any]]) -> str:
    parts = ["<p>Grey: candidates before a filter. Blue: candidates after it.</p>"]
    for name, histogram in histograms.items():
        counts = histogram["counts"]
        if not any(counts["before"]):
            parts.append(f"<p>{name.capitalize()} was not measured.</p>")
            continue
        stages = ["before", *(f"after {stage}" for stage in STAGES)]
        changed = [(one, two) for one, two in itertools.pairwise(stages) if counts[one] != counts[two]]
        idle = [stage for one, stage in zip(stages, STAGES, strict=False) if counts[one] == counts[f"after {stage}"]]
        parts += [_histogram(name, histogram, one, two) for one, two in changed or [("before", stages[-1])]]
        if idle:
            parts.append(f"<p>{name.capitalize()}: filters that rejected nothing: {', '.join(idle)}.</p>")
    return "".join(parts)


def _histogram(name: str, histogram: Mapping[str, Any], before: str, after: str) -> str:
    """Draw the counts before a filter in grey and after it in blue, over the range of occupied bins."""
    one, two = histogram["counts"][before], histogram["counts"][after]
    low, width = histogram["low"], (histogram["high"] - histogram["low"]) / len(one)
    used = [place for place, count in enumerate(histogram["counts"]["before"]) if count]
    first, last = used[0], used[-1] + 1
    step, high = 300 / (last - first), 90 / max(max(one), 1)
    body = []
    for place in range(first, last):
        x = 10 + (place - first) * step
        for count, colour in ((one[place], _BEFORE), (two[place], _AFTER)):
            body.append(_rectangle(x, 100 - count * high, max(step - 1, 1), count * high, colour))
    ends = (low + first * width, low + last * width)
    body += [_text(10, 114, f"{ends[0]:.2f}", "start"), _text(310, 114, f"{ends[1]:.2f}", "end")]
    description = (
        f"{name.capitalize()} {after}: {sum(two):,} of {sum(one):,} remain, {_mean_words(histogram, one, two)}"
    )
    return f"<figure>{_svg(320, 118, body, description)}<figcaption>{html.escape(description)}</figcaption></figure>"


def _mean_words(histogram: Mapping[str, Any], one: Sequence[int], two: Sequence[int]) -> str:
    width = (histogram["high"] - histogram["low"]) / len(one)

    def mean(counts: Sequence[int]) -> str:
        total = sum((histogram["low"] + (place + 0.5) * width) * count for place, count in enumerate(counts))
        return f"{total / sum(counts):.2f}" if sum(counts) else "none"

    return f"mean {mean(one)} before, {mean(two)} after"


def _rounds(rounds: Mapping[str, Mapping[str, Any]]) -> str:
    if len(rounds) < 2:
        return ""
    names = ("candidates", "pass_rate", "similarity", "difference")
    rows = [[number, *(_number(line[name]) for name in names)] for number, line in rounds.items()]
    return "<h3>Rounds of refinement</h3>" + _table(
        ["round", "candidates", "pass rate", "similarity", "difference"], rows
    )


def _rejected(steps: Mapping[str, Mapping[str, int]]) -> str:
    rows = [[step, reason, f"{count:,}"] for step, reasons in steps.items() for reason, count in reasons.items()]
    return _table(["step", "reason", "count"], rows, "words") if rows else "<p>Nothing was rejected.</p>"


# --- pictures ---------------------------------------------------------------------------------------------------------
def _pair_sheet(cases: Sequence[Case]) -> str:
    if not cases:
        return "<p>There are no pairs.</p>"
    rows = [cases[start : start + _PAIRS_PER_ROW] for start in range(0, len(cases), _PAIRS_PER_ROW)]
    cells = [[cell for case in row for cell in _cells(case)] for row in rows]
    sheet = contact_sheet(["reference", "target"] * min(_PAIRS_PER_ROW, len(cases)), cells)
    prompts = "".join(f"<li>{html.escape(case.candidate.key)}: {html.escape(case.spec.prompt)}</li>" for case in cases)
    below = f"<details><summary>Prompts</summary><ol>{prompts}</ol></details>"
    return _picture(sheet, "pairs of reference and target") + below


def _cells(case: Case) -> list[Cell]:
    numbers = [
        f"{name} {value:.2f}"
        for name, value in (("similarity", case.measures.similarity), ("difference", case.measures.difference))
        if value is not None
    ]
    notes: list[tuple[str, bool | None]] = [(number, None) for number in numbers]
    return [Cell(_open_or_grey(case.reference.image)), Cell(_open_or_grey(case.candidate.image), notes)]


def _examples(examples: Mapping[str, Sequence[Case]]) -> str:
    parts = []
    for reason, cases in examples.items():
        if not cases:
            continue
        row = [
            cell
            for case in cases
            for cell in (Cell(_open_or_grey(case.reference.image)), Cell(_open_or_grey(case.candidate.image)))
        ]
        sheet = contact_sheet(["reference", "candidate"] * len(cases), [row])
        description = "".join(
            f"<li>{html.escape(case.candidate.key)}: {html.escape(case.rejection.detail)}</li>"
            for case in cases
            if case.rejection is not None
        )
        parts.append(f"<h3>{html.escape(reason)}</h3>{_picture(sheet, f'rejected: {reason}')}<ul>{description}</ul>")
    return "".join(parts)


def _open_or_grey(content: bytes) -> Image.Image:
    try:
        return open_photo(content)
    except PictureError:
        return Image.new("RGB", (32, 32), (128, 128, 128))


def _picture(image: Image.Image, description: str) -> str:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=88)
    code = base64.b64encode(file.getvalue()).decode()
    return f'<p><img alt="{html.escape(description)}" src="data:image/jpeg;base64,{code}"></p>'


# --- pieces of the page -----------------------------------------------------------------------------------------------
def _svg(width: float, height: float, body: Iterable[str], description: str) -> str:
    return (
        f'<svg role="img" aria-label="{html.escape(description)}" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">{"".join(body)}</svg>'
    )


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _table(header: Sequence[str], body: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f'<table class="{kind}">' + line(header, "th") + "".join(line(cells, "td") for cells in body) + "</table>"


def _title(name: str) -> str:
    return html.escape(_TITLES.get(name, name.replace("_", " ")))


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else ""
