"""The app in a real browser, against a real server with a tiny pipeline."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Page, expect
from scipy import ndimage

from imagine.cli.app import PAGES
from imagine.records import FaceBox
from tests import tiny
from tests.browser import SECONDS, OpenPage
from tests.imagine.serving.servers import Running, ended, opened, running

FACE = (255, 0, 255)  # the colour of faces in the photos of these tests
PROMPT = "a person smiling on a beach"


class SquareFinder:
    """Finds squares of the colour FACE."""

    def find(self, image: Image.Image) -> tuple[FaceBox, ...]:
        marked, _ = ndimage.label((np.asarray(image.convert("RGB")) == FACE).all(axis=-1))
        found = ndimage.find_objects(marked)
        return tuple(FaceBox(x.start, y.start, x.stop - x.start, y.stop - y.start, 1.0) for y, x in found)


class Gate:
    """Holds the denoiser before each of its calls while it is closed, so that tests see jobs that wait and run."""

    def __init__(self, denoiser: Any) -> None:
        self._free = threading.Event()
        self._free.set()
        self._calls = threading.Semaphore(0)
        denoiser.register_forward_pre_hook(lambda *_: self._pass())

    def _pass(self) -> None:
        while not self._free.is_set() and not self._calls.acquire(timeout=0.02):
            pass

    def close(self) -> None:
        self._free.clear()

    def let_one_pass(self) -> None:
        self._calls.release()

    def open(self) -> None:
        self._free.set()


def photo(path: Path, *squares: tuple[int, int, int]) -> Path:
    """Write a photo of 160 x 120 pixels with a face of some size at each of these places."""
    image = tiny.photo(3).resize((160, 120))
    for left, top, size in squares:
        ImageDraw.Draw(image).rectangle((left, top, left + size - 1, top + size - 1), fill=FACE)
    image.save(path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "broken.png").write_bytes(b"this is no picture")
    return {
        "one": photo(folder / "one.png", (50, 40, 40)),
        "two": photo(folder / "two.png", (10, 30, 44), (100, 40, 36)),
        "none": photo(folder / "none.png"),
        "broken": folder / "broken.png",
    }


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = tiny.pipeline()
    pipe.finder = SquareFinder()
    return pipe


@pytest.fixture(scope="module")
def gate(pipe: Any) -> Gate:
    return Gate(pipe.unet)


@pytest.fixture(scope="module")
def server(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("app"), pipe, app=PAGES, keep_pictures=1e9) as found:
        yield found


Visit = Callable[..., Page]


@pytest.fixture
def visit(open_page: OpenPage, server: Running) -> Visit:
    """Open the app in a new context."""
    expect.set_options(timeout=SECONDS)

    def opened(at: Running = server, ready: bool = True, **settings: Any) -> Page:
        page = open_page(at.url, **settings)
        if ready:
            page.wait_for_selector("body[data-ready]")
        return page

    return opened


def choose(page: Page, *paths: Path, person: int = 0) -> None:
    """Choose photos for a person, and wait until they have been read."""
    card = page.locator(".person").nth(person)
    card.locator("input[type=file]").first.set_input_files([str(path) for path in paths])
    expect(card).to_have_attribute("aria-busy", "false")


def draw(page: Page, prompt: str = PROMPT) -> None:
    page.fill("#prompt", prompt)
    page.click("#draw")


def newest(server: Running) -> Any:
    with server.client() as client:
        return client.get("/v1/jobs", params={"kind": "pictures", "limit": 1}).json()["jobs"][0]


def test_a_photo_becomes_a_picture_that_can_be_drawn_again(
    visit: Visit, server: Running, photos: dict[str, Path]
) -> None:
    page = visit()
    page.click("#draw")
    expect(page.locator("#prompt-trouble")).to_have_text("Choose a photo of a person first.")
    choose(page, photos["one"])
    expect(page.locator(".face")).to_have_count(1)
    expect(page.locator(".crop img")).to_have_attribute("src", re.compile("^data:image/png;base64,"))
    assert page.locator(".face").bounding_box()["width"] == pytest.approx(  # type: ignore[index]
        page.locator(".frame").bounding_box()["width"] * 40 / 160, abs=2  # type: ignore[index]
    )  # fmt: skip
    page.uncheck("#random")
    page.fill("#seed", "7")
    page.locator("#identity_scale").fill("0.75")
    expect(page.locator("output[for=identity_scale]")).to_have_text("0.75")
    page.fill("#prompt", PROMPT)
    page.press("#prompt", "Control+Enter")
    expect(page.locator(".picture img")).to_have_js_property("naturalWidth", 32)
    page.click(".picture")
    command = "imagine generate --reference one.png --prompt 'a person smiling on a beach' --seed 7 --steps 3 "
    command += "--guidance-scale 2 --identity-scale 0.75 --output picture-7.png"
    expect(page.locator(".command")).to_have_text(command)
    body = json.loads(page.text_content(".json") or "")
    job = newest(server)
    with server.client() as client:
        again = ended(client, client.post("/v1/pictures", json=body).json()["id"])
        one, other = (opened(client.get(each["pictures"][0]["url"]).content) for each in (again, job))
    assert one.tobytes() == other.tobytes()


def test_odd_photos_are_explained(visit: Visit, server: Running, photos: dict[str, Path]) -> None:
    page = visit()
    choose(page, photos["broken"])
    expect(page.locator(".person [role=alert]")).to_contain_text("broken.png: A photo is damaged")
    choose(page, photos["none"])
    expect(page.locator(".advice")).to_contain_text("No face was found")
    draw(page)
    expect(page.locator("#prompt-trouble")).to_contain_text("No face was found in none.png")
    page.get_by_role("button", name="Use the whole picture").click()
    page.locator(".person").get_by_role("button", name="Remove").click()
    choose(page, photos["two"])
    faces = page.locator(".face")
    expect(faces).to_have_count(2)
    expect(faces.nth(0)).to_have_attribute("aria-pressed", "true")
    first = page.get_attribute(".crop img", "src")
    faces.nth(1).focus()
    page.keyboard.press("Enter")
    expect(faces.nth(1)).to_have_attribute("aria-pressed", "true")
    assert page.get_attribute(".crop img", "src") != first
    draw(page)
    expect(page.locator(".picture")).not_to_have_count(0)
    (person,) = newest(server)["request"]["people"].values()
    assert person["face"] == 1


def test_a_picture_shows_its_progress_and_can_be_canceled(
    visit: Visit, server: Running, photos: dict[str, Path], gate: Gate
) -> None:
    page = visit()
    choose(page, photos["one"])
    before = page.locator(".set").count()
    page.locator("#steps").fill("10")
    gate.close()
    try:
        draw(page)
        expect(page.locator(".set[aria-busy=true]")).to_have_count(1)
        draw(page, "in the queue")
        expect(page.locator(".stage").first).to_have_text("Next in the queue")
        waiting, running = page.locator(".set").nth(0), page.locator(".set").nth(1)
        waiting.get_by_role("button", name="Cancel").click()
        expect(waiting).to_contain_text("Canceled before it was done.")
        for _ in range(12):  # calls of the denoiser
            if running.locator("[data-preview]").is_visible():
                break
            gate.let_one_pass()
            page.wait_for_timeout(400)
        expect(running.locator("[data-preview]")).to_have_attribute("src", re.compile("^data:image/jpeg;base64,"))
        expect(running.locator(".stage")).to_contain_text("of 10")
        page.reload()  # a job outlives its page
        page.wait_for_selector("body[data-ready]")
        expect(page.locator(".set[aria-busy=true]")).to_have_count(1)
        with page.expect_response("**/cancel"):
            running.get_by_role("button", name="Cancel").click()
    finally:
        gate.open()
    expect(running).to_contain_text("Canceled before it was done.")
    assert newest(server)["state"] == "canceled"
    for _ in range(2):
        page.locator(".set").first.get_by_role("button", name="Remove").click()
        expect(page.locator(".set")).to_have_count(before + 1)
        before -= 1


def test_two_people_by_name(visit: Visit, server: Running, photos: dict[str, Path]) -> None:
    page = visit()
    choose(page, photos["two"])
    page.get_by_role("button", name="The other face is a second person").click()
    expect(page.locator(".person")).to_have_count(2)
    expect(page.locator(".person").nth(1).locator(".face").nth(1)).to_have_attribute("aria-pressed", "true")
    page.locator("#name-2").fill("zoë <b>")
    page.locator("#name-2").blur()
    expect(page.locator(".person-head .trouble").nth(1)).to_contain_text("A name begins with a letter")
    page.locator("#name-2").fill("zoë")
    page.locator("#name-2").blur()
    draw(page, "two people on a beach")
    expect(page.locator("#prompt-trouble")).to_contain_text("mentions none of the people")
    page.fill("#prompt", "smiling, ")
    page.get_by_role("button", name="Insert ann into the prompt").click()
    page.get_by_role("button", name="Insert zoë into the prompt").click()
    page.click("#draw")
    expect(page.locator(".set").first.locator(".picture")).to_have_count(1)
    job = newest(server)
    assert job["request"]["prompt"] == "smiling, {ann}{zoë}" and job["request"]["layout"] == "left to right"
    assert [each["face"] for each in job["request"]["people"].values()] == ["largest", 1]


def test_a_person_is_saved_used_after_a_reload_and_deleted(
    visit: Visit, server: Running, photos: dict[str, Path]
) -> None:
    page = visit()
    choose(page, photos["one"])
    page.get_by_role("button", name="Save person").click()
    page.fill("#save-name", "Ann <i>")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator("dialog .trouble")).to_contain_text("only people who agreed may be saved")
    page.check("input[value=invented]")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator("#personas strong")).to_have_text("Ann <i>")
    page.locator(".person").get_by_role("button", name="Remove").click()
    page.reload()
    page.get_by_role("button", name="Add Ann").click()
    expect(page.locator(".person strong")).to_have_text("Ann <i>")
    draw(page)
    expect(page.locator(".set").first.locator(".picture")).to_have_count(1)
    persona = newest(server)["request"]["people"][""]["persona"]
    path = server.store.files.persona(persona)
    assert path.is_file()
    page.get_by_role("button", name="Delete Ann").click()
    page.get_by_role("button", name="Keep").click()
    assert path.is_file()
    page.get_by_role("button", name="Delete Ann").click()
    page.locator("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#personas")).to_contain_text("Nobody yet")
    expect(page.locator(".drop")).to_have_count(1)
    assert not path.exists()


def test_settings_are_compared_side_by_side(visit: Visit, server: Running, photos: dict[str, Path]) -> None:
    page = visit()
    choose(page, photos["one"])
    page.fill("#prompt", PROMPT)
    page.click("#strip")
    strip = page.locator(".set").first
    expect(strip.locator(".picture")).to_have_count(5)
    assert strip.locator("figcaption").all_text_contents() == [f"identity {each}" for each in (0, 0.25, 0.5, 0.75, 1)]
    page.click("#pair")
    page.get_by_role("button", name="Draw both").click()
    expect(page.locator("dialog .trouble")).to_contain_text("Both settings are the same")
    page.locator("#guidance_scale-B").fill("4.5")
    page.get_by_role("button", name="Draw both").click()
    pair = page.locator(".set").first
    expect(pair.locator(".picture")).to_have_count(2)
    assert pair.locator("figcaption").all_text_contents()[1] == "guidance 4.5"
    with server.client() as client:
        jobs = client.get("/v1/jobs", params={"kind": "pictures", "limit": 7}).json()["jobs"]
    assert (
        len({job["pictures"][0]["seed"] for job in jobs[:2]})
        == len({job["pictures"][0]["seed"] for job in jobs[2:]})
        == 1
    )
    for place in (0, 1):
        pair.get_by_role("button", name="Details").nth(place).click()
        page.get_by_role("button", name="Compare with").click()
    expect(page.locator("dialog tbody th")).to_have_text("guidance")


def test_what_fails_is_said(visit: Visit, server: Running, photos: dict[str, Path]) -> None:
    page = visit()
    choose(page, photos["one"])
    page.click("#draw")
    expect(page.locator("#prompt-trouble")).to_contain_text("Describe the picture")
    page.route("**/v1/pictures", lambda route: route.abort())
    draw(page)
    expect(page.locator("#prompt-trouble")).to_have_text("The server does not answer. Is it still running?")
    page.unroute("**/v1/pictures")
    (upload,) = {
        each["upload"]
        for person in page.evaluate("JSON.parse(localStorage['imagine.people'])")
        for each in person["photos"]
    }
    with server.client() as client:
        client.delete(f"/v1/uploads/{upload}")
    page.click("#draw")
    expect(page.locator("#prompt-trouble")).to_contain_text("choose it again")
    page.reload()
    expect(page.locator(".person [role=alert]")).to_contain_text("one.png is no longer on the server")


def test_a_server_with_keys_asks_for_one(visit: Visit, pipe: Any, tmp_path: Path) -> None:
    with running(tmp_path, pipe, keys=1, app=PAGES) as guarded:
        key = guarded.store.access.create_key("app")
        page = visit(guarded, ready=False)
        page.fill("#api-key", "imagine_wrong")
        page.keyboard.press("Enter")
        expect(page.locator("dialog .trouble")).to_have_text("The server does not accept this key.")
        page.fill("#api-key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-ready]")
        page.reload()
        page.wait_for_selector("body[data-ready]")


def test_a_phone_has_no_sideways_scrolling_and_all_controls_have_names(visit: Visit, photos: dict[str, Path]) -> None:
    page = visit(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, color_scheme="dark")
    choose(page, photos["two"])
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box: Any = page.locator("#draw").bounding_box()
    assert box["y"] + box["height"] <= 740 and box["height"] >= 44, "the main action is in reach"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea, img, output, progress')].filter(node => "
        "node.checkVisibility() && !(node.textContent.trim() || node.hasAttribute('alt') || node.ariaLabel "
        "|| node.labels?.length)).map(node => node.outerHTML)"
    )
    assert unnamed == []
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"face", "prompt", "identity_scale", "seed", "strip", "pair", "draw", "chip"} <= reached
    assert page.evaluate("document.getElementById('live').getAttribute('aria-live')") == "polite"
