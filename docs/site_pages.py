"""Pages of the documentation site that do not lie in docs/, made while MkDocs builds it (`make docs`).

MkDocs calls the three functions whose names begin with `on_`. They add README.md and its neighbours, the licence texts,
and one page of API reference per module. The reference follows from the files on disk, so a module that moves needs no
change here. Links are written for readers of the repository; each is rewritten to the page of the site that holds the
same text. A link that leads nowhere stays as it is, and `mkdocs build --strict` fails on it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).parent.parent
PACKAGES = ("imagine", "train", "data_synth")
COPIED = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "weights/README.md": "weights.md",
    "LICENSE": "licence.md",
    "NOTICE": "notice.md",
}
PUBLIC = """# Public API

`from imagine import ImaginePipeline, Persona, open_base` gives the three public names. The pages after this one
describe the modules behind them.

::: imagine.ImaginePipeline
    options: {inherited_members: true, show_root_heading: true, show_root_full_path: false, show_root_toc_entry: true}

::: imagine.Persona
    options: {show_root_heading: true, show_root_full_path: false, show_root_toc_entry: true}

::: imagine.open_base
    options: {show_root_heading: true, show_root_full_path: false, show_root_toc_entry: true}
"""

_FENCE = re.compile(r"^ *(```|~~~)")
_ITEM = re.compile(r"^ *([-*+]|\d+\.) +\S")
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make anchors as GitHub makes them, and add the API reference to the end of the navigation."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    assert config.nav is not None
    sections = [{package: _section(ROOT / package)} for package in PACKAGES]
    config.nav = [*config.nav, {"API reference": ["reference/index.md", *sections]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/, and the files of the checkout that pages link to."""
    for source, page in COPIED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        is_page = source.endswith(".md")
        files.append(File.generated(config, page, content=text if is_page else f"# {source}\n\n```text\n{text}```\n"))
    files.append(File.generated(config, "reference/index.md", content=PUBLIC))
    for module in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        name = _dotted(module)
        files.append(File.generated(config, _reference(module), content=f"# `{name}`\n\n::: {name}\n"))
    for path in sorted(_linked(files)):
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite a page from GitHub's Markdown to the site's: where links lead, and blank lines before lists."""
    source = _source(page.file.src_uri)
    if source is None:
        return markdown
    lines: list[str] = []
    for line, is_code in _lines(markdown):
        if not is_code:
            line = _LINK.sub(lambda found: found[1] + _target(source, found[2], page.file.src_uri) + found[3], line)
            # GitHub begins a list right after a paragraph; Python-Markdown wants a blank line between them.
            before = lines[-1] if lines else ""
            if _ITEM.match(line) and before.strip() and not before.startswith(" ") and not _ITEM.match(before):
                lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _lines(markdown: str) -> list[tuple[str, bool]]:
    """Each line, and whether it belongs to a fenced block."""
    found, fence = [], ""
    for line in markdown.split("\n"):
        mark = _FENCE.match(line)
        found.append((line, bool(fence or mark)))
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1] == fence:
            fence = ""
    return found


def _source(page: str) -> str | None:
    """The path in the checkout of a page's text; None for a page that has no text of its own."""
    copied = {page: source for source, page in COPIED.items()}
    if page.startswith("reference/") or (page in copied and not copied[page].endswith(".md")):
        return None
    return copied.get(page, f"docs/{page}")


def _target(source: str, link: str, page: str) -> str:
    """Where a link in the file `source` leads from the page made of it."""
    if ":" in link:  # an address
        return link
    there = _place(_in_checkout(source, link))
    return link if there is None else posixpath.relpath(there, posixpath.dirname(page) or ".")


def _place(path: str) -> str | None:
    """Where a file or folder of the checkout lies in the site; None for one that has no place there."""
    for page in (f"{path}/__init__.py", f"{path}/README.md"):
        if (ROOT / page).is_file():
            return _place(page)
    if path in COPIED:
        return COPIED[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if not (ROOT / path).is_file():
        return None
    if path.endswith(".py") and path.split("/")[0] in PACKAGES:
        return _reference(ROOT / path)
    return f"files/{path}"


def _linked(files: Files) -> set[str]:
    """The files of the checkout that pages link to and that are no pages themselves."""
    found = set()
    for file in files.documentation_pages():
        source = _source(file.src_uri)
        for line, is_code in _lines(file.content_string) if source is not None else []:
            for link in [] if is_code else _LINK.findall(line):
                place = None if ":" in link[1] else _place(_in_checkout(str(source), link[1]))
                if place is not None and place.startswith("files/"):
                    found.add(place.removeprefix("files/"))
    return found


def _in_checkout(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _reference(path: Path) -> str:
    """The page of a module; a package's page is its folder's index."""
    place = path.relative_to(ROOT).with_suffix(".md").as_posix()
    return "reference/" + place.replace("__init__.md", "index.md")


def _section(folder: Path) -> list[Any]:
    """The navigation of a package: its own page, its modules, then its folders."""
    own = [_reference(folder / "__init__.py")] if (folder / "__init__.py").is_file() else []
    modules = [{path.stem: _reference(path)} for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    inner = [{each.name: _section(each)} for each in sorted(folder.iterdir()) if any(each.glob("*.py"))]
    return [*own, *modules, *inner]
