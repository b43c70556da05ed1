"""Write the output of a build: shards, manifest, funnel, data card, and the lists of rejected and deferred items."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from data_synth.card.facts import make_card
from data_synth.card.funnel import Funnel, plot
from data_synth.card.page import write_card
from data_synth.pair_shards import PairShards
from data_synth.preparing import Prepared
from data_synth.records import Case, LostTarget, Rejection
from data_synth.store import Store
from data_synth.targets import wished
from data_synth.verdicts import Verdict
from imagine.shards.writing import DatasheetInfo

REPORTS = ("manifest.json", "funnel.json", "funnel.png", "card.json", "card.html", "rejections.jsonl", "parked.jsonl")
SETTINGS = "build.json"  # the build file with its overrides; it may contain local paths, so it is not published
FORMAT_VERSION = 1

_PACKAGES = ("imagine-yourself-open", "torch", "diffusers", "transformers", "numpy", "pillow")


def publish(
    prepared: Prepared,
    verdicts: Iterable[Verdict],
    output: str,
    work: Path,
    store: Store,
    report: Callable[[int], None] = lambda done: None,
) -> tuple[Funnel, dict[str, Any]]:
    """Write shards and reports to `output`, and the whole build file to `work`, a local folder.

    report: receives the number of targets written so far. Returns the funnel and the manifest.
    """
    with _reports(output) as folder:
        funnel, manifest = _write_shards_and_reports(prepared, verdicts, output, folder, store, report)
    _write_json(work / SETTINGS, prepared.recipe.config.model_dump(mode="json"))
    return funnel, manifest


def _write_shards_and_reports(
    prepared: Prepared,
    verdicts: Iterable[Verdict],
    output: str,
    folder: Path,
    store: Store,
    report: Callable[[int], None],
) -> tuple[Funnel, dict[str, Any]]:
    """Write the shards to `output` and the reports to `folder`."""
    funnel = Funnel(prepared.photos, prepared.recipe.references)
    licences: Counter[str] = Counter()
    with ExitStack() as stack:
        shards = stack.enter_context(
            PairShards(output, _about(prepared), prepared.recipe.config.records_per_shard, store)
        )
        lists = [stack.enter_context(_open_for_writing(folder / name)) for name in ("rejections.jsonl", "parked.jsonl")]
        passed = _write_verdicts(prepared, funnel.watch(verdicts), shards, lists, licences, report)
        about = {**asdict(_about(prepared)), "models": prepared.models, "licences of references": licences}
        for one in prepared.rejections:
            funnel.reject(one)
        lost: list[Rejection] = []
        card = make_card(_cases(passed, lost), chain(prepared.rejections, lost), about, _wished(prepared))
    write_card(card, folder)
    _write_json(folder / "funnel.json", funnel.as_json())
    (folder / "funnel.png").write_bytes(plot(funnel))
    manifest = _manifest(prepared, funnel, licences, output)
    _write_json(folder / "manifest.json", manifest)
    return funnel, manifest


def _write_verdicts(
    prepared: Prepared,
    verdicts: Iterable[Verdict],
    shards: PairShards,
    lists: list[TextIO],
    licences: Counter[str],
    report: Callable[[int], None],
) -> Iterator[Verdict]:
    """Write each verdict to the shards and lists, and yield it."""
    rejected, deferred = lists
    _write_lines(rejected, prepared.rejections)
    for rejection in prepared.rejections:
        shards.reject(rejection.reason)
    before = ""
    for number, one in enumerate(verdicts, 1):
        if one.pair is not None:
            shards.write(one.pair)
            if one.pair.reference.key != before:
                licences[str(one.pair.reference.facts.get("licence") or "not stated")] += 1
                before = one.pair.reference.key
        _write_lines(rejected, one.rejections)
        for rejection in one.rejections:
            shards.reject(rejection.reason)
        _write_lines(deferred, [one.outcome.deferred] if one.outcome.deferred else [])
        yield one
        report(number)


def _cases(verdicts: Iterable[Verdict], lost: list[Rejection]) -> Iterator[Case | LostTarget]:
    """Yield all measured candidates, and targets without one; add each rejection before measurement to `lost` once."""
    seen: set[tuple[str, str]] = set()
    for one in verdicts:
        for loss in one.outcome.losses:
            if (loss.step, loss.key) not in seen:
                seen.add((loss.step, loss.key))
                lost.append(loss)
        yield from one.cases
        outcome = one.outcome
        if outcome.reference is not None and outcome.deferred is None and not outcome.tries:
            yield LostTarget(outcome.reference, outcome.spec)


def _wished(prepared: Prepared) -> dict[str, dict[str, float]]:
    """Return the wished distribution of targets; it is empty if pairs are mined from existing photos."""
    config = prepared.recipe.config
    return {} if config.generator is None else wished(config.targets)


def _about(prepared: Prepared) -> DatasheetInfo:
    config = prepared.recipe.config
    made = "Targets are other photos of the same person." if config.generator is None else "Targets are generated."
    return DatasheetInfo(
        title=config.title,
        purpose=(
            "Pairs of different pictures of the same person, for training personalised image generation that does not "
            "copy the pose of the reference."
        ),
        collection=f"{made} manifest.json lists models, settings and licences; card.html shows groups and examples.",
        licence=config.licence,
        seeds={"seed": config.seed, "targets": config.targets.seed},
        settings={"pairs": FORMAT_VERSION},
    )


# --- the manifest -----------------------------------------------------------------------------------------------------
def _manifest(prepared: Prepared, funnel: Funnel, licences: Mapping[str, int], output: str) -> dict[str, Any]:
    """Return the facts that identify this data set, and the hashes that verify a copy of it."""
    config, about = prepared.recipe.config, _about(prepared)
    stated = {
        kind: ", ".join(dict.fromkeys(_licences(model["identity"]))) or "not stated"
        for kind, model in prepared.models.items()
    }
    return {
        "format_version": FORMAT_VERSION,
        "title": config.title,
        "seeds": dict(about.seeds),
        "counts": {**dict(funnel.rows()), "parked": funnel.deferred},
        "licences": {"pairs": config.licence, "references": dict(licences), "models": stated},
        "models": prepared.models,
        "config": config.facts,
        "shards": _shards(output),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _licences(identity: Mapping[str, Any]) -> Iterator[str]:
    """Yield the licences of a backend and of the models inside it, such as the recogniser of an import."""
    if identity.get("licence"):
        yield str(identity["licence"])
    for part in identity.values():
        if isinstance(part, Mapping):
            yield from _licences(part)


def _shards(output: str) -> list[dict[str, Any]]:
    """Return name, number of records, bytes and hash of every shard."""
    filesystem, folder = url_to_fs(output)
    sheet = json.loads(filesystem.cat_file(f"{folder.rstrip('/')}/datasheet.json"))
    return [{"name": name, **facts} for name, facts in sheet["shards"].items()]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout without an installed package
        return "not installed"


# --- files ------------------------------------------------------------------------------------------------------------
def _open_for_writing(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="\n")


def _write_lines(file: TextIO, rejections: Iterable[Rejection]) -> None:
    file.writelines(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in rejections)


def _write_json(path: Path, facts: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


@contextmanager
def _reports(output: str) -> Iterator[Path]:
    """Yield a local folder for the reports: the output folder, or a temporary one that is copied there at the end.

    It is not the work folder, because builds with different outputs may share that.
    """
    filesystem, path = url_to_fs(output)
    if isinstance(filesystem, LocalFileSystem):
        Path(path).mkdir(parents=True, exist_ok=True)
        yield Path(path)
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)
        for name in REPORTS:
            filesystem.put_file(f"{folder}/{name}", f"{path.rstrip('/')}/{name}")
