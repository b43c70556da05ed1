"""A store for the tests of the worker."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from imagine.serving.store.store import Store
from tests.imagine.serving.stores import Clock, settings_of


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(settings_of(tmp_path), Clock())
    yield opened
    opened.close()
