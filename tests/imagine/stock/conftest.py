"""Tiny pipelines of Stable Diffusion 1.5 and XL, as stock and as ours, for the tests that run on both."""

from typing import Any

import pytest

from tests import tiny_stock


@pytest.fixture(scope="module", params=[False, True], ids=["sd15", "sdxl"])
def xl(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def stock(xl: bool) -> Any:
    return tiny_stock.stock(xl)


@pytest.fixture(scope="module")
def pipe(xl: bool) -> Any:
    return tiny_stock.personal(tiny_stock.stock(xl))
