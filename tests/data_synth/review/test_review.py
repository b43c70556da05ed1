"""Human review without a browser: queue, blind opinions, decisions for the next build, agreement, HTTP interface."""

import json
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from data_synth.records import Pair, Rejection
from data_synth.review.decisions import (
    FILE,
    REASONS,
    REVIEWERS_DIFFER,
    GoneError,
    Opinion,
    Review,
    decisions,
    judged,
    open_queue,
)
from data_synth.review.server import ReviewServer
from imagine.agreement import agreement, cohen, fleiss
from imagine.errors import ConfigError, ImagineError
from imagine.local_server import LARGEST_BODY
from tests.browser import served
from tests.review_pairs import pair, pairs, picture


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A queue of six pairs."""
    open_queue(pairs(6), tmp_path / FILE)
    return tmp_path / FILE


def numbers(database: Path) -> dict[str, int]:
    """Return the pair numbers by candidate key."""
    with closing(sqlite3.connect(database)) as connection:
        return dict(connection.execute("SELECT key, number FROM pairs WHERE current"))


def save_opinions(database: Path, which: Pair, *opinions: tuple[str, ...]) -> None:
    """Save opinions on a pair: (reviewer, verdict, reason or caption)."""
    number = numbers(database)[which.target.key]
    for reviewer, verdict, *more in opinions:
        reason, caption = (more[0], "") if verdict == "reject" else ("", more[0] if more else "")
        Review(database).decide(number, Opinion(reviewer, verdict, reason, caption))


# --- the queue --------------------------------------------------------------------------------------------------------


def test_a_reviewer_sees_the_data_from_the_build(tmp_path: Path) -> None:
    one = pair(7)
    key = one.target.key
    assert open_queue([one], tmp_path / FILE, {key: [0.25, None, 0.5]}, {key: ["Similar enough."]}) == 1
    review = Review(tmp_path / FILE)
    (number,) = review.state("Ann")["open"]
    shown = review.pair(number, "Ann")
    assert review.picture(shown["reference"]) == one.reference.image
    assert review.picture(shown["target"]) == one.target.image
    assert (shown["key"], shown["prompt"], shown["caption"]) == (key, one.spec.prompt, one.spec.caption)
    assert (shown["aims"], shown["seen"]) == ({"expression": "smiling"}, {"expression": "neutral"})
    assert (shown["rounds"], shown["remarks"]) == ([0.25, None, 0.5], ["Similar enough."])
    assert (shown["measures"]["similarity"], shown["round"]) == (0.5, 1)


def test_rounds_may_be_filled_while_pairs_are_taken(tmp_path: Path) -> None:
    rounds: dict[str, list[float]] = {}

    def pairs_and_rounds() -> Iterator[Pair]:
        for one in pairs(70):
            rounds[one.target.key] = [len(rounds) / 100]
            yield one

    open_queue(pairs_and_rounds(), tmp_path / FILE, rounds)
    review = Review(tmp_path / FILE)
    assert [review.pair(number, "Ann")["rounds"] for number in (1, 64, 70)] == [[0.0], [0.63], [0.69]]


def test_the_same_queue_again_changes_nothing(database: Path) -> None:
    save_opinions(database, pair(2), ("Ann", "keep"))
    before = numbers(database), decisions(database)
    assert open_queue(pairs(6), database) == 6
    assert (numbers(database), decisions(database)) == before


def test_a_decision_applies_only_to_the_pair_that_was_shown(database: Path) -> None:
    old, new = pair(1), pair(1, target=picture((200, 0, 0)))
    save_opinions(database, old, ("Ann", "reject", REASONS[0]))
    assert isinstance(judged(old, decisions(database)), Rejection)
    assert judged(new, decisions(database)) is None, "another picture under the same key must not inherit the verdict"
    open_queue([new], database)
    assert decisions(database) == {}
    assert judged(pair(1, prompt="somewhere else"), decisions(database)) is None
    open_queue([old], database)
    assert judged(old, decisions(database)) == Rejection(old.target.key, "review", REASONS[0], "Reviewed by Ann.")


def test_undecided_pairs_are_deleted_with_their_pictures(database: Path) -> None:
    save_opinions(database, pair(0), ("Ann", "keep"))
    open_queue([pair(5)], database)
    with closing(sqlite3.connect(database)) as connection:
        keys = {key for (key,) in connection.execute("SELECT key FROM pairs")}
        (files,) = connection.execute("SELECT count(*) FROM pictures").fetchone()
    assert keys == {pair(0).target.key, pair(5).target.key}
    assert files == 4


def test_a_killed_build_leaves_the_old_queue(database: Path) -> None:
    class Killed(Exception):
        pass

    def killed() -> Iterator[Pair]:
        yield from (pair(number) for number in range(100, 300))
        raise Killed

    before = numbers(database)
    with pytest.raises(Killed):
        open_queue(killed(), database)
    assert numbers(database) == before


def test_an_invalid_review_file_is_one_sentence(tmp_path: Path) -> None:
    assert decisions(tmp_path / "nowhere" / FILE) == {}
    with pytest.raises(ConfigError, match="no review at"):
        Review(tmp_path / FILE).state("Ann")
    (tmp_path / "text").write_text("not a database, but long enough to be looked at as one: " + "x" * 200)
    with pytest.raises(ConfigError, match="cannot be used"):
        open_queue(pairs(1), tmp_path / "text")
    with closing(sqlite3.connect(tmp_path / "other")) as connection:
        connection.execute("CREATE TABLE something (x)")
    with pytest.raises(ConfigError, match="not a review of this version"):
        open_queue(pairs(1), tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot be used"):
        open_queue(pairs(1), tmp_path / "nowhere" / FILE)
    (tmp_path / "empty").touch()  # left by a build that was killed while it created the file
    assert open_queue(pairs(1), tmp_path / "empty") == 1


# --- deciding ---------------------------------------------------------------------------------------------------------


def test_judged_applies_each_verdict(database: Path) -> None:
    kept, fixed, out, open_ = pairs(4)
    save_opinions(database, kept, ("Ann", "keep"))
    save_opinions(database, fixed, ("Ann", "fix", "  person 1 laughing\n on a beach "))
    save_opinions(database, out, ("Ann", "reject", "text or watermark"))
    decided = decisions(database)
    assert judged(kept, decided) == kept
    assert judged(fixed, decided) == replace(fixed, spec=replace(fixed.spec, prompt="person 1 laughing on a beach"))
    assert judged(out, decided) == Rejection(out.target.key, "review", "text or watermark", "Reviewed by Ann.")
    assert judged(open_, decided) is None


KEEP, REJECT = ("keep",), ("reject", REASONS[0])


@pytest.mark.parametrize(
    ("opinions", "verdict", "more"),
    [
        ([KEEP, KEEP], "keep", ""),
        ([KEEP, REJECT], "reject", REVIEWERS_DIFFER),
        ([KEEP, REJECT, KEEP], "keep", ""),
        ([KEEP, REJECT, REJECT], "reject", REASONS[0]),
        ([("reject", REASONS[3]), ("reject", REASONS[1]), ("reject", REASONS[1])], "reject", REASONS[1]),
        ([("fix", "one"), KEEP], "fix", "one"),
        ([("fix", "one"), ("fix", "two"), REJECT], "fix", "two"),
    ],
)
def test_several_opinions_become_one_decision(
    database: Path, opinions: list[tuple[str, ...]], verdict: str, more: str
) -> None:
    save_opinions(database, pair(3), *((f"reviewer {n}", *opinion) for n, opinion in enumerate(opinions)))
    decision = decisions(database)[pair(3).target.key]
    assert (decision.verdict, decision.reason or decision.caption) == (verdict, more)
    assert len(decision.reviewers) == len(opinions)


def test_a_new_opinion_replaces_the_old_one_and_undo_restores_it(database: Path) -> None:
    review, one = Review(database, opinions=1), pair(4)
    number = numbers(database)[one.target.key]
    save_opinions(database, one, ("Ann", "keep"), ("Ann", "reject", REASONS[1]))
    assert decisions(database)[one.target.key].verdict == "reject"
    assert review.undo("Ann") == number
    assert decisions(database)[one.target.key].verdict == "keep"
    assert review.undo("Ann") == number
    assert decisions(database) == {}
    assert number in review.state("Ann")["open"]
    assert review.undo("Ann") is None


def test_a_repeated_opinion_is_undone_once(database: Path) -> None:
    save_opinions(database, pair(0), ("Ann", "keep"))
    save_opinions(database, pair(1), ("Ann", "keep"), ("Ann", "keep"))
    assert Review(database).undo("Ann") == numbers(database)[pair(1).target.key]
    assert list(decisions(database)) == [pair(0).target.key]


def test_undo_affects_only_the_reviewers_own_opinion(database: Path) -> None:
    save_opinions(database, pair(0), ("Ann", "keep"), ("Bob", "keep"))
    assert Review(database).undo("Ann") is not None
    assert decisions(database)[pair(0).target.key].reviewers == ("Bob",)


def test_different_spellings_of_a_name_are_one_reviewer(database: Path) -> None:
    save_opinions(database, pair(0), ("  Zoe\u0308 \t Q ", "keep"), ("Zoë Q", "reject", REASONS[0]))
    assert decisions(database)[pair(0).target.key].reviewers == ("Zoë Q",)


@pytest.mark.parametrize(
    ("opinion", "sentence"),
    [
        (Opinion("", "keep"), "reviewer's name is empty or too long"),
        (Opinion("x" * 41, "keep"), "reviewer's name is empty or too long"),
        (Opinion("A\0n", "keep"), "control characters"),
        (Opinion("Ann", "maybe"), "no verdict 'maybe'"),
        (Opinion("Ann", "reject"), "no reason ''"),
        (Opinion("Ann", "reject", "dull"), "no reason 'dull'"),
        (Opinion("Ann", "fix", caption=" \n "), "caption is empty or too long"),
        (Opinion("Ann", "fix", caption="x" * 2001), "caption is empty or too long"),
        (Opinion("Ann", "fix", caption="\ud800"), "control characters"),
        (Opinion("Ann", "fix", caption=" person 0 smiling  on a beach"), "caption is unchanged"),
    ],
)
def test_invalid_opinions_are_one_sentence(database: Path, opinion: Opinion, sentence: str) -> None:
    with pytest.raises(ImagineError, match=sentence):
        Review(database).decide(numbers(database)[pair(0).target.key], opinion)
    assert decisions(database) == {}


def test_a_pair_that_left_the_queue_cannot_be_decided_on(database: Path) -> None:
    number = numbers(database)[pair(0).target.key]
    open_queue([pair(1)], database)
    with pytest.raises(GoneError, match="no longer"):
        Review(database).decide(number, Opinion("Ann", "keep"))


# --- several reviewers ------------------------------------------------------------------------------------------------


def work(review: Review, reviewer: str, verdict: str = "keep") -> list[int]:
    """Give one verdict on the whole queue and return the pairs decided on."""
    done = []
    while waiting := review.state(reviewer)["open"]:
        reason = REASONS[0] if verdict == "reject" else ""
        review.decide(waiting[0], Opinion(reviewer, verdict, reason))
        done.append(waiting[0])
    return done


def test_reviewers_see_other_opinions_only_after_their_own(database: Path) -> None:
    review = Review(database)
    number = numbers(database)[pair(0).target.key]
    save_opinions(database, pair(0), ("Ann", "reject", REASONS[2]))
    assert review.pair(number, "Bob")["others"] == []
    assert "Ann" not in json.dumps(review.pair(number, "Bob"))
    save_opinions(database, pair(0), ("Bob", "keep"))
    (other,) = review.pair(number, "Bob")["others"]
    assert (other["reviewer"], other["reason"]) == ("Ann", REASONS[2])
    assert review.pair(number, "Bob")["mine"]["verdict"] == "keep"


def test_a_share_of_the_pairs_needs_a_second_opinion(tmp_path: Path) -> None:
    open_queue(pairs(200), tmp_path / FILE)
    review = Review(tmp_path / FILE, opinions=2, overlap=0.25)
    ann, bob = set(work(review, "Ann")), set(work(review, "Bob"))
    assert len(ann) == 200
    assert 30 <= len(bob) <= 70, "about a quarter of 200, selected by hash"
    assert work(review, "Cy") == []
    assert review.state("Ann")["progress"] == {"pairs": 200, "decided": 200, "complete": 200, "yours": 200, "open": 0}
    assert review.state("Bob")["agreement"] == {
        "num_pairs": len(bob),
        "share": 1.0,
        "kappa": None,
        "reviewers": ({"first": "Ann", "second": "Bob", "num_pairs": len(bob), "share": 1.0, "kappa": None},),
    }


def test_each_reviewer_has_a_different_order(tmp_path: Path) -> None:
    open_queue(pairs(40), tmp_path / FILE)
    review = Review(tmp_path / FILE)
    ann, bob = review.state("Ann")["open"], review.state("Bob")["open"]
    assert sorted(ann) == sorted(bob)
    assert ann != bob
    assert review.state("Ann")["open"] == ann


def test_a_tie_needs_one_more_opinion(database: Path) -> None:
    review = Review(database, opinions=2, overlap=1.0)
    work(review, "Ann", "keep")
    work(review, "Bob", "reject")
    assert len(work(review, "Cy", "reject")) == 6
    assert {decision.reason for decision in decisions(database).values()} == {REASONS[0]}
    assert work(review, "Di") == []


def test_concurrent_reviewers_lose_nothing(tmp_path: Path) -> None:
    """Six threads decide and undo while a build fills the queue repeatedly."""
    open_queue(pairs(30), tmp_path / FILE)
    review = Review(tmp_path / FILE, opinions=6, overlap=1.0)
    names = [f"reviewer {n}" for n in range(6)]

    def reviewing(name: str) -> int:
        for number in review.state(name)["open"]:
            review.decide(number, Opinion(name, "keep"))
            if number % 7 == 0:
                assert review.undo(name) == number
                review.decide(number, Opinion(name, "reject", REASONS[0]))
        return len(review.state(name)["done"])

    with ThreadPoolExecutor(7) as threads:
        counts = threads.map(reviewing, names)
        filling = threads.submit(lambda: [open_queue(pairs(30), tmp_path / FILE) for _ in range(5)])
        assert list(counts) == [30] * 6
        assert filling.result() == [30] * 5
    verdicts = {key: decision.verdict for key, decision in decisions(tmp_path / FILE).items()}
    sevenths = {key for key, number in numbers(tmp_path / FILE).items() if number % 7 == 0}
    assert verdicts == {one.target.key: "reject" if one.target.key in sevenths else "keep" for one in pairs(30)}


# --- agreement --------------------------------------------------------------------------------------------------------


def test_cohens_kappa_matches_a_textbook_example() -> None:
    """Two raters of 50 items: 20 both yes, 15 both no, 5 yes and no, 10 no and yes."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen(first, second) == pytest.approx(0.4)
    assert cohen(second, first) == pytest.approx(0.4)
    assert cohen(["a", "b"], ["b", "a"]) == pytest.approx(-1.0)
    assert cohen(["a", "a"], ["a", "a"]) is None


