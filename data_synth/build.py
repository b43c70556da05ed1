"""A build from its file to shards: prepare, do what the store lacks, judge, publish.

    prepare   backends are checked and photos imported (preparing.py)
    make      every story is told to its end (steps.py): what the store lacks is done by an executor and kept
    judge     filters, the choice among tries, duplicates across the build, reviewers (verdicts.py)
    publish   shards, manifest, funnel, data card, lists of what was rejected or parked (publishing.py)

A build may be killed at any moment and started again. Only results are kept, under what they follow from; all else
is worked out again from them, in the order of the references, so that the same file always ends in the same shards.
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

# Two tasks at work at once may both ask an endpoint for one photo's caption, and be told different ones.
_CAPTION_CHANGED = Rejection(
    "", "caption", "its caption was written twice", "Another caption of it was kept: build again."
)

Report = Callable[[str, int, int], None]  # what is going on, how many are done, of how many (0: nobody knows yet)


@dataclass(frozen=True)
class Built:
    """What a build came to."""

    funnel: Funnel
    made: Mapping[str, int]  # by step: results that were worked out this time, not found in the store
    manifest: Mapping[str, Any]


def build(config: BuildConfig, output: str, backend: str = "local", report: Report = lambda *_: None) -> Built:
    """Build the pairs that `config` describes into `output`, a folder on any fsspec filesystem.

    backend: "local" or "ray". Raises ImagineError, in one sentence, for what is wrong with file, photos or models; what
    is wrong with one item is counted, and never raised.
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
    """Where the store and the review lie: on this machine, whatever the output is."""
    if config.work is not None:
        return config.work
    filesystem, path = _output(output)
    if not isinstance(filesystem, LocalFileSystem):
        raise ConfigError(f"{output} is not on this machine, but the store must be: name a local folder as work=DIR.")
    return Path(path)


def _output(output: str) -> tuple[Any, str]:
    try:
        filesystem, path = url_to_fs(output)
    except Exception as error:  # each filesystem has errors of its own, such as for credentials
        raise ConfigError(f"{output} cannot be used as the output folder ({error}): give another one.") from error
    return filesystem, str(path)


def _check_output(output: str) -> None:
    """Write a file there and take it away: what hinders it should be told before the work, not after it."""
    filesystem, path = _output(output)
    probe = f"{path.rstrip('/')}/build.probe"
    try:
        filesystem.makedirs(path, exist_ok=True)
        filesystem.pipe_file(probe, b"written to see that it can be")
        filesystem.rm_file(probe)
    except Exception as error:  # and for rights and buckets
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{output} cannot be written ({reason}): correct the rights or the address.") from error


# --- making -----------------------------------------------------------------------------------------------------------
@dataclass
class _BuildProgress:
    """What was seen while every story was told to its end."""

    results: Counter[str] = field(default_factory=Counter)  # by step: worked out this time, not found in the store
    deferred: dict[int, Rejection] = field(default_factory=dict)  # stories that could not be told to their end
    hashes: dict[str, str] = field(default_factory=dict)  # of the targets of pairs so far, for near-duplicates
    finished: int = 0

    def record(self, outcomes: Iterable[Outcome | None], filters: FilterSettings) -> None:
        """Take down how stories ended."""
        for outcome in outcomes:
            assert outcome is not None, "an executor gave back a story before its end"
            self.finished += 1
            if outcome.deferred is not None:
                self.deferred[outcome.number] = outcome.deferred
            pair = verdict(outcome, filters).pair
            if pair is not None:
                self.hashes[pair.target.key] = pair.measures.picture_hash


def _run_steps(recipe: Recipe, result_store: Store, executor: Executor, report: Report) -> _BuildProgress:
    """Have everything done that the store lacks, a chunk at a time."""
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
    """The numbers of stories that are worked on together."""
    each = recipe.config.chunk * (recipe.config.targets_per_reference if recipe.config.generator else 1)
    return (range(start, min(start + each, recipe.total)) for start in range(0, recipe.total, each))


def _recording_find(result_store: Store, known: dict[bytes, Result]) -> Find:
    """The store; what is found in it is put into `known` too."""

    def find(keys: Sequence[bytes]) -> Mapping[bytes, Result]:
        found = result_store.find(keys)
        known.update(found)
        return found

    return find


def _without_deferred(done: Task) -> list[tuple[bytes, str, Result]]:
    """What was worked out, without what is to be tried again."""
    results = ((key, step, done.known[key]) for key, step in done.made.items())
    return [one for one in results if not (isinstance(one[2], Failed) and one[2].for_now)]


# --- judging ----------------------------------------------------------------------------------------------------------
def _all_verdicts(recipe: Recipe, result_store: Store, made: _BuildProgress, work: Path) -> Iterator[Verdict]:
    """Every verdict of the build, in order; the reviewers' queue is filled first, if there are reviewers."""
    filters, choice = recipe.config.filters, recipe.config.review
    mined = recipe.config.generator is None  # a photo is the target of several, and the import compared photos
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
    """How every story ended, from the store."""
    for numbers in _chunks(recipe):
        for number, one in zip(numbers, replay_targets(recipe, numbers, result_store.find), strict=True):
            yield one.outcome or Outcome(number, deferred=deferred.get(number, _CAPTION_CHANGED))


def _review_pairs(verdicts: Iterable[Verdict], rounds: dict[str, list[float | None]]) -> Iterator[Pair]:
    """The pairs that reviewers are to see; `rounds` learns of each what refinement did to it, just before."""
    for one in verdicts:
        if one.pair is not None:
            target = one.pair.target
            same = [case for case in one.cases if case.candidate.attempt == target.attempt]
            rounds[target.key] = [case.measures.similarity for case in same]
            yield one.pair
