"""The text-to-image base: the stock denoiser with three text branches, on real singles and on synthetic pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from imagine.adapter import Adapter, BranchSpec
from imagine.diffusion import add_noise, loss_per_item, sample_times, timesteps, velocity
from imagine.models import build_denoiser
from imagine.records import Conditioning
from imagine.sampling import Guidance, Inputs
from imagine.world import captions
from train.data import chance, generator, key
from train.grids import save_grid
from train.language import build_text_encoders, make_tokenizers, parameters, save_text_encoders
from train.latents import Latents
from train.portraits import draw_rows, training_pictures
from train.sampling import sample
from train.task import Loss, Start

ADAPTER_FACTS = {
    "base": "imagine portrait world",
    "encoder": "imagine portrait world ViT, 64 px, patch 8",
    "feature_layer": "-2",
    "licence": "Apache-2.0",
}
PROMPTS = (
    "a photo of a person, smiling, on a beach, wearing a red t-shirt",
    "a pencil sketch of a person, looking angry, wearing a cap",
    "a person, head turned to the left, eyes looking left, in the snow",
    "a person, laughing, in a city, wearing a blue suit",
    "a watercolour painting of a person, looking sad, in a forest",
    'a photo of a person, wearing a yellow hoodie with the letters "SKY", in a room',
    "a person, close-up, looking surprised, wearing a crown, in space",
    "a person, half body, holding a balloon, in a desert, at sunset",
)


class BaseSettings(BaseModel):
    """Sizes of the denoiser, and which pictures and captions it is fed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    widths: tuple[int, ...] = (128, 192)
    layers: int = 1
    real_share: float = 0.2  # share of real singles with terse captions; the rest are synthetic
    dense_share: float = 0.5  # share of dense captions among the synthetic; the rest are rewritten
    drop_text: float = 0.1  # share of pictures trained without any text, for guidance


@dataclass(frozen=True)
class BaseBatch:
    """Clean latents and the sentences that describe them; noise is the loss's own."""

    latents: Tensor  # (B, C, h, w), clean
    texts: list[str]