def test_fleiss_kappa_matches_a_textbook_example() -> None:
    """Fourteen raters, ten items, five categories: kappa 0.210."""
    table = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    ratings = [["abcde"[n] for n, count in enumerate(row) for _ in range(count)] for row in table]
    assert fleiss(ratings) == pytest.approx(0.210, abs=5e-4)
    assert fleiss([["a", "b"], ["b", "a"]]) == pytest.approx(-1.0)
    assert fleiss([["a", "a"]]) is None
    assert fleiss([]) is None


def test_agreement_ignores_items_with_one_opinion() -> None:
    opinions = [
        {"Ann": "keep"},
        {"Ann": "keep", "Bob": "keep"},
        {"Ann": "keep", "Bob": "reject", "Cy": "reject"},
        {"Bob": "reject", "Cy": "reject"},
        {},
    ]
    found = agreement(opinions)
    assert found.num_pairs == 3
    assert found.share == pytest.approx((1 + 1 / 3 + 1) / 3)
    measured = {(two.first, two.second): (two.num_pairs, two.share) for two in found.reviewers}
    assert measured == {("Ann", "Bob"): (2, 0.5), ("Ann", "Cy"): (1, 0.0), ("Bob", "Cy"): (2, 1.0)}
    assert agreement([{"Ann": "keep"}]).share is None


