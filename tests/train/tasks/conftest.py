"""No test of a task leaves a stop to the next one."""

from collections.abc import Iterator

import pytest

from tests.stopping import StopsOnce


@pytest.fixture(autouse=True)
def _reset_stop() -> Iterator[None]:
    yield
    StopsOnce.stop_at = -1
