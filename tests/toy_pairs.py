"""Toy backends for building pairs in tests: single-colour pictures, and numbers derived from hashes.

They follow the contracts of data_synth.backends: results depend only on the records. They log the items that they
process, and on demand they crash, fail, or are temporarily down. Builds can also run in separate processes, forked from
one that has imported everything, so that killing and restarting them takes milliseconds.
"""

import hashlib
import importlib
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from data_synth.backends.contracts import Draft, Failed, Target
from data_synth.config import BuildConfig
from data_synth.records import Candidate, Measures, Reference, TargetSpec
from imagine.errors import PictureError, WeightsError
from tests.forks import fork_process

if TYPE_CHECKING:
    from data_synth.build import Built


class ToySettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    flavour: str = ""  # a different one gives different results
    log: str = Field(default="", exclude=True)  # a file with one line per processed item
    failing: tuple[str, ...] = Field(default=(), exclude=True)  # keys that fail permanently
    raising: tuple[str, ...] = Field(default=(), exclude=True)  # keys that raise PictureError
    breaking: tuple[str, ...] = Field(default=(), exclude=True)  # keys that raise an unexpected error
    down: str = Field(default="", exclude=True)  # a file: while it exists, the keys in it fail temporarily
    pause: float = Field(default=0, exclude=True)  # seconds per item
    count: int = Field(default=6, exclude=True)  # number of references


