"""One training task for all methods that are trained for each person; a method says what it learns and how it reads.

A method is a class below `TuningTask` that defines `build` (the learnt modules) and, where it needs them, `text` (how
sentences are encoded), `terms` (further terms of the loss) and `write` (files in a standard format). Photos, prior
preservation, Cut-Mix, noise, loss, validation, checkpoints and progress are shared: this file and `train.loop`.
"""

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from imagine.errors import ConfigError
from imagine.records import Conditioning
from imagine.settings import validated
from train.cache.latents import squared_error
from train.data.order import chance, choices, normals, shuffled
from train.methods.bases.contract import AnyBase
from train.methods.bases.opening import check_base, draw_latents, open_base
from train.methods.bases.text import TextState, join_texts
from train.methods.learned.rare_words import rare_word
from train.methods.likeness import LikenessMeter
from train.methods.prior import Prior, generated_prior, real_prior
from train.methods.sentences import NEUTRAL, PLAIN, Naming
from train.methods.subjects import Items, cut_mix_items, photo_paths, read_items, scaled_items
from train.run.checkpoint import read_tensors, write_json, write_tensors
from train.run.grids import save_grid
from train.task import Loss, Share, TaskContext, Weight

log = logging.getLogger("train")
VALIDATION_SEED = 1_000_003
LEARNT, CARD = "learnt.safetensors", "concept.json"
Sentences = Literal["plain", "neutral"]
_MIXES = 32  # pictures of two subjects side by side that are made at the start
_DRAWN_AT_ONCE = 8
_CHECKED = 16  # noises per photo in the validation loss


class SubjectData(BaseModel):
    """The `data` section of a run: the base, the photos of each subject, and the folder of pictures of the class."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: str | None = None  # folder or hub id; None: the shipped weights
    photos: Annotated[tuple[tuple[Path, ...], ...], Field(min_length=1)] = ((),)  # files and folders of each subject
    folder: Path = Path("runs/methods/prior")  # pictures of the class, shared by all people with one base


class TuningSettings(BaseModel):
    """Settings that all methods share: names, sentences, prior preservation, augmentation, and what is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    noun: str = "person"  # the class noun, which follows the subject's word; "": none (DreamBooth's ablation)
    token: str | None = None  # the subject's word; None: a rare word, or a new one for methods that learn words
    sentences: Sentences = "plain"  # plain: one sentence; neutral: Textual Inversion's templates
    prior: Weight = 0.0  # weight of prior preservation (DreamBooth: 1)
    prior_images: Annotated[int, Field(ge=1)] = 200
    prior_noun: str | None = None  # noun of the pictures of the class; None: `noun`
    prior_photos: Path | None = None  # a folder of real pictures of the class; None: the base generates them
    prior_steps: Annotated[int, Field(ge=1)] | None = None  # sampling steps of generated pictures; None: the base's
    face_weight: Weight = 1.0  # loss weight inside the face's box; 1 elsewhere
    drop_text: Share = 0.0  # share of images trained with an empty sentence
    scales: Annotated[int, Field(ge=0)] = 0  # versions of each photo at other scales, with words for it; 0: none
    cut_mix: Share = 0.0  # share of images that show two subjects side by side
    location: Weight = 0.0  # weight of the attention outside a subject's half, in those images
    judge: Path | None = None  # folder of weights whose recogniser measures the likeness at every validation
    drawings: Annotated[int, Field(ge=1)] = 4  # pictures drawn at every validation
    drawing_steps: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True)
class TuningBatch:
    """Photos with their sentences; with prior preservation, as many pictures of the class."""

    latents: Tensor  # (B, C, h, w)
    weights: Tensor  # (B, 1, h, w)
    sentences: list[str]
    halves: Tensor  # (B, S, 1, h, w) where each subject is; all zero for an image of one subject
    prior: Tensor  # (B or 0, C, h, w)
    prior_sentences: list[str]


