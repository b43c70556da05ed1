"""The endpoint of captioners and rewriters."""

from collections.abc import Iterator

import pytest

from tests.chat_endpoint import Stub


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """A local chat endpoint; a request that does not have the format of the interface fails the test."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Stub()
    yield made
    made.close()
    assert made.malformed == []
