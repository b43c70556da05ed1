"""Train a small CLIP (arXiv 2103.00020) on images and captions, to pre-train the vision encoder and the text encoders.

By default 65% of the images are masked face crops, the input of the vision encoder in later stages. The rest are whole
pictures, to which the text about places and clothes applies. A second loss term pulls two pictures of one person
closer to each other than to pictures of other people. A third term predicts the traits from the embedding, because
dense captions describe them only coarsely, and identity depends on finer differences. T5 trains beside CLIP's own text
tower, through a head that is discarded afterwards. The base can then freeze both text encoders: a frozen text encoder
costs a third of one that trains.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from imagine.networks import encoders
from imagine.networks.encoders import VisionEncoder
from imagine.world import People, captions
from imagine.world.tables import join
from train.cache.face_crops import FaceCrops
from train.data.language import build_text_encoders, copy_tokenizers, make_tokenizers, parameters
from train.data.order import chance, derive_seed, uniforms
from train.data.portraits import check_two_pictures, data_settings, draw_rows, training_pictures
from train.run.grids import save_grid
from train.task import Loss, Share, TaskContext, Weight
from train.tasks.contrastive_loss import Temperature, info_nce
from train.tasks.recogniser import HELD_OUT_COUNT, held_out_crops
from train.tasks.trait_loss import TRAIT_OUTPUTS, trait_loss


class ClipSettings(BaseModel):
    """The mix of images and captions, and the weights of the loss terms."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    captions: bool = True  # False: face crops alone, without captions; trains the vision encoder only
    whole_share: Share = 0.35  # share of whole pictures among the images
    dense_share: Share = 0.75  # share of dense captions; the rest are rewritten captions, which resemble prompts
    person_weight: Weight = 1.0  # weight of the term between two pictures of one person
    traits: Weight = 5.0  # weight of predicting the identity traits from the embedding of a crop


@dataclass(frozen=True)
class ClipBatch:
    """Images with their captions, and second pictures of the same people to match the crops with."""

    first: Tensor  # (B, 3, S, S) face crops and whole pictures, described by `texts`
    second: Tensor  # (P, 3, S, S) for each crop in `first`, a crop of another picture of that person
    texts: list[str]
    crops: Tensor  # (P,) row numbers of the crops in `first`
    people: People  # the people in those crops
    drifted: People  # the people in `second`: the same, with a slightly drifted identity


