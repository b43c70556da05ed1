"""Train the text-to-image base: the stock denoiser with three text branches, on real singles and synthetic pictures."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from imagine.adapter.adapter import LORA_TARGETS, Adapter, BranchSpec, Fusion, LoraTarget
from imagine.networks.diffusion import (
    add_noise,
    clean_from_velocity,
    logit_normal,
    min_snr_weight,
    timesteps,
    velocity,
)
from imagine.networks.models import build_denoiser
from imagine.pipeline.sampling import Guidance, Inputs, TextTokens, pooled_text
from imagine.records import Conditioning, Tokens
from imagine.world import VERSION
from train.cache.latents import WorldCodec, autoencoder_of, check_autoencoder, squared_error
from train.cache.pictures import AnyGallery, AnyPictures, Gallery, Pictures
from train.cache.sentences import Sentences, SentenceStore
from train.cache.truths import PartMasks, WordPlaces
from train.data.denoiser_inputs import GalleryCache, Truth, cache_gallery
from train.data.language import build_text_encoders, copy_tokenizers, make_tokenizers, parameters, save_text_encoders
from train.data.order import chance, generator, normals, to_device
from train.data.portraits import SIDE, check_sources, data_settings, held_out_pictures, pictures_of
from train.data.sources import DrawnPairs, Mixture, in_order, weighted_sources
from train.run.grids import save_grid
from train.run.sampling import sample
from train.task import Loss, Share, TaskContext, Weight
from train.tasks.auxiliary import AuxiliaryLosses, AuxiliarySettings, TextBranch, Watch, check_auxiliary

log = logging.getLogger("train")
ADAPTER_FACTS = {
    "base": "imagine portrait world",
    "world": VERSION,
    "encoder": "imagine portrait world ViT, 64 px, patch 8",
    "feature_layer": "-2",
    "licence": "Apache-2.0",
}
VALIDATION_SEED = 1_000_003  # seed of the noise in validation losses
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


# Parts that are off in images without a reference.
IDENTITY_PARTS = ("vision_encoder", "vision_branch", "vision_router", "vision_projection", "lora")
Gamma = Annotated[float, Field(gt=0)]


class BaseSettings(AuxiliarySettings):
    """Settings of the denoiser's sizes, and of the training: data sources, dropout for guidance and loss weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    latent_channels: Annotated[int, Field(ge=1)] = 32  # of the latents as the denoiser sees them
    widths: tuple[int, ...] = (128, 192)
    layers: int = 1
    middle_attention: bool = True  # False: the denoiser's middle block is a single residual block
    pooled: bool = True  # add one vector of the sentence, pooled from CLIP's and T5's tokens, to the time embedding
    text_branches: tuple[TextBranch, ...] = ("t5", "byt5")  # in addition to the denoiser's own text branch, CLIP
    fusion: Fusion = "parallel"  # or "concatenated", the paper's baseline (section 4.3.2)
    # pixels, a multiple of 16, the scale of the autoencoder; pictures are scaled to it before they are encoded
    resolution: Annotated[int, Field(ge=16, le=SIDE, multiple_of=16)] = SIDE
    # weights of the run's data sources, by name
    sources: dict[str, float] = {"real": 0.2, "synthetic": 0.8}  # noqa: RUF012  (pydantic copies it)
    # consecutive images from one source; set it to the batch size to alternate whole batches
    alternate: Annotated[int, Field(ge=1)] = 1
    drop_text: Share = 0.1  # share of images for which every text branch reads an empty sentence, for guidance
    drop_clip: Share = 0.0  # share of images for which this branch alone reads an empty sentence; 1: it always does
    drop_t5: Share = 0.0
    drop_byt5: Share = 0.0
    face_weight: Weight = 2.0  # loss weight inside the face's box; 1 elsewhere
    letter_weight: Weight = 1.0  # loss weight of the words on shirts, where the world draws them
    time_mean: float = 0.0  # mean of the logit-normal times; above 0 is more noise
    time_std: Annotated[float, Field(gt=0)] = 1.0
    min_snr_gamma: Gamma | None = None  # the gamma of min-SNR loss weights (arXiv 2303.09556)

    @model_validator(mode="after")
    def _fits_together(self) -> "BaseSettings":
        if len(set(self.text_branches)) != len(self.text_branches) or not self.text_branches:
            raise ValueError("text_branches must name t5, byt5 or both, each once")
        if self.pooled and "t5" not in self.text_branches:
            raise ValueError("pooled needs T5's tokens, but text_branches has no t5: set pooled to false, or add t5")
        for name, share in (("t5", self.drop_t5), ("byt5", self.drop_byt5)):
            if share and name not in self.text_branches:
                raise ValueError(
                    f"drop_{name} has no effect, as text_branches does not name {name}: remove drop_{name}"
                )
        check_auxiliary(self, self.text_branches, self.fusion)
        return self


