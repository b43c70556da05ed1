"""What a hostile client can send: each is refused cleanly, and the server goes on."""

import io
import json
import logging
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from imagine.serving.logs import JsonFormatter
from tests.imagine.serving.servers import Running, photo, running

CANARY = "CANARY-5b1d"
PROMPT = {"prompt": "a person smiling"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Return a server without a worker: nothing here should reach one."""
    folder = tmp_path_factory.mktemp("server")
    with running(folder, max_body=200_000, upload_idle=1.0, upload_time=3.0, max_photos=3) as found:
        yield found


@pytest.fixture(autouse=True)
def _goes_on(server: Running) -> Iterator[None]:
    yield
    with server.client() as client:
        assert client.get("/healthz").status_code == 200


def raw(server: Running, data: bytes, *more: bytes, pause: float = 0.0, patience: float = 8.0) -> bytes:
    """Send bytes over a plain connection, further pieces after pauses, and return what comes back."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), patience) as connection:
        connection.sendall(data)
        received = b""
        try:
            for piece in more:
                time.sleep(pause)
                connection.sendall(piece)
            while block := connection.recv(65_536):
                received += block
        except OSError:  # the server has closed the connection while we were still sending
            pass
        return received


def request(path: str = "/v1/pictures", *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: localhost", *lines, "", ""]).encode("latin-1")


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def png(width: int, height: int, data: bytes, extra: bytes = b"") -> bytes:
    """Return a PNG file with this header and compressed data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), extra, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb() -> bytes:
    """Return a small PNG that says that it has 400 million pixels."""
    return png(20_000, 20_000, zlib.compress(b"\0" * 10_000_000, 9))


def text_bomb() -> bytes:
    """Return a PNG with a compressed text of 60 megabytes."""
    body = b"Comment\0\0" + zlib.compress(b"A" * 60_000_000, 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return png(64, 64, zlib.compress(b"\0" * (64 * 193)), chunk)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 500, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a" + b"\0" * 50, photo(1)[:200],
        b"%!PS-Adobe-3.0 EPSF-3.0\n", b"II*\0" + b"\xff" * 100, b"RIFF\0\0\0\0WEBPVP8 ",
        b"\0\0\0\x18ftypheic" + b"\0" * 90,
        bomb(), text_bomb(), png(1, 60_000, b""), png(64, 64, b"no zlib"), png(0, 0, b""),
    ],
    ids=["empty", "zeros", "svg", "gif", "cut", "eps", "tiff", "webp", "heic", "bomb", "text", "strip", "data", "none"],
)  # fmt: skip
def test_what_is_no_photo_is_refused(server: Running, data: bytes) -> None:
    with server.client() as client:
        started = time.monotonic()
        answer = client.post("/v1/uploads", files=[("photos", ("x.png", data))])
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "photo_not_usable"), answer.text
        assert time.monotonic() - started < 20
    assert list(server.store.files.photos.iterdir()) == []


def test_metadata_of_photos_is_not_kept(server: Running) -> None:
    exif = Image.Exif()
    exif[0x010F] = CANARY  # the camera's maker
    exif.get_ifd(0x8825)[1] = CANARY  # GPS
    exif[0x0112] = 6  # turned
    image, encoded = Image.new("RGB", (80, 64), "red"), io.BytesIO()
    image.save(encoded, "JPEG", exif=exif, comment=CANARY.encode())
    assert CANARY.encode() in encoded.getvalue()
    with server.client() as client:
        upload = client.post("/v1/uploads", files=[("photos", (f"{CANARY}.jpg", encoded.getvalue()))]).json()[0]
    assert (upload["width"], upload["height"]) == (64, 80)
    kept = b"".join(path.read_bytes() for path in server.settings.folder.rglob("*") if path.is_file())
    assert CANARY.encode() not in kept
    server.store.people.delete_uploads([upload["id"]], "local")


def test_a_body_that_is_too_large_is_stopped_while_it_arrives(server: Running) -> None:
    with server.client() as client:
        answer = client.post("/v1/pictures", content=b"x" * 300_000, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    declared = raw(server, request("/v1/pictures", "content-length: 99999999999", "content-type: application/json"))
    assert status(declared) == 413
    chunk = b"%x\r\n%s\r\n" % (50_000, b"x" * 50_000)
    head = request("/v1/pictures", "transfer-encoding: chunked", "content-type: application/json")
    endless = raw(server, head, *[chunk] * 50)
    assert status(endless) == 413


def test_a_slow_body_is_stopped(server: Running) -> None:
    head = request("/v1/pictures", "content-length: 100", "content-type: application/json")
    started = time.monotonic()
    assert status(raw(server, head + b"{")) == 408
    dripping = raw(server, head, *[b" "] * 12, pause=0.5)
    assert status(dripping) == 408 and time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [
        ("application/json", b"{", 422),
        ("application/json", b"[]", 422),
        ("application/json", b"\xff\xfe", 422),
        ("application/json", b"[" * 100_000, 422),
        ("application/json", b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}", 422),
        ("application/json", b'{"prompt": "x", "guidance_scale": NaN}', 422),
        ("application/json", b'{"prompt": "x", "seed": 1e400}', 422),
        ("application/json", b'{"prompt": "\\ud800"}', 422),
        ("application/json", b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 422),
        ("text/plain", b"{}", 415),
        ("", b"{}", 415),
        ("application/x-www-form-urlencoded", b"prompt=x", 415),
        ("multipart/form-data", b"x", 422),
        ("multipart/form-data; boundary=x", b"--y\r\n", 422),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n', 422),
    ],
)
def test_bodies_that_cannot_be_read(server: Running, kind: str, body: bytes, code: int) -> None:
    with server.client() as client:
        answer = client.post("/v1/pictures", content=body, headers={"content-type": kind} if kind else {})
        assert answer.status_code == code, answer.text
        assert answer.json()["error"]["message"].endswith(".")


def test_too_many_files_and_fields(server: Running) -> None:
    with server.client() as client:
        many = client.post("/v1/uploads", files=[("photos", ("a.png", photo(1)))] * 4)
        assert (many.status_code, many.json()["error"]["code"]) == (413, "too_large")
        fields = client.post(
            "/v1/pictures", data={f"f{number}": "x" for number in range(100)}, files={"photos": photo(1)}
        )
        assert fields.status_code == 413
        named = client.post("/v1/pictures", data=PROMPT, files=[("../../x", ("a", photo(1)))])
        assert named.status_code == 422
        twice = client.post("/v1/pictures", data={"request": json.dumps(PROMPT), "prompt": ["a", "b"]}, files=[
            ("photos", ("a.png", photo(1)))])  # fmt: skip
        assert twice.status_code == 422


@pytest.mark.parametrize(
    "path",
    [
        "/v1/pictures/../../../etc/passwd", "/v1/pictures/..%2f..%2fetc%2fpasswd/content", "/v1/pictures/%00/content",
        "/v1/personas/per_../file", "/v1/jobs/job_%2e%2e", "/v1/pictures/pic_" + "0" * 31 + "/content", "/v1/%ff",
        "//etc/passwd", "/..%5c..%5cwindows", "/v1/personas/" + "a" * 5000,
    ],
)  # fmt: skip
def test_no_path_leaves_the_api(server: Running, path: str) -> None:
    answer = raw(server, request(path, "connection: close", method="GET"))
    assert status(answer) in (404, 405, 422), answer[:200]
    assert b"root:" not in answer


def test_headers_are_not_reflected(server: Running) -> None:
    injected = raw(server, request("/healthz", "x-request-id: a\tb; set-cookie=x", "connection: close", method="GET"))
    assert status(injected) == 200 and b"set-cookie" not in injected.lower()
    with server.client() as client:
        assert client.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        long = client.get("/healthz", headers={"x-request-id": "x" * 5000})
        assert len(long.headers["x-request-id"]) < 50
        key = client.post("/v1/pictures", json=PROMPT, headers={"idempotency-key": "k" * 500})
        assert key.status_code == 422
    assert status(raw(server, request("/healthz", "x: " + "y" * 2_000_000, method="GET"))) != 200
    assert status(raw(server, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nbroken\r\n\r\n")) == 400
    smuggled = raw(server, request("/v1/pictures", "content-length: 5", "transfer-encoding: chunked") + b"0\r\n\r\n")
    assert status(smuggled) in (400, 415)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:8188"}, 403),
        ({"host": "localhost@evil.example"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:1"}, 403),
        ({}, 200),
    ],
)
def test_pages_of_other_hosts_cannot_use_a_server_without_keys(
    server: Running, headers: dict[str, str], code: int
) -> None:
    with server.client() as client:
        assert client.get("/v1/jobs", headers=headers).status_code == code
        assert client.get("/v1/jobs", headers={"origin": server.url}).status_code == 200
        preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        refused = client.options("/v1/pictures", headers=preflight)
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers


def test_an_allowed_origin_may_call(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cors")
    with running(folder, origins=("https://friend.example",)) as server, server.client() as client:
        headers = {"origin": "https://friend.example", "access-control-request-method": "POST"}
        allowed = client.options("/v1/pictures", headers=headers)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
        assert client.get("/v1/jobs", headers={"origin": "https://evil.example"}).status_code == 403


@pytest.mark.parametrize("asked", [False, True])
def test_logs_hold_neither_names_nor_prompts_unless_asked(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    logger = logging.getLogger("imagine.serving")
    logger.addHandler(caplog.handler)
    try:
        with (
            caplog.at_level(logging.INFO, "imagine.serving"),
            running(tmp_path_factory.mktemp("logs"), log_prompts=asked) as server,
            server.client() as client,
        ):
            files: Any = [("photos", ("NAME-1.png", photo(1)))]
            assert client.post("/v1/pictures", data={"prompt": CANARY}, files=files).status_code == 202
            client.get(f"/v1/pictures/{CANARY}")
            client.get("/v1/jobs", params={"cursor": CANARY})
    finally:
        logger.removeHandler(caplog.handler)
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    assert {"request", "job accepted"} <= {line["event"] for line in lines}
    assert {line["event"] for line in lines if CANARY in str(line)} == ({"job accepted"} if asked else set())
    assert "NAME-1" not in str(lines)
