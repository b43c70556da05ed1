"""The review page in a real browser: keyboard, touch, phone width, and two concurrent reviewers."""

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from data_synth.records import Measures, Pair
from data_synth.review.decisions import FILE, REASONS, Decision, Opinion, Review, decisions, open_queue
from data_synth.review.server import ReviewServer
from imagine.world import render, sample_contexts, sample_people
from tests.browser import PHONE, OpenPage, served
from tests.review_pairs import pair


@pytest.fixture(scope="module")
def portraits() -> list[Pair]:
    """Five pairs of people of the world."""
    people = sample_people([3, 3, 5, 5, 8, 8, 13, 13, 21, 21])
    drawn = render(people, sample_contexts(list(range(10))), size=128).images
    files = []
    for image in drawn:
        file = io.BytesIO()
        Image.fromarray((image.clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
        files.append(file.getvalue())
    return [pair(n, target=files[2 * n + 1], reference=files[2 * n]) for n in range(5)]


@pytest.fixture
def review(tmp_path: Path, portraits: list[Pair]) -> Iterator[Review]:
    """A queue of five pairs that all need two opinions."""
    keys = [one.target.key for one in portraits]
    open_queue(portraits, tmp_path / FILE, {keys[0]: [0.31, 0.44, 0.52]}, {keys[0]: ["Passed: similarity 0.52."]})
    yield Review(tmp_path / FILE, opinions=2, overlap=1.0)


@pytest.fixture
def address(review: Review) -> Iterator[str]:
    with served(ReviewServer(review, port=0)) as address:
        yield address


Visit = Callable[..., Page]


@pytest.fixture
def visit(open_page: OpenPage, address: str) -> Visit:
    """Open the page as a reviewer, and wait until it is idle."""

    def opened(reviewer: str = "", **settings: Any) -> Page:
        page = open_page(address + (f"?reviewer={reviewer}" if reviewer else ""), **settings)
        shown_key(page)
        return page

    return opened


def shown_key(page: Page) -> str:
    """Wait until the page is idle and return the key of the shown pair, or ""."""
    page.wait_for_selector("body:not([aria-busy])")
    return page.text_content("#key") or "" if page.is_visible("#pair") else ""


def press(page: Page, *keys: str) -> str:
    """Press keys one after the other and return the key of the pair shown afterwards."""
    for key in keys:
        page.keyboard.press(key)
        shown_key(page)
    return shown_key(page)


def decided(review: Review) -> dict[str, Decision]:
    return decisions(review.database)


def test_keep_reject_fix_and_undo_by_keyboard(visit: Visit, review: Review) -> None:
    page = visit("Ann")
    first = shown_key(page)
    second = press(page, "k")
    assert decided(review)[first].verdict == "keep"
    third = press(page, "r", "4")
    assert (decided(review)[second].verdict, decided(review)[second].reason) == ("reject", REASONS[3])
    page.keyboard.press("f")
    expect(page.locator("#fixed")).to_have_value(page.text_content("#prompt") or "")
    page.keyboard.press("Control+a")
    page.keyboard.type("kr: a fixed caption, u?")  # letters that are commands outside the dialog
    fourth = press(page, "Enter")
    assert (decided(review)[third].verdict, decided(review)[third].caption) == ("fix", "kr: a fixed caption, u?")
    assert len({first, second, third, fourth}) == 4
    assert page.text_content("#counts") == "3 of 5 decided, 3 by you"
    assert press(page, "u") == third
    assert third not in decided(review)
    assert press(page, "u") == second
    assert press(page, "u") == first
    assert decided(review) == {}
    expect(page.locator("#undo")).to_be_disabled()


def test_escape_changes_nothing(visit: Visit, review: Review) -> None:
    page = visit("Ann")
    for key in ("r", "f", "?"):
        page.keyboard.press(key)
        expect(page.locator("dialog[open]")).to_have_count(1)
        page.keyboard.press("k")  # no effect while a dialog is open
        page.keyboard.press("Escape")
        expect(page.locator("dialog[open]")).to_have_count(0)
    page.keyboard.press("f")
    page.keyboard.press("Enter")
    expect(page.locator("#fix-trouble")).to_have_text("The caption is unchanged: edit it, or keep the pair.")
    assert decided(review) == {}


def test_a_key_held_down_decides_once(visit: Visit, review: Review) -> None:
    page = visit("Ann")
    for _ in range(6):
        page.keyboard.down("k")  # a held key sends repeated down events
        shown_key(page)
    page.keyboard.up("k")
    assert len(decided(review)) == 1


def test_letters_are_found_on_other_keyboards(visit: Visit, review: Review) -> None:
    page = visit("Ann")
    send = "([key, code]) => document.dispatchEvent(new KeyboardEvent('keydown', {key, code}))"
    page.evaluate(send, ["л", "KeyK"])  # Russian
    shown_key(page)
    page.evaluate(send, ["к", "KeyR"])
    page.evaluate(send, ["é", "Digit2"])  # French
    shown_key(page)
    page.evaluate(send, ["t", "KeyK"])  # Dvorak: the printed letter counts
    shown_key(page)
    assert sorted((one.verdict, one.reason) for one in decided(review).values()) == [
        ("keep", ""),
        ("reject", REASONS[1]),
    ]


def test_arrows_go_back_to_decisions_and_skip(visit: Visit, review: Review) -> None:
    page = visit("Ann")
    first = shown_key(page)
    second = press(page, "k")
    assert press(page, "ArrowLeft") == first
    assert page.text_content("#opinions") == "You: keep."
    press(page, "r", "1")
    assert decided(review)[first].reason == REASONS[0], "a decision can be replaced"
    third = press(page, "ArrowRight")
    assert third not in (first, second)
    for _ in range(3):
        press(page, "k")
    assert shown_key(page) == second, "skipped pairs come last"
    assert press(page, "k") == ""
    expect(page.locator("#finished")).to_contain_text("No pairs left to review")
    assert len(decided(review)) == 5


def test_the_page_shows_the_pair(visit: Visit, review: Review, portraits: list[Pair]) -> None:
    page = visit("Ann")
    first = portraits[0]
    while shown_key(page) != first.target.key:
        press(page, "ArrowRight")
    sides = page.evaluate("['reference', 'target'].map(id => document.getElementById(id).naturalWidth)")
    assert sides == [128, 128]
    assert page.text_content("#prompt") == first.spec.prompt
    assert page.text_content("#aims") == "expression: smiling ✗ detected: neutral"
    assert page.locator("#rounds b").all_text_contents() == ["0.31", "0.44", "0.52"]
    assert page.text_content("#rounds .chosen b") == "0.44", "the target is the candidate of round 1"
    assert "Passed: similarity 0.52." in (page.text_content("#remarks") or "")
    assert "difference0.30" in (page.text_content("#measures") or "")


def test_captions_are_text_and_never_markup(visit: Visit, review: Review) -> None:
    markup = "<img src=x onerror=\"document.title='owned'\"><b>bold</b> & ‮kcab"
    one = pair(9, prompt=markup)
    open_queue([one], review.database, remarks={one.target.key: [markup]})
    page = visit("%3Cb%3EAnn")
    assert page.text_content("#prompt") == markup
    assert page.text_content("#who") == "<b>Ann"
    assert "owned" not in page.title()


def test_a_picture_that_cannot_be_shown_can_still_be_rejected(visit: Visit, review: Review) -> None:
    one = pair(9, target=b"\x89PNG and nothing more")
    open_queue([one], review.database)
    page = visit("Ann")
    expect(page.locator("#status")).to_have_text("A picture of this pair cannot be displayed.")
    press(page, "r", "5")
    assert decided(review)[one.target.key].reason == REASONS[4]


def test_two_reviewers_at_once(visit: Visit, review: Review) -> None:
    ann, bob = visit("Ann"), visit("Bob")
    for _ in range(5):  # alternating, so that each sees the other's changes
        press(ann, "k")
        assert ann.is_hidden("#opinions")
        press(bob, "k") if shown_key(bob) != "p0002-0-0-1" else press(bob, "r", "1")
    assert shown_key(ann) == shown_key(bob) == ""
    found = decided(review)
    assert len(found) == 5
    assert all(one.reviewers == ("Ann", "Bob") for one in found.values())
    assert [key for key, one in found.items() if one.verdict == "reject"] == ["p0002-0-0-1"]
    expect(bob.locator("#agreement")).to_have_text("Agreement 80 %, κ -0.11")
    bob.click("#agreement")
    expect(bob.locator("#agreement-table tbody")).to_contain_text("Ann and Bob")
    bob.keyboard.press("Escape")
    press(bob, "ArrowLeft")
    assert "You: " in (bob.text_content("#opinions") or "") and "Ann: keep." in (bob.text_content("#opinions") or "")
    cy = visit("Cy")
    assert shown_key(cy) == "p0002-0-0-1", "only the tie needs a third opinion"


def test_pairs_completed_by_others_are_skipped(visit: Visit, review: Review) -> None:
    page = visit("Ann")
    first = shown_key(page)
    others = [number for number in review.state("Ann")["open"] if review.pair(number, "Ann")["key"] != first]
    for number in others:
        for name in ("Bob", "Cy"):
            review.decide(number, Opinion(name, "keep"))
    assert press(page, "k") == ""
    assert page.text_content("#counts") == "5 of 5 decided, 1 by you"


def test_the_page_asks_for_a_name_and_stores_it_in_the_address(visit: Visit, review: Review) -> None:
    page = visit()
    expect(page.locator("#who-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#who-dialog")).to_be_visible()
    page.keyboard.type("  ")
    page.keyboard.press("Enter")
    expect(page.locator("#who-trouble")).to_have_text(
        "The reviewer's name is empty or too long: give 1 to 40 characters."
    )
    page.fill("#name", "Zoë Q")
    press(page, "Enter")
    expect(page.locator("#who-dialog")).to_be_hidden()
    press(page, "k")
    page.reload()
    shown_key(page)
    assert page.text_content("#counts") == "1 of 5 decided, 1 by you"
    assert next(iter(decided(review).values())).reviewers == ("Zoë Q",)


def test_an_unreachable_server_is_reported_and_nothing_is_lost(visit: Visit, review: Review) -> None:
    page = visit("Ann")
    first = shown_key(page)
    page.route("**/api/decisions", lambda route: route.abort())
    assert press(page, "k") == first
    expect(page.locator("#status")).to_contain_text("The server does not answer")
    page.unroute("**/api/decisions")
    assert press(page, "k") != first
    assert list(decided(review)) == [first]


def test_a_phone_shows_large_pictures_and_takes_taps(visit: Visit, review: Review) -> None:
    page = visit("Ann", viewport=PHONE, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], "no horizontal scrolling"
    boxes: dict[str, Any] = {
        id_: page.locator(f"#{id_}").bounding_box() or {} for id_ in ("reference", "target", "keep", "fix", "reject")
    }
    assert all(boxes[id_]["width"] > 350 and boxes[id_]["height"] >= 200 for id_ in ("reference", "target"))
    assert all(box["y"] + box["height"] <= PHONE["height"] for box in boxes.values()), (
        "both pictures and all verdicts fit on the screen"
    )
    assert all(min(boxes[id_]["width"], boxes[id_]["height"]) >= 44 for id_ in ("keep", "fix", "reject"))
    page.tap("#keep")
    shown_key(page)
    page.tap("#reject")
    page.tap("#reasons button:nth-child(2)")
    shown_key(page)
    page.tap("#previous")
    shown_key(page)
    page.tap("#undo")
    shown_key(page)
    assert [one.verdict for one in decided(review).values()] == ["keep"]


CONTRASTS = """() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => channels(colour).slice(0, 3).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, channel) => sum + value * [0.2126, 0.7152, 0.0722][channel], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor, parts = channels(colour);
      if (parts.length < 4 || parts[3] === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = {}, walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || !node.checkVisibility() || node.closest("script")) continue;
    const light = [getComputedStyle(node).color, behind(node)].map(luminance).sort((a, b) => b - a);
    found[text] = (light[0] + 0.05) / (light[1] + 0.05);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(visit: Visit, review: Review, portraits: list[Pair], scheme: str) -> None:
    met = Measures(faces=1, attributes={"expression": "smiling"})
    open_queue([portraits[0], replace(portraits[1], measures=met)], review.database)
    page = visit("Ann", color_scheme=scheme)
    contrasts: dict[str, float] = page.evaluate(CONTRASTS)
    for key in ("k", "ArrowLeft"):
        press(page, key)
        contrasts |= page.evaluate(CONTRASTS)
    for key in ("r", "f", "?"):
        page.keyboard.press(key)
        contrasts |= page.evaluate(CONTRASTS)
        page.keyboard.press("Escape")
    assert len(contrasts) > 40
    assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}


def test_all_controls_are_reachable_by_keyboard_and_labelled(visit: Visit, review: Review) -> None:
    page = visit("Ann")
    press(page, "k")
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    wanted = {"agreement", "who", "help", "previous", "keep", "fix", "reject", "undo", "next"}
    assert wanted <= set(reached)
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, img, textarea, input')].filter(node => !(node.textContent.trim() "
        "|| node.alt || node.getAttribute('aria-labelledby') || node.getAttribute('aria-label'))).length"
    )
    assert unnamed == 0
    assert page.evaluate("document.getElementById('status').getAttribute('aria-live')") == "polite"
    assert page.evaluate("document.documentElement.lang") == "en"
