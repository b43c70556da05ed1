"""The text-to-image base: the stock denoiser with three text branches, on real singles and on synthetic pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from imagine.adapter import Adapter, BranchSpec
from imagine.diffusion import add_noise, logit_normal, per_item, timesteps, velocity
from imagine.errors import ConfigError
from imagine.models import build_denoiser
from imagine.records import Conditioning, Tokens
from imagine.sampling import Guidance, Inputs, pooled_text
from train.data import chance, generator, normals, to_device
from train.grids import save_grid
from train.language import build_text_encoders, make_tokenizers, parameters, save_text_encoders
from train.latents import Latents
from train.portraits import draw_rows, training_pictures
from train.sampling import sample
from train.sentences import Sentences, SentenceStore
from train.task import Loss, Start

ADAPTER_FACTS = {
    "base": "imagine portrait world",
    "encoder": "imagine portrait world ViT, 64 px, patch 8",
    "feature_layer": "-2",
    "licence": "Apache-2.0",
}
VALIDATION_SEED = 1_000_003  # of the noise that validation losses are measured with
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
    pooled: bool = True  # the sentence also as one vector beside the time
    real_share: float = 0.2  # share of real singles with terse captions; the rest are synthetic
    dense_share: float = 0.5  # share of dense captions among the synthetic; the rest are rewritten
    drop_text: float = 0.1  # share of pictures trained without any text, for guidance
    face_weight: float = 2.0  # how much more the loss counts inside the face's box


@dataclass(frozen=True)
class BaseBatch:
    """Clean latents and the sentences that describe them; noise is the loss's own."""

    latents: Tensor  # (B, C, h, w), clean
    sentences: Sentences
    faces: Tensor  # (B, 1, h, w) weight of the loss


