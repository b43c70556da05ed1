"""Compare systems by the reports of their evaluations: paired differences over the same people, with tests.

All reports must be of one suite with the same people, prompts and seed. The first system is compared with each other
one. P-values come from a paired permutation test over people, and are adjusted for the number of comparisons of each
metric (Holm 1979).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from imagine.errors import ConfigError
from imagine.evaluation.metrics.comparison import holm, paired_difference
from imagine.evaluation.page import document, plots
from imagine.evaluation.page.plots import Interval
from imagine.evaluation.report import TITLES
from imagine.evaluation.runs.folder import config_error_on_failure
from imagine.paths import as_path, shorten_path

SAME = ("suite", "suite_version", "identities", "prompts", "seed", "world", "gallery", "images")
COSTS = ("seconds_per_person", "bytes_per_person", "seconds_per_picture")


def compare(folders: Sequence[Path], output: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Compare the evaluations in these folders; with `output`, also write compare.json and compare.html there.

    Raises ConfigError for fewer than two reports, for one that cannot be read, and for reports that do not fit.
    """
    if len(folders) < 2:
        raise ConfigError("One evaluation cannot be compared: name at least two folders.")
    reports = _named([_read(as_path(folder)) for folder in folders], [as_path(folder) for folder in folders])
    names = list(reports)
    for name in names[1:]:
        _check_same(names[0], reports[names[0]], name, reports[name])
    metrics = [m for m in reports[names[0]]["metrics"] if all(m in reports[name]["metrics"] for name in names)]
    compared = {
        "suite": reports[names[0]]["suite"],
        "systems": {
            name: {
                "metrics": {metric: report["metrics"][metric] for metric in metrics}, "costs": report.get("costs"),
            }
            for name, report in reports.items()
        },
        "first": names[0],
        "differences": {metric: _differences(metric, reports, names, seed) for metric in metrics},
    }  # fmt: skip
    if output is not None:
        with config_error_on_failure(output / "compare.html"):
            output.mkdir(parents=True, exist_ok=True)
            (output / "compare.json").write_text(json.dumps(compared, indent=2) + "\n", encoding="utf-8")
            (output / "compare.html").write_text(html(compared), encoding="utf-8")
    return compared


def _differences(
    metric: str, reports: Mapping[str, Mapping[str, Any]], names: Sequence[str], seed: int
) -> dict[str, dict[str, float]]:
    """Return, for each system but the first, the first one's mean minus its own, over people that both measured."""
    found = {}
    for name in names[1:]:
        pairs = zip(reports[names[0]]["people"][metric], reports[name]["people"][metric], strict=True)
        known = [(one, two) for one, two in pairs if one is not None and two is not None]
        one, two = (torch.tensor(side, dtype=torch.float64) for side in zip(*known, strict=True))
        found[name] = asdict(paired_difference(one, two, seed))
    adjusted = holm([each["p"] for each in found.values()])
    return {name: {**each, "p_adjusted": p} for (name, each), p in zip(found.items(), adjusted, strict=True)}


def html(compared: Mapping[str, Any]) -> str:
    """Return the page of a comparison."""
    names, first = list(compared["systems"]), compared["first"]
    metrics = list(compared["differences"])
    rows = [
        [
            TITLES.get(metric, metric),
            *(_value(compared["systems"][name]["metrics"][metric]) for name in names),
        ]
        for metric in metrics
    ]  # fmt: skip
    costs = [[name, *(_cost(compared["systems"][name]["costs"], cost) for cost in COSTS)] for name in names]
    parts = [
        f"<h1>Comparison: {document.escape(compared['suite'])}</h1>",
        document.heading("Metrics"), document.table(["metric", *names], rows),
        document.heading("Cost"), document.table(["system", *(c.replace("_", " ") for c in COSTS)], costs),
    ]  # fmt: skip
    for metric, own in compared["differences"].items():
        lines = [Interval(f"{first} − {name}", d["value"], d["low"], d["high"]) for name, d in own.items()]
        body = [
            [
                name,
                f"{d['value']:+.3f}",
                f"{d['low']:+.3f} to {d['high']:+.3f}",
                f"{d['p']:.4f}",
                f"{d['p_adjusted']:.4f}",
            ]
            for name, d in own.items()
        ]
        parts += [
            document.heading(f"{TITLES.get(metric, metric)}: {first} minus the others"),
            document.table(["system", "difference", "95 % interval", "p", "p, adjusted"], body), plots.intervals(lines),
        ]  # fmt: skip
    return document.page("Comparison", parts)


def _cost(known: Mapping[str, float | None] | None, name: str) -> str:
    value = None if known is None else known[name]
    return "" if value is None else f"{value:,.3g}"


def _value(metric: Mapping[str, Any]) -> str:
    return f"{metric['value']:.3f} ({metric['low']:.3f}–{metric['high']:.3f})"


def _named(reports: Sequence[dict[str, Any]], folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the reports by the names of their systems, or of their folders where two systems have one name."""
    systems = [str(report["system"]) for report in reports]
    names = systems if len(set(systems)) == len(systems) else [folder.absolute().name for folder in folders]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"Two folders are named {max(names, key=names.count)}: rename one, so that they can be told apart."
        )
    return dict(zip(names, reports, strict=True))


def _read(folder: Path) -> dict[str, Any]:
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        if not all(key in report for key in ("suite", "system", "metrics", "people")):
            raise ValueError("it lacks some entries")
        return dict(report)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{shorten_path(folder)} holds no report of this version ({error}): run `imagine evaluate` first."
        ) from error


def _check_same(first: str, one: Mapping[str, Any], second: str, two: Mapping[str, Any]) -> None:
    one, two = ({"suite_version": 1, **report} for report in (one, two))  # earlier reports do not say it
    other = [key for key in SAME if one.get(key) != two.get(key)]
    if other:
        raise ConfigError(
            f"{first} and {second} were evaluated with another {', '.join(other)}: evaluate both alike to compare them."
        )
