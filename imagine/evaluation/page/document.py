"""One HTML page without any other file: style, script, tables that sort, and figures.

It shows the same on a phone: wide tables scroll in their own frame, and figures follow the width of the page.
"""

import html as markup
from collections.abc import Sequence

_STYLE = """
:root { --ground: #fff; --text: #1c1e20; --soft: #50555a; --line: #d5d7d9; --field: #f1f1f0; --accent: #0b5cad;
  --real: #1a6f34; --bad: #b42318; color-scheme: light; }
@media (prefers-color-scheme: dark) { :root { --ground: #17181a; --text: #ececed; --soft: #aeb3b8; --line: #3b3f44;
  --field: #24272a; --accent: #86bffc; --real: #63d489; --bad: #ff9a91; color-scheme: dark; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; max-width: 1100px; margin: 0 auto;
  padding: 1em; background: var(--ground); color: var(--text); }
h1 { font-size: 1.5em; margin: .3em 0; } h2 { font-size: 1.15em; margin: 1.6em 0 .3em; } p { margin: .4em 0; }
.soft { color: var(--soft); } .note { border-left: 4px solid var(--bad); padding: .2em .8em; background: var(--field); }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; margin: .4em 0; font-variant-numeric: tabular-nums; }
td, th { padding: .25em .7em; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; } td:first-child { white-space: normal; min-width: 8em; }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); }
th { vertical-align: bottom; cursor: pointer; } th:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending]::after { content: " \\25B2"; } th[aria-sort=descending]::after { content: " \\25BC"; }
svg { width: 100%; height: auto; max-width: 760px; display: block; }
svg text { fill: var(--text); font: 13px system-ui, sans-serif; }
svg .soft { fill: var(--soft); } svg .axis { stroke: var(--line); }
svg .own { stroke: var(--accent); fill: var(--accent); }
svg .ceiling { stroke: var(--real); fill: var(--real); } svg .floor { stroke: var(--bad); fill: var(--bad); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .8em; }
figure { margin: 0; } figure img { width: 48%; image-rendering: auto; border-radius: 4px; vertical-align: top; }
figcaption { font-size: .82em; color: var(--soft); overflow-wrap: anywhere; }
.samples { max-width: none; height: auto; }
@media (max-width: 600px) { body { padding: .6em; font-size: 15px; } td, th { padding: .3em .45em; } }
"""

_SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table")) {
  const value = (row, column) => {
    const text = row.cells[column] ? row.cells[column].textContent.trim() : "";
    const number = parseFloat(text.replace(/[\\s,]/g, ""));
    return Number.isNaN(number) ? text.toLowerCase() : number;
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "descending" && head.hasAttribute("aria-sort") ? -1 : 1;
      const direction = head.hasAttribute("aria-sort") ? up : -1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].map(row => [value(row, column), row]);
      const order = (a, b) => typeof a !== typeof b ? (typeof a === "number" ? -1 : 1) : a < b ? -1 : a > b ? 1 : 0;
      rows.sort(([a], [b]) => direction * order(a, b));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    };
    head.tabIndex = 0;
    head.title = "sort by this column";
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
    });
  });
}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Return a complete HTML page of these parts, which are markup."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>'
    )
    return head + "\n".join(part for part in parts if part) + f"<script>{_SCRIPT}</script></body></html>\n"


def heading(text: str) -> str:
    """Return the heading of a section."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph; kind: "soft" for explanations, "note" for what a reader must not miss."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table that sorts by the column whose header is chosen; "" if it has no line."""
    if not body:
        return ""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = "".join(line(cells, "td") for cells in body)
    return f'<div class="scroll"><table><thead>{line(header, "th")}</thead><tbody>{lines}</tbody></table></div>'


def escape(text: object) -> str:
    """Return a text as markup."""
    return markup.escape(str(text))
