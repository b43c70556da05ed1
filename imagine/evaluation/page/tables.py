"""The tables that the pages of several suites share."""

from collections.abc import Mapping, Sequence
from typing import Any

from imagine.evaluation.page import document
from imagine.evaluation.page.plots import Interval, intervals
from imagine.evaluation.report import ROW_TITLES, TITLES

Numbers = Mapping[str, Any]


def metrics_table(metrics: Mapping[str, Numbers], of_ceiling: Mapping[str, float]) -> str:
    """Return the table of the metrics with their intervals; `of_ceiling` has the shares of the ceiling to show."""
    body = [
        [
            TITLES.get(name, name), f"{m['value']:.3f}", f"{m['low']:.3f} to {m['high']:.3f}",
            _number(m.get("ceiling")), _number(m.get("floor")), f"{of_ceiling[name]:.0%}" if name in of_ceiling else "",
        ]
        for name, m in metrics.items()
    ]  # fmt: skip
    return document.table(["metric", "value", "95 % interval", "ceiling", "floor", "of ceiling"], body)


def metrics_plot(metrics: Mapping[str, Numbers]) -> str:
    """Return the plot of the metrics with intervals, ceilings and floors."""
    return intervals([
        Interval(name.replace("_", " "), m["value"], m["low"], m["high"], m.get("ceiling"), m.get("floor"))
        for name, m in metrics.items()
    ])  # fmt: skip


def rows_table(rows: Mapping[str, Mapping[str, Numbers]]) -> str:
    """Return the table of every metric of every row."""
    names = list(dict.fromkeys(name for table in rows.values() for name in table))
    body = [
        [ROW_TITLES.get(row, row)]
        + [f"{t[n]['value']:.3f} ({t[n]['low']:.3f}–{t[n]['high']:.3f})" if n in t else "" for n in names]
        for row, t in rows.items()
    ]
    return document.table(["row", *names], body)


def share_table(table: Mapping[str, Mapping[str, float]], rows: Sequence[str], count: str) -> str:
    """Return a table of shares: one line per name, with the number of cases (column `count`) and one column per row."""
    body = [
        [name.replace("_", " "), f"{line[count]:.0f}"] + [f"{line[row]:.1%}" if row in line else "" for row in rows]
        for name, line in table.items()
    ]
    return document.table(["", count, *(ROW_TITLES.get(row, row) for row in rows)], body)


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Return what a reader must not miss: the notes, and every picture that could not be read."""
    parts = [document.paragraph(note, "note") for note in summary["notes"]]
    unreadable = summary.get("unreadable") or {}
    if unreadable:
        rows = [[name, why] for name, why in unreadable.items()]
        parts += [document.heading("Pictures that could not be read"), document.table(["file", "why"], rows)]
    return parts


def costs(summary: Mapping[str, Any]) -> str:
    """Return one sentence on what a new person and a picture cost, or nothing."""
    known = summary.get("costs")
    if not known:
        return ""
    facts = []
    if known["seconds_per_person"] is not None:
        facts.append(f"{known['seconds_per_person']:.3g} s for each new person")
    if known["bytes_per_person"] is not None:
        facts.append(f"{known['bytes_per_person']:,.0f} bytes for each new person")
    if known["seconds_per_picture"] is not None:
        facts.append(f"{known['seconds_per_picture']:.3g} s for each picture")
    return document.paragraph("Cost on this machine: " + ", ".join(facts) + ".")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
