"""The identity adapter on the frozen base: vision encoder, vision branch and LoRA, on real singles and on SynPairs.

From a real single the adapter learns who somebody is, with reference and target the same picture; from a pair it
learns what is the person and what was only the photo, because target and reference show one person differently.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from imagine.adapter import Adapter, BranchSpec
from imagine.diffusion import add_noise, per_item, sample_times, timesteps, velocity
from imagine.encoders import VisionEncoder
from imagine.faces import crop_faces
from imagine.records import Conditioning, Tokens
from imagine.sampling import Guidance, Inputs
from imagine.world import render, sample_contexts, sample_people
from imagine.world.seeds import HELD_OUT
from train.data import chance, generator, key
from train.grids import save_grid
from train.language import parameters
from train.portraits import draw_rows
from train.sampling import sample
from train.squares import Squares
from train.task import Loss, Start
from train.task_base import ADAPTER_FACTS, PROMPTS, BaseSettings, BaseTask


class AdapterSettings(BaseSettings):
    """How the adapter is fed: kinds of pictures, what is dropped for guidance, and where the loss looks."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    real_share: float = 0.15
    dense_share: float = 0.15
    drop_vision: float = 0.1
    lora_rank: int = 16
    face_weight: float = 2.0  # how much more the loss counts inside the target's face box


@dataclass(frozen=True)
class AdapterBatch:
    """Targets with their texts, and the references they should resemble; prepared so that a step only computes."""

    latents: Tensor  # (B, C, h, w) of the target
    texts: list[str]
    crops: Tensor  # (B, 3, S, S) of the reference
    faces: Tensor  # (B, 1, h, w) weight of the loss
    strength: Tensor  # (B,) 0 where the reference is dropped


