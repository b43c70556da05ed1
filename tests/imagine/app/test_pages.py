"""The files of the app without a browser: contrast of all colours, and nothing that its content policy would refuse."""

import re

import pytest

from imagine.cli.app import PAGES

STYLE = (PAGES / "style.css").read_text()
PAGE = (PAGES / "index.html").read_text()
FOLDER = PAGES / "scripts"
SCRIPTS = {path.relative_to(FOLDER).as_posix(): path.read_text() for path in FOLDER.rglob("*.js")}
GROUNDS = ("ground", "panel", "sunken", "tint")
# Text, and where it is written; 4.5 to 1 (WCAG 2.2, success criterion 1.4.3, level AA).
TEXT = [
    *((text, ground) for text in ("text", "soft", "accent") for ground in GROUNDS),
    *(("accent-deep", ground) for ground in ("panel", "tint")), ("on-accent", "accent"), ("on-accent", "accent-deep"),
    ("good", "panel"), ("trouble", "panel"), ("trouble", "trouble-tint"), ("warn", "warn-tint"),
]  # fmt: skip
# Borders of controls, outlines of focus and marks; 3 to 1 (1.4.11).
SHAPES = [(shape, ground) for shape in ("edge", "accent", "trouble", "good") for ground in ("ground", "panel")]


def colours(scheme: str) -> dict[str, str]:
    """Return the colour variables of a scheme."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG."""
    channels = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels)
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_colours_have_enough_contrast(scheme: str) -> None:
    known = colours(scheme)
    assert set(known) == set(colours("light"))
    weak = {pair: contrast(known[pair[0]], known[pair[1]]) for pair in TEXT}
    assert {pair: ratio for pair, ratio in weak.items() if ratio < 4.5} == {}
    weak = {pair: contrast(known[pair[0]], known[pair[1]]) for pair in SHAPES}
    assert {pair: ratio for pair, ratio in weak.items() if ratio < 3} == {}


def test_only_variables_name_colours_of_text() -> None:
    rules = STYLE[STYLE.index("/* --- controls --- */") :]
    assert re.findall(r"(?<![-\w])color: (?!var\(--|inherit)[^;]+;", rules) == []


def test_the_pages_hold_nothing_that_their_policy_refuses() -> None:
    assert "unsafe" not in PAGE and "script-src 'self'" in PAGE and "default-src 'none'" in PAGE
    assert re.findall(r"\son\w+\s*=|\sstyle\s*=|<style|<script(?![^>]*\ssrc=)", PAGE) == []
    written = (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "http://",
        "https://",
    )
    assert {(name, word) for name, text in SCRIPTS.items() for word in written if word in text} == set()
    assert "http" not in STYLE and "@import" not in STYLE


def test_every_file_that_is_named_exists_and_every_script_is_used() -> None:
    named = re.findall(r'(?:src|href)="([^#"]+)"', PAGE)
    assert named and [name for name in named if not (PAGES / name).is_file()] == []
    imported = {
        (FOLDER / name).parent.joinpath(other).resolve()
        for name, text in SCRIPTS.items()
        for other in re.findall(r'from "(\.[\w./]+)"', text)
    }
    assert imported | {(FOLDER / "main.js").resolve()} == {(FOLDER / name).resolve() for name in SCRIPTS}
    assert all(len(list(folder.glob("*.js"))) <= 9 for folder in (FOLDER, *FOLDER.glob("*/")))
