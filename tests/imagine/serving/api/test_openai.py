"""OpenAI's images API, called with the official client against a real server."""

import base64
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests import tiny
from tests.imagine.serving.servers import Running, opened, photo, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("server"), tiny.pipeline(), keys=0) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=60) as made:
        yield made


def size_of(data: Any) -> tuple[int, int]:
    return opened(base64.b64decode(data.b64_json)).size


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["imagine"]
    assert client.models.retrieve("imagine").owned_by == "imagine"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"


def test_generations(client: openai.OpenAI, server: Running) -> None:
    out = client.images.generate(
        model="imagine", prompt="smiling on a beach", n=2, size="32x32", quality="low", output_format="jpeg",
        output_compression=80, moderation="low", background="opaque", user="u1", extra_body={"seed": 3},
    )  # fmt: skip
    assert out.data is not None and [size_of(each) for each in out.data] == [(32, 32)] * 2
    assert (out.size, out.output_format, out.quality) == ("32x32", "jpeg", "low") and out.usage is not None
    by_url = client.images.generate(prompt="smiling on a beach", response_format="url", extra_body={"steps": 2})
    assert by_url.data is not None and by_url.data[0].url is not None
    with server.client() as plain:
        assert opened(plain.get(by_url.data[0].url).content).format == "PNG"


def test_generations_of_a_persona(client: openai.OpenAI, server: Running) -> None:
    with server.client() as plain:
        files = [("photos", ("a.png", photo(1)))]
        persona = plain.post("/v1/personas", data={"name": "Ann"}, files=files).json()["id"]
    bodies: list[dict[str, Any]] = [{"persona": persona}, {"persona": {"ann": persona}}, {}]
    seen = []
    for body in bodies:
        prompt = "{ann} smiling" if isinstance(body.get("persona"), dict) else "the person smiling"
        options = {**body, "seed": 5, "num_inference_steps": 2}
        out = client.images.generate(prompt=prompt, extra_body=options)
        assert out.data is not None
        seen.append(opened(base64.b64decode(out.data[0].b64_json or "")).tobytes())
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("several", [False, True])
def test_edits(client: openai.OpenAI, several: bool) -> None:
    one = ("a.png", photo(1), "image/png")
    images: Any = [one, ("b.jpg", photo(2, "JPEG"), "image/jpeg")] if several else one
    out = client.images.edit(image=images, prompt="smiling", input_fidelity="high", n=1, extra_body={"steps": 2})
    assert out.data is not None and size_of(out.data[0]) == (32, 32)


def test_edits_with_a_json_body(client: openai.OpenAI, server: Running) -> None:
    url = "data:image/png;base64," + base64.b64encode(photo(1)).decode()
    with server.client() as plain:
        upload = plain.post("/v1/uploads", files=[("photos", ("a.png", photo(1)))]).json()[0]["id"]
        seen = []
        for image in ({"image_url": url}, {"file_id": upload}):
            body = {"prompt": "smiling", "images": [image], "steps": 2, "seed": 1}
            answer = plain.post("/v1/images/edits", json=body)
            assert answer.status_code == 200, answer.text
            seen.append(opened(base64.b64decode(answer.json()["data"][0]["b64_json"])).tobytes())
        assert seen[0] == seen[1]
        for image in ({"image_url": "http://127.0.0.1:1/x.png"}, {"image_url": "file:///etc/passwd"}, {}):
            refused = plain.post("/v1/images/edits", json={"prompt": "x", "images": [image]})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "images"


def test_streams_have_partial_and_completed_events(client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt="smiling", stream=True, partial_images=2, extra_body={"steps": 60})
    kinds = [event.type for event in stream]
    assert kinds[-1] == "image_generation.completed"
    assert set(kinds[:-1]) <= {"image_generation.partial_image"} and len(kinds) >= 2
    one = ("a.png", photo(1), "image/png")
    edited = [event.type for event in client.images.edit(image=one, prompt="x", stream=True, extra_body={"steps": 2})]
    assert edited[-1] == "image_edit.completed"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"size": "33x33"}, "width"),
        ({"size": "big"}, "size"),
        ({"background": "transparent"}, "background"),
        ({"style": "vivid"}, "style"),
        ({"quality": "hd"}, "quality"),
        ({"n": 11}, "n"),
        ({"partial_images": 1}, "partial_images"),
        ({"output_compression": 50}, "output_compression"),
        ({"prompt": ""}, "prompt"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"extra_body": {"persona": "x"}}, "persona"),
    ],
)
def test_what_cannot_act_is_an_error_that_names_the_field(
    client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(**{"prompt": "smiling", **options})
    assert error.value.param is not None and error.value.param.startswith(param)
    assert error.value.type == "invalid_request_error"


def test_errors_become_the_clients_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt="x", model="gpt-image-2")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as broken:
        client.images.edit(image=("a.png", b"not a picture", "image/png"), prompt="x")
    assert broken.value.code == "photo_not_usable"
    with pytest.raises(openai.BadRequestError) as masked:
        client.images.edit(image=("a.png", photo(1), "image/png"), mask=("m.png", photo(2), "image/png"), prompt="x")
    assert masked.value.code == "invalid_request"


def test_a_wrong_key_is_an_authentication_error(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("keys"), keys=1) as server:
        stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        key = server.store.access.create_key("friend")
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as friend:
            assert [model.id for model in friend.models.list()] == ["imagine"]