class TuningTask(ABC):
    """Train what a method learns on the photos of one subject, or of several."""

    Settings: ClassVar[type[BaseModel]] = TuningSettings
    PARTS: ClassVar[tuple[str, ...]] = ()
    LEARNS_WORDS: ClassVar[bool] = False
    NAME: ClassVar[str] = ""

    def __init__(self, settings: TuningSettings, context: TaskContext) -> None:
        self.settings: Any = settings
        self.context = context
        self.data = validated(SubjectData, context.data, "data")
        with torch.device("cpu"):  # a plan builds on the meta device, but the base's words need real values
            self.base: AnyBase = open_base(self.data.base, context.device)
            self.naming = self._naming()
            self.modules: dict[str, nn.Module] = {}
            self.build()
        self._texts: dict[str, TextState] = {}
        self.seconds: dict[str, float] = {}

    # --- what a method defines
    # ------------------------------------------------------------------------------------------
    @abstractmethod
    def build(self) -> None:
        """Add the learnt modules to `self.modules`, and what they need to the base."""

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of every module, as one part each."""
        return {name: list(module.parameters()) for name, module in self.modules.items()}

    def text(self, sentences: Sequence[str], times: Tensor | None = None) -> TextState:
        """Encode sentences that may name a subject; `times` (B,) are those of the noise, 0 to 1."""
        return self.base.text(sentences)

    def empty_text(self, count: int) -> TextState:
        """Return empty sentences, in the form of `text`, for guidance."""
        return self.base.text([""]).repeat(count)

    def terms(self, text: TextState, images_seen: int, training: bool) -> dict[str, Tensor]:
        """Return further terms of the loss, each a scalar or (B,)."""
        return {}

    def write(self, folder: Path) -> None:
        """Write files in a standard format into a folder, where one exists."""
        return

    def detach(self) -> None:
        """Leave the base as it was."""
        return

    # --- shared -----------------------------------------------------------------------------------------------------
    def _naming(self) -> Naming:
        settings, count = self.settings, len(self.data.photos)
        tokens = []
        for number in range(count):
            if settings.token is not None:
                tokens.append(settings.token if count == 1 else f"{settings.token}{number + 1}")
            elif self.LEARNS_WORDS:
                tokens.append(f"<subject-{number + 1}>")
            else:
                tokens.append(rare_word(self.base.readers, self.context.seed, number))
        return Naming(tuple(tokens), settings.noun)

    def check(self) -> list[str]:
        check_base(self.data.base)
        for photos in self.data.photos:
            photo_paths(photos)
        settings, warnings = self.settings, []
        if settings.cut_mix and len(self.data.photos) != 2:
            raise ConfigError(
                f"cut_mix needs two subjects, and there are {len(self.data.photos)}: give --photos twice, or set it "
                "to 0."
            )
        if settings.location and not (settings.cut_mix and self.LEARNS_WORDS):
            raise ConfigError("location needs cut_mix and learnt words, whose attention it limits: set it to 0.")
        if settings.prior and not (settings.noun or settings.prior_noun):
            raise ConfigError("prior needs pictures of a class: give a noun or a prior_noun, or set prior to 0.")
        if not settings.prior and settings.prior_photos is not None:
            warnings.append("prior_photos has no effect, because prior is 0.")
        return warnings

    def prepare(self) -> None:
        began = time.monotonic()
        photos = [photo_paths(one) for one in self.data.photos]
        self.plain, note = read_items(self.base, photos, self.settings.face_weight)
        if note:
            log.warning("%s: %s", self.context.name, note)
        seed, settings = self.context.seed, self.settings
        self.items = scaled_items(self.base, photos, settings.scales, seed) if settings.scales else self.plain
        self.mixes = cut_mix_items(self.base, photos, _MIXES, seed) if settings.cut_mix else None
        self.seconds["photos"] = time.monotonic() - began
        began = time.monotonic()
        self.prior = self._prior() if settings.prior else None
        self.seconds["prior"] = time.monotonic() - began
        self.meter = None if settings.judge is None else LikenessMeter(settings.judge, photos, self.base.side)
        if self.meter is not None:
            drawn = self._pictures(VALIDATION_SEED, with_subject=False)
            self.before = self.meter.likeness(drawn)
            log.info("%s: likeness of the base's own pictures %.3f", self.context.name, self.before)

    def _prior(self) -> Prior:
        settings = self.settings
        noun = settings.prior_noun or settings.noun
        prompt = PLAIN.format(noun)
        if settings.prior_photos is not None:
            return real_prior(self.base, settings.prior_photos, prompt, settings.prior_images)
        return generated_prior(self.base, prompt, settings.prior_images, self.data.folder, settings.prior_steps)

    def batch(self, images_seen: int, size: int) -> TuningBatch:
        seed, settings = self.context.seed, self.settings
        rows = shuffled(seed, "photos", images_seen, size, len(self.items))
        latents, weights = self.items.latents[rows].cpu(), self.items.weights[rows].cpu()
        templates = [PLAIN] if settings.sentences == "plain" else list(NEUTRAL)
        chosen = choices(seed, "sentences", images_seen, size, [1.0] * len(templates)).tolist()
        sentences = [
            self._sentence(self.items, row, templates[number])
            for row, number in zip(rows.tolist(), chosen, strict=True)
        ]
        subjects = len(self.data.photos)
        halves = torch.zeros(size, subjects, 1, *latents.shape[2:])
        if self.mixes is not None:
            picked = shuffled(seed, "mixes", images_seen, size, len(self.mixes))
            for place in chance(seed, "cut mix", images_seen, size, settings.cut_mix).nonzero().flatten().tolist():
                row = int(picked[place])
                latents[place], weights[place] = self.mixes.latents[row].cpu(), 1
                assert self.mixes.halves is not None
                halves[place] = self.mixes.halves[row]
                sentences[place] = self.naming.side_by_side(*self.mixes.order[row])
        for place in chance(seed, "drop", images_seen, size, settings.drop_text).nonzero().flatten().tolist():
            sentences[place] = ""
        prior, prior_sentences = latents[:0], list[str]()
        if self.prior is not None:
            rows = shuffled(seed, "prior", images_seen, size, len(self.prior.latents))
            prior, prior_sentences = self.prior.latents[rows], [self.prior.captions[row] for row in rows.tolist()]
        return TuningBatch(latents, weights, sentences, halves, prior, prior_sentences)

    def _sentence(self, items: Items, row: int, template: str) -> str:
        prefix = items.prefixes[row]
        return (f"{prefix} " if prefix else "") + template.format(self.naming.name(items.subject[row]))

    def show(self, batch: TuningBatch, path: Path) -> None:
        save_grid(self.base.decode(torch.cat((batch.latents, batch.prior))), path, columns=8)

    def loss(self, batch: TuningBatch, images_seen: int) -> Loss:
        count, seed, device = len(batch.latents), self.context.seed, batch.latents.device
        latents = torch.cat((batch.latents, batch.prior))
        noise = normals(seed, "noise", images_seen, count, latents.shape[1:], device)
        times = self.base.times(seed, images_seen, count)
        if len(batch.prior):
            more = normals(seed, "prior noise", images_seen, count, latents.shape[1:], device)
            noise, times = torch.cat((noise, more)), torch.cat((times, self.base.times(seed + 1, images_seen, count)))
        text = self._read(batch, times)
        watch: dict[str, dict[str, Any]] = {"text": {}}
        located = self.settings.location > 0 and bool(batch.halves.any())
        noised = self.base.noised(latents, noise, times)
        identity = Conditioning(watch=watch) if located else None
        prediction = self.base.predict(noised.noisy, noised.steps, text, identity)
        weights = torch.cat((batch.weights, torch.ones_like(batch.prior[:, :1])))
        errors = squared_error(prediction, noised.target, weights)
        instance = errors[:count]
        metrics: dict[str, Tensor] = {"error": instance.mean()}
        total = instance
        if len(batch.prior):
            total, metrics["prior"] = total + self.settings.prior * errors[count:], errors[count:].mean()
        if located:
            term = self._location(text, watch["text"], batch.halves)
            total, metrics["location"] = total + self.settings.location * term, term.mean()
        for name, term in self.terms(text.take(slice(0, count)), images_seen, True).items():
            total, metrics[name] = total + term, term.mean()
        return Loss(total, metrics)

    def _location(self, text: TextState, watched: Mapping[str, Any], halves: Tensor) -> Tensor:
        from train.methods.losses import location_loss

        assert text.places is not None
        count = len(halves)
        here = {
            name: replace(each, query=each.query[:count], key=each.key[:count], mask=_first(each.mask, count))
            for name, each in watched.items()
        }
        vectors = int(getattr(self.settings, "vectors", 1))
        there = halves.flatten(1).any(1).to(halves)  # 0 for an image of one subject
        return location_loss(here, text.places[:count], halves, vectors) * there

    def _read(self, batch: TuningBatch, times: Tensor) -> TextState:
        count = len(batch.sentences)
        own = self.text(batch.sentences, times[:count])
        if not batch.prior_sentences:
            return own
        return join_texts([own, self.text(batch.prior_sentences, times[count:])])

    def cached_text(self, sentences: Sequence[str]) -> TextState:
        """Encode sentences once each; for methods whose text encoders do not change."""
        for sentence in dict.fromkeys(sentences):
            if sentence not in self._texts:
                with torch.no_grad():
                    self._texts[sentence] = self.base.text([sentence])
        return join_texts([self._texts[sentence] for sentence in sentences])

    # --- measuring and drawing --------------------------------------------------------------------------------------
    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        """Return the error on the photos at fixed noises; with a judge, the likeness of drawn pictures to the
        photos."""
        numbers = {"validation_loss": self._validation_loss(images_seen)}
        pictures = self._pictures(VALIDATION_SEED)
        save_grid(pictures, folder / "pictures.png", columns=4)
        if self.meter is not None:
            numbers |= {"likeness": self.meter.likeness(pictures), "likeness_before": self.before}
        return numbers

    def _validation_loss(self, images_seen: int) -> float:
        errors = []
        for row in range(len(self.plain)):
            latents = self.plain.latents[row : row + 1].repeat(_CHECKED, 1, 1, 1).to(self.base.device)
            first = row * _CHECKED
            noise = normals(VALIDATION_SEED, "noise", first, _CHECKED, latents.shape[1:], self.base.device)
            times = self.base.times(VALIDATION_SEED, first, _CHECKED)
            text = self.text([self._sentence(self.plain, row, PLAIN)] * _CHECKED, times)
            noised = self.base.noised(latents, noise, times)
            prediction = self.base.predict(noised.noisy, noised.steps, text)
            errors.append(squared_error(prediction, noised.target, torch.ones_like(latents[:, :1])).mean())
        return float(torch.stack(errors).mean())

    def _pictures(self, seed: int, with_subject: bool = True) -> Tensor:
        names = (
            [self.naming.name(number) for number in range(len(self.data.photos))]
            if with_subject
            else [self.naming.noun or "person"]
        )
        sentences = [PLAIN.format(names[n % len(names)]) for n in range(self.settings.drawings)]
        pieces = []
        for first in range(0, len(sentences), _DRAWN_AT_ONCE):
            some = sentences[first : first + _DRAWN_AT_ONCE]
            noise = normals(seed, "drawing", first, len(some), self.base.latent_shape, self.base.device)
            pieces.append(self.draw(some, noise, self.settings.drawing_steps))
        return torch.cat(pieces)

    @torch.no_grad()
    def draw(
        self, sentences: Sequence[str], noise: Tensor, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        """Draw pictures (B, 3, S, S), 0 to 1, of sentences that name a subject by its word, from noise (B, C, h, w)."""
        predict = lambda noisy, step, text, _: self.base.predict(noisy, step, text)  # noqa: E731
        latents = draw_latents(
            self.base, noise, lambda times: self.text(sentences, times), self.empty_text(len(sentences)), predict,
            steps, guidance,
        )  # fmt: skip
        return self.base.decode(latents)

    # --- files ------------------------------------------------------------------------------------------------------
    def export(self, folder: Path) -> None:
        """Write what was learnt, a description of it, and files that other programs read."""
        files = self.save(folder)
        card = {
            "format_version": 1, "method": self.NAME, "base": self.base.name, "tokens": list(self.naming.tokens),
            "noun": self.naming.noun, "photos": len(self.plain), "files": files,
            "bytes": sum((folder / name).stat().st_size for name in files),
            "prior": None if self.prior is None else self.prior.kind,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }  # fmt: skip
        write_json(folder / CARD, card)
        self.write(folder)

    def save(self, folder: Path) -> list[str]:
        """Write what was learnt into a folder, and return the names of the files that `load` reads."""
        tensors = {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        write_tensors(folder / LEARNT, tensors, {"method": self.NAME})
        return [LEARNT]

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises WeightsError if it does not fit."""
        from train.run.checkpoint import load_weights

        tensors, _ = read_tensors(folder / LEARNT)
        load_weights(self.modules, tensors, str(folder / LEARNT))
        for module in self.modules.values():
            module.to(self.base.device).requires_grad_(False).eval()
        self._texts.clear()


def _first(mask: Tensor | None, count: int) -> Tensor | None:
    return None if mask is None else mask[:count]


def read_card(folder: Path) -> dict[str, Any]:
    """Return the description of what was learnt in a folder; ConfigError if there is none."""
    try:
        return dict(json.loads((folder / CARD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ConfigError(f"{folder} holds nothing that a method learnt ({CARD}): name an export folder.") from None
