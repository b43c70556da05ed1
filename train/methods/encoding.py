"""One training task for all methods that are trained once for all people, and then only encode a person.

A method is a class below `EncoderTask` that defines `build` (the learnt modules), `represent` (face crops to numbers
per person) and `condition` (sentences and these numbers to what the denoiser reads). Data, noise, loss, guidance,
validation, checkpoints and progress are shared: this file, `train.data` and `train.loop`.

Sentences are encoded in every step, because several methods write into them.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from imagine.adapter.adapter import Adapter
from imagine.errors import ConfigError
from imagine.people.faces import crop_face
from imagine.records import VISION, Conditioning, Tokens
from train.cache.latents import squared_error
from train.cache.shortening import shorten
from train.data.denoiser_inputs import GalleryCache, cache_gallery, references
from train.data.order import chance, normals, to_device, uniforms
from train.data.portraits import check_sources, data_settings, gallery_folder, held_out_pictures, pictures_of
from train.data.public_base import load_vision
from train.data.sources import DrawnPairs, Mixture, in_order
from train.methods.bases.contract import AnyBase
from train.methods.bases.opening import check_base, draw_latents, open_base
from train.methods.bases.text import TextState
from train.methods.learned.words import LearntWords
from train.run.checkpoint import load_weights, read_tensors, write_json, write_tensors
from train.run.grids import save_grid
from train.task import Loss, Share, TaskContext, Weight

log = logging.getLogger("train")
VALIDATION_SEED = 1_000_003
LEARNT, CARD = "learnt.safetensors", "concept.json"


class EncoderSettings(BaseModel):
    """Settings that all encoders share: the vision encoder, the data, and the dropout for guidance."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    vision: Path | None = None  # folder of the vision encoder; None: the base's image_encoder
    sources: dict[str, float] = {"synthetic": 1.0}
    drop_text: Share = 0.1
    drop_vision: Share = 0.1
    face_weight: Weight = 1.0  # loss weight inside the face's box; 1 elsewhere
    lora_rank: Annotated[int, Field(ge=0)] = 0  # LoRA on the attention layers; 0: none
    validation_images: Annotated[int, Field(ge=2)] = 32
    drawings: Annotated[int, Field(ge=0)] = 4
    drawing_steps: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True)
class EncoderBatch:
    """Targets with their captions, and the face crops of the references."""

    latents: Tensor  # (B, C, h, w)
    weights: Tensor  # (B, 1, h, w)
    captions: list[str]
    crops: Tensor  # (B, 3, S, S)
    strength: Tensor  # (B,) 0 where the reference is dropped