class AdapterTask(BaseTask):
    """The base as it was trained, frozen, with a vision branch that learns to carry a face into its pictures."""

    Settings: ClassVar[type[BaseModel]] = AdapterSettings
    PARTS: ClassVar[tuple[str, ...]] = ("vision_encoder", "vision_branch", "vision_projection", "lora")
    VALIDATION_PICTURES: ClassVar[int] = 128
    settings: AdapterSettings

    def __init__(self, settings: AdapterSettings, start: Start) -> None:
        super().__init__(settings, start)
        self.vision = VisionEncoder()
        width = int(self.vision.config.width)
        branch = BranchSpec("vision", self.unet.config.cross_attention_dim, projection="full", input_width=width)
        self.adapter = Adapter(self.unet, [branch], lora_rank=settings.lora_rank)
        self.adapter.attach(self.unet)
        self.modules |= {"image_encoder": self.vision, "adapter": self.adapter}

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"vision_encoder": parameters(self.vision), **self.adapter.parts()}

    def prepare(self) -> None:
        super().prepare()
        folder = Path(self.start.data["folder"]) / "train"
        self.squares = Squares(self.pictures, self.vision.config.image_size, folder, noisy=True)

    def batch(self, images_seen: int, size: int) -> AdapterBatch:  # type: ignore[override]
        gallery, seed = self.pictures.gallery, self.start.seed
        who = draw_rows(self.start, "people", images_seen, size, gallery.identities)
        real = chance(seed, "real", images_seen, size, self.settings.real_share)
        other = draw_rows(self.start, "which", images_seen, size, gallery.pictures - 1) + 1
        references = who * gallery.pictures
        rows = references + torch.where(real, 0, other)
        dense = chance(seed, "dense", images_seen, size, self.settings.dense_share)
        kinds = zip(real.tolist(), dense.tolist(), strict=True)
        styles = ["terse" if r else "dense" if d else "rewritten" for r, d in kinds]
        texts = self.captions(rows, styles, key(seed, "captions", images_seen) % 2**31)
        drop = chance(seed, "drop", images_seen, size, self.settings.drop_text)
        latents = self.latents.take(rows)
        target_boxes = torch.from_numpy(self.pictures.boxes[rows.numpy()])
        return AdapterBatch(
            latents,
            ["" if gone else text for gone, text in zip(drop.tolist(), texts, strict=True)],
            self.squares.take(references, generator(seed, "crops", images_seen)),
            _face_weights(target_boxes, gallery.size, latents.shape[-1], self.settings.face_weight),
            1 - chance(seed, "drop vision", images_seen, size, self.settings.drop_vision).float(),
        )

    def vision_tokens(self, crops: Tensor) -> Tokens:
        return self.adapter.tokens("vision", self.vision(crops))

    def errors(self, batch: AdapterBatch, vision: Tokens, noise: Tensor, t: Tensor) -> Tensor:
        """Squared error of the velocity, weighted towards the face, one number an item."""
        with torch.no_grad():
            clip, branches = self.text.encode(batch.texts)
        conditioning = Conditioning({**branches, "vision": vision}, {"vision": batch.strength})
        guess = self.unet(
            add_noise(batch.latents, noise, t), timesteps(t), encoder_hidden_states=clip.values,
            encoder_attention_mask=clip.mask, cross_attention_kwargs={"conditioning": conditioning},
        ).sample  # fmt: skip
        square = (guess.float() - velocity(batch.latents, noise)).square().mean(1, keepdim=True)
        return (square * batch.faces).flatten(1).sum(1) / batch.faces.flatten(1).sum(1)

    def loss(self, batch: AdapterBatch, images_seen: int) -> Loss:  # type: ignore[override]
        noise, t = self._noise(batch.latents, generator(self.start.seed, "noise", images_seen))
        return Loss(self.errors(batch, self.vision_tokens(batch.crops), noise, t))

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        batch = self.batch(0, self.VALIDATION_PICTURES)
        batch = AdapterBatch(batch.latents, batch.texts, batch.crops, batch.faces, torch.ones(len(batch.texts)))
        noise, t = self._noise(batch.latents, generator(0, "validation", 0))
        vision = self.vision_tokens(batch.crops)
        right = float(self.errors(batch, vision, noise, t).mean())
        wrong = float(self.errors(batch, Tokens(vision.values.roll(1, 0)), noise, t).mean())
        self.draw(folder / "pictures.png")
        return {"validation_loss": right, "shuffled_references": wrong, "reference_ratio": wrong / right}

    def draw(self, path: Path, seeds: int = 5) -> None:
        """Held-out people by row: the photo, then fixed sentences."""
        who = range(HELD_OUT.stop - 2_000, HELD_OUT.stop - 2_000 + seeds)
        people = sample_people(who)
        photo = render(people, sample_contexts(who).replace(style=0, headwear=0, framing=1))
        vision = self.vision_tokens(crop_faces(photo.images, photo.boxes, self.vision.config.image_size))
        vision = Tokens(vision.values.repeat_interleave(len(PROMPTS), 0))
        count = seeds * len(PROMPTS)
        inputs = Inputs(self.text.encode(list(PROMPTS) * seeds), self.text.encode([""] * count), vision)
        noise = torch.randn((count, self.unet.config.in_channels, 8, 8), generator=generator(0, "draw", 0))
        latents = sample(self.unet, noise.to(self.start.device), inputs, Guidance(2.0), self.DRAWING_STEPS)
        drawn = self.latents.decode(latents).cpu().view(seeds, len(PROMPTS), 3, 128, 128)
        save_grid(torch.cat((photo.images[:, None], drawn), 1).flatten(0, 1), path, columns=len(PROMPTS) + 1)

    def export(self, folder: Path) -> None:
        self.vision.save_pretrained(folder / "image_encoder")
        self.adapter.save(folder / "adapter", {**ADAPTER_FACTS, "tokens": str(self.vision.tokens)})

    def _noise(self, latents: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = torch.randn(latents.shape, generator=random).to(latents.device)
        return noise, sample_times(len(noise), random).to(noise.device)


def _face_weights(boxes: Tensor, side: int, cells: int, weight: float) -> Tensor:
    """(B, 1, cells, cells): `weight` where a latent cell touches the face, 1 elsewhere."""
    middle = (torch.arange(cells) + 0.5) * side / cells
    half = side / cells / 2
    across = (middle > boxes[:, :1] - half) & (middle < boxes[:, :1] + boxes[:, 2:3] + half)
    down = (middle > boxes[:, 1:2] - half) & (middle < boxes[:, 1:2] + boxes[:, 3:] + half)
    inside = (down.unsqueeze(2) & across.unsqueeze(1)).unsqueeze(1).float()
    return per_item(torch.ones(len(boxes)), inside) + (weight - 1) * inside
