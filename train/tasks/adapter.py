"""Train the identity adapter: vision encoder, vision branch and LoRA on the frozen base, on real singles and SynPairs.

A real single is both reference and target: it teaches the adapter a person's appearance. A pair shows one person in
two different pictures: it teaches the adapter to separate the person from pose, expression, clothes and scene.

A stage may also train the base's parts. An undertrained base then learns to draw faces with the reference as input. A
stage that trains the adapter alone on the frozen base follows, as in the paper.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from imagine.adapter.adapter import LORA_TARGETS, Adapter, BranchSpec, LoraTarget
from imagine.errors import ConfigError
from imagine.networks.diffusion import add_noise, clean_from_velocity, velocity
from imagine.networks.encoders import VisionEncoder
from imagine.people.faces import crop_faces
from imagine.pipeline.sampling import Guidance, Inputs
from imagine.records import Tokens
from imagine.world import render, sample_contexts, sample_people
from imagine.world.seeds import HELD_OUT
from train.cache.latents import squared_error
from train.data.denoiser_inputs import references
from train.data.language import parameters
from train.data.order import chance, to_device, uniforms
from train.run.grids import save_grid
from train.run.judging import HeldOutEvaluation
from train.run.sampling import sample
from train.task import Loss, Share, TaskContext, Weight
from train.tasks.base import (
    ADAPTER_FACTS,
    IDENTITY_PARTS,
    PROMPTS,
    VALIDATION_SEED,
    BaseBatch,
    BaseSettings,
    BaseTask,
    check_lora,
    images_without_effect,
)
from train.tasks.likeness_loss import LikenessNetwork

_DRAWN_AT_ONCE = 16  # pictures per sampling batch
_JUDGED_AT = 4.0  # guidance scale of the judged pictures
_MIDDLE = torch.full((1, 2), 0.5)  # the shift of a centred crop


class AdapterSettings(BaseSettings):
    """Settings of the adapter's training: data sources, dropout for guidance, LoRA and loss weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sources: dict[str, float] = {"real": 0.15, "synthetic": 0.85}  # noqa: RUF012  (pydantic copies it)
    drop_vision: Share = 0.1  # share of images trained without their reference, for guidance
    lora_rank: Annotated[int, Field(ge=0)] = 16  # 0: no LoRA
    lora_targets: tuple[LoraTarget, ...] = LORA_TARGETS
    zero_init: bool = True  # the output of the vision branch starts at zero (paper, section 3.4.1)
    face_weight: Weight = 3.0
    likeness: Weight = 0.0  # weight of the likeness loss; not in the paper, see docs/training.md
    judge: Path | None = None  # folder of weights whose judge scores held-out people at every validation

    @model_validator(mode="after")
    def _has_an_effect(self) -> "AdapterSettings":
        check_lora(self.lora_rank, self.lora_targets)
        return self


@dataclass(frozen=True)
class AdapterBatch(BaseBatch):
    """Targets with their captions, and the references that they should resemble."""

    crops: Tensor  # (B, 3, S, S) face crops of the references
    strength: Tensor  # (B,) 0 where the reference is dropped