class EncoderTask(ABC):
    """Train what an encoder method learns on pairs of references and targets."""

    Settings: ClassVar[type[BaseModel]] = EncoderSettings
    PARTS: ClassVar[tuple[str, ...]] = ()
    NAME: ClassVar[str] = ""

    def __init__(self, settings: EncoderSettings, context: TaskContext) -> None:
        self.settings: Any = settings
        self.context = context
        self.records = {key: value for key, value in context.data.items() if key != "base"}
        self.adapter: Adapter | None = None
        self.place_word: LearntWords | None = None
        with torch.device("cpu"):  # a plan builds on the meta device, but the base's words need real values
            self.base: AnyBase = open_base(context.data.get("base"), context.device)
            self.vision = load_vision(settings.vision or self.base.folder / "image_encoder", self.base.device)
            self.vision.to(self.base.device).requires_grad_(False).eval()
            self.modules: dict[str, nn.Module] = {}
        with torch.device(self.base.device):
            self.build()
        if self.adapter is not None:
            self.adapter.attach(self.base.unet)

    # --- what a method defines
    # ------------------------------------------------------------------------------------------
    @abstractmethod
    def build(self) -> None:
        """Add the learnt modules to `self.modules`."""

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of every module, as one part each."""
        return {name: list(module.parameters()) for name, module in self.modules.items()}

    @abstractmethod
    def represent(self, crops: Tensor) -> Tensor:
        """Return what the method keeps of a person, (B, n, width), for face crops (B, 3, S, S)."""

    def merge(self, each: Tensor) -> Tensor:
        """Return one person's numbers (1, m, width) from those of several photos (P, n, width)."""
        return each.flatten(0, 1).unsqueeze(0)

    def condition(
        self, sentences: Sequence[str], subject: Tensor, strength: Tensor
    ) -> tuple[TextState, Conditioning | None]:
        """Return what the denoiser reads for sentences and people (B, n, width) at strengths (B,)."""
        identity = Conditioning({VISION: Tokens(subject)}, {VISION: strength})
        return self.base.text(sentences), identity

    def terms(self, subject: Tensor) -> dict[str, Tensor]:
        """Return further terms of the loss for people (B, n, width), scalars."""
        return {}

    # --- shared pieces for methods ----------------------------------------------------------------------------------
    def width(self) -> int:
        """Return the width of the denoiser's text."""
        return int(self.base.unet.config.cross_attention_dim)

    def mark_noun(self, noun: str = "person") -> None:
        """Let `places_text` find the noun in sentences, by a word that reads as the noun."""
        self.place_word = LearntWords(self.base, ["<subject-1>"], noun)
        self.place_word.requires_grad_(False)
        self.noun = noun

    def places_text(self, sentences: Sequence[str], where: Tensor) -> TextState:
        """Encode sentences; in those `where` (B,) is True, `places` is 1 where the class noun stands."""
        assert self.place_word is not None, "mark_noun was not called"
        word = self.place_word.names[0]
        marked = [
            sentence.replace(self.noun, word, 1) if wanted else sentence
            for sentence, wanted in zip(sentences, where.tolist(), strict=True)
        ]
        return self.place_word.encode(self.base, marked)

    # --- data -------------------------------------------------------------------------------------------------------
    def check(self) -> list[str]:
        check_base(self.context.data.get("base"))
        check_sources(self.records, self.settings.sources)
        return []

    def prepare(self) -> None:
        data, side = data_settings(self.records), self.base.side
        names = sorted({data.sources[name].gallery for name in self.settings.sources if name in data.sources})
        pictures = {name: pictures_of(self.records, name, side) for name in names}
        galleries = {name: some.gallery for name, some in pictures.items()}
        crop = int(self.vision.config.image_size)
        self.caches: dict[str, GalleryCache[None]] = {
            name: cache_gallery(some, self.base.codec, None, gallery_folder(self.records, name, side), crop_side=crop)
            for name, some in pictures.items()
        }
        self.mixture = Mixture(
            self.settings.sources, data.sources, galleries, own_counts=self.context.own_counts
        )  # fmt: skip
        self.cut = 0  # captions that were shortened

    def batch(self, images_seen: int, size: int) -> EncoderBatch:
        seed, settings = self.context.seed, self.settings
        batch = self._pairs(self.mixture.draw(seed, images_seen, size), seed, images_seen)
        strength = 1 - chance(seed, "drop vision", images_seen, size, settings.drop_vision).float()
        for place in chance(seed, "drop", images_seen, size, settings.drop_text).nonzero().flatten().tolist():
            batch.captions[place] = ""
        return replace(batch, strength=strength)

    def _pairs(self, drawn: DrawnPairs, seed: int, first: int) -> EncoderBatch:
        size = len(drawn.targets)
        captions, positions, latents, weights = [""] * size, [], [], []
        for name, here in drawn.by_gallery().items():
            cache, rows = self.caches[name], drawn.targets[here]
            styles = [drawn.caption_styles[number] for number in here.tolist()]
            for place, text in zip(here.tolist(), cache.pictures.gallery.captions(rows, styles), strict=True):
                captions[place] = self._fitting(text)
            positions.append(here)
            latents.append(cache.latents.take(rows))
            weights.append(1 + (self.settings.face_weight - 1) * cache.faces(rows))
        crops = references(self.caches, drawn, uniforms(seed, "crops", first, size, (2,)))
        return EncoderBatch(
            in_order(positions, latents), in_order(positions, weights), captions, crops, torch.ones(size)
        )  # fmt: skip

    def _fitting(self, caption: str) -> str:
        short = shorten(caption, self.base.fits)
        self.cut += short != caption
        return short

    def show(self, batch: EncoderBatch, path: Path) -> None:
        targets = self.base.decode(batch.latents.to(self.base.device))
        crops = torch.nn.functional.interpolate(batch.crops.cpu(), size=targets.shape[-2:])
        save_grid(torch.stack((crops, targets), 1).flatten(0, 1), path, columns=8)

    # --- loss and validation ----------------------------------------------------------------------------------------
    def errors(self, batch: EncoderBatch, subject: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return the error (B,) of the prediction with these people."""
        text, identity = self.condition(batch.captions, subject, batch.strength)
        noised = self.base.noised(batch.latents, noise, times)
        prediction = self.base.predict(noised.noisy, noised.steps, text, identity)
        return squared_error(prediction, noised.target, batch.weights)

    def loss(self, batch: EncoderBatch, images_seen: int) -> Loss:
        count, seed, device = len(batch.latents), self.context.seed, batch.latents.device
        noise = normals(seed, "noise", images_seen, count, batch.latents.shape[1:], device)
        subject = self.represent(batch.crops)
        errors = self.errors(batch, subject, noise, self.base.times(seed, images_seen, count))
        metrics, total = {"error": errors.mean()}, errors
        for name, term in self.terms(subject).items():
            total, metrics[name] = total + term, term
        return Loss(total, metrics)

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        """Return the errors with each person's own reference and with another's, and save some pictures."""
        if self.cut:
            log.warning("%s: %d captions were shortened to what the text encoders take.", self.context.name, self.cut)
        count = self.settings.validation_images
        batch = to_device(self._held_out(count), self.base.device)
        noise = normals(VALIDATION_SEED, "noise", 0, count, batch.latents.shape[1:], self.base.device)
        times = self.base.times(VALIDATION_SEED, 0, count)
        subject = self.represent(batch.crops)
        right = float(self.errors(batch, subject, noise, times).mean())
        wrong = float(self.errors(batch, subject.roll(1, 0), noise, times).mean())
        if drawings := min(self.settings.drawings, count):
            start = normals(VALIDATION_SEED, "drawing", 0, drawings, self.base.latent_shape, self.base.device)
            drawn = self.draw(batch.captions[:drawings], subject[:drawings], start, self.settings.drawing_steps)
            crops = torch.nn.functional.interpolate(batch.crops[:drawings].cpu(), size=drawn.shape[-2:])
            save_grid(torch.cat((crops, drawn)), folder / "pictures.png", columns=drawings)
        return {"validation_loss": right, "shuffled_references": wrong, "reference_ratio": wrong / right}

    def _held_out(self, count: int) -> EncoderBatch:
        """Return pairs of held-out people of the world; of the training sources for a data set of records."""
        data = data_settings(self.records)
        named = [data.galleries.get(data.sources[name].gallery) for name in self.settings.sources]
        world = all(gallery is None or gallery.records is None for gallery in named)
        if not world or self.base.side != 128:
            return self._pairs(self.mixture.draw(VALIDATION_SEED, 0, count), VALIDATION_SEED, 0)
        pictures = held_out_pictures(self.records, count)
        folder = data.folder / f"held-out-{count}"
        crop = int(self.vision.config.image_size)
        cache: GalleryCache[None] = cache_gallery(pictures, self.base.codec, None, folder, crop_side=crop)
        rows = torch.arange(1, 2 * count, 2)
        captions = [self._fitting(text) for text in pictures.gallery.captions(rows, ["rewritten"] * count)]
        latents, middle = cache.latents.take(rows), torch.full((count, 2), 0.5)
        return EncoderBatch(
            latents, torch.ones_like(latents[:, :1]), captions, cache.crops(rows - 1, middle), torch.ones(count)
        )

    # --- drawing ----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def subject(self, images: Sequence[Image.Image]) -> Tensor:
        """Return one person's numbers (1, m, width) from photos; a photo without a face is used whole."""
        side = int(self.vision.config.image_size)
        import numpy as np

        crops = [crop_face(image, self.base.finder, side, on_no_face="whole").image for image in images]
        pixels = torch.stack([torch.from_numpy(np.asarray(crop, dtype=np.float32) / 255) for crop in crops])
        return self.merge(self.represent(pixels.permute(0, 3, 1, 2).to(self.base.device)))

    @torch.no_grad()
    def draw(
        self, sentences: Sequence[str], subject: Tensor | None, noise: Tensor, steps: int | None = None,
        guidance: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Draw pictures (B, 3, S, S), 0 to 1, of people (1 or B, m, width); None: the base alone."""
        count = len(sentences)
        empty = self.base.text([""]).repeat(count)
        if subject is None:
            text, identity = self.base.text(sentences), None
        else:
            people = subject.to(self.base.device).expand(count, -1, -1)
            text, identity = self.condition(sentences, people, torch.ones(count, device=self.base.device))

        def predict(noisy: Tensor, step: Tensor, state: TextState, full: bool) -> Tensor:
            return self.base.predict(noisy, step, state, identity if full else None)

        latents = draw_latents(self.base, noise, lambda _: text, empty, predict, steps, guidance)
        return self.base.decode(latents)

    # --- files ------------------------------------------------------------------------------------------------------
    def export(self, folder: Path) -> None:
        """Write what was learnt and a description of it."""
        tensors = {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        write_tensors(folder / LEARNT, tensors, {"method": self.NAME})
        card = {"format_version": 1, "method": self.NAME, "base": self.base.name, "files": [LEARNT],
                "bytes": self._bytes_per_person(), "seconds": {}}  # fmt: skip
        write_json(folder / CARD, card)
        self.write(folder)

    def write(self, folder: Path) -> None:  # noqa: B027  (few methods have such a format)
        """Write files in a standard format into a folder, where one exists."""

    @torch.no_grad()
    def _bytes_per_person(self) -> int:
        side = int(self.vision.config.image_size)
        crop = torch.full((1, 3, side, side), 0.5, device=self.base.device)
        return self.represent(crop).numel() * 4

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `export` wrote. Raises WeightsError if it does not fit."""
        tensors: Mapping[str, Tensor] = read_tensors(folder / LEARNT)[0]
        load_weights(self.modules, tensors, str(folder / LEARNT))
        for module in self.modules.values():
            module.to(self.base.device).requires_grad_(False).eval()


def write_ip_adapter(task: EncoderTask, folder: Path) -> None:
    """Write the adapter in our format; `imagine export-ip-adapter` turns it into a standard file."""
    if task.adapter is None:
        raise ConfigError(f"{task.NAME} has no adapter.")
    config = task.vision.config
    facts = {
        "base": task.base.name, "encoder": f"ViT of width {config.width}, {config.image_size} px", "feature_layer":
        "-2", "tokens": str(task.adapter.branch_specs[0].tokens or task.vision.tokens), "licence": "unspecified",
    }  # fmt: skip
    task.adapter.save(folder / "adapter", facts)
