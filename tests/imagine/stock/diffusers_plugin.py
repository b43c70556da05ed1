"""A pytest plugin that runs diffusers' published pipeline tests without a network, on our classes or on its own.

Two environment variables control it. PIPELINES is "ours" or "stock": with "ours", the test modules get the classes of
`imagine.stock` under the names of the stock classes. TOKENIZER is the folder of a small CLIP tokenizer, which the test
modules get instead of the one that they would download.
"""

import os
from typing import Any

import pytest

import imagine.stock
from imagine.stock import STOCK_PIPELINES


def personalised(value: Any) -> Any:
    """Return our class for a stock class that this project supports, and anything else unchanged."""
    name = getattr(value, "__name__", "")
    is_stock = isinstance(value, type) and name in STOCK_PIPELINES and value.__module__.startswith("diffusers.")
    return getattr(imagine.stock, name) if is_stock else value


class LocalTokenizer:
    """Stands for CLIPTokenizer; every name of a repository gives the tokenizer in the folder TOKENIZER."""

    @staticmethod
    def from_pretrained(*_: Any, **__: Any) -> Any:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(os.environ["TOKENIZER"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Replace names in the collected test modules and in their test classes."""
    ours = os.environ["PIPELINES"] == "ours"
    functions = [item for item in items if isinstance(item, pytest.Function)]
    for module in {item.module for item in functions}:
        if hasattr(module, "CLIPTokenizer"):
            module.CLIPTokenizer = LocalTokenizer
        for name, value in list(vars(module).items()) if ours else ():
            setattr(module, name, personalised(value))
    for owner in {owner for item in functions if item.cls is not None for owner in item.cls.__mro__}:
        if ours and "pipeline_class" in vars(owner) and not isinstance(vars(owner)["pipeline_class"], property):
            owner.pipeline_class = personalised(owner.pipeline_class)
