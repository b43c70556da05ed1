"""A small CLIP (arXiv 2103.00020): crops and whole pictures against dense captions, so that both towers start informed.

Half of each batch are masked face crops, as the vision encoder will see them, half are whole pictures, so that text
about places and clothes has something to hold on to. A second term asks that two pictures of one person be nearer to
each other than to anyone else's: dense captions name traits coarsely, and identity lies between the words. T5 learns
beside CLIP's own text tower, through a head that is thrown away, so that the base can leave both as they are: a frozen
text encoder costs a third of one that trains.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from imagine.encoders import VisionEncoder
from imagine.records import Tokens
from imagine.world import captions
from train.data import chance, generator, key
from train.language import build_text_encoders, make_tokenizers, parameters
from train.portraits import draw_rows, training_pictures
from train.squares import Squares
from train.task import Loss, Start
from train.task_recogniser import VALIDATION, held_out_crops


class ClipSettings(BaseModel):
    """What the images are, and how much likeness between pictures of one person counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    whole_share: float = 0.35  # share of whole pictures among the images
    dense_share: float = 0.75  # share of dense captions; the rest are rewritten, as prompts are
    person_weight: float = 1.0  # weight of the term between two pictures of one person


@dataclass(frozen=True)
class ClipBatch:
    """Images with their captions, and second pictures of the same people to match them with."""

    first: Tensor  # (B, 3, S, S) a crop or a whole picture, which `texts` describes
    second: Tensor  # (P, 3, S, S) another picture of the person, for those that are crops
    texts: list[str]
    crops: Tensor  # (P,) which rows of `first` are crops


class Temperature(nn.Module):
    """CLIP's learned temperature, as the logarithm of a scale; for CLIP's captions, people, and T5's captions."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((3,), math.log(10.0)))


class ClipTask:
    """Gives the vision encoder and the denoiser's CLIP text encoder their start, before either meets a denoiser."""

    Settings: ClassVar[type[BaseModel]] = ClipSettings
    PARTS: ClassVar[tuple[str, ...]] = ("vision", "text", "t5")
    HELD_OUT_PEOPLE: ClassVar[int] = VALIDATION

    def __init__(self, settings: ClipSettings, start: Start) -> None:
        self.settings, self.start = settings, start
        tokenizers = start.folder / "cache"
        make_tokenizers(tokenizers)
        self.text = build_text_encoders(tokenizers)
        self.vision = VisionEncoder()
        self.temperature = Temperature()
        self.t5_head = nn.Linear(self.text.t5.config.d_model, self.vision.config.embed_width)
        self.modules: dict[str, nn.Module] = {
            "image_encoder": self.vision, "text_encoder": self.text.clip, "text_encoder_2": self.text.t5,
            "t5_head": self.t5_head, "temperature": self.temperature,
        }  # fmt: skip

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {
            "vision": parameters(self.vision, self.temperature),
            "text": parameters(self.text.clip),
            "t5": parameters(self.text.t5, self.t5_head),
        }

    def prepare(self) -> None:
        self.pictures = training_pictures(self.start.data)
        folder = Path(self.start.data["folder"]) / "train"
        self.squares = Squares(self.pictures, self.vision.config.image_size, folder, noisy=True)

    def batch(self, images_seen: int, size: int) -> ClipBatch:
        gallery = self.pictures.gallery
        who = draw_rows(self.start, "people", images_seen, size, gallery.identities)
        random = generator(self.start.seed, "views", images_seen)
        which = torch.randint(2, (size,), generator=random)
        rows, others = who * gallery.pictures + which, who * gallery.pictures + 1 - which
        side = self.vision.config.image_size
        first = self.squares.take(rows, random)
        whole = torch.rand(size, generator=random) < self.settings.whole_share
        first[whole] = F.interpolate(self.pictures.take(rows[whole])[0], size=(side, side), mode="area")
        crops = (~whole).nonzero().squeeze(1)
        second = self.squares.take(others[crops], random)
        people, contexts = gallery.people(rows), gallery.contexts(rows)
        seed = key(self.start.seed, "captions", images_seen) % 2**31
        seeds = [seed + i for i in range(size)]
        dense, rewritten = (captions(people, contexts, style, seeds) for style in ("dense", "rewritten"))
        share = chance(self.start.seed, "dense", images_seen, size, self.settings.dense_share).tolist()
        texts = [long if pick else short for pick, long, short in zip(share, dense, rewritten, strict=True)]
        return ClipBatch(first, second, texts, crops)

    def loss(self, batch: ClipBatch, images_seen: int) -> Loss:
        tokens = self.text.encode_clip(batch.texts)
        ends = tokens.mask.sum(1) - 1 if tokens.mask is not None else torch.tensor(-1)
        text = F.normalize(tokens.values[torch.arange(len(ends)), ends], dim=1)
        sentence = F.normalize(self.t5_head(_mean(self.text.encode_t5(batch.texts))), dim=1)
        image = F.normalize(self.vision.embed(torch.cat((batch.first, batch.second))), dim=1)
        first, second = image[: len(batch.first)], image[len(batch.first) :]
        scales = self.temperature.log_scale.clamp(max=math.log(60.0)).exp()
        caption, caption_hits = _contrast(first, text, scales[0])
        person, person_hits = _contrast(first[batch.crops], second, scales[1])
        meaning, meaning_hits = _contrast(first, sentence, scales[2])
        per_sample = caption + meaning
        per_sample[batch.crops] = per_sample[batch.crops] + self.settings.person_weight * person
        hits = {"caption_hits": caption_hits, "t5_hits": meaning_hits, "person_hits": person_hits}
        return Loss(per_sample, hits)

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        pair = [
            F.normalize(torch.cat([self.vision.embed(part.to(self.start.device)) for part in crops.split(100)]), dim=1)
            for crops in held_out_crops(self.vision.config.image_size, self.HELD_OUT_PEOPLE)
        ]
        hits = ((pair[0] @ pair[1].T).argmax(1) == torch.arange(len(pair[0]), device=pair[0].device)).float().mean()
        return {"rank1": float(hits)}

    def export(self, folder: Path) -> None:
        self.vision.save_pretrained(folder / "image_encoder")
        self.text.clip.save_pretrained(folder / "text_encoder")
        self.text.t5.save_pretrained(folder / "text_encoder_2")


def _mean(tokens: Tokens) -> Tensor:
    """The mean of the tokens that count, (B, width)."""
    assert tokens.mask is not None, "T5's tokens come with a mask"
    weight = tokens.mask.unsqueeze(2).to(tokens.values.dtype)
    return (tokens.values * weight).sum(1) / weight.sum(1)


def _contrast(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE over matching rows, one loss per row, and the share of rows matched."""
    logits = scale * a @ b.T
    labels = torch.arange(len(a), device=a.device)
    loss = (F.cross_entropy(logits, labels, reduction="none") + F.cross_entropy(logits.T, labels, reduction="none")) / 2
    return loss, (logits.argmax(1) == labels).float().mean()
