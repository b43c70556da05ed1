"""Write pictures of the portrait world to disk: PNG files with one metadata.jsonl row each, or webdataset shards.

Every picture depends only on (seed, person, number). So the command can be killed at any moment and resumed, and a
later run with more people or pictures keeps the existing ones. A picture is finished when its row is in metadata.jsonl;
the complete PNG is written before the row. Shards are for training: the first picture of a person is the reference and
the others are its targets. Shards are finished one at a time, and a folder of shards accepts only the same settings.

Pictures of several people come last. They show the people of the portraits, which are their references, and have exact
boxes and masks of each person, and captions that number the people.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from data_synth.world_groups import GroupJob, drawn_groups, group_jobs, portrait_file, portrait_key
from imagine.errors import ConfigError
from imagine.request import MOST_PEOPLE
from imagine.shards.people import RecordPerson
from imagine.shards.reading import Record
from imagine.shards.writing import SETTINGS, DatasheetInfo, ShardWriter
from imagine.world import Contexts, People, attributes, captions, render, sample_contexts, sample_people
from imagine.world.seeds import DEMO, HELD_OUT, JUDGE, TRAIN

RANGES = {"train": TRAIN, "judge": JUDGE, "held_out": HELD_OUT, "demo": DEMO}
SIZES = range(16, 1025)
FORMAT_VERSION = 1
_BATCH = 16  # pictures rendered together; the batches never change, so a resumed run gives the same bytes


@dataclass(frozen=True)
class WorldSettings:
    """What to draw: `images` pictures of each of `identities` people, `size` pixels square.

    groups: number of further pictures, each of `group_size` of these people, on a wider canvas. shards: number of
    records per shard; None: write PNG files. Raises ConfigError for values out of range.
    """

    identities: int
    images: int
    size: int = 128
    seed: int = 0
    people: str = "train"
    shards: int | None = None
    groups: int = 0
    group_size: int = 2

    def __post_init__(self) -> None:
        if self.people not in RANGES:
            raise ConfigError(f"There is no range of people called {self.people!r}: choose one of {', '.join(RANGES)}.")
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
            raise ConfigError(f"A shard of {self.shards} records cannot be written: give 1 or more.")
        self._check_groups()

    def _check_groups(self) -> None:
        if self.groups < 0:
            raise ConfigError(f"{self.groups} pictures of several people cannot be drawn: give 0 or more.")
        if not 2 <= self.group_size <= MOST_PEOPLE:
            raise ConfigError(f"A picture of {self.group_size} people cannot be drawn: give 2 to {MOST_PEOPLE}.")
        if self.groups and self.identities < self.group_size:
            raise ConfigError(
                f"A picture of {self.group_size} people needs as many identities, not {self.identities}: give more."
            )

    @property
    def pictures(self) -> int:
        """Number of all pictures."""
        return self.identities * self.images + self.groups

    def group_facts(self) -> dict[str, int]:
        """Return the settings that pictures of several people depend on; empty if there are none."""
        if not self.groups:
            return {}
        return {"group_size": self.group_size, "group_identities": self.identities, "group_images": self.images}


@dataclass(frozen=True)
class _Job:
    """One picture to draw."""

    number: int  # of the person, from 0
    image: int  # which of the person's pictures, from 0
    identity: int  # the person's seed: sample_people([identity]) is this person again
    context: int  # the context's seed, for sample_contexts

    @property
    def file(self) -> str:
        """The path below the output folder."""
        return portrait_file(self.number, self.image)


_AnyJob = _Job | GroupJob


def build(settings: WorldSettings, output: Path, report: Callable[[int], None] = lambda done: None) -> Path:
    """Draw what is missing in `output` and return the path of its metadata.jsonl.

    report: receives the number of finished pictures, first that of an earlier run. Raises ConfigError if `output`
    cannot be used or holds pictures with another size, seed or range of people.
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
    """Write the missing shards to `output`, a folder on any filesystem, and return the address of its data sheet.

    report: receives the number of pictures written so far, first that of an earlier run. Raises ConfigError if `output`
    cannot be used or holds pictures with other settings.
    """
    if Path(output, "world.json").exists():
        raise ConfigError(f"{output} holds pictures as PNG files: choose another folder for shards.")
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
            "Made to train and evaluate personalised image generation with known ground truth. The pictures show "
            "stylised, rendered people: results on them say nothing about photographs of real people."
        ),
        collection=(
            "Rendered by imagine.world; captions, attributes, boxes and landmarks come from the parameters of the "
            "renderer. The set contains no photographs and no real people."
        ),
        licence="Apache-2.0, like the renderer",
        seeds={"seed": settings.seed},
        settings={
            "people": settings.people,
            "identities": settings.identities,
            "images": settings.images,
            "size": settings.size,
            "world": FORMAT_VERSION,
            **({"groups": settings.groups, "group_size": settings.group_size} if settings.groups else {}),
        },
    )


