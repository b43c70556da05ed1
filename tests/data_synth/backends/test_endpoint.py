"""Test the client of chat endpoints against a local server that can return any error."""

import base64
import io
import time
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from data_synth.backends.captioners import DESCRIBE, EndpointCaptioner
from data_synth.backends.chat import EMPTY, REFUSED, TRUNCATED, Question, tidy
from data_synth.backends.contracts import Failed, Target
from data_synth.backends.endpoint import DENIED, DOWN, REJECTED, Endpoint, EndpointSettings
from data_synth.backends.rewriters import EndpointRewriter
from data_synth.records import Reference
from imagine.errors import ConfigError
from tests import tiny_models
from tests.chat_endpoint import Reply, Stub, completion, text_of, trouble


def client(stub: Stub, **settings: Any) -> Endpoint:
    fast = {"first_wait": 0.01, "timeout": 5.0, **settings}
    endpoint = Endpoint(EndpointSettings(model="some/model", url=stub.url, **fast))
    endpoint.load()
    return endpoint


def test_a_request_has_the_format_of_the_interface(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    endpoint = client(stub, key_from="SOME_KEY", max_tokens=50, body={"top_p": 0.9})
    assert endpoint.answer([Question("Who?", 7)]) == ["A person."]
    assert stub.requests == [
        {
            "model": "some/model",
            "messages": [{"role": "user", "content": "Who?"}],
            "max_tokens": 50,
            "temperature": 0.0,
            "seed": 7,
            "top_p": 0.9,
        }
    ]
    assert stub.headers[0]["Authorization"] == "Bearer secret"
    picky = client(stub, tokens_as="max_completion_tokens", temperature=None, send_seed=False)
    picky.answer([Question("Who?", 7)])
    assert set(stub.requests[1]) == {"model", "messages", "max_completion_tokens"}
    assert "Authorization" not in stub.headers[1]


def test_pictures_are_sent_upright_and_shrunk_as_data_urls(stub: Stub) -> None:
    def describe(number: int, body: dict[str, Any]) -> Reply:
        text, picture = body["messages"][0]["content"]
        assert text == {"type": "text", "text": DESCRIBE} and picture["type"] == "image_url"
        kind, data = picture["image_url"]["url"].split(",")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        return completion(f"A {kind} of {image.format} {image.size}.")

    stub.reply = describe
    file = io.BytesIO()
    sideways = Image.new("RGB", (200, 100), "red").getexif()
    sideways[0x0112] = 6  # stored rotated by 90 degrees
    Image.new("RGB", (200, 100), "red").save(file, "JPEG", exif=sideways)
    captioner = EndpointCaptioner(EndpointCaptioner.Settings(model="m", url=stub.url, longest_side=64))
    captioner.load()
    captions = captioner.caption(
        [Reference("a", file.getvalue()), Reference("b", b"no picture"), tiny_models.reference(1)]
    )
    assert captions[0] == "A data:image/jpeg;base64 of JPEG (32, 64)."
    assert isinstance(captions[1], Failed) and not captions[1].for_now
    assert captions[2] == "A data:image/jpeg;base64 of JPEG (64, 64)."
    assert len(stub.requests) == 2 and stub.requests[0]["seed"] != stub.requests[1]["seed"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_transient_errors_are_retried(stub: Stub, status: int) -> None:
    stub.reply = lambda number, body: trouble(status) if number < 3 else completion("At last.")
    assert client(stub).answer([Question("Who?", 0)]) == ["At last."]
    assert len(stub.requests) == 4


def test_waits_double(stub: Stub) -> None:
    stub.reply = lambda number, body: trouble(503) if number < 4 else completion("At last.")
    client(stub, first_wait=0.05, longest_wait=0.2).answer([Question("Who?", 0)])
    waits = [later - earlier for earlier, later in zip(stub.times, stub.times[1:], strict=False)]
    for wait, most in zip(waits, (0.05, 0.1, 0.2, 0.2), strict=True):  # the last one reaches longest_wait
        assert most / 2 <= wait < most + 0.1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_respected(stub: Stub, form: str) -> None:
    ahead = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))  # between 1 and 2 seconds from now
    header = "0.4" if form == "seconds" else ahead
    stub.reply = lambda number, body: trouble(429, Retry_After=header) if number == 0 else completion("At last.")
    assert client(stub).answer([Question("Who?", 0)]) == ["At last."]
    assert stub.times[1] - stub.times[0] >= (0.4 if form == "seconds" else 0.9)


