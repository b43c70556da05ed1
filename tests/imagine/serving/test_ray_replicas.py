"""The server on Ray Serve, on this machine: one web replica and two denoising replicas share one queue."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from imagine.errors import ConfigError
from imagine.serving.settings import ServeSettings
from imagine.serving.store.store import Store
from tests import tiny
from tests.root import ROOT

ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    import socket

    from ray import serve

    from imagine.serving.ray_replicas import application

    folder = tmp_path_factory.mktemp("ray")
    tiny.pipeline().save_pretrained(folder / "weights")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings: dict[str, Any] = {"folder": folder, "weights": folder / "weights", "device": "cpu", "max_batch": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application({**settings, "replicas": 2, "cpus": 0.1}), route_prefix="/")
        yield f"http://127.0.0.1:{port}", folder
        serve.shutdown()
        ray.shutdown()


def test_two_replicas_share_one_queue(url: tuple[str, Path]) -> None:
    with httpx.Client(base_url=url[0], timeout=60) as client:
        end = time.monotonic() + 120
        while len(client.get("/readyz").json().get("workers", [])) < 2:
            assert time.monotonic() < end
            time.sleep(0.2)
        body = {"prompt": "a person smiling", "steps": 40}
        jobs = [client.post("/v1/pictures", json={**body, "seed": number}).json()["id"] for number in range(8)]
        while any(client.get(f"/v1/jobs/{job}").json()["state"] in ("queued", "running") for job in jobs):
            assert time.monotonic() < end
            time.sleep(0.2)
    store = Store.open(ServeSettings(folder=url[1]))
    found = [store.jobs.find(job) for job in jobs]
    assert [job.state for job in found if job] == ["succeeded"] * 8
    assert len({job.worker for job in found if job}) == 2
    store.close()


def test_a_public_address_needs_a_key(tmp_path: Path) -> None:
    from imagine.serving.ray_replicas import application

    with pytest.raises(ConfigError, match="no API key"):
        application({"folder": tmp_path, "host": "0.0.0.0"})
