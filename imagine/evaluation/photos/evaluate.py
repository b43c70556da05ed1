"""Evaluate a system on photographs: DreamBench, or a user's own folder of photos.

Each subject's photos are given to the system, which draws every prompt. Pictures are compared with the photos: people
by a face recogniser, things by CLIP and DINO, prompts by CLIP. The ceiling is what other photos of the same subject
reach, and the floor what photos of other subjects reach. The notes say what cannot be measured, because a network is
not on this disk.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imagine.errors import ConfigError, PictureError
from imagine.evaluation.page.pictures import Shown
from imagine.evaluation.photos import page
from imagine.evaluation.photos.encoders import ClipEncoder, DinoEncoder, FaceEncoder, ImageEncoder
from imagine.evaluation.photos.scores import CLIP, DINO, IDENTITY, Features, measure, summarise
from imagine.evaluation.photos.subjects import IMAGES, Subject, describe, read_subjects
from imagine.evaluation.runs.folder import check_settings_file, commit, config_error_on_failure, noise_seed
from imagine.evaluation.runs.judged import JudgedStore
from imagine.evaluation.runs.pictures import RunPictures, Task, draw_missing, read_costs, relative, remove_partial_files
from imagine.evaluation.runs.shards import WHOLE, Shard
from imagine.evaluation.systems.photographs import refuse_drawings
from imagine.evaluation.systems.pipelines import as_judgeable
from imagine.people.photos import open_photo
from imagine.records import Progress, no_progress

FORMAT_VERSION = 2
_SHOWN = 6  # pictures of each kind on the page


@dataclass(frozen=True)
class PhotoSettings:
    """Where the photos are, and what compares them.

    images: pictures of each prompt (default: 4 in dreambench, 1 in photos). references: photos of each person that the
    system gets, in the suite photos. clip, dino: where the networks are (see `ClipEncoder.from_disk` and
    `DinoEncoder.from_disk`), or encoders; without clip, the one in open_clip's cache is used if it is there.
    identity: the recogniser of people; without it, dlib's in the suite photos, and none in dreambench.
    """

    folder: Path
    prompts_file: Path | None = None
    references: int = 1
    images: int | None = None
    clip: "str | ClipEncoder | None" = None
    dino: "str | DinoEncoder | None" = None
    identity: ImageEncoder | None = None


def run(
    pipeline: Any,
    output: str | Path,
    suite: str,
    photos: PhotoSettings | None,
    subjects: int | None = None,
    prompts: int | None = None,
    seed: int = 0,
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
    shard: Shard = WHOLE,
) -> dict[str, Any]:
    """Evaluate a system and write report.json, report.html, pictures.jsonl and pictures/ into `output`.

    `subjects` and `prompts` limit the numbers of both. Arguments, result and errors are otherwise those of
    `evaluate.run`.
    """
    if photos is None:
        raise ConfigError(f"The suite {suite} needs a folder of photos: name it with --photos DIR.")
    chosen = read_subjects(suite, photos.folder, photos.prompts_file, photos.references)[:subjects]
    chosen = [replace(each, prompts=each.prompts[:prompts]) for each in chosen]
    encoders, notes = load_encoders(suite, photos)
    images = photos.images or IMAGES[suite]
    if images < 1 or photos.references < 1:
        raise ConfigError("The numbers of pictures and of reference photos must be at least 1.")
    system = as_judgeable(pipeline, options)
    settings = {
        "suite": suite,
        "identities": len(chosen),
        "prompts": len(chosen[0].prompts),
        "seed": seed,
        "images": images,
    }
    check_settings_file(Path(output), {
        **settings, "subjects": describe(chosen), "options": dict(options or {}), "weights": system.fingerprint(),
    })  # fmt: skip
    if shard.is_whole:
        remove_partial_files(Path(output))
    evaluation = PhotoEvaluation(
        RunPictures(Path(output), system, side=None), chosen, encoders, settings, images, shard, progress
    )
    return evaluation.run(batch, notes, dict(options or {}))


def load_encoders(suite: str, photos: PhotoSettings) -> tuple[dict[str, ImageEncoder], list[str]]:
    """Return the encoders that are on this disk by their part (identity, clip, dino), and notes on the others."""
    encoders: dict[str, ImageEncoder] = {}
    notes: list[str] = []
    if photos.identity is not None or suite == "photos":
        encoders[IDENTITY] = photos.identity or FaceEncoder.for_photographs()
    try:
        encoders[CLIP] = ClipEncoder.from_disk(photos.clip) if not isinstance(photos.clip, ClipEncoder) else photos.clip
    except ConfigError as error:
        if photos.clip is not None:
            raise
        notes.append(f"CLIP-T and CLIP-I were not measured: {error}")
    if photos.dino is None:
        notes.append("DINO was not measured: name a folder that holds it (--dino DIR).")
    else:
        encoders[DINO] = photos.dino if isinstance(photos.dino, DinoEncoder) else DinoEncoder.from_disk(photos.dino)
    if not encoders:
        raise ConfigError("Nothing can be measured: name CLIP with --clip, or DINO with --dino.")
    return encoders, notes


@dataclass(frozen=True)
class PhotoEvaluation:
    """One evaluation on photographs."""

    pictures: RunPictures
    subjects: Sequence[Subject]
    encoders: Mapping[str, ImageEncoder]
    settings: Mapping[str, Any]
    images: int
    shard: Shard
    progress: Progress

    @property
    def each(self) -> int:
        """The number of pictures of each subject."""
        return len(self.subjects[0].prompts) * self.images

    def run(self, batch: int, notes: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
        """Draw, judge and report; in a part of a run, only draw and judge."""
        photos, unreadable = self._open_photos()
        failed = self._draw(photos, batch)
        if IDENTITY in self.encoders:
            refuse_drawings([self.pictures.image("full", each) for each in self._ids()[:16]])
        drawn = self._judge_drawn()
        if not self.shard.is_whole:
            return {}
        self.progress("judging the photos", 0, 0)
        features = Features(
            drawn,
            [
                self._encode([photos[path] for path in subject.references if path in photos])
                for subject in self.subjects
            ],
            [self._encode([photos[path] for path in subject.truths if path in photos]) for subject in self.subjects],
            self._texts(),
        )
        scores, ceilings, floors = measure(features, self.each, int(self.settings["seed"]))
        missing = {**{str(path.name): why for path, why in unreadable.items()}, **self.pictures.unreadable, **failed}
        extra = (
            [f"{len(missing)} pictures could not be read; those of the system count as failures."] if missing else []
        )
        alone = [each.name for each in self.subjects if not each.truths]
        if alone and IDENTITY in self.encoders:
            extra.append(
                f"{len(alone)} subjects have no further photo, so SimGT leaves them out: {', '.join(alone[:5])}."
            )
        names = [subject.name for subject in self.subjects]
        summary = {
            "format_version": FORMAT_VERSION, **self.settings, "commit": commit(), "system": self.pictures.system.name,
            "options": dict(options), "costs": read_costs(self.pictures.output), "notes": [*notes, *extra],
            "unreadable": missing, "encoders": {part: each.name for part, each in self.encoders.items()},
            **summarise(names, scores, ceilings, floors, int(self.settings["seed"])),
        }  # fmt: skip
        self._write(summary, scores, photos)
        return summary

    def _ids(self) -> list[str]:
        return [
            f"{subject.name}/{prompt:02}_{image}"
            for subject in self.subjects
            for prompt in range(len(subject.prompts))
            for image in range(self.images)
        ]

    def _prompts(self) -> list[str]:
        return [prompt for subject in self.subjects for prompt in subject.prompts for _ in range(self.images)]

    def _open_photos(self) -> tuple[dict[Path, Image.Image], dict[Path, str]]:
        """Return all photos, and why some cannot be read. Raises ConfigError if a subject has none to give."""
        photos, unreadable = dict[Path, Image.Image](), dict[Path, str]()
        for subject in self.subjects:
            for path in dict.fromkeys((*subject.references, *subject.truths)):
                try:
                    photos[path] = open_photo(path)
                except PictureError as error:
                    unreadable[path] = str(error)
            if not any(path in photos for path in subject.references):
                raise ConfigError(
                    f"No reference photo of {subject.name} can be read: {unreadable[subject.references[0]]}"
                )
        return photos, unreadable

    def _draw(self, photos: Mapping[Path, Image.Image], batch: int) -> dict[str, str]:
        ids, prompts, seed = self._ids(), self._prompts(), int(self.settings["seed"])
        tasks = [
            Task("full", each, prompt, number // self.each, noise_seed(seed, number))
            for number, (each, prompt) in enumerate(zip(ids, prompts, strict=True))
        ]

        def given(key: Any) -> tuple[list[Image.Image], str]:
            subject = self.subjects[key]
            return [photos[path] for path in subject.references if path in photos], subject.noun

        facts = {"suite": self.settings["suite"], "system": self.pictures.system.name}
        facts["weights"] = self.pictures.system.fingerprint()
        return draw_missing(self.pictures, tasks, given, batch, facts, self.shard, self.progress)

    def _encode(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        return {part: each.images(images) if images else torch.zeros(0, 1) for part, each in self.encoders.items()}

    def _texts(self) -> Tensor | None:
        clip = self.encoders.get(CLIP)
        return clip.texts(self._prompts()) if isinstance(clip, ClipEncoder) else None

    def _judge_drawn(self, batch: int = 16) -> dict[str, Tensor]:
        """Return the features of every picture by part; zeros for a picture that cannot be read."""
        store = JudgedStore(self.pictures.output, " ".join(each.name for each in self.encoders.values()), self.shard)
        ids, parts = self._ids(), list[dict[str, Tensor]]()
        for number, start in enumerate(range(0, len(ids), batch)):
            if not self.shard.owns(number):
                continue
            self.progress("judging the pictures", start, len(ids))
            images = [self.pictures.image("full", each) for each in ids[start : start + batch]]
            digest = store.digest(" ".join("none" if image is None else _hash(image) for image in images))
            found = store.load("full", start, digest)
            if found is None:
                shown = [image or Image.new("RGB", (64, 64)) for image in images]
                keep = torch.tensor([[image is not None] for image in images])
                tensors = {part: values * keep for part, values in self._encode(shown).items()}
                store.computed += len(images)
                store.save("full", start, digest, tensors, None)
                found = tensors, None
            parts.append(found[0])
        return {part: torch.cat([each[part] for each in parts]) for part in self.encoders} if parts else {}

    def _write(
        self, summary: Mapping[str, Any], scores: Mapping[str, Tensor], photos: Mapping[Path, Image.Image]
    ) -> None:
        output, ids, prompts = self.pictures.output, self._ids(), self._prompts()
        lines = [
            {
                "id": each, "file": self.pictures.name(self.pictures.path("full", each)), "text": prompt,
                "identity": number // self.each,
                "reference": relative(self.subjects[number // self.each].references[0], output),
                **{name: _plain(values.flatten()[number]) for name, values in scores.items()},
            }
            for number, (each, prompt) in enumerate(zip(ids, prompts, strict=True))
        ]  # fmt: skip
        ranked = page.ranked(scores, _SHOWN)
        shown = {kind: [self._shown(number, photos) for number in numbers] for kind, numbers in ranked.items()}
        with config_error_on_failure(output / "report.html"):
            (output / "pictures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            (output / "report.html").write_text(page.html(summary, shown), encoding="utf-8")
            (output / "report.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def _shown(self, number: int, photos: Mapping[Path, Image.Image]) -> Shown:
        subject = self.subjects[number // self.each]
        reference = next(photos[path] for path in subject.references if path in photos)
        picture = replace(self.pictures, unreadable={}).image("full", self._ids()[number])
        return Shown(picture, reference.copy(), f"{subject.name}: {self._prompts()[number]}")


def _hash(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def _plain(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else round(float(value), 4)
