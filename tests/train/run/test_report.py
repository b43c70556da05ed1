"""Reports of a run: averages over images, rows deleted on resume, a bar on terminals, and the measured precision."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from train.run.report import Report, cut_rows, faster_precision


def test_a_row_holds_averages_over_images(tmp_path: Path) -> None:
    with Report(tmp_path, "one", images=100, images_seen=10, every=1e9) as report:
        report.count({"loss": torch.tensor(1.0)}, 30)
        report.count({"loss": 4.0, "rare": 7.0}, 10)
        report.row_if_due(50, {})
        assert not report.path.exists()
        report.row(50, {"lr": 0.5})
        report.row(50, {"lr": 0.5})  # nothing new: no row
    row = json.loads(report.path.read_text())
    assert (row["images_seen"], row["loss"], row["rare"], row["lr"]) == (50, 1.75, 7.0, 0.5)


def test_trackers_receive_the_same_numbers_under_the_stages_name(tmp_path: Path) -> None:
    calls: list[tuple[dict[str, float], int]] = []
    with Report(tmp_path, "one", 100, 0, every=0, track=lambda numbers, seen: calls.append((numbers, seen))) as report:
        report.count({"loss": torch.tensor(0.25)}, 50)
        report.row(50, {"lr": 0.5})
        report.validation(50, {"error": 1.0})
    (numbers, seen), validation = calls
    assert seen == 50 and numbers["one/loss"] == 0.25 and numbers["one/lr"] == 0.5 and "one/images_seen" not in numbers
    assert validation == ({"one/validate/error": 1.0}, 50)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_and_lines_elsewhere(
    tmp_path: Path,
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "train")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "160")
    with Report(tmp_path, "one", images=100, images_seen=0, every=0) as report:
        report.count({"loss": 0.25}, 50)
        report.row_if_due(50, {})
    assert ("50/100" in capsys.readouterr().err) == terminal
    assert ("50 of 100 images  loss 0.2500" in caplog.text) != terminal


def test_an_inactive_report_writes_nothing(tmp_path: Path) -> None:
    calls: list[int] = []
    track = lambda _, seen: calls.append(seen)  # noqa: E731
    with Report(tmp_path, "one", images=100, images_seen=0, every=0, active=False, track=track) as report:
        report.row(50, {})
        report.validation(50, {"error": 1.0})
    assert list(tmp_path.iterdir()) == [] and calls == []


def test_later_rows_and_a_truncated_last_row_are_deleted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"images_seen": seen}) for seen in (10, 20, 30)]
    path.write_text("\n".join([*rows, '{"images_se']))
    cut_rows(path, 20)
    assert path.read_text().splitlines() == rows[:2]


def test_a_busy_moment_does_not_decide_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    now, turns = 0.0, itertools.count()

    def clock() -> float:
        nonlocal now
        now += 0.008 if next(turns) < 12 else 0.001  # the first products are slow, as on a busy machine
        return now

    monkeypatch.setattr("train.run.report.time.perf_counter", clock)
    assert faster_precision(torch.device("cpu"))[1].count("1.00 ms") == 2


def test_the_faster_precision_is_measured_on_the_device() -> None:
    name, words = faster_precision(torch.device("cpu"))
    assert name in ("fp32", "bf16") and "fp32" in words and "bf16" in words
