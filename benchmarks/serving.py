"""Measure a server through HTTP: throughput with and without batching, and a long load of many different people.

    python benchmarks/serving.py throughput --batches 1,8,16 --pictures 64
    python benchmarks/serving.py throughput --batches 1,8,16 --pictures 64 --no-refine-faces
    python benchmarks/serving.py load --people 64 --minutes 10 --max-batch 8

The people are held-out people of the portrait world, enrolled through the API. `load` keeps one request of every person
open all the time. Its report has the latencies, the memory of both processes at the beginning and the end, and what the
judge's recogniser says: in how many pictures the person who was asked for is the most similar of all, beside the same
share for pictures with the same seeds that the library draws alone, and the largest difference between both.
Times are valid for one machine only.
"""

import argparse
import contextlib
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PROMPTS = (
    "a person, laughing", "a person, smiling, in the snow", "a person, looking surprised, on a beach",
    "a person, wearing a sun hat",
)  # fmt: skip


class Client:
    """Asks one server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, method: str, path: str, body: Any = None, timeout: float = 900.0, **headers: str) -> Any:
        """Send a JSON request; return the JSON answer, or the bytes of another one."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"content-type": "application/json", **headers}, method=method
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            content = answer.read()
            return json.loads(content) if "json" in answer.headers.get("content-type", "") else content

    def enroll(self, name: str, photo: bytes) -> str:
        """Make a persona from the file of a photo; return its id."""
        form = (
            f'--x\r\ncontent-disposition: form-data; name="name"\r\n\r\n{name}\r\n--x\r\n'
            'content-disposition: form-data; name="photos"; filename="a.png"\r\ncontent-type: image/png\r\n\r\n'
        )
        data = form.encode() + photo + b"\r\n--x--\r\n"
        request = urllib.request.Request(
            self.url + "/v1/personas", data, {"content-type": "multipart/form-data; boundary=x"}
        )
        with urllib.request.urlopen(request, timeout=900) as answer:
            return str(json.loads(answer.read())["id"])


@contextlib.contextmanager
def server(folder: Path, max_batch: int, weights: Path | None) -> Iterator[tuple[Client, "subprocess.Popen[bytes]"]]:
    """Run `imagine serve` on a free port until its worker is ready, and stop it at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "settings.yaml").write_text("requests_per_minute: 100000\nmax_queue_per_owner: 500\nlease: 120\n")
    command = [sys.executable, "-m", "imagine", "serve", "--port", str(port), "--folder", str(folder)]
    command += ["--max-batch", str(max_batch), "--settings", str(folder / "settings.yaml")]
    command += [] if weights is None else ["--weights", str(weights)]
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    client, end = Client(f"http://127.0.0.1:{port}"), time.monotonic() + 600
    try:
        while True:
            with contextlib.suppress(OSError):
                client.ask("GET", "/readyz", timeout=10)
                break
            if time.monotonic() > end or process.poll() is not None:
                raise SystemExit((folder / "log.txt").read_text()[-3000:])
            time.sleep(0.2)
        yield client, process
    finally:
        process.terminate()
        process.wait(120)


def reference_photos(count: int) -> list[bytes]:
    """Render one photo of each of `count` held-out people, as PNG files."""
    from imagine.evaluation.report import to_pil
    from imagine.evaluation.suites import contexts_for
    from imagine.world import render, sample_people, seeds

    people = range(seeds.HELD_OUT.start, seeds.HELD_OUT.start + count)
    contexts = contexts_for([{"expression": "neutral", "yaw": "front", "gaze": "ahead"}] * count, people)
    photos = []
    for picture in render(sample_people(people), contexts).images:
        encoded = io.BytesIO()
        to_pil(picture).save(encoded, "PNG")
        photos.append(encoded.getvalue())
    return photos


def throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Draw the same pictures with several batch sizes; return pictures a second and latencies of each."""
    photos, found = reference_photos(options.people), {}
    for size in [int(each) for each in options.batches.split(",")]:
        with tempfile.TemporaryDirectory() as folder, server(Path(folder), size, options.weights) as (client, _):
            personas = [client.enroll(f"person {number}", photo) for number, photo in enumerate(photos)]
            bodies = [
                {"prompt": PROMPTS[number % len(PROMPTS)], "persona": personas[number % len(personas)],
                 "seed": number, "refine_faces": options.refine_faces}
                for number in range(options.pictures)
            ]  # fmt: skip
            draw = lambda body: _timed(client, body)  # noqa: E731
            list(map(draw, bodies[:2]))  # warms everything up
            started = time.monotonic()
            with ThreadPoolExecutor(len(bodies)) as pool:
                latencies = list(pool.map(draw, bodies))
            seconds = time.monotonic() - started
        found[size] = {"pictures_per_second": round(len(bodies) / seconds, 3), **_quantiles(latencies)}
        print(f"batches of {size}: {found[size]}", file=sys.stderr)
    return {"pictures": options.pictures, "refine_faces": options.refine_faces, "batches": found}


def _timed(client: Client, body: dict[str, Any]) -> float:
    started = time.monotonic()
    job = client.ask("POST", "/v1/pictures", body, prefer="wait=600")
    if job["state"] != "succeeded":
        raise SystemExit(f"a job {job['state']}: {job['error']}")
    return time.monotonic() - started


