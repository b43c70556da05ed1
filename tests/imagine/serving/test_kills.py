"""SIGKILL of the server and its worker under load; `benchmarks/serving_kills.py` does it twenty times."""

import sys
from pathlib import Path

import pytest

from benchmarks.serving_kills import trial
from tests import tiny


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the worker's process in /proc")
def test_no_accepted_job_is_lost_or_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, folder = tmp_path / "weights", tmp_path / "server"
    tiny.pipeline().save_pretrained(weights)
    folder.mkdir()
    found = trial(folder, kills=3, seed=4, weights=weights, steps=4, seconds=4.0)
    assert found["faults"] == [] and found["accepted"] > 0
    assert set(found["states"]) == {"succeeded"} and sum(found["kills"].values()) == 3