# --- the interface ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A server under test."""

    database: Path
    port: int

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def get(self, path: str) -> Any:
        status, _, body = self.request("GET", path)
        assert status == 200, body
        return json.loads(body)

    def post(self, path: str, content: object) -> tuple[int, Any]:
        body = json.dumps(content).encode()
        status, _, answer = self.request("POST", path, body, {"Content-Type": "application/json"})
        return status, json.loads(answer)


@pytest.fixture
def site(database: Path) -> Iterator[Site]:
    server = ReviewServer(Review(database, opinions=2, overlap=1.0), port=0)
    with served(server):
        yield Site(database, server.server_port)


def test_a_review_over_http(site: Site) -> None:
    state = site.get("/api/state?reviewer=Ann%20B")
    assert (state["reviewer"], state["reasons"]) == ("Ann B", list(REASONS))
    assert len(state["open"]) == 6
    number = state["open"][0]
    shown = site.get(f"/api/pairs/{number}?reviewer=Ann%20B")
    kinds = [site.request("GET", f"/pictures/{shown[side]}")[1]["content-type"] for side in ("reference", "target")]
    assert kinds == ["image/jpeg", "image/png"]
    status, state = site.post("/api/decisions", {"reviewer": "Ann B", "pair": number, "verdict": "keep"})
    assert (status, state["done"], state["progress"]["decided"]) == (200, [number], 1)
    status, state = site.post("/api/undo", {"reviewer": "Ann B"})
    assert (status, state["pair"], state["done"]) == (200, number, [])
    assert site.post("/api/undo", {"reviewer": "Ann B"})[1]["pair"] is None


