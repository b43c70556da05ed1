"""Draw contact sheets with scores under the pictures, and write the HTML page of an evaluation.

The evaluation and the demo share this module. The page is a single HTML file with inline styles, which any browser can
open; it embeds the sample grid (samples.png) from the same folder.
"""

import html as markup
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

MARGIN = 10
TITLES = {
    "prompt": "Prompt: share of the requested attributes that were found",
    "sim_gt": "SimGT: similarity to another picture of the person",
    "sim_ref": "SimRef: similarity to the reference",
    "rank1": "Rank-1 among the people in the gallery",
    "copy_paste": "Copy-paste (0: none, 1: a copy of the reference)",
    "present": "Present: share of people who are in their picture",
    "doubled": "Doubled: share of pictures that show one person twice",
    "assigned": "Assigned: share of pictures with everyone, in the requested places",
    "attributes": "Attributes: share of what is asked of each person that was found",
    "exchanged": "Exchanged: share of pairs that change places when their references do",
}
ROW_TITLES = {
    "full": "pipeline",
    "detached": "adapter detached",
    "ceiling": "real renders (ceiling)",
    "other": "real renders of other people",
    "copy": "the reference itself",
}


@dataclass(frozen=True)
class Cell:
    """One picture of a contact sheet and the short lines under it, each good (True), bad (False) or neutral (None)."""

    image: Image.Image
    notes: Sequence[tuple[str, bool | None]] = ()


def to_pil(picture: Tensor) -> Image.Image:
    """Convert (3, H, W) in 0..1 to an RGB picture."""
    values = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(values))


def to_tensor(image: Image.Image) -> Tensor:
    """Convert a picture to (3, H, W) in 0..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def contact_sheet(
    headers: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    side: int = 128,
    title: str = "",
    height: int | None = None,
) -> Image.Image:
    """Draw rows of pictures under wrapped headers, with one column per header.

    Each picture is scaled to fit into `side` x `height` px; without `height`, into a square.
    """
    height = height or side
    font, bold = ImageFont.load_default(size=11), ImageFont.load_default(size=16)
    wrapped = [_wrap(header, font, side) for header in headers]
    title_height = 30 if title else 0
    top = MARGIN + title_height + 14 * max(map(len, wrapped)) + 6
    notes = max((len(cell.notes) for row in rows for cell in row), default=0)
    step = height + 14 * notes + MARGIN
    sheet = Image.new("RGB", (MARGIN + (side + MARGIN) * len(headers), top + step * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, fill="black", font=bold)
    for column, lines in enumerate(wrapped):
        for number, line in enumerate(lines):  # bottom-aligned, so that a short header is next to its picture
            y = top - 6 - 14 * (len(lines) - number)
            pen.text((MARGIN + column * (side + MARGIN), y), line, fill="black", font=font)
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            _place(sheet, pen, cell, (MARGIN + column * (side + MARGIN), top + number * step), (side, height), font)
    return sheet


def _place(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, cell: Cell, corner: tuple[int, int], size: tuple[int, int], font: Any
) -> None:
    left, top = corner
    sheet.paste(ImageOps.pad(cell.image.convert("RGB"), size, Image.Resampling.LANCZOS, "white"), corner)
    for number, (note, good) in enumerate(cell.notes):
        colour = {None: "#333333", True: "#1a7f37", False: "#b42318"}[good]
        pen.text((left, top + size[1] + 1 + 14 * number), note, fill=colour, font=font)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def html(summary: Mapping[str, Any]) -> str:
    """Return the whole page for a summary as report.json holds it."""
    facts = (
        f"{summary['identities']} held-out people × {summary['prompts']} prompts of suite “{summary['suite']}”, "
        f"seed {summary['seed']}, gallery of {summary['gallery']} people, commit {summary['commit'] or 'unknown'}."
    )
    rows = list(summary["rows"])
    parts = [
        f"<h1>Evaluation: {markup.escape(str(summary['suite']))}</h1><p>{markup.escape(facts)}</p>",
        "<h2>Metrics</h2>", metrics_table(summary["metrics"], summary["of_ceiling"]),
        "<h2>Rows</h2>", rows_table(summary["rows"]),
        "<h2>Prompt attributes found</h2>", share_table(summary["attributes"], rows, "asked"),
        "<h2>Leakage: the reference's attribute appears where the prompt requests another</h2>",
        share_table(summary["leakage"], rows, "possible"),
        "<h2>Prompt groups</h2>", _groups_table(summary["groups"]),
        '<h2>Samples</h2><img src="samples.png" alt="references and pictures">',
    ]  # fmt: skip
    return page(parts)


def page(parts: Sequence[str]) -> str:
    """Return an HTML page of these parts."""
    style = (
        "body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
        "table{border-collapse:collapse;margin:.5em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;"
        "text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    )
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title><style>{style}</style>'
    return head + "\n".join(parts) + "</html>\n"


def metrics_table(metrics: Mapping[str, Mapping[str, float]], of_ceiling: Mapping[str, float]) -> str:
    """Return the table of the metrics with their intervals; `of_ceiling` has the shares of the ceiling to show."""
    body = [
        [
            TITLES[name], f"{m['value']:.3f}", f"{m['low']:.3f} to {m['high']:.3f}", f"{m['ceiling']:.3f}",
            f"{m['floor']:.3f}", f"{of_ceiling[name]:.0%}" if name in of_ceiling else "",
        ]
        for name, m in metrics.items()
    ]  # fmt: skip
    return _table(["", "value", "95 % interval", "ceiling", "floor", "of ceiling"], body)


def rows_table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the table of every metric of every row."""
    body = [
        [ROW_TITLES.get(row, row)] + [f"{m['value']:.3f} ({m['low']:.3f}–{m['high']:.3f})" for m in table.values()]
        for row, table in rows.items()
    ]
    return _table(["", *next(iter(rows.values()))], body)


def share_table(table: Mapping[str, Mapping[str, float]], rows: Sequence[str], count: str) -> str:
    """Return a table of shares: one line per name, with the number of cases (column `count`) and one column per row."""
    body = [
        [name.replace("_", " "), f"{line[count]:.0f}"] + [f"{line[row]:.1%}" if row in line else "" for row in rows]
        for name, line in table.items()
    ]
    return _table(["", count, *(ROW_TITLES.get(row, row) for row in rows)], body)


def _groups_table(groups: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    first = next(iter(groups.values()))
    main, names = next(iter(first)), list(next(iter(first.values())))
    shown = [main, "ceiling"]
    body = [
        [group] + [f"{by_row[row][name]:.3f}" for row in shown for name in names] for group, by_row in groups.items()
    ]
    return _table(["", *(f"{name}, {ROW_TITLES.get(row, row)}" for row in shown for name in names)], body)


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{markup.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(cells, "td") for cells in body) + "</table>"
