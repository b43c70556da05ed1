"""Define and run the steps from a reference to the measured candidates of one target.

    import    get the reference
    caption   describe it in a dense caption
    rewrite   rewrite the caption for the target, with a wished value for each attribute (targets.aims)
    generate  generate a candidate
    measure   measure the candidate
    refine    refine its identity and measure again, up to `rounds` times while it is too unlike the reference

"generate" and the steps after it repeat up to `attempts` times: until a candidate passes the filters, or always if the
build chooses the best candidate.

The steps of a target are a Python generator that yields one request after the other and receives each result, which
decides how it continues. It computes nothing itself. So the same code replays results from the store, runs in a worker,
and reports which results are missing. Each request has a key: the hash of everything that its result depends on, which
is the backend, its settings and its inputs.
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

STEP_CALLS = {  # step: the kind of its backend, and the method that it calls
    "import": ("references", "draw"),
    "caption": ("captioner", "caption"),
    "rewrite": ("rewriter", "rewrite"),
    "generate": ("generator", "generate"),
    "refine": ("refiner", "refine"),
    "measure": ("measurer", "measure"),
}
STEPS = tuple(STEP_CALLS)
BACKEND_CRASHED = "the backend broke down"
_CRASHES_IN_A_ROW = 4  # items after which a backend that crashed at each of them counts as broken


@dataclass(frozen=True)
class Request:
    """A request for one result that a target needs."""

    step: str
    key: bytes
    argument: Any = field(repr=False)  # one item for the backend's method


@dataclass(frozen=True)
class Recipe:
    """Everything that the steps of targets depend on, besides the results that they receive."""

    config: BuildConfig
    identities: Mapping[str, str]  # step: hash of its backend and its settings
    references: int  # number of references
    mined: Sequence[tuple[int, int, int]] = ()  # without a generator: (reference, turn, target) numbers

    @property
    def total(self) -> int:
        """The number of targets."""
        if self.config.generator is None:
            return len(self.mined)
        return self.references * self.config.targets_per_reference

    def request(self, step: str, argument: Any, *parts: Any) -> Request:
        """Return the request for the result of `step` on `argument`, which `parts` describe completely."""
        return Request(step, self.key(step, self.identities.get(step, ""), *parts), argument)

    @staticmethod
    def key(step: str, identity: str, *parts: Any) -> bytes:
        """Return the hash of a step, its backend and its inputs."""
        whole = json.dumps([step, identity, *parts], sort_keys=True, default=dict)
        return hashlib.sha256(whole.encode()).digest()


@dataclass(frozen=True)
class Outcome:
    """The result of the steps of one target."""

    number: int
    reference: Reference | None = None
    spec: TargetSpec | None = None
    tries: tuple[tuple[Candidate, Measures], ...] = ()  # the measured candidates, in order of generation
    losses: tuple[Rejection, ...] = ()  # failures before the measurement
    deferred: Rejection | None = None  # why the target could not be finished in this run


TargetSteps = Generator[Request, Any, Outcome]
Find = Callable[[Sequence[bytes]], Mapping[bytes, Result]]  # maps keys to the available results


class _TargetStopped(Exception):
    """Raised when the steps of a target cannot continue."""

    def __init__(self, key: str, step: str, failed: Failed) -> None:
        self.rejection, self.for_now = Rejection(key, step, failed.reason, failed.sentence), failed.for_now


def target_steps(recipe: Recipe, number: int) -> TargetSteps:
    """Return the steps of target `number`, from its reference to its measured candidates."""
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
    """Measure a candidate and refine it while it is too unlike the reference; record each measured version."""
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
    """Pair two photos of one person; the caption of the second photo is the prompt of the pair."""
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
            reference.key,
            "caption",
            Failed("no caption", "The reference has no caption and the build has no captioner: add either."),
        )
    return _require_result(reference.key, "caption", (yield recipe.request("caption", reference, digest(reference))))


def _require_result(key: str, step: str, result: Any) -> Any:
    if isinstance(result, Failed):
        raise _TargetStopped(key, step, result)
    return result


def _has_failed(result: Any, key: str, step: str, state: dict[str, Any]) -> bool:
    """Return whether a candidate failed, and record its loss; the target may continue with another candidate."""
    if isinstance(result, Failed):
        if result.for_now:
            raise _TargetStopped(key, step, result)
        state["losses"].append(Rejection(key, step, result.reason, result.sentence))
    return isinstance(result, Failed)


def _with_key(made: Candidate, spec: TargetSpec, attempt: int, turn: int) -> Candidate:
    return replace(made, key=f"{spec.key}-{attempt}-{turn}", ask=spec.key, attempt=attempt, round=turn)


def _too_unlike(measured: Measures, config: BuildConfig) -> bool:
    """Return whether refinement can help: the similarity was measured and is below the filter's minimum."""
    band = config.filters.similarity
    return band is not None and measured.similarity is not None and measured.similarity < band[0]


