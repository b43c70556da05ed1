"""The steps from a reference to a measured candidate, as one story for each target.

    import    the reference
    caption   what it shows, densely
    rewrite   the same person as the target should show them: a value for each attribute, dealt by targets.aims
    generate  a candidate, then
    measure   it; while it is too unlike the reference, up to `rounds` times:
    refine    its identity, and measure again; up to `attempts` times from "generate": while nothing passes the filters,
              or, where the best is to be chosen, each time

A story is a generator: it asks for one result after the other and is given each; what it is given decides how it goes
on. It does no work itself, so the same lines replay what the store holds, run in a worker, and say what is missing.
Each request has a key, the hash of all that its result follows from: backend, settings, and the keys of its inputs.
"""

import hashlib
import json
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from data_synth.backends.contracts import Draft, Failed, Target
from data_synth.backends.registry import make_backend
from data_synth.config import BuildConfig
from data_synth.filters import rejection
from data_synth.records import Candidate, Measures, Reference, Rejection, TargetSpec
from data_synth.store import Result
from data_synth.targets import aims
from imagine.errors import ConfigError, ImagineError, WeightsError

STEP_CALLS = {  # step: which backend does it, by which call
    "import": ("references", "draw"),
    "caption": ("captioner", "caption"),
    "rewrite": ("rewriter", "rewrite"),
    "generate": ("generator", "generate"),
    "refine": ("refiner", "refine"),
    "measure": ("measurer", "measure"),
}
STEPS = tuple(STEP_CALLS)
BACKEND_CRASHED = "the backend broke down"


@dataclass(frozen=True)
class Request:
    """One result that a story needs."""

    step: str
    key: bytes
    argument: Any = field(repr=False)  # one item of the backend's call


@dataclass(frozen=True)
class Recipe:
    """All that stories follow from, besides the results that they are given."""

    config: BuildConfig
    identities: Mapping[str, str]  # step: hash of its backend and settings
    references: int  # how many there are
    mined: Sequence[tuple[int, int, int]] = ()  # without a generator: reference, its turn, and its target

    @property
    def total(self) -> int:
        """How many stories there are."""
        if self.config.generator is None:
            return len(self.mined)
        return self.references * self.config.targets_per_reference

    def request(self, step: str, argument: Any, *parts: Any) -> Request:
        """The request for what `step` makes of `argument`, which is fully described by `parts`."""
        return Request(step, self.key(step, self.identities.get(step, ""), *parts), argument)

    @staticmethod
    def key(step: str, identity: str, *parts: Any) -> bytes:
        """The hash of a step, its backend and what it is given."""
        whole = json.dumps([step, identity, *parts], sort_keys=True, default=dict)
        return hashlib.sha256(whole.encode()).digest()


@dataclass(frozen=True)
class Outcome:
    """How one story ended."""

    number: int
    reference: Reference | None = None
    spec: TargetSpec | None = None
    tries: tuple[tuple[Candidate, Measures], ...] = ()  # in the order in which they were made
    losses: tuple[Rejection, ...] = ()  # what failed before it could be measured
    deferred: Rejection | None = None  # why it could not be told to its end this time


TargetSteps = Generator[Request, Any, Outcome]
Find = Callable[[Sequence[bytes]], Mapping[bytes, Result]]  # keys to those results that are there


class _TargetStopped(Exception):
    """A story that cannot go on."""

    def __init__(self, key: str, step: str, failed: Failed) -> None:
        self.rejection, self.for_now = Rejection(key, step, failed.reason, failed.sentence), failed.for_now


def target_steps(recipe: Recipe, number: int) -> TargetSteps:
    """Story `number`: from its reference to its measured candidates."""
    state: dict[str, Any] = {"number": number, "tries": [], "losses": []}
    try:
        yield from (_mined_steps if recipe.config.generator is None else _generated_steps)(recipe, number, state)
    except _TargetStopped as stopped:
        state["deferred" if stopped.for_now else "lost"] = stopped.rejection
    losses = (*state.pop("losses"), *([state.pop("lost")] if "lost" in state else ()))
    return Outcome(**{**state, "tries": tuple(state["tries"]), "losses": losses})


