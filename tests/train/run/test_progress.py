"""Long work shows how much is done and the time left, with and without a terminal."""

import logging

import pytest

from train.run.progress import blocks, duration


def test_blocks_cover_every_number_once() -> None:
    assert [list(each) for each in blocks(2, 9, 3, "rendering")] == [[2, 3, 4], [5, 6, 7], [8]]
    assert list(blocks(4, 4, 3, "rendering")) == []


def test_without_a_terminal_log_lines_tell_the_progress(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "train"):
        assert len(list(blocks(1_000, 3_000, 1_000, "rendering portraits", every=0))) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "rendering portraits  2,000 of 3,000  0 s left", "rendering portraits  3,000 of 3,000  0 s left",
    ]  # fmt: skip


def test_short_work_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "train"):
        list(blocks(0, 10, 1, "rendering"))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.6, "10 s"), (60, "1 min"), (3_590, "1 h 00 min"), (12_000, "3 h 20 min")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