class ClipTask:
    """Pre-train the vision encoder and the text encoders CLIP and T5, before any of them conditions a denoiser."""

    Settings: ClassVar[type[BaseModel]] = ClipSettings
    PARTS: ClassVar[tuple[str, ...]] = ("vision", "text", "t5")
    HELD_OUT_PEOPLE: ClassVar[int] = HELD_OUT_COUNT

    def __init__(self, settings: ClipSettings, context: TaskContext) -> None:
        self.settings, self.context = settings, context
        tokenizers = context.folder / "cache"
        if not copy_tokenizers(context.places_of_tokenizers, tokenizers):
            make_tokenizers(tokenizers)
        self.text = build_text_encoders(tokenizers)
        self.vision = VisionEncoder()
        self.temperature = Temperature(3)  # one scale each for CLIP's captions, people, and T5's captions
        self.t5_head = nn.Linear(self.text.t5.config.d_model, self.vision.config.embed_width)
        self.reading = nn.Linear(self.vision.config.embed_width, TRAIT_OUTPUTS)
        self.modules: dict[str, nn.Module] = {
            "image_encoder": self.vision, "text_encoder": self.text.clip, "text_encoder_2": self.text.t5,
            "t5_head": self.t5_head, "temperature": self.temperature, "reading": self.reading,
        }  # fmt: skip

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {
            "vision": parameters(self.vision, self.reading, self.temperature),
            "text": parameters(self.text.clip),
            "t5": parameters(self.text.t5, self.t5_head),
        }

    def check(self) -> list[str]:
        check_two_pictures(self.context.data)
        return []

    def prepare(self) -> None:
        self.pictures = training_pictures(self.context.data)
        folder = data_settings(self.context.data).folder / "train"
        self.face_crops = FaceCrops(self.pictures, self.vision.config.image_size, folder, noisy=True)

    def batch(self, images_seen: int, size: int) -> ClipBatch:
        gallery = self.pictures.gallery
        who = draw_rows(self.context, "people", images_seen, size, gallery.identities)
        seed = self.context.seed
        which = chance(seed, "which", images_seen, size, 0.5).long()
        rows, others = who * gallery.pictures + which, who * gallery.pictures + 1 - which
        side = self.vision.config.image_size
        shifts = uniforms(seed, "shift", images_seen, size, (2, 2))
        first = self.face_crops.take(rows, shifts[:, 0])
        whole = chance(seed, "whole", images_seen, size, self.settings.whole_share if self.settings.captions else 0)
        first[whole] = F.interpolate(self.pictures.take(rows[whole])[0], size=(side, side), mode="area")
        crops = (~whole).nonzero().squeeze(1)
        second = self.face_crops.take(others[crops], shifts[crops, 1])
        people = gallery.people(rows)
        texts = self._texts(people, rows, images_seen) if self.settings.captions else []
        return ClipBatch(first, second, texts, crops, people[crops], gallery.people(others[crops]))

    def _texts(self, people: People, rows: Tensor, images_seen: int) -> list[str]:
        contexts, size = self.pictures.gallery.contexts(rows), len(rows)
        seeds = [derive_seed(self.context.seed, "captions", images_seen + i) % 2**31 for i in range(size)]
        dense, rewritten = (captions(people, contexts, style, seeds) for style in ("dense", "rewritten"))
        share = chance(self.context.seed, "dense", images_seen, size, self.settings.dense_share).tolist()
        return [long if pick else short for pick, long, short in zip(share, dense, rewritten, strict=True)]

    def show(self, batch: ClipBatch, path: Path) -> None:
        save_grid(torch.cat((batch.first, batch.second)), path, columns=8)

    def loss(self, batch: ClipBatch, images_seen: int) -> Loss:
        image = F.normalize(self.vision.embed(torch.cat((batch.first, batch.second))), dim=1)
        first, second = image[: len(batch.first)], image[len(batch.first) :]
        per_sample, metrics = torch.zeros(len(first), device=image.device), dict[str, Tensor]()
        if len(second):  # a micro-batch may consist of whole pictures only
            faces, metrics = self._faces(first[batch.crops], second, batch)
            per_sample = per_sample.index_add(0, batch.crops, faces.to(per_sample.dtype))
        if self.settings.captions:
            likeness, more = self._captions(first, batch.texts)
            per_sample, metrics = per_sample + likeness, {**metrics, **more}
        return Loss(per_sample, metrics)

    def _faces(self, crops: Tensor, second: Tensor, batch: ClipBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (P,) of matching two pictures of one person and of predicting their traits, and metrics."""
        person, hits = info_nce(crops, second, self.temperature.scales()[1])
        scaled = torch.cat((crops, second)) * crops.shape[1] ** 0.5
        traits = trait_loss(self.reading(scaled), join((batch.people, batch.drifted))).view(2, -1).mean(0)
        faces = self.settings.person_weight * person + self.settings.traits * traits
        return faces, {"person_hits": hits, "traits": traits.mean()}

    def _captions(self, images: Tensor, texts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (B,) of matching images and captions through CLIP's tower and through T5, and metrics."""
        clip, t5 = self.text.encode_clip(texts), self.text.encode_t5(texts)
        both = encoders.pooled(clip, t5)
        width = int(clip.values.shape[2])
        text = F.normalize(both[:, :width], dim=1)
        sentence = F.normalize(self.t5_head(both[:, width:]), dim=1)
        scales = self.temperature.scales()
        caption, caption_hits = info_nce(images, text, scales[0])
        meaning, meaning_hits = info_nce(images, sentence, scales[2])
        return caption + meaning, {"caption_hits": caption_hits, "t5_hits": meaning_hits}

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        pair = [
            F.normalize(
                torch.cat([self.vision.embed(part.to(self.context.device)) for part in crops.split(100)]), dim=1
            )
            for crops in held_out_crops(self.vision.config.image_size, self.HELD_OUT_PEOPLE)
        ]
        hits = ((pair[0] @ pair[1].T).argmax(1) == torch.arange(len(pair[0]), device=pair[0].device)).float().mean()
        return {"rank1": float(hits)}

    def export(self, folder: Path) -> None:
        self.vision.save_pretrained(folder / "image_encoder")
        self.text.clip.save_pretrained(folder / "text_encoder")
        self.text.t5.save_pretrained(folder / "text_encoder_2")
