"""Write the HTML page and the samples of the suite `people`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from imagine.evaluation import report
from imagine.evaluation.page import document, pictures, tables
from imagine.evaluation.people.cases import GroupCases
from imagine.evaluation.people.judging import JudgedGroup
from imagine.evaluation.people.scores import JudgedRow, is_assigned

_SHOWN = 4  # groups of each size in the samples


def html(summary: Mapping[str, Any], sheet: Image.Image) -> str:
    """Return the whole page for a summary as report.json holds it, with the sheet of `samples`."""
    groups = " and ".join(f"{number} groups of {count}" for count, number in summary["groups"].items())
    facts = (
        f"{groups} held-out people, {summary['prompts']} sentences for each number of people, by {summary['system']}, "
        f"seed {summary['seed']}, {summary['world']}, commit {summary['commit'] or 'unknown'}. A face shows a person "
        f"if their similarity exceeds {summary['threshold']:.3f} and nobody else of the group is more similar to it."
    )
    parts = [
        f"<h1>Evaluation: {document.escape(summary['suite'])}</h1>", document.paragraph(facts), tables.costs(summary),
        *tables.notes(summary),
        document.heading("Metrics"), tables.metrics_table(summary["metrics"], summary["of_ceiling"]),
        document.paragraph(
            "Kept, drift, swap, dominance, blending and missing add up to all people: what became of the face in each "
            f"person's place, by a change of similarity of more than {summary['tolerance']:.3f} against real pictures.",
            "soft",
        ),
        tables.metrics_plot(summary["metrics"]),
    ]  # fmt: skip
    for count, metrics in summary["by_people"].items():
        parts += [document.heading(f"{count} people"), tables.metrics_table(metrics, {})]
    parts += [
        document.heading("Rows"), tables.rows_table(summary["rows"]),
        document.heading("Attributes found"),
        tables.share_table(summary["attributes"], list(summary["rows"]), "asked"),
        document.heading("Samples"), pictures.whole(sheet, "references and pictures"),
    ]  # fmt: skip
    return document.page(f"Evaluation: {summary['suite']}", parts)


def samples(
    sets: Sequence[GroupCases], rows: Sequence[JudgedRow], reference: Callable[[GroupCases, int], Image.Image],
    drawn: Callable[[GroupCases, int], Image.Image | None],
) -> Image.Image:  # fmt: skip
    """Return the first groups of each size, their references in the first columns and one column per sentence.

    reference: returns the portrait in one row of the cases' people; drawn: the picture of one case.
    """
    sheets = [_sheet(cases, row, reference, drawn) for cases, row in zip(sets, rows, strict=True)]
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _sheet(
    cases: GroupCases, row: JudgedRow, reference: Callable[[GroupCases, int], Image.Image],
    drawn: Callable[[GroupCases, int], Image.Image | None],
) -> Image.Image:  # fmt: skip
    lines, prompts = [], len(cases.prompts)
    for group in range(min(_SHOWN, cases.groups)):
        people = [report.Cell(reference(cases, group * cases.count + number)) for number in range(cases.count)]
        numbers = range(group * prompts, (group + 1) * prompts)
        lines.append(
            people
            + [report.Cell(drawn(cases, n) or report.blank(), _notes(cases, n, row.pictures[n])) for n in numbers]
        )
    headers = [f"reference of {{{name}}}" for name in cases.names] + [prompt.text for prompt in cases.prompts]
    return report.contact_sheet(headers, lines, side=96 * cases.count, height=128, title=f"{cases.count} people")


def _notes(cases: GroupCases, case: int, group: JudgedGroup) -> list[tuple[str, bool | None]]:
    """Return the lines under a picture: each person's similarity, and whether the picture counts as assigned."""
    lines: list[tuple[str, bool | None]] = []
    for name, person in zip(cases.names, group.people, strict=True):
        score = "no face" if person.similarity is None else f"{person.similarity:.2f}"
        lines.append((f"{name}: {score}", person.present))
    is_right = is_assigned(cases.prompt(case), group)
    return [*lines, ("assigned" if is_right else "not assigned", is_right)]