def check_lora(rank: int, targets: Sequence[LoraTarget]) -> None:
    """Raise ValueError if `targets` names LoRA layers but `rank` is 0."""
    if not rank and tuple(targets) != LORA_TARGETS:
        raise ValueError("lora_targets has no effect with lora_rank 0, which adds no LoRA: remove lora_targets")


def images_without_effect(context: TaskContext, drop_vision: float) -> list[str]:
    """Return a warning if some images train nothing: without a reference, the frozen base predicts alone."""
    if not drop_vision or not context.trains or not set(context.trains) <= set(IDENTITY_PARTS):
        return []
    return [
        f"drop_vision: {drop_vision:g} of the images have no reference and train nothing, because every part that "
        "trains is off for them; set it to 0."
    ]


@dataclass(frozen=True)
class BaseBatch:
    """Clean latents and the sentences that describe them; the loss draws the noise."""

    latents: Tensor  # (B, C, h, w), clean
    sentences: Sentences
    faces: Tensor  # (B, 1, h, w) face mask: 1 where the face is, 0 elsewhere
    weights: Tensor  # (B, 1, h, w) loss weight of each cell
    truth: Truth | None = field(default=None, kw_only=True)  # what the auxiliary losses need to know


class BaseTask:
    """Train denoiser, text branches and ByT5 together; CLIP and T5 are frozen and encode each caption once."""

    Settings: ClassVar[type[BaseModel]] = BaseSettings
    PARTS: ClassVar[tuple[str, ...]] = ("unet", "text_adapter", "byt5")
    DRAWING_STEPS: ClassVar[int] = 20  # sampling steps of the picture grids
    VALIDATION_PEOPLE: ClassVar[int] = 128

    def __init__(self, settings: BaseSettings, context: TaskContext) -> None:
        self.settings, self.context = settings, context
        if not copy_tokenizers(context.places_of_tokenizers, context.folder / "cache"):
            make_tokenizers(context.folder / "cache")
        self.text = build_text_encoders(context.folder / "cache")
        pooled = self.text.pooled_width if settings.pooled else None
        self.unet = build_denoiser(
            latent_channels=settings.latent_channels, widths=settings.widths, layers=settings.layers,
            pooled_width=pooled, middle_attention=settings.middle_attention,
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
        self.auxiliary = AuxiliaryLosses(settings, context, self.unet)
        self.modules |= self.auxiliary.modules

    def parts(self) -> dict[str, list[nn.Parameter]]:
        heads = {part: self.auxiliary.parameters_of(part) for part in ("unet", "text_adapter")}
        return {
            "unet": parameters(self.unet) + heads["unet"],
            "text_adapter": parameters(self.text_adapter) + heads["text_adapter"],
            "byt5": parameters(self.text.byt5) if "byt5" in self.settings.text_branches else [],
        }  # fmt: skip

    def check(self) -> list[str]:
        check_sources(self.context.data, self.settings.sources)
        check_autoencoder(self.context)
        recorded = self._recorded_sources()
        self.auxiliary.check(recorded)
        if self.settings.letter_weight == 1 or not all(recorded.values()):
            return []
        return ["letter_weight has no effect: records do not contain the positions of words; remove it."]

    def _recorded_sources(self) -> dict[str, bool]:
        """Return for each source whether it reads records, which do not say where letters are."""
        data, recorded = data_settings(self.context.data), {}
        for name in weighted_sources(self.settings.sources, data.sources):
            gallery = data.galleries.get(data.sources[name].gallery)
            recorded[name] = gallery is not None and gallery.records is not None
        return recorded

    def prepare(self) -> None:
        data = data_settings(self.context.data)
        names = {data.sources[name].gallery for name in self.settings.sources if name in data.sources}
        pictures = {name: pictures_of(self.context.data, name) for name in sorted(names)}
        galleries = {name: some.gallery for name, some in pictures.items()}
        self.lettered = self._lettered(galleries)
        self.mixture = self._mixture(galleries)
        self.codec = WorldCodec(autoencoder_of(self.context), self.context.device)
        self.codec.check_channels(self.settings.latent_channels, self.context.name)
        self.gallery_caches = {name: self._cache_gallery(some, name) for name, some in pictures.items()}
        # Built again, because a record that became unreadable while it was cached must not be drawn.
        self.mixture = self._mixture(galleries)
        for sentence in self.mixture.word_facts():
            log.info("%s: %s", self.context.name, sentence)
        self.validation_people = data.limited(self.VALIDATION_PEOPLE)
        self.held_out = self._cache_gallery(
            held_out_pictures(self.context.data, self.validation_people), f"held-out-{self.validation_people}"
        )

    def _mixture(self, galleries: Mapping[str, AnyGallery]) -> Mixture:
        sources, settings = data_settings(self.context.data).sources, self.settings
        own_counts = self.context.own_counts
        return Mixture(
            settings.sources, sources, galleries, settings.alternate, own_counts, settings.words, self.lettered
        )

    def _lettered(self, galleries: Mapping[str, AnyGallery]) -> dict[str, Tensor]:
        """Return which rows of each gallery of the world carry a word, (N,) bool; {} unless `words` is set."""
        if self.settings.words is None:
            return {}
        folder = data_settings(self.context.data).folder
        world = {name: gallery for name, gallery in galleries.items() if isinstance(gallery, Gallery)}
        return {name: WordPlaces(gallery, folder / name).carried() for name, gallery in world.items()}

    def _cache_gallery(self, pictures: AnyPictures, name: str) -> GalleryCache[SentenceStore]:
        folder = data_settings(self.context.data).folder / name
        sentences = SentenceStore(pictures.gallery, self.text, folder)
        cached = cache_gallery(pictures, self.codec, sentences, folder, self.settings.resolution, self.crop_side())
        if not isinstance(pictures, Pictures) or not self.auxiliary.needs_truth:
            return cached
        parts = PartMasks(pictures.gallery, folder) if self.settings.part_loss else None
        return replace(cached, words=WordPlaces(pictures.gallery, folder), part_masks=parts)

    def crop_side(self) -> int | None:
        """Return the side in pixels of the face crops that this task needs; None if it needs none."""
        return None

    def batch(self, images_seen: int, size: int) -> BaseBatch:
        return self._targets(self.mixture.draw(self.context.seed, images_seen, size), images_seen)

    def _targets(self, drawn: DrawnPairs, images_seen: int) -> BaseBatch:
        """Return the drawn targets with their captions; some captions are dropped for some branches."""
        dropped = self._dropped(images_seen, len(drawn.targets))
        positions, latents, sentences, faces, weights, truths = [], [], [], [], [], []
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
            truths += [gallery_cache.truth(rows)] if self.auxiliary.needs_truth else []
        order = torch.cat(positions).argsort()
        joined = Sentences.join(sentences)
        return BaseBatch(
            in_order(positions, latents),
            joined if len(positions) == 1 else joined[order],
            in_order(positions, faces),
            in_order(positions, weights),
            truth=Truth.join(positions, truths) if truths else None,
        )

    def _weights(self, gallery_cache: GalleryCache[SentenceStore], rows: Tensor) -> Tensor:
        """Return the loss weight of each cell of these rows' latents, (B, 1, h, w)."""
        faces, letters = self.settings.face_weight, self.settings.letter_weight
        weights = 1 + (faces - 1) * gallery_cache.faces(rows)
        return weights if letters == 1 else weights + (letters - 1) * gallery_cache.letters(rows)

    def _dropped(self, first: int, size: int) -> dict[str, Tensor]:
        """Return for each text branch the images whose caption it drops, (size,) bool."""
        seed, settings = self.context.seed, self.settings
        everything = chance(seed, "drop", first, size, settings.drop_text)
        shares = {"clip": settings.drop_clip, "t5": settings.drop_t5, "byt5": settings.drop_byt5}
        return {name: everything | chance(seed, f"drop {name}", first, size, share) for name, share in shares.items()}

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        sentences: Sentences,
        identity: Conditioning | None = None,
    ) -> Tensor:
        """Return the denoiser's velocity for noisy latents (B, C, h, w) at times t (B,).

        `identity` holds the tokens of the identity branches, their strength, and the groups of several people.
        """
        branches, identity = self._branches(sentences), identity or Conditioning()
        conditioning = replace(identity, branches={**branches, **identity.branches})
        return cast(Tensor, self.unet(
            noisy, timesteps(t), encoder_hidden_states=sentences.clip.values,
            encoder_attention_mask=sentences.clip.mask, class_labels=pooled_text(self.unet, sentences.clip, branches),
            cross_attention_kwargs={"conditioning": conditioning},
        ).sample)  # fmt: skip

    def _branches(self, sentences: Sentences) -> dict[str, Tokens]:
        """Return the tokens of the text branches that this task has."""
        branches = {}
        if "t5" in self.settings.text_branches:
            branches["t5"] = sentences.t5
        if "byt5" in self.settings.text_branches:
            branches["byt5"] = self.text.encode_byt5([f'"{text}"' for text in sentences.letters])
        return branches

    def errors(self, batch: BaseBatch, noise: Tensor, t: Tensor) -> Tensor:
        """Return the squared error (B,) of the velocity, weighted by cell."""
        prediction = self.predict(add_noise(batch.latents, noise, t), t, batch.sentences)
        return squared_error(prediction, velocity(batch.latents, noise), batch.weights)

    def show(self, batch: BaseBatch, path: Path) -> None:
        save_grid(self.decode(batch.latents), path, columns=8)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to pictures (B, 3, S, S), 0 to 1, on the CPU."""
        return self.codec.decode(latents.to(self.context.device)).cpu()

    def loss(self, batch: BaseBatch, images_seen: int) -> Loss:
        noise, t = self.noise(batch.latents, self.context.seed, images_seen)
        watch = self.auxiliary.watch(images_seen)
        noisy = add_noise(batch.latents, noise, t)
        prediction = self.predict(noisy, t, batch.sentences, Conditioning(watch=watch) if watch else None)
        target = velocity(batch.latents, noise)
        errors = self.weighted(squared_error(prediction, target, batch.weights), t)
        terms = self.auxiliary_terms(batch, watch, clean_from_velocity(noisy, prediction, t), t, images_seen)
        metrics = self.auxiliary.metrics(terms, batch.truth)
        if not terms:
            return Loss(errors, metrics)
        return Loss(errors + self.auxiliary.weighted(terms), {"error": errors.mean(), **metrics})

    def auxiliary_terms(
        self, batch: BaseBatch, watch: Watch, clean: Tensor, t: Tensor, images_seen: int
    ) -> dict[str, Tensor]:
        """Return the auxiliary losses (B,) of predicted clean latents, by name (`AuxiliaryLosses.terms`)."""
        return self.auxiliary.terms(
            batch.truth, batch.sentences.letters, watch, clean, t, images_seen, self.codec, SIDE
        )  # fmt: skip

    def weighted(self, errors: Tensor, t: Tensor) -> Tensor:
        """Return the errors (B,) times the min-SNR weights of their times `t`, if the stage uses such weights."""
        gamma = self.settings.min_snr_gamma
        return errors if gamma is None else errors * min_snr_weight(t, gamma)

    def noise(self, latents: Tensor, seed: int, images_seen: int) -> tuple[Tensor, Tensor]:
        """Return noise of the latents' shape, and times (B,); both depend on each image's number alone."""
        count, device = len(latents), latents.device
        noise = normals(seed, "noise", images_seen, count, latents.shape[1:], device)
        normal = normals(seed, "times", images_seen, count, device=device)
        return noise, logit_normal(normal, self.settings.time_mean, self.settings.time_std)

    def held_out_batch(self) -> BaseBatch:
        """Return one picture of each held-out person, with its caption."""
        gallery_cache, rows = self.held_out, torch.arange(1, 2 * self.validation_people, 2)
        sentences = gallery_cache.sentences.take(rows, ["rewritten"] * len(rows))
        return BaseBatch(
            gallery_cache.latents.take(rows), sentences, gallery_cache.faces(rows), self._weights(gallery_cache, rows)
        )

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        # The losses with the right captions, and with those of other pictures.
        batch = to_device(self.held_out_batch(), self.context.device)
        noise, t = self.noise(batch.latents, VALIDATION_SEED, 0)
        right = float(self.errors(batch, noise, t).mean())
        wrong = float(self.errors(replace(batch, sentences=batch.sentences.shifted()), noise, t).mean())
        self.draw(folder / "pictures.png")
        return {"validation_loss": right, "shuffled_captions": wrong, "caption_ratio": wrong / right}

    def draw(self, path: Path, seeds: int = 2) -> None:
        """Save a grid of pictures at fixed seeds, one column per fixed sentence, without and with guidance."""
        noise = self.drawing_noise(len(PROMPTS) * seeds)
        inputs = Inputs(self.encode_texts(list(PROMPTS) * seeds), self.encode_texts([""] * len(noise)), None)
        rows = [sample(self.unet, noise, inputs, Guidance(scale), self.DRAWING_STEPS) for scale in (1.0, 3.0)]
        save_grid(self.decode(torch.cat(rows)), path, columns=len(PROMPTS))

    def encode_texts(self, texts: Sequence[str]) -> TextTokens:
        """Return the sampler's text input: CLIP's tokens, and those of the other text branches that this task has."""
        clip, branches = self.text.encode(texts)
        return clip, {name: branches[name] for name in self.settings.text_branches}

    def drawing_noise(self, count: int) -> Tensor:
        """Return noise (count, C, h, w), the same at every call, so that picture grids are comparable."""
        shape = (count, *self.held_out.latents.values.shape[1:])
        return torch.randn(shape, generator=generator(0, "draw", 0)).to(self.context.device)

    def export(self, folder: Path) -> None:
        self.unet.save_pretrained(folder / "unet")
        facts = {**ADAPTER_FACTS, "tokens": "64 T5, 16 ByT5"}
        self.text_adapter.save(folder / "text_adapter", facts)
        save_text_encoders(self.text, folder)