def test_the_page_loads_nothing_from_elsewhere(site: Site) -> None:
    status, headers, body = site.request("GET", "/?reviewer=Ann")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert b"http://" not in body and b"https://" not in body
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/favicon.ico", 404),
        ("GET", "/../review.py", 404),
        ("GET", "/pictures/" + "0" * 64, 404),
        ("GET", "/pictures/../../etc/passwd", 404),
        ("GET", "/api/state", 400),
        ("GET", "/api/state?reviewer=", 400),
        ("GET", "/api/state?reviewer=%00", 400),
        ("GET", "/api/pairs/99999?reviewer=Ann", 404),
        ("GET", "/api/pairs/-1?reviewer=Ann", 404),
        ("GET", "/api/pairs/9999999999999999999999?reviewer=Ann", 404),
        ("GET", "/api/pairs/1", 400),
        ("GET", "/api/undo", 405),
        ("POST", "/api/state", 404),
    ],
)
def test_wrong_addresses_get_one_sentence(site: Site, method: str, path: str, status: int) -> None:
    found, headers, body = site.request(method, path)
    assert found == status
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["error"].endswith(".")


JSON = {"Content-Type": "application/json"}
GOOD = {"reviewer": "Ann", "pair": 1, "verdict": "keep"}


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", JSON, 400),
        (b"\xff\xfe", JSON, 400),
        (b"[" * 30000, JSON, 400),
        (b"[]", JSON, 400),
        (b"{}", JSON, 400),
        (json.dumps({**GOOD, "pair": "1"}).encode(), JSON, 400),
        (json.dumps({**GOOD, "pair": True}).encode(), JSON, 400),
        (json.dumps({**GOOD, "pair": 10**30}).encode(), JSON, 400),
        (json.dumps({**GOOD, "pair": 4000}).encode(), JSON, 404),
        (json.dumps({**GOOD, "reviewer": 5}).encode(), JSON, 400),
        (json.dumps({**GOOD, "verdict": "maybe"}).encode(), JSON, 400),
        (json.dumps({**GOOD, "verdict": "reject", "reason": ["x"]}).encode(), JSON, 400),
        (json.dumps({**GOOD, "verdict": "fix", "caption": "\ud800"}).encode(), JSON, 400),
        # another page can post this without a preflight request
        (json.dumps(GOOD).encode(), {"Content-Type": "text/plain"}, 415),
        (json.dumps(GOOD).encode(), {**JSON, "Origin": "http://elsewhere.example"}, 403),
        (json.dumps(GOOD).encode(), {**JSON, "Origin": "null"}, 403),
        (json.dumps(GOOD).encode(), {**JSON, "Host": "elsewhere.example"}, 403),
        (b"", {**JSON, "Content-Length": "-5"}, 411),
        (b"", {**JSON, "Content-Length": str(LARGEST_BODY + 1)}, 413),
    ],
)
def test_bad_posts_change_nothing(site: Site, body: bytes, headers: dict[str, str], status: int) -> None:
    found, _, answer = site.request("POST", "/api/decisions", body, headers)
    assert found == status, answer
    assert json.loads(answer)["error"].endswith(".")
    assert decisions(site.database) == {}
    assert site.post("/api/decisions", GOOD)[0] == 200, "the server still accepts a valid post"