def _generated_steps(recipe: Recipe, number: int, state: dict[str, Any]) -> Generator[Request, Any, None]:
    place, turn = divmod(number, recipe.config.targets_per_reference)
    reference = state["reference"] = yield from _reference(recipe, place)
    key, known = f"{reference.key}-{turn}", digest(reference)
    caption = yield from _caption(recipe, reference)
    target_values = aims(place, turn, recipe.references, recipe.config.targets)
    seed = _seed(recipe.config.seed, key)
    target = Target(reference, caption, target_values, seed)
    prompt = _require_result(
        key, "rewrite", (yield recipe.request("rewrite", target, known, caption, target_values, seed))
    )
    spec = state["spec"] = TargetSpec(key, reference.key, caption, prompt, target_values, seed)
    asked = [known, key, caption, prompt, target_values, seed]
    for attempt in range(recipe.config.attempts):
        request = recipe.request("generate", (reference, spec, attempt), *asked, attempt)
        made = yield request
        if _has_failed(made, f"{key}-{attempt}-0", "generate", state):
            continue
        yield from _refined_steps(recipe, state, _with_key(made, spec, attempt, 0), request.key)
        passed = (rejection(one.key, measured, recipe.config.filters) is None for one, measured in state["tries"])
        if recipe.config.choose == "first" and any(passed):
            return


def _refined_steps(
    recipe: Recipe, state: dict[str, Any], candidate: Candidate, source: bytes
) -> Generator[Request, Any, None]:
    """Measure a candidate and refine it while that is worth a round; everything on the way is a try."""
    reference, spec, config = state["reference"], state["spec"], recipe.config
    for turn in range(config.rounds + 1):
        draft = Draft(reference, spec, candidate)
        measured = yield recipe.request("measure", draft, source.hex())
        if _has_failed(measured, candidate.key, "measure", state):
            return
        state["tries"].append((candidate, measured))
        if turn == config.rounds or not _too_unlike(measured, config):
            return
        request = recipe.request("refine", draft, source.hex())
        refined, source = (yield request), request.key
        if _has_failed(refined, f"{spec.key}-{candidate.attempt}-{turn + 1}", "refine", state):
            return
        candidate = _with_key(refined, spec, candidate.attempt, turn + 1)


def _mined_steps(recipe: Recipe, number: int, state: dict[str, Any]) -> Generator[Request, Any, None]:
    """Two photos of one person; the second one's caption is what the pair asks for."""
    place, turn, other = recipe.mined[number]
    reference = state["reference"] = yield from _reference(recipe, place)
    target = yield from _reference(recipe, other)
    prompt = yield from _caption(recipe, target)
    spec = state["spec"] = TargetSpec(f"{reference.key}-{turn}", reference.key, reference.caption, prompt)
    candidate = Candidate(f"{spec.key}-0-0", spec.key, target.image, facts={**target.facts, "photo": target.key})
    measured = yield recipe.request(
        "measure", Draft(reference, spec, candidate), digest(reference), digest(target), prompt
    )
    if not _has_failed(measured, candidate.key, "measure", state):
        state["tries"].append((candidate, measured))


def _reference(recipe: Recipe, place: int) -> Generator[Request, Any, Reference]:
    return _require_result(f"reference {place}", "import", (yield recipe.request("import", place, place)))


def _caption(recipe: Recipe, reference: Reference) -> Generator[Request, Any, str]:
    if reference.caption and (recipe.config.keep_captions or recipe.config.captioner is None):
        return reference.caption
    if recipe.config.captioner is None:
        raise _TargetStopped(
            reference.key, "caption", Failed("no caption", "There is no captioner, and it brings no caption.")
        )
    return _require_result(reference.key, "caption", (yield recipe.request("caption", reference, digest(reference))))


def _require_result(key: str, step: str, result: Any) -> Any:
    if isinstance(result, Failed):
        raise _TargetStopped(key, step, result)
    return result


def _has_failed(result: Any, key: str, step: str, state: dict[str, Any]) -> bool:
    """Whether a try is lost, which is noted; the story may go on with another."""
    if isinstance(result, Failed):
        if result.for_now:
            raise _TargetStopped(key, step, result)
        state["losses"].append(Rejection(key, step, result.reason, result.sentence))
    return isinstance(result, Failed)


def _with_key(made: Candidate, spec: TargetSpec, attempt: int, turn: int) -> Candidate:
    return replace(made, key=f"{spec.key}-{attempt}-{turn}", ask=spec.key, attempt=attempt, round=turn)


def _too_unlike(measured: Measures, config: BuildConfig) -> bool:
    """Whether refining can help: too little of the reference, as far as a face was there to measure it."""
    band = config.filters.similarity
    return band is not None and measured.similarity is not None and measured.similarity < band[0]