def _quantiles(latencies: Sequence[float]) -> dict[str, float]:
    ordered = sorted(latencies)
    return {
        "p50": round(statistics.median(ordered), 2),
        "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2),
        "max": round(ordered[-1], 2),
    }


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Keep one request of every person open for some minutes; return latencies, memory and the judge's verdict."""
    photos, made, memory = reference_photos(options.people), list[dict[str, Any]](), list[dict[str, int]]()
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), options.max_batch, options.weights) as running:
        client, process = running
        personas = [client.enroll(f"person {number}", photo) for number, photo in enumerate(photos)]
        started, end = time.monotonic(), time.monotonic() + 60 * options.minutes

        def person(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < end:
                body = {"prompt": rng.choice(PROMPTS), "persona": personas[number], "seed": rng.randrange(2**31),
                        "refine_faces": options.refine_faces}  # fmt: skip
                asked = time.monotonic()
                job = client.ask("POST", "/v1/pictures", body, prefer="wait=600")
                record = {"person": number, "state": job["state"], "seconds": time.monotonic() - asked, **body}
                if job["state"] == "succeeded":
                    record["png"] = client.ask("GET", job["pictures"][0]["url"])
                with lock:
                    made.append(record)

        with ThreadPoolExecutor(options.people) as pool:
            done = [pool.submit(person, number) for number in range(options.people)]
            while not all(each.done() for each in done):
                memory.append(_memory(process.pid))
                time.sleep(5)
            for each in done:
                each.result()
        seconds = time.monotonic() - started
        jobs = client.ask("GET", "/metrics").decode()
    states = {state: sum(each["state"] == state for each in made) for state in {each["state"] for each in made}}
    return {
        "people": options.people, "minutes": options.minutes, "max_batch": options.max_batch, "states": states,
        "pictures_per_second": round(len(made) / seconds, 3), **_quantiles([each["seconds"] for each in made]),
        "memory_mb": {"after_a_tenth": memory[len(memory) // 10], "end": memory[-1]},
        "open_jobs": [line for line in jobs.splitlines() if 'state="queued"' in line or 'state="running"' in line],
        "identity": verdict(made, photos, options),
    }  # fmt: skip


def verdict(made: Sequence[dict[str, Any]], photos: Sequence[bytes], options: argparse.Namespace) -> dict[str, Any]:
    """Compare pictures of the load with the people who were asked for, and some with those drawn alone."""
    import numpy as np
    import torch
    from PIL import Image

    from imagine import ImaginePipeline
    from imagine.evaluation.judge import Judge
    from imagine.evaluation.report import to_tensor

    def tensors(files: Sequence[bytes]) -> torch.Tensor:
        return torch.stack([to_tensor(Image.open(io.BytesIO(each)).convert("RGB")) for each in files])

    judge = Judge.from_pretrained()
    drawn = [each for each in made if "png" in each]
    gallery = judge.embed(tensors(photos))

    def nearest(files: Sequence[bytes]) -> torch.Tensor:
        return (judge.embed(tensors(files)) @ gallery.T).argmax(1)

    people = torch.tensor([each["person"] for each in drawn])
    right = nearest([each["png"] for each in drawn]) == people
    sample = random.Random(0).sample(drawn, min(options.alone, len(drawn)))
    pipe = ImaginePipeline.from_pretrained(options.weights)
    pipe.set_progress_bar_config(disable=True)
    alone, differences = [], []
    for each in sample:
        image = pipe(
            each["prompt"], reference=photos[each["person"]], refine_faces=options.refine_faces,
            generator=torch.Generator().manual_seed(each["seed"]),
        ).images[0]  # fmt: skip
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        alone.append(encoded.getvalue())
        served = np.asarray(Image.open(io.BytesIO(each["png"])).convert("RGB"), dtype=int)
        differences.append(int(np.abs(served - np.asarray(image, dtype=int)).max()))
    who = torch.tensor([each["person"] for each in sample])
    found = nearest(alone)
    same = found == nearest([each["png"] for each in sample])
    compared = {
        "pictures": len(sample),
        "most_similar_is_right": round(float((found == who).float().mean()), 3),
        "same_verdict_as_served": round(float(same.float().mean()), 3),
        "largest_difference_of_255": max(differences),
        "differing_pictures": sum(map(bool, differences)),
    }
    return {
        "pictures": len(drawn),
        "most_similar_is_right": round(float(right.float().mean()), 3),
        "alone": compared,
    }


def _memory(parent: int) -> dict[str, int]:
    """Return the resident memory, in MB, of the web process and of its workers (Linux)."""
    found = {"web": 0, "worker": 0}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                pages = int((entry / "statm").read_text().split()[1])
                size = pages * os.sysconf("SC_PAGE_SIZE") >> 20
                if int(entry.name) == parent:
                    found["web"] += size
                elif int(fields[1]) == parent:
                    found["worker"] += size
    return found


def main() -> int:
    """Run one measurement and print its report as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, people in (("throughput", throughput, 16), ("load", load, 64)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--people", type=int, default=people)
        command.add_argument("--weights", type=Path)
        command.add_argument("--refine-faces", action=argparse.BooleanOptionalAction, default=True)
        if name == "throughput":
            command.add_argument("--batches", default="1,8,16")
            command.add_argument("--pictures", type=int, default=64)
        else:
            command.add_argument("--minutes", type=float, default=10.0)
            command.add_argument("--max-batch", type=int, default=8)
            command.add_argument("--alone", type=int, default=64, help="pictures that are also drawn alone")
    options = parser.parse_args()
    print(json.dumps(options.run(options), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