class AdapterTask(BaseTask):
    """Train a vision branch that adds a person's identity to the pictures of a trained base."""

    Settings: ClassVar[type[BaseModel]] = AdapterSettings
    PARTS: ClassVar[tuple[str, ...]] = (*IDENTITY_PARTS, *BaseTask.PARTS)
    settings: AdapterSettings

    def __init__(self, settings: AdapterSettings, context: TaskContext) -> None:
        super().__init__(settings, context)
        self.vision = VisionEncoder()
        width = int(self.vision.config.width)
        tokens = self.unet.config.cross_attention_dim
        branch = BranchSpec("vision", tokens, 1.0, settings.zero_init, "full", width, settings.fusion)
        self.adapter = Adapter(self.unet, [branch], settings.lora_rank, settings.lora_targets)
        self.adapter.attach(self.unet)
        self.modules |= {"image_encoder": self.vision, "adapter": self.adapter}
        self.likeness = self._likeness_network()
        self.evaluation: HeldOutEvaluation | None = None

    def _likeness_network(self) -> LikenessNetwork | None:
        """Return the network of the likeness loss, which a stage `likeness` has trained; None without that loss."""
        if not self.settings.likeness:
            return None
        if "likeness" not in self.context.earlier:
            raise ConfigError(
                f"Stage {self.context.name} has a likeness loss, which needs a trained likeness network: name a stage "
                "`likeness` in its start_from, or set likeness to 0."
            )
        self.modules["likeness"] = network = LikenessNetwork(int(self.unet.config.in_channels))
        return network

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"vision_encoder": parameters(self.vision), **self.adapter.parts(), **super().parts()}

    def check(self) -> list[str]:
        judge = self.settings.judge
        if judge is not None and not (judge / "judge").is_dir():
            raise ConfigError(
                f"Stage {self.context.name}: judge is {judge}, which holds no judge; name a folder of weights with one."
            )
        return [*super().check(), *images_without_effect(self.context, self.settings.drop_vision)]

    def crop_side(self) -> int:
        return int(self.vision.config.image_size)

    def batch(self, images_seen: int, size: int) -> AdapterBatch:
        seed, drawn = self.context.seed, self.mixture.draw(self.context.seed, images_seen, size)
        targets = self._targets(drawn, images_seen)
        return AdapterBatch(
            targets.latents,
            targets.sentences,
            targets.faces,
            targets.weights,
            references(self.gallery_caches, drawn, uniforms(seed, "crops", images_seen, size, (2,))),
            1 - chance(seed, "drop vision", images_seen, size, self.settings.drop_vision).float(),
        )

    def vision_tokens(self, crops: Tensor) -> Tokens:
        return self.adapter.tokens("vision", self.vision(crops))

    def prediction(self, batch: AdapterBatch, vision: Tokens, noise: Tensor, t: Tensor) -> Tensor:
        """Return the denoiser's predicted velocity (B, C, h, w), conditioned on these vision tokens."""
        noisy = add_noise(batch.latents, noise, t)
        return self.predict(noisy, t, batch.sentences, {"vision": vision}, batch.strength)

    def cosines(self, batch: AdapterBatch, prediction: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the cosine similarity (B,) of the predicted clean latents to the target, by the likeness network."""
        assert self.likeness is not None, "the stage has no likeness network"
        clean = clean_from_velocity(add_noise(batch.latents, noise, t), prediction, t)
        with torch.no_grad():
            target = self.likeness(batch.latents, batch.faces)
        return (self.likeness(clean, batch.faces) * target).sum(1)

    def show(self, batch: BaseBatch, path: Path) -> None:
        """Save a grid of the references, as the vision encoder receives them, each with its target on the right."""
        assert isinstance(batch, AdapterBatch)
        targets = self.decode(batch.latents)
        crops = F.interpolate(batch.crops, size=targets.shape[-1])
        save_grid(torch.stack((crops, targets), 1).flatten(0, 1), path, columns=8)

    def loss(self, batch: AdapterBatch, images_seen: int) -> Loss:  # type: ignore[override]
        noise, t = self.noise(batch.latents, self.context.seed, images_seen)
        prediction = self.prediction(batch, self.vision_tokens(batch.crops), noise, t)
        errors = self.weighted(squared_error(prediction, velocity(batch.latents, noise), batch.weights), t)
        if self.likeness is None:
            return Loss(errors)
        # No likeness is required where the reference is dropped. The loss falls with the noise level, because a noisier
        # input contains less of the face.
        likeness_loss = batch.strength * (1 - t) * (1 - self.cosines(batch, prediction, noise, t))
        return Loss(
            errors + self.settings.likeness * likeness_loss, {"error": errors.mean(), "strange": likeness_loss.mean()}
        )

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        # The losses with two references: another picture of the same person, and a picture of a different person.
        targets, firsts = self.held_out_batch(), torch.arange(0, 2 * self.validation_people, 2)
        crops = self.held_out.crops(firsts, _MIDDLE.expand(len(firsts), 2))
        strength = torch.ones(len(firsts))
        batch = AdapterBatch(targets.latents, targets.sentences, targets.faces, targets.weights, crops, strength)
        batch = to_device(batch, self.context.device)
        noise, t = self.noise(batch.latents, VALIDATION_SEED, 0)
        vision = self.vision_tokens(batch.crops)
        predictions = [
            self.prediction(batch, tokens, noise, t) for tokens in (vision, Tokens(vision.values.roll(1, 0)))
        ]
        target = velocity(batch.latents, noise)
        right, wrong = (float(squared_error(prediction, target, batch.weights).mean()) for prediction in predictions)
        self.draw(folder / "pictures.png")
        numbers = {"validation_loss": right, "shuffled_references": wrong, "reference_ratio": wrong / right}
        if self.likeness is not None:
            numbers["likeness"] = float(self.cosines(batch, predictions[0], noise, t).mean())
        return numbers | self._judge_scores(folder)

    def _judge_scores(self, folder: Path) -> dict[str, float]:
        """Return the judge's scores for pictures of held-out people; empty if the stage names no judge."""
        if self.settings.judge is None:
            return {}
        evaluation = self.evaluation = self.evaluation or HeldOutEvaluation(self.settings.judge)
        crops, sentences = evaluation.references(self.crop_side()).to(self.context.device), evaluation.sentences
        pieces = []
        noise = self.drawing_noise(len(sentences))
        for first in range(0, len(sentences), _DRAWN_AT_ONCE):
            some = slice(first, first + _DRAWN_AT_ONCE)
            texts = sentences[some]
            vision = self.vision_tokens(crops[some])
            inputs = Inputs(self.encode_texts(texts), self.encode_texts([""] * len(texts)), vision)
            latents = sample(self.unet, noise[some], inputs, Guidance(_JUDGED_AT), self.DRAWING_STEPS)
            pieces.append(self.decode(latents))
        pictures = torch.cat(pieces)
        save_grid(pictures, folder / "judged.png", columns=len(evaluation.cases.prompts))
        return evaluation.scores(pictures)

    def draw(self, path: Path, seeds: int = 5) -> None:
        """Save a grid with one held-out person per row: the photo, then a picture for each of the fixed sentences."""
        who = range(HELD_OUT.stop - 2_000, HELD_OUT.stop - 2_000 + seeds)
        people = sample_people(who)
        photo = render(people, sample_contexts(who).replace(style=0, headwear=0, framing=1))
        vision = self.vision_tokens(crop_faces(photo.images, photo.boxes, self.vision.config.image_size))
        vision = Tokens(vision.values.repeat_interleave(len(PROMPTS), 0))
        count = seeds * len(PROMPTS)
        inputs = Inputs(self.encode_texts(list(PROMPTS) * seeds), self.encode_texts([""] * count), vision)
        latents = sample(self.unet, self.drawing_noise(count), inputs, Guidance(2.0), self.DRAWING_STEPS)
        drawn = self.decode(latents).unflatten(0, (seeds, len(PROMPTS)))
        photos = F.interpolate(photo.images, size=drawn.shape[-2:], mode="area")
        save_grid(torch.cat((photos[:, None], drawn), 1).flatten(0, 1), path, columns=len(PROMPTS) + 1)

    def export(self, folder: Path) -> None:
        super().export(folder)
        self.vision.save_pretrained(folder / "image_encoder")
        self.adapter.save(folder / "adapter", {**ADAPTER_FACTS, "tokens": str(self.vision.tokens)})