def share(*parts: Any) -> float:
    """Return a number from 0 to 1, derived from a hash of the parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") / 2**32


def picture(*parts: Any) -> bytes:
    colour = tuple(int(255 * share(*parts, channel)) for channel in "rgb")
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


class Toy:
    """The common base of the toy backends."""

    Settings = ToySettings
    step = ""

    def __init__(self, settings: ToySettings) -> None:
        self.settings = settings
        self.is_loaded = False

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"class": type(self).__name__, "licence": "CC0-1.0"}

    def load(self) -> None:
        self.is_loaded = True

    def _failure_of(self, key: str) -> Failed | None:
        assert self.is_loaded, "used before it was loaded"
        time.sleep(self.settings.pause)
        if key in self.settings.breaking:
            raise RuntimeError(f"broke at {key}")
        if key in self.settings.raising:
            raise PictureError(f"{key} is no picture.")
        if self.settings.log:
            with open(self.settings.log, "a", encoding="utf-8") as log:
                log.write(f"{self.step} {key}\n")
        down = Path(self.settings.down or "nowhere")
        if down.exists() and key in down.read_text().split():
            return Failed("the endpoint is down", f"{key} was not answered.", for_now=True)
        return Failed("refused", f"{key} is not accepted.") if key in self.settings.failing else None


class ToyPeople(Toy):
    step = "import"

    @property
    def count(self) -> int:
        return self.settings.count

    def draw(self, numbers: Sequence[int]) -> list[Reference | Failed]:
        made = [
            Reference(f"p{number}", picture("face", number), f"person {number}", facts={"licence": "CC-BY-4.0"})
            for number in numbers
        ]
        return [self._failure_of(one.key) or one for one in made]


class ToyCaptioner(Toy):
    step = "caption"

    def caption(self, references: Sequence[Reference]) -> list[str | Failed]:
        return [self._failure_of(one.key) or f"a face called {one.key}{self.settings.flavour}" for one in references]


class ToyRewriter(Toy):
    step = "rewrite"

    def rewrite(self, targets: Sequence[Target]) -> list[str | Failed]:
        return [
            self._failure_of(one.reference.key) or ", ".join([one.caption, *one.aims.values(), str(one.seed % 1000)])
            for one in targets
        ]


class ToyGenerator(Toy):
    step = "generate"

    def generate(self, work: Sequence[tuple[Reference, TargetSpec, int]]) -> list[Candidate | Failed]:
        return [self._failure_of(f"{spec.key}-{attempt}") or self._drawn(spec, attempt) for _, spec, attempt in work]

    def _drawn(self, spec: TargetSpec, attempt: int) -> Candidate:
        parts = (spec.prompt, spec.seed, attempt, self.settings.flavour)
        facts = {"similarity": round(0.2 + 0.5 * share("likeness", *parts), 4)}
        return Candidate("", "", picture(*parts), facts=facts)


class ToyRefiner(Toy):
    step = "refine"

    def refine(self, drafts: Sequence[Draft]) -> list[Candidate | Failed]:
        return [self._failure_of(one.candidate.key) or self._refined(one) for one in drafts]

    def _refined(self, draft: Draft) -> Candidate:
        better = round(draft.candidate.facts["similarity"] + 0.1, 4)
        return replace(draft.candidate, image=picture(draft.candidate.image), facts={"similarity": better})


class ToyMeasurer(Toy):
    step = "measure"

    def measure(self, drafts: Sequence[Draft]) -> list[Measures | Failed]:
        return [self._failure_of(one.candidate.key) or self._measured(one) for one in drafts]

    def _measured(self, draft: Draft) -> Measures:
        image = draft.candidate.image
        # few digits, so that some pictures are near-duplicates
        digits = hashlib.sha256(image).hexdigest()[:4] + "0" * 12
        return Measures(
            faces=0 if share("face", image) < 0.1 else 1,
            similarity=draft.candidate.facts.get("similarity", 0.7),
            difference=round(share("difference", image), 4),
            quality=1.0,
            sharpness=0.1,
            text=0.0,
            picture_hash=digits,
            attributes=dict(draft.spec.aims),
        )


class ToyRecogniser(Toy):
    """A recogniser that finds one face per picture; its tint is the identity."""

    step = "recognise"

    def recognise(self, pictures: Sequence[Any]) -> list[tuple[Any, ...]]:
        from data_synth.backends.recognisers import KnownFace
        from imagine.records import FaceBox

        faces = []
        for image in pictures:
            assert self._failure_of("photo") is None
            tint = np.asarray(image, np.float32).mean((0, 1))
            tint -= tint.mean()
            faces.append((KnownFace(FaceBox(8, 8, 48, 48, 1.0), tint / np.linalg.norm(tint)),))
        return faces


class StoppedRecogniser(ToyRecogniser):
    """Raises KeyboardInterrupt on a batch of fewer than 16 photos while the file `down` exists."""

    def recognise(self, pictures: Sequence[Any]) -> list[tuple[Any, ...]]:
        if len(pictures) < 16 and Path(self.settings.down).exists():
            raise KeyboardInterrupt
        return super().recognise(pictures)


# --- for Ray, whose workers import this module: it avoids importing torch, which takes longer than all their work -----
class PlacedGenerator(ToyGenerator):
    """A generator that also logs the GPUs that Ray assigned to its process."""

    def generate(self, work: Sequence[tuple[Reference, TargetSpec, int]]) -> list[Candidate | Failed]:
        _note_place(self.settings, "generate")
        return super().generate(work)


class PlacedCaptioner(ToyCaptioner):
    """A captioner that also logs the GPUs that Ray assigned to its process."""

    def caption(self, references: Sequence[Reference]) -> list[str | Failed]:
        _note_place(self.settings, "caption")
        return super().caption(references)


def _note_place(settings: ToySettings, step: str) -> None:
    if settings.log:
        with open(settings.log, "a", encoding="utf-8") as notes:
            notes.write(f"{step} {importlib.import_module('ray').get_gpu_ids()}\n")


class AbsentCaptioner(ToyCaptioner):
    """A captioner whose model is missing."""

    def load(self) -> None:
        raise WeightsError("The model nowhere cannot be loaded.")


def photo(person: int, number: int) -> bytes:
    """Return a photo of 64 x 64 pixels: a pattern specific to the photo, in the person's tint."""
    random = np.random.default_rng(number + 1000 * person)
    angle = 2 * np.pi * person / 7
    tint = 128 + 80 * np.array([np.cos(angle), np.cos(angle + 2.1), np.cos(angle + 4.2)])
    pattern = np.kron(random.uniform(0.6, 1.0, (8, 8)), np.ones((8, 8)))
    file = io.BytesIO()
    Image.fromarray((pattern[..., None] * tint).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def toy_config(toy: Mapping[str, Any] | None = None, **values: Any) -> BuildConfig:
    """Return a build with toy backends only; `toy` holds settings for all of them."""
    kinds = {
        "references": "ToyPeople", "captioner": "ToyCaptioner", "rewriter": "ToyRewriter", "generator": "ToyGenerator",
        "refiner": "ToyRefiner", "measurer": "ToyMeasurer",
    }  # fmt: skip
    choices = {kind: {"backend": f"tests.toy_pairs:{name}", **(toy or {})} for kind, name in kinds.items()}
    usual = {"targets_per_reference": 2, "attempts": 2, "rounds": 2, "records_per_shard": 5, "chunk": 2}
    return BuildConfig.model_validate({**choices, **usual, **values})


def built(config: BuildConfig, output: Path) -> "Built":
    from data_synth.build import build  # imported late, because it imports torch, which Ray workers do not need

    return build(config, str(output))


def contents(output: Path) -> dict[str, bytes]:
    """Return the output files of a build by name, without the store, which may hold results of earlier settings."""
    ours = (path for path in sorted(output.iterdir()) if not path.name.startswith(("store.", "review.", "build.")))
    return {path.name: path.read_bytes() for path in ours}


# --- builds in separate processes -------------------------------------------------------------------------------------
def _build(config: BuildConfig, output: Path) -> None:
    built(config, output)


def started(config: BuildConfig, output: Path) -> ForkServerProcess:
    """Start a process that runs a build."""
    return fork_process(_build, config, output)