def _seed(*parts: Any) -> int:
    """Return a 63-bit seed derived from the parts."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1


def digest(reference: Reference) -> str:
    """Return a hash, 64 hexadecimal digits, of everything in a reference."""
    facts = {spec.name: getattr(reference, spec.name) for spec in fields(reference) if spec.name != "image"}
    whole = json.dumps([_hash(reference.image), facts], sort_keys=True, default=dict)
    return hashlib.sha256(whole.encode()).hexdigest()


@lru_cache(maxsize=8)  # consecutive targets share one reference
def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- running the steps ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Task:
    """Some targets, and results that they need."""

    numbers: Sequence[int]
    known: Mapping[bytes, Result]
    made: Mapping[bytes, str] = field(default_factory=dict)  # those of `known` that a worker computed: key to step


class TargetProgress:
    """A running target: its `pending` request, or its `outcome` once it is finished."""

    def __init__(self, recipe: Recipe, number: int) -> None:
        self._steps = target_steps(recipe, number)
        self.pending: Request | None = None
        self.outcome: Outcome | None = None
        self.resume(None)

    def resume(self, result: Result | None) -> None:
        """Pass the result of the pending request to the target's steps."""
        try:
            self.pending = self._steps.send(result)
        except StopIteration as end:
            self.pending, self.outcome = None, end.value


def replay_targets(recipe: Recipe, numbers: Iterable[int], find: Find) -> list[TargetProgress]:
    """Start the targets and advance them as far as `find` has the results."""
    started = [TargetProgress(recipe, number) for number in numbers]
    feed_results(started, find)
    return started


def feed_results(started: Sequence[TargetProgress], find: Find) -> None:
    """Advance the targets as far as `find` has the results that they need."""
    unknown: set[bytes] = set()
    while wanted := {one.pending.key: None for one in started if one.pending and one.pending.key not in unknown}:
        found = find(list(wanted))
        unknown |= wanted.keys() - found.keys()
        for one in started:
            while one.pending is not None and one.pending.key in found:
                one.resume(found[one.pending.key])


def find_in(known: Mapping[bytes, Result]) -> Find:
    """Return a lookup in `known`."""
    return lambda keys: {key: known[key] for key in keys if key in known}


def advance(recipe: Recipe, task: Task, backends: "Backends", steps: Sequence[str] = STEPS) -> Task:
    """Run those of `steps` that the task's targets need, in batches of one step, until no target needs one of them."""
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
        results = perform(backends.of(step), step, list(requests.values()), backends.crashes.setdefault(step, []))
        known.update(zip(requests, results, strict=True))
        made.update(dict.fromkeys(requests, step))
        feed_results(started, find_in(known))


class Backends:
    """The backends of a build in this process; each is loaded on first use."""

    def __init__(self, config: BuildConfig) -> None:
        self._choices = config.choices
        self._loaded: dict[str, Any] = {}
        self.crashes: dict[str, list[Exception]] = {}  # step: the errors of its latest items, if all of them crashed

    def of(self, step: str) -> Any:
        """Return the loaded backend of `step`. Raises ImagineError if it cannot be loaded."""
        if step not in self._loaded:
            kind = STEP_CALLS[step][0]
            backend = make_backend(kind, self._choices[kind])
            backend.load()
            self._loaded[step] = backend
        return self._loaded[step]


def perform(backend: Any, step: str, arguments: Sequence[Any], crashes: list[Exception] | None = None) -> list[Result]:
    """Return the backend's results for these items, in order. If a batch fails, retry its items singly.

    An item that raises ImagineError fails permanently; ConfigError and WeightsError are raised instead. An item that
    raises another exception is deferred, because the machine may be the cause. If each of several items raises one, or
    each of four in a row over several calls with the same list `crashes`, ImagineError is raised with the cause and its
    place in the code.
    """
    call = getattr(backend, STEP_CALLS[step][1])
    crashes = [] if crashes is None else crashes
    try:
        results = _checked_results(call(arguments), len(arguments), backend)
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
        crashes[:] = [*crashes, *errors] if len(errors) == len(arguments) else []
        if len(errors) == len(arguments) > 1 or len(crashes) >= _CRASHES_IN_A_ROW:
            raise ImagineError(_crash_message(backend, step, crashes)) from crashes[-1]
    else:
        crashes.clear()
    return results


def _crash_message(backend: Any, step: str, errors: Sequence[Exception]) -> str:
    last = errors[-1]
    place = traceback.extract_tb(last.__traceback__)[-1]  # taken here, because a pickled error loses its traceback
    what = f"{type(last).__name__}: {' '.join(str(last).split())[:300]}"
    return (
        f"{step}: {type(backend).__name__} failed at all {len(errors)} items ({what}; in {place.name}, "
        f"{place.filename}:{place.lineno}). Earlier results are stored: correct this and run the build again."
    )


def _checked_results(results: list[Result], count: int, backend: Any) -> list[Result]:
    assert len(results) == count, f"{type(backend).__name__} returned {len(results)} results for {count} items"
    return results
