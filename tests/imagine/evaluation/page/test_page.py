"""The report's page in a real browser: one file, tables that sort, plots, and a phone's width."""

from pathlib import Path

from PIL import Image

from imagine.evaluation.page import document, pictures, plots
from imagine.evaluation.page.pictures import Shown
from imagine.evaluation.page.plots import Interval
from tests.browser import OpenPage


def page_of_everything() -> str:
    wide = [f"column {number}" for number in range(12)]
    rows = [["beta", "0.5 (0.4–0.6)"], ["alpha", "-1.25"], ["gamma <b>", "1,024"], ["delta", ""]]
    image = Image.new("RGB", (64, 64), "red")
    parts = [
        document.heading("Numbers"), document.table(["name", "value"], rows), document.table(wide, [wide]),
        plots.intervals([Interval("sim", 0.5, 0.4, 0.6, 0.9, 0.0), Interval("copies", -0.2, -0.3, -0.1)]),
        plots.plane({"full": (0.5, 0.6), "real renders (ceiling)": (0.9, 0.95)}, [(0.4, 0.5)], ("x", "y")),
        plots.bars({"scene": (0.5, 0.9), "letters": (0.0, None)}), plots.bars({}),
        pictures.figures([Shown(image, image, "a <i>prompt</i>"), Shown(None, image, "lost")]),
        document.paragraph("one & two", "note"),
    ]  # fmt: skip
    return document.page("Everything", parts)


def test_the_page_needs_no_other_file_and_sorts(open_page: OpenPage, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page_of_everything(), encoding="utf-8")
    page = open_page((tmp_path / "report.html").as_uri())  # fails if the page asks for another file

    def column(number: int) -> list[str | None]:
        cells = page.locator("table").first.locator(f"tbody td:nth-child({number})")
        return [cell.text_content() for cell in cells.all()]

    page.locator("th", has_text="value").click()
    assert column(2) == ["1,024", "0.5 (0.4–0.6)", "-1.25", ""] or column(2)[:1] == [""]
    page.locator("th", has_text="value").press("Enter")
    assert [text for text in column(2) if text] == ["-1.25", "0.5 (0.4–0.6)", "1,024"]
    page.locator("th", has_text="name").click()
    assert column(1) == ["gamma <b>", "delta", "beta", "alpha"]
    assert page.locator("th", has_text="name").get_attribute("aria-sort") == "descending"
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 4 and min(widths) >= 64
    assert page.locator("svg").count() == 3


def test_a_phone_scrolls_tables_and_not_the_page(open_page: OpenPage, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page_of_everything(), encoding="utf-8")
    page = open_page((tmp_path / "report.html").as_uri(), viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("[...document.querySelectorAll('.scroll')].some(each => each.scrollWidth > each.clientWidth)")
    page.close()
