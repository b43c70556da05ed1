"""A build that is killed (SIGKILL) and resumed at random moments gives the same records as an uninterrupted one."""

import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from imagine.shards.reading import open_records
from tests.toy_pairs import contents, started, toy_config

KILLS = 20
CONFIG = toy_config({"count": 12, "pause": 0.001}, chunk=1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted build, and its duration in seconds."""
    output = tmp_path_factory.mktemp("pairs") / "uninterrupted"
    for folder in ("warm", "uninterrupted"):  # the first start also waits for the imports of the fork server
        began = time.monotonic()
        process = started(CONFIG, output.with_name(folder))
        process.join()
        assert process.exitcode == 0
    return output, time.monotonic() - began


def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path, uninterrupted: tuple[Path, float]) -> None:
    expected, seconds = uninterrupted
    rng, kills, runs = random.Random(5), 0, 0
    while kills < KILLS:
        output = tmp_path / str(runs)
        process = started(CONFIG, output)
        # short times too, so that one build is killed several times
        process.join(rng.uniform(0, seconds / rng.choice((1, 3))))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
        else:
            assert process.exitcode == 0 and contents(output) == contents(expected)
            runs += 1  # finished before the kill: start a new build
    process = started(CONFIG, tmp_path / str(runs))
    process.join()
    assert process.exitcode == 0 and contents(tmp_path / str(runs)) == contents(expected)
    keys = [record.key for record in open_records(tmp_path / str(runs), cache=tmp_path / "cache")]
    assert len(keys) == len(set(keys)) > 12, "no duplicates"


def results(folder: Path) -> dict[str, int]:
    """Count the stored results by step; a build may be killed before it creates the table."""
    folder.mkdir(exist_ok=True)
    with sqlite3.connect(folder / "store.sqlite") as store:
        there = store.execute("SELECT name FROM sqlite_master WHERE name = 'results'").fetchone()
        rows = store.execute("SELECT step, count(*) FROM results GROUP BY step").fetchall() if there else []
    return dict(rows)


def test_a_resumed_build_does_not_repeat_finished_work(tmp_path: Path, uninterrupted: tuple[Path, float]) -> None:
    log = tmp_path / "log"
    config = toy_config({"count": 12, "pause": 0.001, "log": str(log)}, chunk=1)
    wait = uninterrupted[1] / 3
    while not (log.exists() and log.read_text().count("generate") >= 8):
        process = started(config, tmp_path / "out")
        wait *= 1.08  # the machine may be slower now than during the uninterrupted build
        process.join(wait)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the build finished before it was killed"
        stored = results(tmp_path / "out")
    log.write_text("")
    process = started(config, tmp_path / "out")
    process.join()
    assert process.exitcode == 0 and contents(tmp_path / "out") == contents(uninterrupted[0])
    total = results(tmp_path / "out")
    for step in ("caption", "generate", "measure"):
        assert log.read_text().count(f"{step} ") == total[step] - stored.get(step, 0)
