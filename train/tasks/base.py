"""The text-to-image base: the stock denoiser with three text branches, on real singles and on synthetic pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from imagine.adapter.adapter import LORA_TARGETS, Adapter, BranchSpec, Fusion, LoraTarget
from imagine.networks.diffusion import add_noise, logit_normal, min_snr_weight, timesteps, velocity
from imagine.networks.models import build_denoiser
from imagine.pipeline.sampling import Guidance, Inputs, TextTokens, pooled_text
from imagine.records import Conditioning, Tokens
from train.cache.latents import WorldCodec, autoencoder_of, check_autoencoder, squared_error
from train.cache.pictures import AnyGallery, AnyPictures
from train.cache.sentences import Sentences, SentenceStore
from train.data.denoiser_inputs import GalleryCache, cache_gallery
from train.data.language import build_text_encoders, make_tokenizers, parameters, save_text_encoders
from train.data.order import chance, generator, normals, to_device
from train.data.portraits import SIDE, check_sources, data_settings, held_out_pictures, pictures_of
from train.data.sources import DrawnPairs, Mixture, in_order, weighted_sources
from train.run.grids import save_grid
from train.run.sampling import sample
from train.task import Loss, Share, TaskContext, Weight

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


IDENTITY_PARTS = ("vision_encoder", "vision_branch", "vision_projection", "lora")  # off where nobody is to be shown
Gamma = Annotated[float, Field(gt=0)]
TextBranch = Literal["t5", "byt5"]


class BaseSettings(BaseModel):
    """Sizes of the denoiser, and which pictures and captions it is fed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    widths: tuple[int, ...] = (128, 192)
    layers: int = 1
    middle_attention: bool = True  # False leaves one residual block in the denoiser's middle
    pooled: bool = True  # the sentence also as one vector beside the time, of CLIP's and T5's tokens
    text_branches: tuple[TextBranch, ...] = ("t5", "byt5")  # beside the denoiser's own, which is CLIP's
    fusion: Fusion = "parallel"  # or "concatenated", the paper's comparison (section 4.3.2)
    # pixels, a multiple of the autoencoder's 16; pictures are scaled to it before they are encoded
    resolution: Annotated[int, Field(ge=16, le=SIDE, multiple_of=16)] = SIDE
    sources: dict[str, float] = {"real": 0.2, "synthetic": 0.8}  # names among the run's data sources, by weight
    alternate: Annotated[int, Field(ge=1)] = (
        1  # images in a row from one source; the batch's size alternates whole batches
    )
    drop_text: Share = 0.1  # share of images that no text branch is told anything of, for guidance
    drop_clip: Share = 0.0  # and of those that one branch alone misses; 1 leaves it out altogether
    drop_t5: Share = 0.0
    drop_byt5: Share = 0.0
    face_weight: Weight = 2.0  # how much more the loss counts inside the face's box
    letter_weight: Weight = 1.0  # how much more on the words on shirts, where the world draws them
    time_mean: float = 0.0  # of the logit-normal times; above 0 is more noise
    time_std: Annotated[float, Field(gt=0)] = 1.0
    min_snr_gamma: Gamma | None = None  # weigh errors by min-SNR (arXiv 2303.09556), with this gamma

    @model_validator(mode="after")
    def _fits_together(self) -> "BaseSettings":
        if len(set(self.text_branches)) != len(self.text_branches) or not self.text_branches:
            raise ValueError("text_branches names t5, byt5 or both, each once")
        if self.pooled and "t5" not in self.text_branches:
            raise ValueError("the pooled sentence is read off T5's tokens too: set pooled to false, or keep t5")
        for name, share in (("t5", self.drop_t5), ("byt5", self.drop_byt5)):
            if share and name not in self.text_branches:
                raise ValueError(f"drop_{name} has no effect, as text_branches leaves {name} out: leave it out too")
        return self


def check_lora(rank: int, targets: Sequence[LoraTarget]) -> None:
    """ValueError for layers that a LoRA of rank 0 would go to."""
    if not rank and tuple(targets) != LORA_TARGETS:
        raise ValueError("lora_targets has no effect with lora_rank 0, which is no LoRA: leave it out")


