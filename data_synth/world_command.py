"""Pictures of the portrait world on disk: PNGs and one metadata.jsonl row for each.

Every picture follows from (seed, person, number) alone, so a build can be killed at any moment and carried on, and
asking for more people or more pictures later keeps those that are there. A picture is finished when its row is in
metadata.jsonl; the PNG is in place, whole, before the row is written.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from imagine.errors import ConfigError
from imagine.world import Contexts, People, attributes, captions, render, sample_contexts, sample_people
from imagine.world.seeds import DEMO, HELD_OUT, JUDGE, TRAIN

RANGES = {"train": TRAIN, "judge": JUDGE, "held_out": HELD_OUT, "demo": DEMO}
SIZES = range(16, 1025)
FORMAT_VERSION = 1
_BATCH = 16  # pictures drawn at once; always the same ones together, so that a resumed build equals a straight one


@dataclass(frozen=True)
class WorldSettings:
    """What to draw: `images` pictures of each of `identities` people, `size` pixels square."""

    identities: int
    images: int
    size: int = 128
    seed: int = 0
    people: str = "train"

    def __post_init__(self) -> None:
        if self.people not in RANGES:
            raise ConfigError(f"There are no people called {self.people!r}: choose one of {', '.join(RANGES)}.")
        most = len(RANGES[self.people])
        if not 1 <= self.identities <= most:
            raise ConfigError(f"{self.identities} identities cannot be drawn: give 1 to {most:,}.")
        if self.images < 1:
            raise ConfigError(f"{self.images} images of a person cannot be drawn: give 1 or more.")
        if self.size not in SIZES:
            raise ConfigError(f"A size of {self.size} pixels cannot be drawn: give {SIZES[0]} to {SIZES[-1]}.")
        if self.seed < 0:
            raise ConfigError(f"The seed is {self.seed}: give 0 or more.")


@dataclass(frozen=True)
class _Job:
    """One picture to draw."""

    file: str  # below the output folder
    identity: int  # the person's seed: sample_people([identity]) is this person again
    context: int  # the context's seed, likewise


def build(settings: WorldSettings, output: Path, report: Callable[[int], None] = lambda done: None) -> Path:
    """Draw what is missing in `output` and return the path of its metadata.jsonl.

    `report` is told how many pictures are done, first those found from an earlier run. Raises ConfigError if `output`
    cannot be used or holds pictures made with another size, seed or range of people.
    """
    table = output / "metadata.jsonl"
    _open_folder(settings, output)
    finished = _finished(output, table)
    done = sum(job.file in finished for batch in _batches(settings) for job in batch)
    report(done)
    for batch in _batches(settings):
        missing = [index for index, job in enumerate(batch) if job.file not in finished]
        if missing:
            _draw(settings, batch, missing, output, table)
            done += len(missing)
            report(done)
    return table


def _batches(settings: WorldSettings) -> Iterator[list[_Job]]:
    """All jobs, person by person, in batches; the first N people of a seed are the same whatever N is."""
    people = RANGES[settings.people]
    order = np.random.default_rng(settings.seed).permutation(len(people))[: settings.identities].tolist()
    jobs = (
        _Job(f"images/{number:06d}/{image:04d}.png", people[row], _seed(settings.seed, people[row], image))
        for number, row in enumerate(order)
        for image in range(settings.images)
    )
    while batch := list(islice(jobs, _BATCH)):
        yield batch


def _seed(*parts: int) -> int:
    """One 63-bit seed out of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _draw(settings: WorldSettings, batch: list[_Job], missing: list[int], output: Path, table: Path) -> None:
    people = sample_people([job.identity for job in batch])
    contexts = sample_contexts([job.context for job in batch])
    drawn = render(people, contexts, size=settings.size)
    rows = []
    for i in missing:
        _write_png(output / batch[i].file, drawn.images[i])
        truth = {"box": _rounded(drawn.boxes[i]), "landmarks": _rounded(drawn.landmarks[i])}
        rows.append({**_row(batch[i], people[i : i + 1], contexts[i : i + 1]), **truth})
    _append(table, rows)


def _row(job: _Job, people: People, contexts: Contexts) -> dict[str, Any]:
    styles = ("dense", "terse", "rewritten")
    written = {style: captions(people, contexts, style=style, seed=job.context)[0] for style in styles}
    return {
        "file": job.file,
        "identity": job.identity,
        "caption": written["dense"],
        "attributes": attributes(people, contexts)[0],
        "captions": written,
        "context": job.context,
    }


def _rounded(values: Tensor) -> Any:
    return np.round(values.numpy().astype(np.float64), 2).tolist()


def _write_png(path: Path, image: Tensor) -> None:
    """Write (3, S, S), 0 to 1, so that the file is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(part, format="PNG")
    os.replace(part, path)


def _append(table: Path, rows: list[dict[str, Any]]) -> None:
    with table.open("a", encoding="utf-8", newline="\n") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def _finished(output: Path, table: Path) -> set[str]:
    """The files that are done; a row torn by a kill, or one whose picture has gone, is taken out of the table."""
    if not table.exists():
        return set()
    with table.open(encoding="utf-8", newline="\n") as rows:
        lines = list(rows)
    kept = {}
    for line in lines:
        file = _file_of(line)
        if file is not None and (output / file).is_file():
            kept[file] = line
    if len(kept) < len(lines):
        part = table.with_suffix(".part")
        part.write_text("".join(kept.values()), encoding="utf-8", newline="\n")
        os.replace(part, table)
    return set(kept)


def _file_of(line: str) -> str | None:
    try:
        return str(json.loads(line)["file"]) if line.endswith("\n") else None
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


def _open_folder(settings: WorldSettings, output: Path) -> None:
    """Make the folder, or check that it was made with the same settings."""
    wanted = {"version": FORMAT_VERSION, "size": settings.size, "seed": settings.seed, "people": settings.people}
    note = output / "world.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            part = note.with_suffix(".part")
            part.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
            os.replace(part, note)
        there = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{output} cannot be used as the output folder ({error}): give another one.") from error
    if there != wanted:
        said = ", ".join(f"{key} {there.get(key)}" for key in wanted if there.get(key) != wanted[key])
        raise ConfigError(f"{output} holds pictures made with {said}: give the same settings or another folder.")
