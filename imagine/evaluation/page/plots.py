"""Plots as SVG text: metrics with intervals, the plane of identity and prompt, and bars per attribute."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imagine.evaluation.page.document import escape

_WIDTH = 760
_LEFT = 250  # pixels for the names


@dataclass(frozen=True)
class Interval:
    """One line of `intervals`: a value with its interval, and the values of ceiling and floor, where there are any."""

    name: str
    value: float
    low: float
    high: float
    ceiling: float | None = None
    floor: float | None = None


def intervals(lines: Sequence[Interval]) -> str:
    """Return a plot with one line per metric: a dot with its interval, a green and a red mark for ceiling and floor."""
    if not lines:
        return ""
    numbers = [n for one in lines for n in (one.low, one.high, one.value, one.ceiling, one.floor) if n is not None]
    low, high = min(0.0, *numbers), max(1.0, *numbers)

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - 20)

    height = 28 * len(lines) + 34
    marks = [_axis(x, low, high, height - 26)]
    for number, one in enumerate(lines):
        y = 18 + 28 * number
        marks.append(f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(one.name)}</text>')
        for kind, value in (("ceiling", one.ceiling), ("floor", one.floor)):
            if value is not None:
                marks.append(_line(x(value), y - 8, x(value), y + 8, kind, 3, f"{kind} {value:.3f}"))
        title = f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"
        marks.append(_line(x(one.low), y, x(one.high), y, "own", 2, title))
        marks.append(f'<circle class="own" cx="{x(one.value):.1f}" cy="{y}" r="5"><title>{title}</title></circle>')
    return _svg(height, marks, "metrics with 95 % intervals")


def plane(
    points: Mapping[str, tuple[float, float]], people: Sequence[tuple[float, float]], titles: tuple[str, str]
) -> str:
    """Return the plane of two numbers: one large point per row of pictures, one small point per person of the first.

    points: name -> (x, y). The first row is the system's, and the others are known for comparison.
    """
    numbers = [pair for pair in (*points.values(), *people)]
    spans = [(min(0.0, *(n[axis] for n in numbers)), max(1.0, *(n[axis] for n in numbers))) for axis in (0, 1)]
    side, left, top = 380, 60, 16

    def place(pair: tuple[float, float]) -> tuple[float, float]:
        across, up = ((pair[axis] - spans[axis][0]) / (spans[axis][1] - spans[axis][0]) for axis in (0, 1))
        return left + across * side, top + (1 - up) * side

    marks = [f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" class="axis"/>']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = place((tick, tick))
        marks.append(f'<text class="soft" x="{x:.0f}" y="{top + side + 16}" text-anchor="middle">{tick:g}</text>')
        marks.append(f'<text class="soft" x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{tick:g}</text>')
    for x, y in map(place, people):
        marks.append(f'<circle class="own" cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill-opacity=".35" stroke="none"/>')
    lines: list[float] = []  # heights of the names that are written
    for number, (name, pair) in enumerate(points.items()):
        kind = "own" if number == 0 else "ceiling" if name.startswith("real renders (") else "floor"
        x, y = place(pair)
        title = f"{escape(name)}: {pair[0]:.3f}, {pair[1]:.3f}"
        marks.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{title}</title></circle>')
        right = x < left + side * 0.62
        anchor, shift = ("start", 10) if right else ("end", -10)
        height = _free_height(y - 8, lines)
        lines.append(height)
        marks.append(f'<text x="{x + shift:.1f}" y="{height:.1f}" text-anchor="{anchor}">{escape(name)}</text>')
    middle = left + side / 2
    marks.append(f'<text x="{middle}" y="{top + side + 36}" text-anchor="middle">{escape(titles[0])}</text>')
    turned = f'transform="rotate(-90 14 {top + side / 2})"'
    marks.append(f'<text x="14" y="{top + side / 2}" text-anchor="middle" {turned}>{escape(titles[1])}</text>')
    return _svg(top + side + 46, marks, f"{titles[1]} against {titles[0]}")


def _free_height(wanted: float, lines: Sequence[float]) -> float:
    """Return the height nearest to the wanted one that is no other name's."""
    steps = (15 * step for n in range(20) for step in (n, -n))
    return next(wanted + step for step in steps if all(abs(wanted + step - line) >= 14 for line in lines))


def bars(shares: Mapping[str, tuple[float, float | None]]) -> str:
    """Return one bar per name for a share of 0 to 1, with a green mark for its ceiling."""
    if not shares:
        return ""

    def x(value: float) -> float:
        return _LEFT + min(max(value, 0.0), 1.0) * (_WIDTH - _LEFT - 60)

    height = 24 * len(shares) + 30
    marks = [_axis(x, 0.0, 1.0, height - 24)]
    for number, (name, (share, ceiling)) in enumerate(shares.items()):
        y = 6 + 24 * number
        marks.append(f'<text x="{_LEFT - 10}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        marks.append(
            f'<rect class="own" x="{_LEFT}" y="{y}" width="{x(share) - _LEFT:.1f}" height="16" stroke="none">'
            f"<title>{share:.1%}</title></rect>"
        )
        marks.append(f'<text class="soft" x="{_WIDTH - 8}" y="{y + 13}" text-anchor="end">{share:.0%}</text>')
        if ceiling is not None:
            marks.append(_line(x(ceiling), y - 2, x(ceiling), y + 18, "ceiling", 3, f"ceiling {ceiling:.1%}"))
    return _svg(height, marks, "share found per attribute")


def _axis(x: "object", low: float, high: float, bottom: float) -> str:
    place = x if callable(x) else None
    assert place is not None
    marks = []
    for number in range(5):
        value = low + (high - low) * number / 4
        marks.append(_line(place(value), 4, place(value), bottom, "axis", 1, ""))
        marks.append(
            f'<text class="soft" x="{place(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:.2g}</text>'
        )
    return "".join(marks)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, width: int, title: str) -> str:
    inner = f"<title>{title}</title>" if title else ""
    return (
        f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke-width="{width}">'
        f"{inner}</line>"
    )


def _svg(height: float, marks: Sequence[str], label: str) -> str:
    body = "".join(marks)
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'
