"""Requests that schemathesis makes from the API's own description: no answer is a fault of the server.

The long version is `benchmarks/fuzzing.py`.
"""

from collections.abc import Iterator

import pytest

from benchmarks.fuzzing import fuzz
from tests import tiny
from tests.imagine.serving.servers import Running, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(
        tmp_path_factory.mktemp("server"), tiny.pipeline(), keys=1, requests_per_minute=1e6, longest_wait=1.0
    ) as found:
        yield found


@pytest.mark.filterwarnings("ignore")
def test_no_request_is_a_fault_of_the_server(server: Running) -> None:
    key = server.store.access.create_key("fuzzing")
    tried, failures = fuzz(server.url, examples=4, seed=1, key=key)
    assert failures == [] and tried >= 15