class BaseTask:
    """Denoiser, text branches and text encoders train together, so that each learns what the others need."""

    Settings: ClassVar[type[BaseModel]] = BaseSettings
    PARTS: ClassVar[tuple[str, ...]] = ("unet", "text_adapter", "clip", "t5", "byt5")
    DRAWING_STEPS: ClassVar[int] = 20  # of the sampler, for the sheets of pictures

    def __init__(self, settings: BaseSettings, start: Start) -> None:
        self.settings, self.start = settings, start
        make_tokenizers(start.folder / "cache")
        self.text = build_text_encoders(start.folder / "cache")
        self.unet = build_denoiser(widths=settings.widths, layers=settings.layers)
        t5, byt5 = (model.config.d_model for model in (self.text.t5, self.text.byt5))
        branches = [BranchSpec("t5", t5, zero_init=False), BranchSpec("byt5", byt5, zero_init=False)]
        self.text_adapter = Adapter(self.unet, branches)
        self.text_adapter.attach(self.unet)
        self.modules: dict[str, nn.Module] = {
            "unet": self.unet, "text_adapter": self.text_adapter, "text_encoder": self.text.clip,
            "text_encoder_2": self.text.t5, "text_encoder_3": self.text.byt5,
        }  # fmt: skip

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {
            "unet": parameters(self.unet), "text_adapter": parameters(self.text_adapter),
            "clip": parameters(self.text.clip), "t5": parameters(self.text.t5), "byt5": parameters(self.text.byt5),
        }  # fmt: skip

    def prepare(self) -> None:
        self.pictures = training_pictures(self.start.data)
        earlier = self.start.earlier["autoencoder"]
        self.latents = Latents(self.pictures, earlier, earlier.parent / "latents", self.start.device)

    def batch(self, images_seen: int, size: int) -> BaseBatch:
        gallery, seed = self.pictures.gallery, self.start.seed
        who = draw_rows(self.start, "people", images_seen, size, gallery.identities)
        real = chance(seed, "real", images_seen, size, self.settings.real_share)
        other = draw_rows(self.start, "which", images_seen, size, gallery.pictures - 1) + 1
        rows = who * gallery.pictures + torch.where(real, 0, other)
        dense = chance(seed, "dense", images_seen, size, self.settings.dense_share)
        kinds = zip(real.tolist(), dense.tolist(), strict=True)
        styles = ["terse" if r else "dense" if d else "rewritten" for r, d in kinds]
        texts = self.captions(rows, styles, key(seed, "captions", images_seen) % 2**31)
        drop = chance(seed, "drop", images_seen, size, self.settings.drop_text)
        texts = ["" if gone else text for gone, text in zip(drop.tolist(), texts, strict=True)]
        return BaseBatch(self.latents.take(rows), texts)

    def captions(self, rows: Tensor, styles: list[str], seed: int) -> list[str]:
        """A caption for each row, in the style given for it."""
        people, contexts = self.pictures.gallery.people(rows), self.pictures.gallery.contexts(rows)
        texts = [""] * len(rows)
        for style in set(styles):
            mine = [i for i, name in enumerate(styles) if name == style]
            written = captions(people[mine], contexts[mine], style, [seed + i for i in mine])
            for i, text in zip(mine, written, strict=True):
                texts[i] = text
        return texts

    def predict(self, latents: Tensor, texts: list[str], noise: Tensor, t: Tensor) -> Tensor:
        """The loss of each item, (B,), at times t."""
        clip, branches = self.text.encode(texts)
        noisy = add_noise(latents, noise, t)
        guess = self.unet(
            noisy, timesteps(t), encoder_hidden_states=clip.values, encoder_attention_mask=clip.mask,
            cross_attention_kwargs={"conditioning": Conditioning(branches)},
        ).sample  # fmt: skip
        return loss_per_item(guess, velocity(latents, noise))

    def loss(self, batch: BaseBatch, images_seen: int) -> Loss:
        random = generator(self.start.seed, "noise", images_seen)
        noise = torch.randn(batch.latents.shape, generator=random).to(batch.latents.device)
        t = sample_times(len(noise), random).to(noise.device)
        return Loss(self.predict(batch.latents, batch.texts, noise, t))

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        # Synthetic pictures of the first people, against their own and others' captions.
        rows = torch.arange(1, min(257, len(self.pictures.gallery)), 2)
        texts = self.captions(rows, ["rewritten"] * len(rows), 0)
        random = generator(0, "validation", 0)
        latents = self.latents.take(rows).to(self.start.device)
        noise = torch.randn(latents.shape, generator=random).to(latents.device)
        t = sample_times(len(noise), random).to(noise.device)
        right = float(self.predict(latents, texts, noise, t).mean())
        wrong = float(self.predict(latents, texts[1:] + texts[:1], noise, t).mean())
        self.draw(folder / "pictures.png")
        return {"validation_loss": right, "shuffled_captions": wrong, "caption_ratio": wrong / right}

    def draw(self, path: Path, seeds: int = 2) -> None:
        """Fixed sentences at fixed seeds, one column a sentence, without and with guidance."""
        shape = (len(PROMPTS) * seeds, self.unet.config.in_channels, 8, 8)
        noise = torch.randn(shape, generator=generator(0, "draw", 0)).to(self.start.device)
        inputs = Inputs(self.text.encode(list(PROMPTS) * seeds), self.text.encode([""] * len(noise)), None)
        rows = [sample(self.unet, noise, inputs, Guidance(scale), self.DRAWING_STEPS) for scale in (1.0, 3.0)]
        save_grid(self.latents.decode(torch.cat(rows)).cpu(), path, columns=len(PROMPTS))

    def export(self, folder: Path) -> None:
        self.unet.save_pretrained(folder / "unet")
        facts = {**ADAPTER_FACTS, "tokens": "64 T5, 16 ByT5"}
        self.text_adapter.save(folder / "text_adapter", facts)
        save_text_encoders(self.text, folder)