class BaseTask:
    """Denoiser, text branches and ByT5 train together; CLIP and T5 stay as they are and read each caption once."""

    Settings: ClassVar[type[BaseModel]] = BaseSettings
    PARTS: ClassVar[tuple[str, ...]] = ("unet", "text_adapter", "byt5")
    DRAWING_STEPS: ClassVar[int] = 20  # of the sampler, for the sheets of pictures

    def __init__(self, settings: BaseSettings, start: Start) -> None:
        self.settings, self.start = settings, start
        make_tokenizers(start.folder / "cache")
        self.text = build_text_encoders(start.folder / "cache")
        pooled = self.text.pooled_width if settings.pooled else None
        self.unet = build_denoiser(widths=settings.widths, layers=settings.layers, pooled_width=pooled)
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
            "byt5": parameters(self.text.byt5),
        }  # fmt: skip

    def prepare(self) -> None:
        self.pictures = training_pictures(self.start.data)
        folder = Path(self.start.data["folder"]) / "train"
        self.latents = Latents(self.pictures, self._autoencoder(), folder, self.start.device)
        self.store = SentenceStore(self.pictures.gallery, self.text, folder)

    def _autoencoder(self) -> Path:
        """The folder that holds it: what an earlier stage left, or the weights that the stage begins with."""
        folder = self.start.earlier.get("autoencoder", self.start.initial)
        if folder is None:
            raise ConfigError(
                f"Stage {self.start.name} needs an autoencoder: name a stage `autoencoder` in its start_from, or a "
                "folder of weights as its initial."
            )
        return folder

    def batch(self, images_seen: int, size: int) -> BaseBatch:
        return self._targets(*self._rows(images_seen, size), images_seen)

    def _rows(self, images_seen: int, size: int) -> tuple[Tensor, Tensor]:
        """Each person's first picture, and how far behind it the target lies: 0 is that real one itself, (B,) each."""
        gallery = self.pictures.gallery
        who = draw_rows(self.start, "people", images_seen, size, gallery.identities)
        real = chance(self.start.seed, "real", images_seen, size, self.settings.real_share)
        other = draw_rows(self.start, "which", images_seen, size, gallery.pictures - 1) + 1
        return who * gallery.pictures, torch.where(real, 0, other)

    def _targets(self, firsts: Tensor, offsets: Tensor, images_seen: int) -> BaseBatch:
        rows = firsts + offsets
        latents = self.latents.take(rows)
        return BaseBatch(latents, self.captions(rows, offsets == 0, images_seen), self.face_weights(rows, latents))

    def captions(self, rows: Tensor, real: Tensor, images_seen: int) -> Sentences:
        """Terse captions for real pictures, dense or rewritten ones for synthetic ones, none for some of both."""
        size, seed = len(rows), self.start.seed
        dense = chance(seed, "dense", images_seen, size, self.settings.dense_share)
        drop = chance(seed, "drop", images_seen, size, self.settings.drop_text)
        kinds = zip(real.tolist(), dense.tolist(), strict=True)
        styles = ["terse" if r else "dense" if d else "rewritten" for r, d in kinds]
        return self.store.take(rows, styles, drop)

    def face_weights(self, rows: Tensor, latents: Tensor) -> Tensor:
        """How much each place of the latents counts in the loss: more where the face is, (B, 1, h, w)."""
        boxes = torch.from_numpy(self.pictures.boxes[rows.numpy()])
        return face_weights(boxes, self.pictures.gallery.size, latents.shape[-1], self.settings.face_weight)

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        sentences: Sentences,
        vision: Mapping[str, Tokens] | None = None,
        strength: Tensor | None = None,
    ) -> Tensor:
        """The denoiser's velocity for noisy latents (B, C, h, w) at times t (B,), with whom to show if anybody."""
        branches = {"t5": sentences.t5, "byt5": self.text.encode_byt5([f'"{text}"' for text in sentences.letters])}
        scales = {} if strength is None else {name: strength for name in vision or {}}
        return cast(Tensor, self.unet(
            noisy, timesteps(t), encoder_hidden_states=sentences.clip.values,
            encoder_attention_mask=sentences.clip.mask, class_labels=pooled_text(self.unet, sentences.clip, branches),
            cross_attention_kwargs={"conditioning": Conditioning({**branches, **(vision or {})}, scales)},
        ).sample)  # fmt: skip

    def errors(self, batch: BaseBatch, noise: Tensor, t: Tensor) -> Tensor:
        """Squared error of the velocity, weighted towards the face, one number an item."""
        guess = self.predict(add_noise(batch.latents, noise, t), t, batch.sentences)
        return weighted_error(guess, velocity(batch.latents, noise), batch.faces)

    def show(self, batch: BaseBatch, path: Path) -> None:
        save_grid(self.latents.decode(batch.latents.to(self.start.device)).cpu(), path, columns=8)

    def loss(self, batch: BaseBatch, images_seen: int) -> Loss:
        return Loss(self.errors(batch, *self.noise(batch.latents, self.start.seed, images_seen)))

    def noise(self, latents: Tensor, seed: int, images_seen: int) -> tuple[Tensor, Tensor]:
        """Noise like the latents, and times (B,): of each image number its own."""
        count, device = len(latents), latents.device
        noise = normals(seed, "noise", images_seen, count, latents.shape[1:], device)
        return noise, logit_normal(normals(seed, "times", images_seen, count, device=device))

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        # Synthetic pictures of the first people, against their own and others' captions.
        rows = torch.arange(1, min(257, len(self.pictures.gallery)), 2)
        latents = self.latents.take(rows).to(self.start.device)
        sentences = self.store.take(rows, ["rewritten"] * len(rows), torch.zeros(len(rows), dtype=torch.bool))
        batch = to_device(BaseBatch(latents, sentences, self.face_weights(rows, latents)), self.start.device)
        noise, t = self.noise(latents, VALIDATION_SEED, 0)
        right = float(self.errors(batch, noise, t).mean())
        wrong = float(self.errors(replace(batch, sentences=batch.sentences.shifted()), noise, t).mean())
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


def weighted_error(guess: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Mean squared error over channels and, by weight (B, 1, h, w), over places: one number an item, in float32."""
    square = (guess.float() - wanted.float()).square().mean(1, keepdim=True)
    return (square * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)


def face_weights(boxes: Tensor, side: int, cells: int, weight: float) -> Tensor:
    """(B, 1, cells, cells): `weight` where a latent cell touches the face, 1 elsewhere."""
    middle = (torch.arange(cells) + 0.5) * side / cells
    half = side / cells / 2
    across = (middle > boxes[:, :1] - half) & (middle < boxes[:, :1] + boxes[:, 2:3] + half)
    down = (middle > boxes[:, 1:2] - half) & (middle < boxes[:, 1:2] + boxes[:, 3:] + half)
    inside = (down.unsqueeze(2) & across.unsqueeze(1)).unsqueeze(1).float()
    return per_item(torch.ones(len(boxes)), inside) + (weight - 1) * inside