def images_without_effect(context: TaskContext, drop_vision: float) -> list[str]:
    """A sentence about images that teach nothing, if there are any: without a person the frozen base draws alone."""
    if not drop_vision or not context.trains or not set(context.trains) <= set(IDENTITY_PARTS):
        return []
    return [
        f"drop_vision: {drop_vision:g} of the images are shown nobody and teach nothing, as everything that trains is "
        "off in them; set it to 0."
    ]


@dataclass(frozen=True)
class BaseBatch:
    """Clean latents and the sentences that describe them; noise is the loss's own."""

    latents: Tensor  # (B, C, h, w), clean
    sentences: Sentences
    faces: Tensor  # (B, 1, h, w) 1 where the face is, 0 elsewhere
    weights: Tensor  # (B, 1, h, w) how much each cell counts in the loss


class BaseTask:
    """Denoiser, text branches and ByT5 train together; CLIP and T5 stay as they are and read each caption once."""

    Settings: ClassVar[type[BaseModel]] = BaseSettings
    PARTS: ClassVar[tuple[str, ...]] = ("unet", "text_adapter", "byt5")
    DRAWING_STEPS: ClassVar[int] = 20  # of the sampler, for the sheets of pictures
    VALIDATION_PEOPLE: ClassVar[int] = 128

    def __init__(self, settings: BaseSettings, context: TaskContext) -> None:
        self.settings, self.context = settings, context
        make_tokenizers(context.folder / "cache")
        self.text = build_text_encoders(context.folder / "cache")
        pooled = self.text.pooled_width if settings.pooled else None
        self.unet = build_denoiser(
            widths=settings.widths, layers=settings.layers, pooled_width=pooled,
            middle_attention=settings.middle_attention,
        )  # fmt: skip
        t5, byt5 = (model.config.d_model for model in (self.text.t5, self.text.byt5))
        widths = {"t5": t5, "byt5": byt5}
        fusion = settings.fusion
        branches = [BranchSpec(name, widths[name], zero_init=False, fusion=fusion) for name in settings.text_branches]
        self.text_adapter = Adapter(self.unet, branches)
        self.text_adapter.attach(self.unet)
        self.modules: dict[str, nn.Module] = {
            "unet": self.unet, "text_adapter": self.text_adapter, "text_encoder": self.text.clip,
            "text_encoder_2": self.text.t5, "text_encoder_3": self.text.byt5,
        }  # fmt: skip

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {
            "unet": parameters(self.unet), "text_adapter": parameters(self.text_adapter),
            "byt5": parameters(self.text.byt5) if "byt5" in self.settings.text_branches else [],
        }  # fmt: skip

    def check(self) -> list[str]:
        check_sources(self.context.data, self.settings.sources)
        check_autoencoder(self.context)
        return self._weight_without_effect()

    def _weight_without_effect(self) -> list[str]:
        """A sentence if the letters are to count more where nobody knows of any."""
        data = data_settings(self.context.data)
        named = [
            data.galleries.get(data.sources[name].gallery)
            for name in weighted_sources(self.settings.sources, data.sources)
        ]
        if self.settings.letter_weight == 1 or any(gallery is None or gallery.records is None for gallery in named):
            return []
        return ["letter_weight has no effect: records do not say where words are; leave it out."]

    def prepare(self) -> None:
        data = data_settings(self.context.data)
        names = {data.sources[name].gallery for name in self.settings.sources if name in data.sources}
        pictures = {name: pictures_of(self.context.data, name) for name in sorted(names)}
        galleries = {name: some.gallery for name, some in pictures.items()}
        self.mixture = self._mixture(galleries)
        self.codec = WorldCodec(autoencoder_of(self.context), self.context.device)
        self.gallery_caches = {name: self._cache_gallery(some, name) for name, some in pictures.items()}
        self.mixture = self._mixture(galleries)  # once more: a record may have broken since its face was looked for
        self.validation_people = data.limited(self.VALIDATION_PEOPLE)
        self.held_out = self._cache_gallery(
            held_out_pictures(self.context.data, self.validation_people), f"held-out-{self.validation_people}"
        )

    def _mixture(self, galleries: Mapping[str, AnyGallery]) -> Mixture:
        sources, settings = data_settings(self.context.data).sources, self.settings
        return Mixture(settings.sources, sources, galleries, settings.alternate, self.context.own_counts)

    def _cache_gallery(self, pictures: AnyPictures, name: str) -> GalleryCache[SentenceStore]:
        folder = data_settings(self.context.data).folder / name
        sentences = SentenceStore(pictures.gallery, self.text, folder)
        return cache_gallery(pictures, self.codec, sentences, folder, self.settings.resolution, self.crop_side())

    def crop_side(self) -> int | None:
        """Pixels of the face crops that this task needs, if it does."""
        return None

    def batch(self, images_seen: int, size: int) -> BaseBatch:
        return self._targets(self.mixture.draw(self.context.seed, images_seen, size), images_seen)

    def _targets(self, drawn: DrawnPairs, images_seen: int) -> BaseBatch:
        """The targets of what was drawn, with their captions; some branches are told nothing of some."""
        dropped = self._dropped(images_seen, len(drawn.targets))
        positions, latents, sentences, faces, weights = [], [], [], [], []
        for name, here in drawn.by_gallery().items():
            gallery_cache, rows = self.gallery_caches[name], drawn.targets[here]
            positions.append(here)
            latents.append(gallery_cache.latents.take(rows))
            caption_styles = [drawn.caption_styles[i] for i in here.tolist()]
            sentences.append(
                gallery_cache.sentences.take(
                    rows, caption_styles, {branch: mask[here] for branch, mask in dropped.items()}
                )
            )
            faces.append(gallery_cache.faces(rows))
            weights.append(self._weights(gallery_cache, rows))
        order = torch.cat(positions).argsort()
        joined = Sentences.join(sentences)
        return BaseBatch(
            in_order(positions, latents),
            joined if len(positions) == 1 else joined[order],
            in_order(positions, faces),
            in_order(positions, weights),
        )

    def _weights(self, gallery_cache: GalleryCache[SentenceStore], rows: Tensor) -> Tensor:
        """How much each cell of these rows' latents counts in the loss, (B, 1, h, w)."""
        faces, letters = self.settings.face_weight, self.settings.letter_weight
        weights = 1 + (faces - 1) * gallery_cache.faces(rows)
        return weights if letters == 1 else weights + (letters - 1) * gallery_cache.letters(rows)

    def _dropped(self, first: int, size: int) -> dict[str, Tensor]:
        """Text branch -> which images it is told nothing of, (size,) bool."""
        seed, settings = self.context.seed, self.settings
        everything = chance(seed, "drop", first, size, settings.drop_text)
        shares = {"clip": settings.drop_clip, "t5": settings.drop_t5, "byt5": settings.drop_byt5}
        return {name: everything | chance(seed, f"drop {name}", first, size, share) for name, share in shares.items()}

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        sentences: Sentences,
        vision: Mapping[str, Tokens] | None = None,
        strength: Tensor | None = None,
    ) -> Tensor:
        """The denoiser's velocity for noisy latents (B, C, h, w) at times t (B,), with whom to show if anybody."""
        branches = self._branches(sentences)
        scales = {} if strength is None else {name: strength for name in vision or {}}
        return cast(Tensor, self.unet(
            noisy, timesteps(t), encoder_hidden_states=sentences.clip.values,
            encoder_attention_mask=sentences.clip.mask, class_labels=pooled_text(self.unet, sentences.clip, branches),
            cross_attention_kwargs={"conditioning": Conditioning({**branches, **(vision or {})}, scales)},
        ).sample)  # fmt: skip

    def _branches(self, sentences: Sentences) -> dict[str, Tokens]:
        """The tokens of the text branches that there are."""
        branches = {}
        if "t5" in self.settings.text_branches:
            branches["t5"] = sentences.t5
        if "byt5" in self.settings.text_branches:
            branches["byt5"] = self.text.encode_byt5([f'"{text}"' for text in sentences.letters])
        return branches

    def errors(self, batch: BaseBatch, noise: Tensor, t: Tensor) -> Tensor:
        """Squared error of the velocity, weighted towards face and letters, one number an item."""
        prediction = self.predict(add_noise(batch.latents, noise, t), t, batch.sentences)
        return squared_error(prediction, velocity(batch.latents, noise), batch.weights)

    def show(self, batch: BaseBatch, path: Path) -> None:
        save_grid(self.decode(batch.latents), path, columns=8)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, S, S), 0 to 1, on the CPU."""
        return self.codec.decode(latents.to(self.context.device)).cpu()

    def loss(self, batch: BaseBatch, images_seen: int) -> Loss:
        noise, t = self.noise(batch.latents, self.context.seed, images_seen)
        return Loss(self.weighted(self.errors(batch, noise, t), t))

    def weighted(self, errors: Tensor, t: Tensor) -> Tensor:
        """Errors (B,) by how much their time counts."""
        gamma = self.settings.min_snr_gamma
        return errors if gamma is None else errors * min_snr_weight(t, gamma)

    def noise(self, latents: Tensor, seed: int, images_seen: int) -> tuple[Tensor, Tensor]:
        """Noise like the latents, and times (B,): of each image number its own."""
        count, device = len(latents), latents.device
        noise = normals(seed, "noise", images_seen, count, latents.shape[1:], device)
        normal = normals(seed, "times", images_seen, count, device=device)
        return noise, logit_normal(normal, self.settings.time_mean, self.settings.time_std)

    def held_out_batch(self) -> BaseBatch:
        """One picture each of people whom nobody was trained on, with its caption."""
        gallery_cache, rows = self.held_out, torch.arange(1, 2 * self.validation_people, 2)
        sentences = gallery_cache.sentences.take(rows, ["rewritten"] * len(rows))
        return BaseBatch(
            gallery_cache.latents.take(rows), sentences, gallery_cache.faces(rows), self._weights(gallery_cache, rows)
        )

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        batch = to_device(self.held_out_batch(), self.context.device)  # against their own and others' captions
        noise, t = self.noise(batch.latents, VALIDATION_SEED, 0)
        right = float(self.errors(batch, noise, t).mean())
        wrong = float(self.errors(replace(batch, sentences=batch.sentences.shifted()), noise, t).mean())
        self.draw(folder / "pictures.png")
        return {"validation_loss": right, "shuffled_captions": wrong, "caption_ratio": wrong / right}

    def draw(self, path: Path, seeds: int = 2) -> None:
        """Fixed sentences at fixed seeds, one column a sentence, without and with guidance."""
        noise = self.drawing_noise(len(PROMPTS) * seeds)
        inputs = Inputs(self.encode_texts(list(PROMPTS) * seeds), self.encode_texts([""] * len(noise)), None)
        rows = [sample(self.unet, noise, inputs, Guidance(scale), self.DRAWING_STEPS) for scale in (1.0, 3.0)]
        save_grid(self.decode(torch.cat(rows)), path, columns=len(PROMPTS))

    def encode_texts(self, texts: Sequence[str]) -> TextTokens:
        """Sentences as the sampler wants them: CLIP's tokens, and those of the other text branches that there are."""
        clip, branches = self.text.encode(texts)
        return clip, {name: branches[name] for name in self.settings.text_branches}

    def drawing_noise(self, count: int) -> Tensor:
        """The same noise (count, C, h, w) at every call, so that sheets can be compared."""
        shape = (count, *self.held_out.latents.values.shape[1:])
        return torch.randn(shape, generator=generator(0, "draw", 0)).to(self.context.device)

    def export(self, folder: Path) -> None:
        self.unet.save_pretrained(folder / "unet")
        facts = {**ADAPTER_FACTS, "tokens": "64 T5, 16 ByT5"}
        self.text_adapter.save(folder / "text_adapter", facts)
        save_text_encoders(self.text, folder)
