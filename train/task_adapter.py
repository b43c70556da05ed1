"""The identity adapter: vision encoder, vision branch and LoRA on the frozen base, on real singles and on SynPairs.

From a real single the adapter learns who somebody is, with reference and target the same picture; from a pair it
learns what is the person and what was only the photo, because target and reference show one person differently.

A stage may also name the base's parts. A base that is still young then learns to draw faces with somebody to draw, and
an adapter stage on the frozen base follows, as in the paper.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from imagine.adapter import Adapter, BranchSpec
from imagine.diffusion import add_noise, velocity
from imagine.encoders import VisionEncoder
from imagine.faces import crop_faces
from imagine.records import Tokens
from imagine.sampling import Guidance, Inputs
from imagine.world import render, sample_contexts, sample_people
from imagine.world.seeds import HELD_OUT
from train.data import chance, generator, to_device, uniforms
from train.grids import save_grid
from train.language import parameters
from train.sampling import sample
from train.squares import Squares
from train.task import Loss, Start
from train.task_base import (
    ADAPTER_FACTS,
    PROMPTS,
    VALIDATION_SEED,
    BaseBatch,
    BaseSettings,
    BaseTask,
    weighted_error,
)


class AdapterSettings(BaseSettings):
    """How the adapter is fed: kinds of pictures, what is dropped for guidance, and where the loss looks."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    real_share: float = 0.15
    dense_share: float = 0.15
    drop_vision: float = 0.1
    lora_rank: int = 16
    face_weight: float = 3.0


@dataclass(frozen=True)
class AdapterBatch(BaseBatch):
    """Targets with their captions, and the references they should resemble."""

    crops: Tensor  # (B, 3, S, S) of the reference
    strength: Tensor  # (B,) 0 where the reference is dropped


class AdapterTask(BaseTask):
    """The base as it was trained, with a vision branch that learns to carry a face into its pictures."""

    Settings: ClassVar[type[BaseModel]] = AdapterSettings
    PARTS: ClassVar[tuple[str, ...]] = ("vision_encoder", "vision_branch", "vision_projection", "lora", *BaseTask.PARTS)
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
        return {"vision_encoder": parameters(self.vision), **self.adapter.parts(), **super().parts()}

    def prepare(self) -> None:
        super().prepare()
        folder = Path(self.start.data["folder"]) / "train"
        self.squares = Squares(self.pictures, self.vision.config.image_size, folder, noisy=True)

    def batch(self, images_seen: int, size: int) -> AdapterBatch:
        seed, (references, offsets) = self.start.seed, self._rows(images_seen, size)
        targets = self._targets(references, offsets, images_seen)
        return AdapterBatch(
            targets.latents,
            targets.sentences,
            targets.faces,
            self.squares.take(references, uniforms(seed, "crops", images_seen, size, (2,))),
            1 - chance(seed, "drop vision", images_seen, size, self.settings.drop_vision).float(),
        )

    def vision_tokens(self, crops: Tensor) -> Tokens:
        return self.adapter.tokens("vision", self.vision(crops))

    def errors_with(self, batch: AdapterBatch, vision: Tokens, noise: Tensor, t: Tensor) -> Tensor:
        """Squared error of the velocity, weighted towards the face, one number an item."""
        noisy = add_noise(batch.latents, noise, t)
        guess = self.predict(noisy, t, batch.sentences, {"vision": vision}, batch.strength)
        return weighted_error(guess, velocity(batch.latents, noise), batch.faces)

    def show(self, batch: BaseBatch, path: Path) -> None:
        """Each reference, as the vision encoder sees it, with its target to the right."""
        assert isinstance(batch, AdapterBatch)
        targets = self.latents.decode(batch.latents.to(self.start.device)).cpu()
        crops = F.interpolate(batch.crops, size=targets.shape[-1])
        save_grid(torch.stack((crops, targets), 1).flatten(0, 1), path, columns=8)

    def loss(self, batch: AdapterBatch, images_seen: int) -> Loss:  # type: ignore[override]
        noise, t = self.noise(batch.latents, self.start.seed, images_seen)
        return Loss(self.errors_with(batch, self.vision_tokens(batch.crops), noise, t))

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        batch = to_device(self.batch(0, self.VALIDATION_PICTURES), self.start.device)
        batch = replace(batch, strength=torch.ones_like(batch.strength))
        noise, t = self.noise(batch.latents, VALIDATION_SEED, 0)
        vision = self.vision_tokens(batch.crops)
        right = float(self.errors_with(batch, vision, noise, t).mean())
        wrong = float(self.errors_with(batch, Tokens(vision.values.roll(1, 0)), noise, t).mean())
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
        super().export(folder)
        self.vision.save_pretrained(folder / "image_encoder")
        self.adapter.save(folder / "adapter", {**ADAPTER_FACTS, "tokens": str(self.vision.tokens)})
