"""SIGKILL at any moment: a build that is started again each time ends with the records of one that was left alone."""

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
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A build that was left alone, and how many seconds it took."""
    output = tmp_path_factory.mktemp("pairs") / "straight"
    for folder in ("warm", "straight"):  # the first start waits for the fork server's imports
        began = time.monotonic()
        process = started(CONFIG, output.with_name(folder))
        process.join()
        assert process.exitcode == 0
    return output, time.monotonic() - began


def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path, straight: tuple[Path, float]) -> None:
    expected, seconds = straight
    dice, kills, runs = random.Random(5), 0, 0
    while kills < KILLS:
        output = tmp_path / str(runs)
        process = started(CONFIG, output)
        process.join(dice.uniform(0, seconds / dice.choice((1, 3))))  # short lives too: one build sees many deaths
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
        else:
            assert process.exitcode == 0 and contents(output) == contents(expected)
            runs += 1  # done before its kill came: the next ones meet a new build
    process = started(CONFIG, tmp_path / str(runs))
    process.join()
    assert process.exitcode == 0 and contents(tmp_path / str(runs)) == contents(expected)
    keys = [record.key for record in open_records(tmp_path / str(runs), cache=tmp_path / "cache")]
    assert len(keys) == len(set(keys)) > 12, "no doubles"


def results(folder: Path) -> dict[str, int]:
    """How many results of each step a build's store holds; it may have been killed before it made the table."""
    folder.mkdir(exist_ok=True)
    with sqlite3.connect(folder / "store.sqlite") as store:
        there = store.execute("SELECT name FROM sqlite_master WHERE name = 'results'").fetchone()
        rows = store.execute("SELECT step, count(*) FROM results GROUP BY step").fetchall() if there else []
    return dict(rows)


def test_what_a_killed_build_had_done_is_not_done_again(tmp_path: Path, straight: tuple[Path, float]) -> None:
    log = tmp_path / "log"
    config = toy_config({"count": 12, "pause": 0.001, "log": str(log)}, chunk=1)
    wait = straight[1] / 3
    while not (log.exists() and log.read_text().count("generate") >= 8):
        process = started(config, tmp_path / "out")
        wait *= 1.08  # a machine may be slower now than when the straight run was timed
        process.join(wait)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "too fast to be killed"
        kept = results(tmp_path / "out")
    log.write_text("")
    process = started(config, tmp_path / "out")
    process.join()
    assert process.exitcode == 0 and contents(tmp_path / "out") == contents(straight[0])
    total = results(tmp_path / "out")
    for step in ("caption", "generate", "measure"):
        assert log.read_text().count(f"{step} ") == total[step] - kept.get(step, 0)
