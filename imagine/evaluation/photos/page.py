"""The page of the suites of photographs."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from imagine.evaluation.page import document, pictures, plots, tables
from imagine.evaluation.page.pictures import Shown


def html(summary: Mapping[str, Any], shown: Mapping[str, Sequence[Shown]]) -> str:
    """Return the whole page for a summary as report.json holds it, with the best, median and worst pictures."""
    used = ", ".join(f"{part}: {name}" for part, name in summary["encoders"].items())
    facts = (
        f"{summary['identities']} subjects × {summary['prompts']} prompts × {summary['images']} pictures by "
        f"{summary['system']}, seed {summary['seed']}, commit {summary['commit'] or 'unknown'}. Compared by {used}."
    )
    worst = summary["worst_subject"]
    parts = [
        f"<h1>Evaluation: {document.escape(summary['suite'])}</h1>", document.paragraph(facts), tables.costs(summary),
        *tables.notes(summary),
        document.heading("Metrics"), tables.metrics_table(summary["metrics"], summary["of_ceiling"]),
        document.paragraph("Green marks are the ceiling (other photos of the subject), red marks the floor.", "soft"),
        tables.metrics_plot(summary["metrics"]),
        *_plane(summary),
        document.heading("Subjects"),
        document.paragraph(f"Worst subject: {worst}, by {summary['ranked_by']}.") if worst else "",
        _subjects(summary["subjects"]),
    ]  # fmt: skip
    for kind, own in shown.items():
        parts += [document.heading(f"The {kind} pictures"), pictures.figures(own)]
    return document.page(f"Evaluation: {summary['suite']}", parts)


def ranked(scores: Mapping[str, Tensor], count: int) -> dict[str, list[int]]:
    """Return the numbers of the best, median and worst pictures by the mean of what was measured of each."""
    names = [name for name in ("sim_gt", "sim_ref", "dino", "clip_i", "clip_t") if name in scores]
    both = sum(scores[name].nan_to_num().flatten() for name in names)
    assert isinstance(both, Tensor)
    order = both.argsort(descending=True).tolist()
    count = min(count, len(order))
    middle = max(0, (len(order) - count) // 2)
    return {"best": order[:count], "median": order[middle : middle + count], "worst": order[-count:][::-1]}


def _plane(summary: Mapping[str, Any]) -> list[str]:
    metrics, across = summary["metrics"], summary["ranked_by"]
    if "clip_t" not in metrics or across is None:
        return []
    own = {"the system": (metrics[across]["value"], metrics["clip_t"]["value"])}
    values = zip(summary["people"][across], summary["people"]["clip_t"], strict=True)
    people = [(x, y) for x, y in values if x is not None and y is not None]
    return [document.heading("Identity and prompt"), plots.plane(own, people, (across, "CLIP-T"))]


def _subjects(subjects: Mapping[str, Mapping[str, float | None]]) -> str:
    names = list(next(iter(subjects.values())))
    body = [[name, *("" if own[n] is None else f"{own[n]:.3f}" for n in names)] for name, own in subjects.items()]
    return document.table(["subject", *names], body)