def test_timeouts_and_invalid_answers_are_deferred(stub: Stub) -> None:
    stub.reply = lambda number, body: None
    began = time.monotonic()
    (hung,) = client(stub, timeout=0.2, retries=1).answer([Question("Who?", 0)])
    assert isinstance(hung, Failed) and hung.for_now and hung.reason == DOWN and "timed out" in hung.sentence
    assert 0.4 <= time.monotonic() - began < 2 and len(stub.requests) == 2
    for nonsense in (b"<html>", b'{"choices": []}', b"[]", completion("A person.")[2][:-9]):
        stub.reply = lambda number, body, nonsense=nonsense: (200, {}, nonsense)  # type: ignore[misc]
        (deferred,) = client(stub, retries=1).answer([Question("Who?", 0)])
        assert isinstance(deferred, Failed) and deferred.for_now, nonsense
    stub.reply = lambda number, body: (200, {"Content-Length": "500"}, completion("A person.")[2])
    (cut,) = client(stub, retries=0, timeout=0.3).answer([Question("Who?", 0)])
    assert isinstance(cut, Failed) and cut.for_now


def test_a_closed_server_is_deferred(stub: Stub) -> None:
    endpoint = client(stub, retries=1)
    stub.server.server_close()
    (deferred,) = endpoint.answer([Question("Who?", 0)])
    assert isinstance(deferred, Failed) and deferred.for_now and deferred.reason == DOWN


def test_an_error_of_one_question_is_permanent_and_affects_no_other(stub: Stub) -> None:
    def picky(number: int, body: dict[str, Any]) -> Reply:
        return trouble(400, "image too large") if text_of(body) == "bad" else completion(f"To {text_of(body)}.")

    stub.reply = picky
    first, bad, last = client(stub).answer([Question("one", 0), Question("bad", 0), Question("two", 0)])
    assert (first, last) == ("To one.", "To two.")
    assert isinstance(bad, Failed) and not bad.for_now and bad.reason == REJECTED and "image too large" in bad.sentence
    assert len(stub.requests) == 3  # no retry


@pytest.mark.parametrize("status", [401, 404, 307])
def test_a_wrong_key_name_or_address_parks_without_retries(stub: Stub, status: int) -> None:
    stub.reply = lambda number, body: trouble(status, "unknown", Location="http://127.0.0.1:9/v1/chat/completions")
    (deferred,) = client(stub).answer([Question("Who?", 0)])
    assert isinstance(deferred, Failed) and deferred.for_now and deferred.reason == DENIED
    assert len(stub.requests) == 1  # no retry, and no redirection was followed


def test_after_repeated_failures_the_rest_is_deferred_without_requests(stub: Stub) -> None:
    stub.reply = lambda number, body: trouble(503)
    endpoint = client(stub, retries=1, at_once=1, patience=3)
    deferred = endpoint.answer([Question("Who?", number) for number in range(20)])
    assert all(isinstance(one, Failed) and one.for_now and one.reason == DOWN for one in deferred)
    assert len(stub.requests) == 6
    stub.reply = lambda number, body: completion("A person.")
    assert endpoint.answer([Question("Who?", 0)]) == ["A person."]  # the next call sends requests again


