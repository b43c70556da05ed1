"""Pictures of the portrait world on disk: PNGs and one metadata.jsonl row for each, or webdataset shards.

Every picture follows from (seed, person, number) alone, so a build can be killed at any moment and carried on, and
asking for more people or more pictures later keeps those that are there. A picture is finished when its row is in
metadata.jsonl; the PNG is in place, whole, before the row is written. Shards are for training: a person's first
picture is the reference, the others are its targets. They are finished one at a time, and hold what they were made for.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from imagine.errors import ConfigError
from imagine.shards.reading import Record
from imagine.shards.writing import SETTINGS, DatasheetInfo, ShardWriter
from imagine.world import Contexts, People, attributes, captions, render, sample_contexts, sample_people
from imagine.world.seeds import DEMO, HELD_OUT, JUDGE, TRAIN

RANGES = {"train": TRAIN, "judge": JUDGE, "held_out": HELD_OUT, "demo": DEMO}
SIZES = range(16, 1025)
FORMAT_VERSION = 1
_BATCH = 16  # pictures drawn at once; always the same ones together, so that a resumed build equals a straight one


@dataclass(frozen=True)
class WorldSettings:
    """What to draw: `images` pictures of each of `identities` people, `size` pixels square.

    `shards` is how many records each shard holds; None is for PNG files.
    """

    identities: int
    images: int
    size: int = 128
    seed: int = 0
    people: str = "train"
    shards: int | None = None

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
        if self.shards is not None and self.shards < 1:
            raise ConfigError(f"{self.shards} records do not make a shard: give 1 or more.")


@dataclass(frozen=True)
class _Job:
    """One picture to draw."""

    number: int  # of the person, from 0
    image: int  # which of the person's pictures, from 0
    identity: int  # the person's seed: sample_people([identity]) is this person again
    context: int  # the context's seed, likewise

    @property
    def file(self) -> str:
        """Below the output folder."""
        return f"images/{self.number:06d}/{self.image:04d}.png"


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


def build_shards(settings: WorldSettings, output: str, report: Callable[[int], None] = lambda done: None) -> str:
    """Write what is missing of the shards in `output`, a folder on any filesystem, and return its data sheet's address.

    `report` is told how many pictures are in shards or on the way there, first those found from an earlier run. Raises
    ConfigError if `output` cannot be used or holds pictures made with other settings.
    """
    if Path(output, "world.json").exists():
        raise ConfigError(f"{output} holds pictures as PNG files: give another folder for shards.")
    assert settings.shards is not None, "these settings are for PNG files"
    with ShardWriter(output, _about(settings), settings.shards) as writer:
        done = 0
        report(writer.processed)
        for batch in _batches(settings):
            missing = range(max(writer.processed - done, 0), len(batch))
            for record in _records(settings, batch, missing) if missing else ():
                writer.write(record)
            done += len(batch)
            if missing:
                report(done)
    return f"{output.rstrip('/')}/datasheet.json"


def _about(settings: WorldSettings) -> DatasheetInfo:
    return DatasheetInfo(
        title="Pictures of the portrait world",
        purpose=(
            "Made to train and to measure personalised image generation where the truth is known. These are stylised "
            "people from a renderer: they say nothing about how photographs of real people come out."
        ),
        collection=(
            "Drawn by imagine.world; captions, attributes, boxes and landmarks come from the numbers that the pictures "
            "were drawn from. Nothing was photographed, and nobody shown exists."
        ),
        licence="Apache-2.0, as the renderer",
        seeds={"seed": settings.seed},
        settings={
            "people": settings.people,
            "identities": settings.identities,
            "images": settings.images,
            "size": settings.size,
            "world": FORMAT_VERSION,
        },
    )


def _batches(settings: WorldSettings) -> Iterator[list[_Job]]:
    """All jobs, person by person, in batches; the first N people of a seed are the same whatever N is."""
    people = RANGES[settings.people]
    order = np.random.default_rng(settings.seed).permutation(len(people))[: settings.identities].tolist()
    jobs = (
        _Job(number, image, people[row], _seed(settings.seed, people[row], image))
        for number, row in enumerate(order)
        for image in range(settings.images)
    )
    while batch := list(islice(jobs, _BATCH)):
        yield batch


def _seed(*parts: int) -> int:
    """One 63-bit seed out of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _draw(settings: WorldSettings, batch: list[_Job], missing: Sequence[int], output: Path, table: Path) -> None:
    rows = []
    for job, png, row in _drawn(settings, batch, missing):
        _write_atomically(output / job.file, png)
        rows.append({"file": job.file, **row})
    _append(table, rows)


def _records(settings: WorldSettings, batch: list[_Job], missing: Sequence[int]) -> Iterator[Record]:
    """The missing pictures of a batch as records of pairs."""
    for job, png, row in _drawn(settings, batch, missing):
        left, top, width, height = row["box"]
        yield Record(
            key=f"{job.number:06d}_{job.image:04d}",
            image=png,
            caption=row["caption"],
            captions=row["captions"],
            identity=str(job.identity),
            reference=f"{job.number:06d}_0000" if job.image else None,
            box=(left, top, width, height),
            source="synthetic" if job.image else "real",
            extra={name: row[name] for name in ("attributes", "context", "landmarks")},
        )


def _drawn(
    settings: WorldSettings, batch: list[_Job], missing: Sequence[int]
) -> Iterator[tuple[_Job, bytes, dict[str, Any]]]:
    """PNG and row of the missing pictures; all of the batch are drawn, as the last bit depends on the company."""
    people = sample_people([job.identity for job in batch])
    contexts = sample_contexts([job.context for job in batch])
    drawn = render(people, contexts, size=settings.size)
    for i in missing:
        truth = {"box": _rounded(drawn.boxes[i]), "landmarks": _rounded(drawn.landmarks[i])}
        row = {**_row(batch[i], people[i : i + 1], contexts[i : i + 1]), **truth}
        yield batch[i], _png(drawn.images[i]), row


def _row(job: _Job, people: People, contexts: Contexts) -> dict[str, Any]:
    styles = ("dense", "terse", "rewritten")
    written = {style: captions(people, contexts, style=style, seed=job.context)[0] for style in styles}
    return {
        "identity": job.identity,
        "caption": written["dense"],
        "attributes": attributes(people, contexts)[0],
        "captions": written,
        "context": job.context,
    }


def _rounded(values: Tensor) -> Any:
    return np.round(values.numpy().astype(np.float64), 2).tolist()


def _png(image: Tensor) -> bytes:
    """(3, S, S), 0 to 1, as a PNG file."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _write_atomically(path: Path, content: bytes) -> None:
    """So that the file is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(content)
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
    settings_file = output / "world.json"
    if (output / SETTINGS).exists():
        raise ConfigError(f"{output} holds shards: give another folder for PNG files.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not settings_file.exists():
            part = settings_file.with_suffix(".part")
            part.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
            os.replace(part, settings_file)
        existing = json.loads(settings_file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{output} cannot be used as the output folder ({error}): give another one.") from error
    if existing != wanted:
        differences = ", ".join(f"{key} {existing.get(key)}" for key in wanted if existing.get(key) != wanted[key])
        raise ConfigError(f"{output} holds pictures made with {differences}: give the same settings or another folder.")
