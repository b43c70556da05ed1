"""Kill the server and its worker (SIGKILL) at random moments under load, and look whether a job was lost or done twice.

    python benchmarks/serving_kills.py --kills 20

Each round starts the server on the same folder, sends requests, and kills the web process, the worker, or both. At the
end the server runs until nothing is open. Every accepted job must have ended, its pictures must be there once, and
every file must belong to a row.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENDS = ("succeeded", "failed", "canceled", "expired")


@dataclass
class Trial:
    """A folder with a server that is killed again and again."""

    folder: Path
    weights: Path | None
    requests: list[dict[str, Any]]
    rng: random.Random
    accepted: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    process: "subprocess.Popen[bytes] | None" = None
    url: str = ""

    def start(self) -> None:
        """Start the server and wait until it answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        settings = self.folder / "settings.yaml"
        settings.write_text("max_attempts: 100\nmax_queue_per_owner: 400\nlease: 6\ndrain: 1\n")
        command = [sys.executable, "-m", "imagine", "serve", "--port", str(port), "--folder", str(self.folder)]
        command += ["--settings", str(settings), "--device", "cpu"]
        command += [] if self.weights is None else ["--weights", str(self.weights)]
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + 300
        while self.ask("GET", "/healthz") is None:
            if time.monotonic() > end or self.process.poll() is not None:
                raise SystemExit((self.folder / "log.txt").read_text()[-3000:])
            time.sleep(0.1)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request; return the answer, or None if the server is not there."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.loads(answer.read() or b"{}")
        except (urllib.error.URLError, OSError, ValueError):
            return None

    def round(self, seconds: float) -> None:
        """Send requests for a random time below `seconds`, then kill something."""
        end = time.monotonic() + self.rng.uniform(0.05, seconds)
        while time.monotonic() < end:
            if len(self.accepted) < 400 and (made := self.ask("POST", "/v1/pictures", self.rng.choice(self.requests))):
                self.accepted.append(made["id"])
            time.sleep(self.rng.uniform(0.0, 0.3))
        what = self.rng.choice(("web", "worker", "both"))
        self.kills[what] += 1
        assert self.process is not None
        workers = children_of(self.process.pid)
        if what in ("worker", "both"):
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
        if what in ("web", "both"):
            self.process.kill()
            self.process.wait()
            wait_for_end(workers)
            self.start()

    def finish(self, patience: float) -> None:
        """Let the server run until every accepted job has ended, or until none has ended for `patience` seconds."""
        open_jobs, last = list(self.accepted), time.monotonic()
        while open_jobs and time.monotonic() < last + patience:
            still = [job for job in open_jobs if (self.ask("GET", f"/v1/jobs/{job}") or {}).get("state") not in ENDS]
            if len(still) < len(open_jobs):
                open_jobs, last = still, time.monotonic()
                print(f"{len(open_jobs)} jobs left", file=sys.stderr)
            time.sleep(0.5)
        self.stop()

    def stop(self) -> None:
        """Stop the server in order."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)

    def verdict(self) -> dict[str, Any]:
        """Return what became of the accepted jobs, from the database itself."""
        from imagine.serving.settings import ServeSettings
        from imagine.serving.store.store import Store

        store = Store.open(ServeSettings(folder=self.folder))
        states, faults, kept = Counter[str](), list[str](), set[str]()
        for job in self.accepted:
            found = store.jobs.find(job)
            if found is None or not found.ended:
                faults.append(f"{job} was lost: {found.state if found else 'no row'}")
                continue
            states[found.state] += 1
            rows = store.jobs.pictures_of(job)
            ends = [event.kind for event in store.jobs.events_after(0, job) if event.kind in ENDS]
            if len(ends) != 1 or len(rows) != (found.count if found.state == "succeeded" else 0):
                faults.append(f"{job} ended {len(ends)} times with {len(rows)} pictures")
            if found.state == "failed" and not found.error:
                faults.append(f"{job} failed without a reason")
            for row in rows:
                path = store.files.picture(row.id, row.media)
                kept.add(path.name)
                if not path.is_file() or not path.stat().st_size:
                    faults.append(f"{job} has no file for a picture")
        store.remove_left_over_files(older=0)
        extra = {path.name for path in store.files.pictures.iterdir()} - kept
        extra -= {name for name in extra if store.people.is_known(name.split(".")[0])}
        faults += [f"file without a row: {name}" for name in extra]
        store.close()
        return {"accepted": len(self.accepted), "states": dict(states), "kills": dict(self.kills), "faults": faults}


def children_of(parent: int) -> list[int]:
    """Return the ids of the processes that a process has started (Linux)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found.append(int(entry.name))
    return found


def wait_for_end(processes: list[int], within: float = 90.0) -> None:
    """Wait until processes have ended, as workers do by themselves when their server is killed."""
    end = time.monotonic() + within
    while any(Path(f"/proc/{each}").exists() for each in processes) and time.monotonic() < end:
        time.sleep(0.1)


def trial(folder: Path, kills: int, seed: int, weights: Path | None, steps: int, seconds: float) -> dict[str, Any]:
    """Kill a server so many times under load, and return the verdict."""
    requests = [
        {"prompt": "a person smiling on a beach", "steps": steps + more, "n": 1 + more % 2} for more in range(3)
    ]
    tried = Trial(folder, weights, requests, random.Random(seed))
    tried.start()
    try:
        for number in range(kills):
            tried.round(seconds)
            print(f"kill {number + 1} of {kills}: {len(tried.accepted)} jobs accepted", file=sys.stderr)
        tried.finish(patience=300)
    finally:
        tried.stop()
    return tried.verdict()


def main() -> int:
    """Kill a server, print the verdict, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=8.0, help="longest time between two kills (default: 8)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = trial(Path(folder), options.kills, options.seed, options.weights, options.steps, options.seconds)
    print(json.dumps(found, indent=1))
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
