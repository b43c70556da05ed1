"""The navigation of the documentation site. `make docs` builds it strictly, fails on a broken link, and runs in CI."""

from collections.abc import Iterator
from typing import Any

import yaml

from tests.root import ROOT


def pages(navigation: Any) -> Iterator[str]:
    if isinstance(navigation, str):
        yield navigation
    else:
        for inner in navigation.values() if isinstance(navigation, dict) else navigation:
            yield from pages(inner)


def test_every_page_has_a_place_in_the_navigation() -> None:
    listed = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    on_disk = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert on_disk - set(listed) == set()
