"""The page of the suite `portraits`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from imagine.evaluation.page import document, pictures, plots, tables
from imagine.evaluation.page.pictures import Shown
from imagine.evaluation.report import ROW_TITLES, TITLES

RANKED = 6  # pictures of each kind: best, median, worst


def html(summary: Mapping[str, Any], samples: Image.Image, ranked: Mapping[str, Sequence[Shown]]) -> str:
    """Return the whole page for a summary as report.json holds it.

    samples: the contact sheet; ranked: "best", "median" and "worst" pictures.
    """
    facts = (
        f"{summary['identities']} held-out people × {summary['prompts']} prompts of suite “{summary['suite']}” "
        f"(version {summary['suite_version']}) by "
        f"{summary['system']}, seed {summary['seed']}, {summary['world']}, gallery of {summary['gallery']} people, "
        f"commit {summary['commit'] or 'unknown'}."
    )
    rows, found = list(summary["rows"]), summary["attributes"]
    main = rows[0]
    attribute_bars = {name.replace("_", " "): (line[main], line.get("ceiling")) for name, line in found.items()}
    parts = [
        f"<h1>Evaluation: {document.escape(summary['suite'])}</h1>", document.paragraph(facts), tables.costs(summary),
        *tables.notes(summary),
        document.heading("Metrics"), tables.metrics_table(summary["metrics"], summary["of_ceiling"]),
        document.paragraph("Green marks are the ceiling (real renders), red marks the floor.", "soft"),
        tables.metrics_plot(summary["metrics"]),
        document.heading("Identity and prompt"),
        document.paragraph("A small point is one person. Copies of the reference lie low, other people left.", "soft"),
        _plane(summary),
        document.heading("Rows"), tables.rows_table(summary["rows"]),
        document.heading("Prompt attributes found"), plots.bars(attribute_bars),
        tables.share_table(found, rows, "asked"),
        document.heading("Leakage: the reference's attribute appears where the prompt requests another"),
        tables.share_table(summary["leakage"], rows, "possible"),
        document.heading("Kinds of people"), _worst(summary), _people_table(summary["people_groups"]),
        document.heading("Prompt groups"), _groups_table(summary["groups"]),
        *_whole_rows(summary), *_judge(summary),
    ]  # fmt: skip
    for name, shown in ranked.items():
        parts += [document.heading(f"The {name} pictures, by likeness and prompt together"), pictures.figures(shown)]
    parts += [document.heading("Samples"), pictures.whole(samples, "references and pictures")]
    return document.page(f"Evaluation: {summary['suite']}", parts)


def ranked_pictures(
    scores: Mapping[str, Tensor], picture: Callable[[int], Image.Image | None], texts: Sequence[str],
    reference: Callable[[int], Image.Image | None], count: int = RANKED,
) -> dict[str, list[Shown]]:  # fmt: skip
    """Return the best, median and worst pictures by the mean of SimGT and of the share of the prompt that was found."""
    both = ((scores["sim_gt"] + scores["prompt"]) / 2).flatten()
    order = both.argsort(descending=True).tolist()
    count = min(count, len(order))
    middle = max(0, (len(order) - count) // 2)
    chosen = {"best": order[:count], "median": order[middle : middle + count], "worst": order[-count:][::-1]}
    sim, prompt = scores["sim_gt"].flatten(), scores["prompt"].flatten()
    return {
        name: [
            Shown(
                picture(case), reference(case), f"{texts[case]} (likeness {sim[case]:.2f}, prompt {prompt[case]:.0%})"
            )
            for case in cases
        ]
        for name, cases in chosen.items()
    }


def _plane(summary: Mapping[str, Any]) -> str:
    points = {
        ROW_TITLES.get(row, row): (table["sim_gt"]["value"], table["prompt"]["value"])
        for row, table in summary["rows"].items()
    }
    people = list(zip(summary["people"]["sim_gt"], summary["people"]["prompt"], strict=True))
    return plots.plane(points, people, ("SimGT", "prompt"))


def _worst(summary: Mapping[str, Any]) -> str:
    worst = summary["worst_group"]
    if worst is None:
        return document.paragraph("No group has enough people to name the worst.", "soft")
    return document.paragraph(
        f"Worst group: {worst['trait'].replace('_', ' ')} “{worst['group']}” ({worst['people']} people), whose "
        f"likeness reaches {worst['of_ceiling']:.0%} of its own ceiling."
    )


def _people_table(groups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    body = []
    for trait, words in groups.items():
        for word, cell in words.items():
            line = [f"{trait.replace('_', ' ')}: {word}", str(cell["people"])]
            for name in ("sim_gt", "rank1", "prompt"):
                one = cell[name]
                line += [f"{one['value']:.3f} ({one['low']:.3f}–{one['high']:.3f})", f"{one['ceiling']:.3f}"]
            body.append(line)
    names = [text for name in ("sim_gt", "rank1", "prompt") for text in (name, "ceiling")]
    return document.table(["group", "people", *names], body)


def _groups_table(groups: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    first = next(iter(groups.values()))
    main, names = next(iter(first)), list(next(iter(first.values())))
    shown = [main, "ceiling"]
    body = [
        [group] + [f"{by_row[row][name]:.3f}" for row in shown for name in names] for group, by_row in groups.items()
    ]
    return document.table(["group", *(f"{name}, {ROW_TITLES.get(row, row)}" for row in shown for name in names)], body)


def _whole_rows(summary: Mapping[str, Any]) -> list[str]:
    body = [
        [ROW_TITLES.get(row, row)]
        + [f"{one[n]['value']:.4f} ({one[n]['low']:.4f} to {one[n]['high']:.4f})" for n in ("frechet", "kernel")]
        for row, one in summary["distributions"].items()
    ]
    parts = [
        document.heading("Distance to real pictures"),
        document.table(["row", TITLES["frechet"], TITLES["kernel"]], body),
    ]
    spread = {name: summary[name] for name in ("diversity", "disturbance") if summary[name] is not None}
    if spread:
        parts += [document.heading("Diversity and disturbance"), tables.metrics_table(spread, {})]
    return parts


def _judge(summary: Mapping[str, Any]) -> list[str]:
    faces = [[ROW_TITLES.get(row, row), f"{share:.1%}"] for row, share in summary["faces"].items()]
    agreed = [
        [name, _or_none(one["correlation"]), f"{one['same']:.1%}", _or_none(one["kappa"])]
        for name, one in summary["agreement"].items()
    ]
    return [
        document.heading("The judge"),
        document.paragraph("Pictures in which a face was found; the others stay in every denominator.", "soft"),
        document.table(["row", "faces"], faces),
        document.paragraph("Agreement of the recogniser with others, over all rows.", "soft"),
        document.table(["other recogniser", "rank correlation", "same verdict", "Cohen's kappa"], agreed),
    ]


def _or_none(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
