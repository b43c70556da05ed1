"""Fixed splits of the portrait world, by which any method can be measured: the same people, photos, prompts and noise.

    split = load_split("test", identities=20, prompts=13)
    for task in split.tasks():
        my_method(task.reference, task.prompt, task.seed).save(f"out/mine/{task.id}.png")
    report = split.score("out/mine", "out/report")

A split is defined by seeds of the portrait world. Its digest covers everything that the seeds give: traits of people,
contexts of pictures, and prompts. It is pinned here, and checked whenever a split is loaded, so that two scores under
one name and version are of the same split.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from imagine.errors import ConfigError
from imagine.evaluation import report
from imagine.evaluation.cases import Cases, make_cases
from imagine.evaluation.evaluate import run
from imagine.evaluation.judge import Judge
from imagine.evaluation.runs.folder import config_error_on_failure, noise_seed, save_atomically
from imagine.evaluation.suites import PORTRAITS
from imagine.evaluation.systems.finished import FinishedPictures
from imagine.records import Progress, no_progress
from imagine.world import VERSION, render
from imagine.world.tables import Table

PEOPLE, PROMPTS, GALLERY = 51, 65, 1000
SEEDS = {"test": 0, "validation": 7}  # of the evaluation; the trainer chooses checkpoints by people of seed 7
DIGESTS: dict[tuple[str, str], str] = {  # with version 2 of the prompts
    ("portrait-world-2", "test"): "27ddf15fdb2b94ba8179b9363e6acc80eb52083443fdc26a3c63f3a6647f64f5",
    ("portrait-world-2", "validation"): "f3420040870c172c11e945cc163780e9d8dedd99b5b6a8673ff6037901bf67f6",
}


@dataclass(frozen=True)
class BenchmarkTask:
    """One picture to make: the only photo of the person, the sentence, and a seed for the method's own noise."""

    id: str
    person: int
    reference: Image.Image
    prompt: str
    seed: int


@dataclass(frozen=True)
class Split:
    """A split, or its first people and prompts."""

    name: str
    cases: Cases
    digest: str  # of the whole split

    @property
    def seed(self) -> int:
        return SEEDS[self.name]

    def references(self) -> list[Image.Image]:
        """Return the photo of each person."""
        drawn = render(self.cases.people[: self.cases.identities], self.cases.references).images
        return [report.to_pil(picture) for picture in drawn]

    def tasks(self) -> Iterator[BenchmarkTask]:
        """Yield the pictures to make, all prompts of the first person first."""
        photos, each = self.references(), len(self.cases.prompts)
        for case in range(len(self.cases)):
            person, prompt = divmod(case, each)
            yield BenchmarkTask(
                f"{person:03}_{prompt:02}", person, photos[person], self.cases.prompt(case).text,
                noise_seed(self.seed, case),
            )  # fmt: skip

    def score(
        self, pictures: str | Path, output: str | Path, name: str = "", judge: Judge | None = None,
        progress: Progress = no_progress,
    ) -> dict[str, Any]:  # fmt: skip
        """Measure finished pictures, named by the ids of their tasks, and return what report.json holds.

        Missing pictures count as failures. Raises ConfigError if there is none at all.
        """
        return run(
            FinishedPictures(pictures, name), output, "portraits", self.cases.identities, len(self.cases.prompts),
            self.seed, judge, gallery=len(self.cases.gallery), progress=progress,
        )  # fmt: skip

    def write(self, folder: Path) -> None:
        """Write the photos (references/), tasks.jsonl and benchmark.json with digests of all files, for other programs.

        Raises ConfigError if the folder cannot be written.
        """
        hashes = {}
        for person, photo in enumerate(self.references()):
            path = folder / "references" / f"{person:03}.png"
            save_atomically(photo, path)
            hashes[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        lines = [
            json.dumps({
                "id": task.id, "person": task.person, "reference": f"references/{task.person:03}.png",
                "prompt": task.prompt, "seed": task.seed,
            })
            for task in self.tasks()
        ]  # fmt: skip
        facts = {
            "benchmark": VERSION, "split": self.name, "digest": self.digest, "identities": self.cases.identities,
            "prompts": len(self.cases.prompts), "gallery": len(self.cases.gallery), "files": hashes,
        }  # fmt: skip
        with config_error_on_failure(folder / "benchmark.json"):
            (folder / "tasks.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (folder / "benchmark.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load_split(name: str = "test", identities: int = PEOPLE, prompts: int = PROMPTS, gallery: int = GALLERY) -> Split:
    """Return a split, or its first people and prompts.

    Raises ConfigError for an unknown name, numbers out of range, or if this version of the program makes another split
    than the pinned one.
    """
    if name not in SEEDS:
        raise ConfigError(f"There is no split {name!r} of {VERSION}: choose from {', '.join(SEEDS)}.")
    if not (2 <= identities <= PEOPLE and 1 <= prompts <= PROMPTS):
        raise ConfigError(f"A split has up to {PEOPLE} people, at least 2, and up to {PROMPTS} prompts: choose fewer.")
    found, pinned = _whole_digest(name), DIGESTS.get((VERSION, name))
    if pinned is not None and found != pinned:
        raise ConfigError(
            f"The split {name} of {VERSION} is not the published one (digest {found[:12]}, expected {pinned[:12]}): "
            "use the released program, so that scores can be compared."
        )
    return Split(name, make_cases(PORTRAITS[:prompts], identities, SEEDS[name], gallery), found)


@functools.lru_cache(maxsize=len(SEEDS))
def _whole_digest(name: str) -> str:
    return digest(make_cases(PORTRAITS[:PROMPTS], PEOPLE, SEEDS[name], GALLERY))


def digest(cases: Cases) -> str:
    """Return a SHA-256 of everything that defines these cases; numbers are rounded to four decimals."""
    hasher = hashlib.sha256()
    for table in (cases.people, cases.references, cases.gallery, cases.truths, cases.ceilings):
        assert isinstance(table, Table)
        for spec in fields(table):
            column: Tensor = getattr(table, spec.name)
            whole = (column.double() * 10_000).round().long() if column.is_floating_point() else column.long()
            hasher.update(f"{spec.name} {tuple(whole.shape)}".encode() + whole.contiguous().numpy().tobytes())
    for prompt in cases.prompts:
        hasher.update(json.dumps([prompt.text, dict(prompt.asked)], sort_keys=True).encode())
    return hasher.hexdigest()