def _seed(*parts: Any) -> int:
    """63 bits that follow from the parts."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1


def digest(reference: Reference) -> str:
    """64 hexadecimal digits of all that is in a reference."""
    facts = {spec.name: getattr(reference, spec.name) for spec in fields(reference) if spec.name != "image"}
    whole = json.dumps([_hash(reference.image), facts], sort_keys=True, default=dict)
    return hashlib.sha256(whole.encode()).hexdigest()


@lru_cache(maxsize=8)  # the targets of one reference ask one after the other
def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- telling stories --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Task:
    """Some stories, and results that they need."""

    numbers: Sequence[int]
    known: Mapping[bytes, Result]
    made: Mapping[bytes, str] = field(default_factory=dict)  # of `known`, what a worker made: key to step


class TargetProgress:
    """A story under way: what it `pending` next, or its `outcome`."""

    def __init__(self, recipe: Recipe, number: int) -> None:
        self._steps = target_steps(recipe, number)
        self.pending: Request | None = None
        self.outcome: Outcome | None = None
        self.resume(None)

    def resume(self, result: Result | None) -> None:
        """Give the story what it wants."""
        try:
            self.pending = self._steps.send(result)
        except StopIteration as end:
            self.pending, self.outcome = None, end.value


def replay_targets(recipe: Recipe, numbers: Iterable[int], find: Find) -> list[TargetProgress]:
    """Stories, told as far as `find` knows what they want."""
    started = [TargetProgress(recipe, number) for number in numbers]
    feed_results(started, find)
    return started


def feed_results(started: Sequence[TargetProgress], find: Find) -> None:
    """Tell stories on as far as `find` knows what they want."""
    unknown: set[bytes] = set()
    while wanted := {one.pending.key: None for one in started if one.pending and one.pending.key not in unknown}:
        found = find(list(wanted))
        unknown |= wanted.keys() - found.keys()
        for one in started:
            while one.pending is not None and one.pending.key in found:
                one.resume(found[one.pending.key])


def find_in(known: Mapping[bytes, Result]) -> Find:
    """Finds those of the keys that are in `known`."""
    return lambda keys: {key: known[key] for key in keys if key in known}


def advance(recipe: Recipe, task: Task, backends: "Backends", steps: Sequence[str] = STEPS) -> Task:
    """Do what the task's stories want of `steps`, in batches of one step, until they want nothing more of them."""
    known, made = dict(task.known), dict(task.made)
    started = replay_targets(recipe, task.numbers, find_in(known))
    while True:
        wanted = {one.pending.step for one in started if one.pending}
        step = next((step for step in STEPS if step in wanted and step in steps), None)
        if step is None:
            return Task(task.numbers, known, made)
        requests = {
            one.pending.key: one.pending.argument for one in started if one.pending and one.pending.step == step
        }
        results = perform(backends.of(step), step, list(requests.values()))
        known.update(zip(requests, results, strict=True))
        made.update(dict.fromkeys(requests, step))
        feed_results(started, find_in(known))


class Backends:
    """The backends of a build in this process, each loaded when it is first used."""

    def __init__(self, config: BuildConfig) -> None:
        self._choices = config.choices
        self._loaded: dict[str, Any] = {}

    def of(self, step: str) -> Any:
        """The backend that does `step`, loaded. Raises ImagineError if it cannot be."""
        if step not in self._loaded:
            kind = STEP_CALLS[step][0]
            backend = make_backend(kind, self._choices[kind])
            backend.load()
            self._loaded[step] = backend
        return self._loaded[step]


def perform(backend: Any, step: str, arguments: Sequence[Any]) -> list[Result]:
    """The backend's results for these items, in order; what breaks it is found by itself and fails alone.

    An item that cannot be used (ImagineError) fails for good, unless settings or weights are wrong: that is raised. Any
    other exception may be the machine's fault, so its item is deferred. If every one of several ends so, the backend is
    at fault, and ImagineError says with what and where.
    """
    call = getattr(backend, STEP_CALLS[step][1])
    try:
        return _checked_results(call(arguments), len(arguments), backend)
    except (ConfigError, WeightsError):
        raise
    except Exception:
        results, errors = [], []
        for argument in arguments:
            try:
                results += _checked_results(call([argument]), 1, backend)
            except (ConfigError, WeightsError):
                raise
            except ImagineError as error:
                results.append(Failed("an item that cannot be used", str(error)))
            except Exception as error:
                results.append(Failed(BACKEND_CRASHED, f"{type(error).__name__}: {error}", for_now=True))
                errors.append(error)
        if len(errors) == len(arguments) > 1:
            raise ImagineError(_crash_message(backend, step, errors)) from errors[-1]
        return results


def _crash_message(backend: Any, step: str, errors: Sequence[Exception]) -> str:
    last = errors[-1]
    place = traceback.extract_tb(last.__traceback__)[-1]  # said here, since an error that travels loses its trace
    what = f"{type(last).__name__}: {' '.join(str(last).split())[:300]}"
    return (
        f"{step}: {type(backend).__name__} failed at all {len(errors)} items ({what}; in {place.name}, "
        f"{place.filename}:{place.lineno}): what was done before is kept; correct this, and build again."
    )


def _checked_results(results: list[Result], count: int, backend: Any) -> list[Result]:
    assert len(results) == count, f"{type(backend).__name__} gave {len(results)} results for {count} items"
    return results
