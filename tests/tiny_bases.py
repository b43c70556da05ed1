"""Folders as they are downloaded from the hub, at tiny random sizes, and a hub on this machine that serves them."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch
from safetensors.torch import save_file

from tests import tiny_ip, tiny_stock

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def save_base(folder: Path, xl: bool = False, variant: str | None = None) -> Path:
    """Save a stock pipeline whose U-Net fits `save_ip_adapter`."""
    import diffusers

    parts = {**tiny_stock.components(xl), "unet": tiny_ip.unet(xl)}
    stock: Any = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    pipe = stock(**parts)
    if variant == "fp16":
        pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder, variant=variant)
    return folder


def save_ip_adapter(file: Path, kind: str = "plus", xl: bool = False, with_encoder: bool = True) -> Path:
    """Save an IP-Adapter's file, with its image encoder in `image_encoder` beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tiny_ip.tensors(kind, tiny_ip.unet(xl)), file)
    if with_encoder:
        tiny_ip.encoder().save_pretrained(file.parent / "image_encoder")
    return file


@contextmanager
def serve(repositories: Mapping[str, Path]) -> Iterator[str]:
    """Serve folders as repositories of a hub; yield its address. Only what the client asks for here is implemented."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(True)

        def do_HEAD(self) -> None:
            self._answer(False)

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            path = unquote(urlparse(self.path).path)
            for name, folder in repositories.items():
                if path.startswith(f"/api/models/{name}/tree/"):
                    return self._send(json.dumps(tree(folder)).encode(), with_body, {})
                if path.startswith(f"/api/models/{name}"):
                    revision = path.rpartition("/revision/")[2] if "/revision/" in path else "main"
                    if revision in ("main", COMMIT, "v1"):
                        return self._send(json.dumps(described(name, folder)).encode(), with_body, {})
                if path.startswith(f"/{name}/resolve/"):
                    file = folder / path.removeprefix(f"/{name}/resolve/").partition("/")[2]
                    if file.is_file():
                        content = file.read_bytes()
                        etag = hashlib.sha256(content).hexdigest()
                        return self._send(content, with_body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            self.send_response(404)
            missing = "RevisionNotFound" if any(name in path for name in repositories) else "RepoNotFound"
            self.send_header("X-Error-Code", missing)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, content: bytes, with_body: bool, headers: Mapping[str, str]) -> None:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def files_of(folder: Path) -> dict[str, int]:
    """Return the sizes of a folder's files by their paths within it."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }


def described(name: str, folder: Path) -> dict[str, Any]:
    siblings = [{"rfilename": file, "size": size} for file, size in files_of(folder).items()]
    return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False}


def tree(folder: Path) -> list[dict[str, Any]]:
    return [{"type": "file", "path": file, "size": size, "oid": "0"} for file, size in files_of(folder).items()]
