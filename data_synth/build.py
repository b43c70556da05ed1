"""Run a build: read a build configuration and write shards of pairs.

    prepare   check the backends and import the photos (preparing.py)
    make      run the steps of every target (steps.py); an executor computes the results that the store lacks
    judge     apply filters, choose among candidates, remove duplicates across the build, apply reviews (verdicts.py)
    publish   write shards, manifest, funnel, data card, and the lists of rejected and deferred items (publishing.py)

A build may be killed at any moment and resumed. The store holds only the results of steps, each under a hash of its
inputs. Everything else is derived from them again, in the order of the references, so the same build file always gives
the same shards.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from data_synth import store
from data_synth.backends.contracts import Failed
from data_synth.card.funnel import Funnel
from data_synth.config import BuildConfig
from data_synth.executors import Executor, choose_executor
from data_synth.filters import FilterSettings, duplicate_rejections
from data_synth.pair_shards import check_foreign_shards
from data_synth.preparing import prepare
from data_synth.publishing import publish
from data_synth.records import Pair, Rejection
from data_synth.review import decisions as review
from data_synth.steps import Find, Outcome, Recipe, Task, find_in, replay_targets
from data_synth.store import Result, Store
from data_synth.verdicts import Verdict, reviewed, verdict, without_duplicates
from imagine.errors import ConfigError

# Two concurrent tasks may both request the caption of one photo and get different answers from an endpoint.
_CAPTION_CHANGED = Rejection(
    "",
    "caption",
    "its caption was written twice",
    "The store holds a different caption of this photo: run the build again.",
)

Report = Callable[[str, int, int], None]  # label, number done, total (0: not known yet)


@dataclass(frozen=True)
class Built:
    """The result of a build."""

    funnel: Funnel
    made: Mapping[str, int]  # by step: results that this run computed, not those found in the store
    manifest: Mapping[str, Any]


def build(config: BuildConfig, output: str, backend: str = "local", report: Report = lambda *_: None) -> Built:
    """Build the pairs that `config` describes into `output`, a folder on any fsspec filesystem.

    backend: "local" or "ray". report: receives progress. Raises ImagineError, in one sentence, if the file, the photos
    or the models are wrong. A problem with a single item is counted as a rejection and never raised.
    """
    executor = choose_executor(config, backend)
    work = _work_folder(config, output)
    _check_output(output)
    with Store(work / store.FILE) as result_store:
        check_foreign_shards(output, result_store)
        prepared = prepare(config, result_store, lambda done: report("photos", done, 0))
        total = prepared.recipe.total
        made = _run_steps(prepared.recipe, result_store, executor, report)
        verdicts = _all_verdicts(prepared.recipe, result_store, made, work)
        funnel, manifest = publish(
            prepared, verdicts, output, work, result_store, lambda done: report("pairs written", done, total)
        )
    return Built(funnel, made.results, manifest)


def _work_folder(config: BuildConfig, output: str) -> Path:
    """Return the folder of the store and the review, which is always local, even if the output is remote."""
    if config.work is not None:
        return config.work
    filesystem, path = _output(output)
    if not isinstance(filesystem, LocalFileSystem):
        raise ConfigError(
            f"{output} is a remote folder, but the store needs a local one: name a local folder as work=DIR."
        )
    return Path(path)


def _output(output: str) -> tuple[Any, str]:
    try:
        filesystem, path = url_to_fs(output)
    except Exception as error:  # each filesystem raises its own errors, for example about credentials
        raise ConfigError(f"{output} cannot be used as the output folder ({error}): choose another one.") from error
    return filesystem, str(path)


def _check_output(output: str) -> None:
    """Write and remove a file in the output folder, so that a missing permission is reported before the work starts."""
    filesystem, path = _output(output)
    probe = f"{path.rstrip('/')}/build.probe"
    try:
        filesystem.makedirs(path, exist_ok=True)
        filesystem.pipe_file(probe, b"a test of write access")
        filesystem.rm_file(probe)
    except Exception as error:  # each filesystem raises its own errors, for example about permissions and buckets
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{output} cannot be written ({reason}): correct its permissions or the address.") from error


# --- making -----------------------------------------------------------------------------------------------------------
@dataclass
class _BuildProgress:
    """What is recorded while the steps of the targets run."""

    results: Counter[str] = field(default_factory=Counter)  # by step: computed by this run, not found in the store
    # by target number: targets that could not be finished in this run
    deferred: dict[int, Rejection] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)  # by candidate key: hashes of the pairs' targets so far
    finished: int = 0

    def record(self, outcomes: Iterable[Outcome | None], filters: FilterSettings) -> None:
        """Record the outcomes of some targets."""
        for outcome in outcomes:
            assert outcome is not None, "an executor returned an unfinished target"
            self.finished += 1
            if outcome.deferred is not None:
                self.deferred[outcome.number] = outcome.deferred
            pair = verdict(outcome, filters).pair
            if pair is not None:
                self.hashes[pair.target.key] = pair.measures.picture_hash


def _run_steps(recipe: Recipe, result_store: Store, executor: Executor, report: Report) -> _BuildProgress:
    """Compute all results that the store lacks, one chunk of targets at a time."""
    made, sent, filters = _BuildProgress(), deque[Task](), recipe.config.filters

    def missing() -> Iterator[Task]:
        for numbers in _chunks(recipe):
            known: dict[bytes, Result] = {}
            started = replay_targets(recipe, numbers, _recording_find(result_store, known))
            made.record((one.outcome for one in started if not one.pending), filters)
            report("targets", made.finished, recipe.total)
            if unfinished := [number for number, one in zip(numbers, started, strict=True) if one.pending]:
                sent.append(Task(unfinished, known))
                yield sent[-1]

    for done in executor(recipe, missing()):
        sent_task = sent.popleft()
        permanent = _without_deferred(done)
        result_store.save(permanent)
        made.results.update(step for _, step, _ in permanent)
        ended = replay_targets(recipe, sent_task.numbers, find_in({**sent_task.known, **done.known}))
        made.record((one.outcome for one in ended), filters)
        report("targets", made.finished, recipe.total)
    return made


def _chunks(recipe: Recipe) -> Iterator[range]:
    """Yield the numbers of the targets that are processed together."""
    each = recipe.config.chunk * (recipe.config.targets_per_reference if recipe.config.generator else 1)
    return (range(start, min(start + each, recipe.total)) for start in range(0, recipe.total, each))


def _recording_find(result_store: Store, known: dict[bytes, Result]) -> Find:
    """Return a lookup in the store that also copies what it finds into `known`."""

    def find(keys: Sequence[bytes]) -> Mapping[bytes, Result]:
        found = result_store.find(keys)
        known.update(found)
        return found

    return find


def _without_deferred(done: Task) -> list[tuple[bytes, str, Result]]:
    """Return the results that a task computed, without those to be retried later."""
    results = ((key, step, done.known[key]) for key, step in done.made.items())
    return [one for one in results if not (isinstance(one[2], Failed) and one[2].for_now)]


# --- judging ----------------------------------------------------------------------------------------------------------
def _all_verdicts(recipe: Recipe, result_store: Store, made: _BuildProgress, work: Path) -> Iterator[Verdict]:
    """Yield every verdict of the build, in order; fill the reviewers' queue first if the build has a review."""
    filters, choice = recipe.config.filters, recipe.config.review
    # a photo may be the target of several pairs, and the import has already compared the photos
    mined = recipe.config.generator is None
    duplicates = {} if mined else {one.key: one for one in duplicate_rejections(made.hashes, filters)}

    def filtered() -> Iterator[Verdict]:
        outcomes = _outcomes(recipe, result_store, made.deferred)
        return without_duplicates((verdict(outcome, filters) for outcome in outcomes), duplicates)

    if choice == "none":
        return filtered()
    database = work / review.FILE
    rounds: dict[str, list[float | None]] = {}
    review.open_queue(_review_pairs(filtered(), rounds), database, rounds)
    return reviewed(filtered(), review.decisions(database), choice == "required")


def _outcomes(recipe: Recipe, result_store: Store, deferred: Mapping[int, Rejection]) -> Iterator[Outcome]:
    """Yield the outcome of every target, replayed from the store."""
    for numbers in _chunks(recipe):
        for number, one in zip(numbers, replay_targets(recipe, numbers, result_store.find), strict=True):
            yield one.outcome or Outcome(number, deferred=deferred.get(number, _CAPTION_CHANGED))


def _review_pairs(verdicts: Iterable[Verdict], rounds: dict[str, list[float | None]]) -> Iterator[Pair]:
    """Yield the pairs to review; just before each, add its similarity after each refinement round to `rounds`."""
    for one in verdicts:
        if one.pair is not None:
            target = one.pair.target
            same = [case for case in one.cases if case.candidate.attempt == target.attempt]
            rounds[target.key] = [case.measures.similarity for case in same]
            yield one.pair