def test_answers_are_returned_in_order(stub: Stub) -> None:
    def slow_first(number: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.1 if text_of(body) == "0" else 0)
        return completion(f"To {text_of(body)}.")

    stub.reply = slow_first
    questions = [Question(str(number), 0) for number in range(8)]
    assert client(stub, at_once=4).answer(questions) == [f"To {number}." for number in range(8)]


def test_refusals_and_truncated_answers(stub: Stub) -> None:
    stub.reply = lambda number, body: [
        completion(None, refusal="I will not."),
        completion("Half", finish="content_filter"),
        completion("One sentence. And half of", finish="length"),
        completion([{"type": "text", "text": "In "}, {"type": "text", "text": "parts."}]),
    ][int(text_of(body))]
    refused, filtered, cut, parts = client(stub).answer([Question(str(number), 0) for number in range(4)])
    assert isinstance(refused, Failed) and refused.reason == REFUSED
    assert isinstance(filtered, Failed) and filtered.reason == REFUSED
    assert (cut, parts) == ("One sentence.", "In parts.")


@pytest.mark.parametrize(
    ("answer", "tidied"),
    [
        ("<think>Is he old?</think>\nAn old man.", "An old man."),
        ('Sure! Here is the rewritten caption:\n\n"A woman\nsmiles."', "A woman smiles."),
        ("**Caption:** A man with “OK” on it.", "A man with “OK” on it."),
        ('"A", said the woman, "B"', '"A", said the woman, "B"'),
        ("Here, a man sits: he waits.", "Here, a man sits: he waits."),
        ("I'm sorry, but I can't describe people.", REFUSED),
        ("Sorry-looking dogs.", "Sorry-looking dogs."),
        ("Here is a man: he waits.", "Here is a man: he waits."),
        (" \n", EMPTY),
    ],
)
def test_answers_are_tidied(answer: str, tidied: str) -> None:
    result = tidy(answer, complete=True)
    assert (result.reason if isinstance(result, Failed) else result) == tidied


def test_an_unfinished_last_sentence_is_removed() -> None:
    assert tidy('He says "no." She is 1.5 m ta', complete=False) == 'He says "no."'
    cut = tidy("A man with", complete=False)
    assert isinstance(cut, Failed) and cut.reason == TRUNCATED


def test_the_prompt_of_a_rewriter_contains_caption_and_aims(stub: Stub) -> None:
    stub.reply = lambda number, body: completion(text_of(body))
    reference = Reference("r", b"")
    settings = EndpointRewriter.Settings(model="m", url=stub.url, instruction="[{aims}] {caption}")
    rewriter = EndpointRewriter(settings)
    rewriter.load()
    braces = Target(reference, "A {aims} of {style}.", {"gaze": "left", "scene": "beach"}, 3)
    same = Target(reference, "A man.", {}, 4)
    assert rewriter.rewrite([braces, same]) == ["[- gaze: left - scene: beach] A {aims} of {style}.", "A man."]
    assert [body["seed"] for body in stub.requests] == [3]  # no request for the target without aims
    assert stub.requests[0]["temperature"] == 0.7


def test_settings_are_checked_and_only_those_that_change_answers_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="url"):
        EndpointSettings(model="m", url="file:///etc/passwd")
    with pytest.raises(ValidationError, match=r"where \{aims\}"):
        EndpointRewriter.Settings(model="m", instruction="Rewrite {caption}")
    with pytest.raises(ValidationError, match="modle"):
        EndpointCaptioner.Settings(model="m", modle="n")  # type: ignore[call-arg]
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="SOME_KEY"):
        Endpoint(EndpointSettings(model="m", key_from="SOME_KEY")).load()
    hashed = EndpointCaptioner.Settings(model="m").model_dump()
    assert set(hashed) == {"model", "max_tokens", "temperature", "body", "instruction", "longest_side"}
    one, two = (EndpointCaptioner(EndpointCaptioner.Settings(model="m", licence="x", timeout=t)) for t in (1, 2))
    assert one.identity == two.identity and one.identity["model"] == "m" and one.identity["licence"] == "x"