def _batches(settings: WorldSettings) -> Iterator[Sequence[_AnyJob]]:
    """Yield all jobs in batches: first the portraits, person by person, then the pictures of several people.

    The first N people of a seed are the same for every N.
    """
    people = RANGES[settings.people]
    order = np.random.default_rng(settings.seed).permutation(len(people))[: settings.identities].tolist()
    jobs = (
        _Job(number, image, people[row], _seed(settings.seed, people[row], image))
        for number, row in enumerate(order)
        for image in range(settings.images)
    )
    while batch := list(islice(jobs, _BATCH)):
        yield batch

    def seed_of(*parts: int) -> int:
        return _seed(settings.seed, people.start, *parts)

    identities = [people[row] for row in order]
    yield from group_jobs(identities, settings.groups, settings.group_size, settings.images, seed_of)


def _seed(*parts: int) -> int:
    """Return one 63-bit seed derived from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _draw(settings: WorldSettings, batch: Sequence[_AnyJob], missing: Sequence[int], output: Path, table: Path) -> None:
    rows = []
    for job, png, row in _drawn(settings, batch, missing):
        _write_atomically(output / job.file, png)
        rows.append({"file": job.file, **row})
    _append(table, rows)


def _records(settings: WorldSettings, batch: Sequence[_AnyJob], missing: Sequence[int]) -> Iterator[Record]:
    """Yield the missing pictures of a batch as records of pairs, or of several people."""
    for job, png, row in _drawn(settings, batch, missing):
        if isinstance(job, GroupJob):
            yield _group_record(job, png, row)
            continue
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


def _group_record(job: GroupJob, png: bytes, row: dict[str, Any]) -> Record:
    people = [RecordPerson.from_dict(one) for one in row["people"]]
    return Record(
        key=job.key,
        image=png,
        caption=row["caption"],
        captions=row["captions"],
        source="synthetic",
        extra={name: row[name] for name in ("attributes", "arrangement", "context")},
        people=tuple(replace(one, references=tuple(map(portrait_key, one.references))) for one in people),
    )


def _drawn(
    settings: WorldSettings, batch: Sequence[_AnyJob], missing: Sequence[int]
) -> Iterator[tuple[_AnyJob, bytes, dict[str, Any]]]:
    """Yield the PNG and row of each missing picture.

    The whole batch is rendered, because the last bit of a picture can depend on the batch.
    """
    if groups := [job for job in batch if isinstance(job, GroupJob)]:
        yield from ((job, _png(image), row) for job, image, row in drawn_groups(groups, missing, settings.size))
    elif portraits := [job for job in batch if isinstance(job, _Job)]:
        yield from _drawn_portraits(settings, portraits, missing)


def _drawn_portraits(
    settings: WorldSettings, batch: list[_Job], missing: Sequence[int]
) -> Iterator[tuple[_Job, bytes, dict[str, Any]]]:
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
    """Encode an image (3, S, S), 0 to 1, as a PNG file."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either complete or absent."""
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
    """Return the finished files; remove rows from the table that are incomplete or have lost their picture."""
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
    """Create the folder, or check that it was created with the same settings."""
    wanted: dict[str, Any] = {
        "version": FORMAT_VERSION, "size": settings.size, "seed": settings.seed, "people": settings.people,
    }  # fmt: skip
    settings_file = output / "world.json"
    if (output / SETTINGS).exists():
        raise ConfigError(f"{output} holds shards: choose another folder for PNG files.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        existing = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.exists() else {}
        # A folder of portraits can get groups later.
        complete = {**wanted, **settings.group_facts(), **existing}
        if complete != existing and all(complete[key] == value for key, value in wanted.items()):
            part = settings_file.with_suffix(".part")
            part.write_text(json.dumps(complete) + "\n", encoding="utf-8")
            os.replace(part, settings_file)
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{output} cannot be used as the output folder ({error}): choose another one.") from error
    wanted |= settings.group_facts()
    differences = ", ".join(f"{key} {complete[key]}" for key, value in wanted.items() if complete[key] != value)
    if differences:
        raise ConfigError(
            f"{output} holds pictures made with {differences}: give the same settings, or choose another folder."
        )
