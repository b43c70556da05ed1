"""The pictures of a run: draws those that are missing, and reads all of them.

Each picture is saved when it is drawn, and its noise depends on the run's seed and its number only, so that an
interrupted run continues with the next picture. People are enrolled when their first picture is drawn; what that cost
is written down at once.
"""

import json
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imagine.errors import PictureError
from imagine.evaluation import report
from imagine.evaluation.runs.folder import config_error_on_failure, read_picture, save_atomically
from imagine.evaluation.runs.shards import WHOLE, Shard
from imagine.evaluation.systems.contracts import Drawing, System
from imagine.evaluation.systems.finished import FinishedPictures, Judgeable, open_finished
from imagine.paths import as_path
from imagine.records import Progress, no_progress

COSTS = "costs.jsonl"
SIDE = 128  # of finished pictures, which may have any size, where the judge of the world reads them


@dataclass(frozen=True)
class Task:
    """One picture of a run. `who`: the key of its person, a mapping from names to keys, or None for nobody."""

    row: str
    id: str
    prompt: str
    who: "Hashable | Mapping[str, Hashable] | None"
    seed: int
    size: tuple[int, int] | None = None


@dataclass
class RunPictures:
    """The pictures of a run in `output`, or in the folder of `system` if that holds finished pictures.

    unreadable: file -> why it could not be read, of those that `load` met.
    """

    output: Path
    system: Judgeable
    side: int | None = SIDE  # of finished pictures; None: as they are
    unreadable: dict[str, str] = field(default_factory=dict)

    def path(self, row: str, picture: str) -> Path:
        """Return the file of a picture."""
        if isinstance(self.system, FinishedPictures):
            return self.system.path(picture if row == "full" else f"{row}/{picture}")
        return self.output / "pictures" / row / f"{picture}.png"

    def image(self, row: str, picture: str) -> Image.Image | None:
        """Return a picture, or None if it cannot be read; the reason is kept in `unreadable`."""
        path = self.path(row, picture)
        try:
            if isinstance(self.system, FinishedPictures):
                return open_finished(path, self.side)
            return report.to_pil(read_picture(path))
        except PictureError as error:
            self.unreadable[self.name(path)] = str(error)
            return None

    def load(self, row: str, pictures: Sequence[str]) -> Tensor:
        """Return pictures of one size (N, 3, H, W) in 0..1; one that cannot be read is NaN."""
        found = [self.image(row, each) for each in pictures]
        sizes = [image.size for image in found if image is not None]
        width, height = sizes[0] if sizes else (SIDE, SIDE)
        blank = torch.full((3, height, width), torch.nan)
        return torch.stack([
            blank if image is None else report.to_tensor(_fitted(image, (width, height))) for image in found
        ])  # fmt: skip

    def name(self, path: Path) -> str:
        """Return a picture's path relative to the run's folder."""
        return relative(path, self.output)


def draw_missing(
    pictures: RunPictures, tasks: Sequence[Task], photos: Callable[[Any], tuple[Sequence[Image.Image], str]],
    batch: int, facts: Mapping[str, Any], shard: Shard = WHOLE, progress: Progress = no_progress,
) -> dict[str, str]:  # fmt: skip
    """Draw the pictures that are missing, a batch at a time, and return file -> reason of those that have none.

    photos: from a person's key to their photos and class noun. facts: what each file should say, such as the system.
    With a part of a run, only its batches are drawn; batches do not depend on which pictures exist.
    """
    system = pictures.system
    if isinstance(system, FinishedPictures):
        system.check([task.id for task in tasks])
        return {}
    own = [some for number, some in enumerate(_batches(tasks, batch)) if shard.owns(number)]
    missing = [[task for task in some if not pictures.path(task.row, task.id).exists()] for some in own]
    total, done = sum(map(len, own)), sum(map(len, own)) - sum(map(len, missing))
    progress("drawing", done, total)
    people, failed = EnrolledPeople(system, photos, pictures.output / COSTS), dict[str, str]()
    for some in filter(None, missing):
        drawings = [Drawing(task.id, task.prompt, people.of(task.who), task.seed, task.size) for task in some]
        started = time.monotonic()
        drawn = system.draw(drawings)
        seconds = time.monotonic() - started
        for task, image in zip(some, drawn, strict=True):
            path = pictures.path(task.row, task.id)
            if isinstance(image, str):
                failed[pictures.name(path)] = image
            else:
                save_atomically(image, path, {**facts, "row": task.row, "prompt": task.prompt, "seed": task.seed})
        people.write({"row": some[0].row, "pictures": len(some), "seconds": round(seconds, 4)})
        done += len(some)
        progress("drawing", done, total)
    return failed