def test_concurrent_reviewers_over_http(site: Site) -> None:
    barrier = threading.Barrier(4)  # all read their queue first: a pair with two opinions is no longer open

    def reviewing(name: str) -> int:
        numbers = site.get(f"/api/state?reviewer={name}")["open"]
        barrier.wait(timeout=60)
        for number in numbers:
            assert site.post("/api/decisions", {"reviewer": name, "pair": number, "verdict": "keep"})[0] == 200
        return len(site.get(f"/api/state?reviewer={name}")["done"])

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(reviewing, ["Ann", "Bob", "Cy", "Di"])) == [6] * 4
    assert [len(decision.reviewers) for decision in decisions(site.database).values()] == [4] * 6


def test_a_used_port_is_one_sentence(site: Site) -> None:
    with pytest.raises(ConfigError, match=f"Port {site.port} cannot be used"):
        ReviewServer(Review(site.database), site.port)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no review at"),
        (["--port", "70000"], "no port 70000"),
        (["--overlap", "2"], "overlap of 2.0 is not a share"),
        (["--opinions", "0"], "0 opinions"),
        (["--reviewer", " "], "reviewer's name"),
    ],
)
def test_wrong_options_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    from data_synth.__main__ import main

    assert main(["review", str(tmp_path), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_serves_until_it_is_interrupted(database: Path) -> None:
    command = [sys.executable, "-m", "data_synth", "review", str(database.parent), "--port", "0", "--reviewer", "Ann B"]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background processes ignore SIGINT by default
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        try:
            assert line.startswith("6 pairs to review: open http://127.0.0.1:")
            address = line.split("open ")[1].split()[0]
            assert address.endswith("/?reviewer=Ann%20B")
            port = int(address.split(":")[2].split("/")[0])
            assert Site(database, port).request("GET", "/")[0] == 200
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