class EnrolledPeople:
    """Enrolls each person once, when first asked for, and writes down what it cost."""

    def __init__(self, system: System, photos: Callable[[Any], tuple[Sequence[Image.Image], str]], file: Path) -> None:
        self._system, self._photos, self._file = system, photos, file
        self._enrolled: dict[Hashable, Any] = {}

    def of(self, who: Any) -> Any:
        """Return the enrolled person, a mapping from names to them, or None."""
        if who is None:
            return None
        if isinstance(who, Mapping):
            return {name: self._one(key) for name, key in who.items()}
        return self._one(who)

    def _one(self, key: Hashable) -> Any:
        if key not in self._enrolled:
            images, noun = self._photos(key)
            started = time.monotonic()
            person = self._enrolled[key] = self._system.enroll(images, noun)
            seconds = getattr(person, "seconds", None) or time.monotonic() - started
            self.write({"person": str(key), "seconds": round(float(seconds), 4), "bytes": size_of(person)})
        return self._enrolled[key]

    def write(self, line: Mapping[str, Any]) -> None:
        with config_error_on_failure(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def size_of(person: Any) -> int | None:
    """Return the bytes that a system keeps of a person: its attribute `bytes`, or its tensors; None if unknown."""
    if isinstance(known := getattr(person, "bytes", None), int):
        return known
    features = getattr(person, "features", None)
    return features.numel() * features.element_size() if isinstance(features, Tensor) else None


def read_costs(output: Path) -> dict[str, float | None] | None:
    """Return mean seconds and bytes per new person, and seconds per picture of the row "full"; None without any.

    A line that a killed run wrote in part is left out.
    """
    people: dict[str, dict[str, Any]] = {}
    pictures, seconds = 0, 0.0
    path = output / COSTS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "person" in entry:
            people.setdefault(entry["person"], entry)
        elif entry.get("row") == "full":
            pictures, seconds = pictures + entry["pictures"], seconds + entry["seconds"]
    if not people and not pictures:
        return None
    sizes = [entry["bytes"] for entry in people.values() if entry["bytes"] is not None]
    return {
        "people": len(people),
        "seconds_per_person": sum(each["seconds"] for each in people.values()) / len(people) if people else None,
        "bytes_per_person": sum(sizes) / len(sizes) if sizes else None,
        "seconds_per_picture": seconds / pictures if pictures else None,
    }


def relative(path: Path, folder: Path) -> str:
    """Return a path as seen from a folder, or the whole path where there is no way (another drive of Windows)."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return path.as_posix()


def remove_partial_files(output: Path) -> None:
    """Remove the temporary files of a killed run."""
    for path in as_path(output).rglob("*.part"):
        path.unlink(missing_ok=True)


def _batches(tasks: Sequence[Task], batch: int) -> Iterator[list[Task]]:
    """Yield batches of tasks of one row and size, in order."""
    for kind in dict.fromkeys((task.row, task.size) for task in tasks):
        own = [task for task in tasks if (task.row, task.size) == kind]
        for start in range(0, len(own), batch):
            yield own[start : start + batch]


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
