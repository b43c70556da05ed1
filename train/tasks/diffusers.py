"""The identity adapter on a public base: Stable Diffusion 1.5 or XL, frozen, with our adapters beside it.

As the portrait world's adapter (`tasks.adapter`), it learns from real singles who somebody is, and from pairs what
is the person and what was only the photo. What differs is the base's: it predicts what its scheduler's config says, on
its own noise schedule, from its own text encoders' states; SDXL also hears sizes. T5 and ByT5, which such a base never
read, are branches of a second adapter that begin as nothing.

Latents, face crops and text states come from disk; autoencoder and text encoders are gone before the first step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from imagine.adapter.adapter import LORA_TARGETS, Adapter, BranchSpec, LoraTarget
from imagine.errors import ConfigError
from imagine.ip_adapter.reading import import_adapter, read_ip_adapter
from imagine.networks.weights import fingerprint, remove_local_paths
from imagine.planning.bases import AdapterShape, Blueprint, Component
from imagine.records import VISION, Conditioning, Tokens, join
from train.cache.latents import squared_error
from train.cache.pictures import AnyGallery, AnyPictures
from train.data.denoiser_inputs import GalleryCache, cache_gallery, references
from train.data.language import parameters
from train.data.order import chance, normals, to_device, uniforms
from train.data.portraits import check_sources, data_settings, gallery_folder, pictures_of
from train.data.public_base import BaseCodec, BaseTextEncoders, T5TextEncoder, load_vision, open_base, time_ids
from train.data.sources import DrawnPairs, Mixture, in_order
from train.data.text_states import TextStates
from train.run.grids import save_grid
from train.task import Loss, Share, TaskContext, Weight
from train.tasks.base import VALIDATION_SEED, Gamma, check_lora, images_without_effect

_PLUS_HEAD = 64  # width of a plus projection's heads
_TOKENS = {"t5": 256, "byt5": 128}  # kept of a caption


class DiffusersSettings(BaseModel):
    """The base, what the adapter is built of and begins with, and how it is fed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: str  # the folder of a pipeline in diffusers' layout, or a hub id
    vision: Path | None = None  # of a VisionEncoder or a CLIPVisionModelWithProjection; none: the base's image_encoder
    t5: Path | None = None  # of a T5 encoder with its tokenizer; none: no such branch
    byt5: Path | None = None
    ip_adapter: Path | None = None  # a Plus or Full file that the vision branch begins with
    projection: Literal["full", "plus"] | None = None  # without such a file; full
    zero_init: bool | None = None  # likewise: the vision branch begins as nothing (paper, section 3.4.1); true
    lora_rank: Annotated[int, Field(ge=0)] = 64  # 0: no LoRA
    lora_targets: tuple[LoraTarget, ...] = LORA_TARGETS
    resolution: Annotated[int, Field(ge=8)] = 512  # pixels
    sources: dict[str, float] = {"real": 1.0}
    alternate: Annotated[int, Field(ge=1)] = 1  # images in a row from one source
    drop_text: Share = 0.1  # share of images that no text branch is told anything of, for guidance
    drop_clip: Share = 0.0  # and of those that one branch alone misses
    drop_t5: Share = 0.0
    drop_byt5: Share = 0.0
    drop_vision: Share = 0.1  # share of images that are shown nobody
    face_weight: Weight = 1.0  # how much more the loss counts inside the face's box
    min_snr_gamma: Gamma | None = None  # weigh errors by min-SNR (arXiv 2303.09556), with this gamma
    gradient_checkpointing: bool = False  # denoiser and vision encoder are computed twice, in far less memory
    base_precision: Literal["fp32", "bf16"] = "fp32"  # of the frozen denoiser's weights
    held_out: str | None = None  # a source to validate on; none: pictures that it trains on
    validation_images: Annotated[int, Field(ge=2)] = 32
    drawings: Annotated[int, Field(ge=0)] = 4  # pictures drawn at every validation
    drawing_steps: Annotated[int, Field(ge=1)] = 30
    drawing_guidance: float = 5.0
    licence: str = "unspecified"  # what the exported adapter says of itself

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, given: Any) -> Any:
        """Without a file to begin with, the vision branch is the paper's unless something else is said."""
        if not isinstance(given, dict) or given.get("ip_adapter") is not None:
            return given
        said = {name: value for name, value in given.items() if value is not None}
        return {"projection": "full", "zero_init": True, **said}

    @model_validator(mode="after")
    def _has_an_effect(self) -> "DiffusersSettings":
        check_lora(self.lora_rank, self.lora_targets)
        for name, branch, share in (("t5", self.t5, self.drop_t5), ("byt5", self.byt5, self.drop_byt5)):
            if share and branch is None:
                raise ValueError(f"drop_{name} has no effect without {name}: leave it out, or name the encoder")
        for name, value in (("projection", self.projection), ("zero_init", self.zero_init)):
            if value is not None and self.ip_adapter is not None:
                raise ValueError(f"{name} has no effect beside ip_adapter, which brings its own: leave it out")
        return self


@dataclass(frozen=True)
class DiffusersBatch:
    """Clean latents, what describes them, and the references they should resemble."""

    latents: Tensor  # (B, C, h, w), scaled as the base wants them
    states: dict[str, Tokens]  # "clip", "pooled" in SDXL, "t5", "byt5"
    sizes: Tensor  # (B, 6) height and width of the picture, top and left cut off, height and width wanted
    faces: Tensor  # (B, 1, h, w) 1 where the face is, 0 elsewhere
    crops: Tensor  # (B, 3, S, S) of the reference
    strength: Tensor  # (B,) 0 where the reference is dropped


class DiffusersTask:
    """The base as others trained it, with a vision branch that learns to carry a face into its pictures."""

    Settings: ClassVar[type[BaseModel]] = DiffusersSettings
    PARTS: ClassVar[tuple[str, ...]] = (
        "vision_encoder", "vision_branch", "vision_projection", "lora", "t5_branch", "byt5_branch",
    )  # fmt: skip

    def __init__(self, settings: DiffusersSettings, context: TaskContext) -> None:
        self.settings, self.context = settings, context
        self.base = open_base(settings.base, shapes_only=context.device.type == "meta")
        self.schedule = self.base.schedule
        dtype = torch.bfloat16 if settings.base_precision == "bf16" else torch.float32
        self.unet = self.base.denoiser(context.device, dtype)
        if settings.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.vision = load_vision(settings.vision or self.base.folder / "image_encoder", context.device)
        self.vision.tower.set_grad_checkpointing(settings.gradient_checkpointing)
        self.adapter = self._identity()
        self.adapter.attach(self.unet)
        self.modules: dict[str, nn.Module] = {
            "unet": self.unet, "image_encoder": self.vision, "adapter": self.adapter,
        }  # fmt: skip
        self.text_encoders = self._text_encoders()
        self.text_adapter: Adapter | None = None
        if len(self.text_encoders) > 1:
            specs = [
                BranchSpec(text_encoder.name, text_encoder.width)
                for text_encoder in self.text_encoders
                if isinstance(text_encoder, T5TextEncoder)
            ]
            self.text_adapter = self.modules["text_adapter"] = Adapter(self.unet, specs)
            self.text_adapter.attach(self.unet)

    def _identity(self) -> Adapter:
        """The vision branch with its projection and LoRA, from an IP-Adapter's file if there is one."""
        settings, width = self.settings, int(self.unet.config.cross_attention_dim)
        vision_width = int(self.vision.config.width)
        inner = (
            max(_PLUS_HEAD, min(width, vision_width) // _PLUS_HEAD * _PLUS_HEAD)
            if settings.projection == "plus"
            else None
        )
        spec = BranchSpec(
            VISION, width, 1.0, settings.zero_init is not False, settings.projection or "full", vision_width,
            inner_width=inner,
        )  # fmt: skip
        initial_tensors: dict[str, Tensor] = {}
        if settings.ip_adapter is not None:
            imported = import_adapter(read_ip_adapter(settings.ip_adapter), self.unet)[0]
            (given,) = imported.branch_specs
            if given.projection == "linear" or given.input_width != vision_width:
                raise ConfigError(
                    f"{settings.ip_adapter} reads {given.input_width} numbers of its own encoder's "
                    f"{'embedding' if given.projection == 'linear' else 'tokens'}, the vision encoder here gives "
                    f"tokens of {vision_width}: take a Plus or Full file, and the image_encoder that belongs to it."
                )
            # Where nobody is shown, the branch is off from now on: that is how it trains here.
            spec, initial_tensors = replace(given, absent="off"), imported.state_dict()
        adapter = Adapter(self.unet, [spec], settings.lora_rank, settings.lora_targets)
        if initial_tensors and self.context.device.type != "meta":
            adapter.load_state_dict({**adapter.state_dict(), **initial_tensors})
        return adapter

    def _text_encoders(self) -> "list[BaseTextEncoders | T5TextEncoder]":
        given = {"t5": self.settings.t5, "byt5": self.settings.byt5}
        device = self.context.device
        further = [T5TextEncoder(name, path, _TOKENS[name], device) for name, path in given.items() if path is not None]
        return [BaseTextEncoders(self.base, device), *further]

    def parts(self) -> dict[str, list[nn.Parameter]]:
        text = {} if self.text_adapter is None else self.text_adapter.parts()
        absent: dict[str, list[nn.Parameter]] = {name: [] for name in self.PARTS}
        return {**absent, "vision_encoder": parameters(self.vision), **self.adapter.parts(), **text}

    def blueprint(self) -> Blueprint:
        """The networks that a step computes, as a plan of its memory and arithmetic wants them."""
        networks = {
            "unet": ("UNet2DConditionModel", self.base.config("unet")),
            "vae": ("AutoencoderKL", self.base.config("vae")),
            "vision_encoder": ("VisionEncoder", dict(self.vision.config)),
        }
        identity = AdapterShape(self.adapter.branch_specs, self.settings.lora_rank, self.settings.lora_targets)
        text = {} if self.text_adapter is None else {"text_adapter": AdapterShape(self.text_adapter.branch_specs)}
        components = {name: Component(kind, _plain(config)) for name, (kind, config) in networks.items()}
        return Blueprint(self.base.kind, components, {**text, "adapter": identity})

    # --- what is made once and kept ---------------------------------------------------------------------------------

    def check(self) -> list[str]:
        check_sources(self.context.data, self.settings.sources)
        if self.settings.held_out is not None:
            check_sources(self.context.data, {self.settings.held_out: 1.0})
        BaseCodec(self.base, self.context.device).shape(self.settings.resolution)
        return images_without_effect(self.context, self.settings.drop_vision)

    def prepare(self) -> None:
        data = data_settings(self.context.data)
        validation_sources = [self.settings.held_out] if self.settings.held_out else []
        names_in_use = [*self.settings.sources, *validation_sources]
        names = sorted({data.sources[name].gallery for name in names_in_use if name in data.sources})
        side = self.settings.resolution
        pictures = {name: pictures_of(self.context.data, name, side) for name in names}
        galleries = {name: some.gallery for name, some in pictures.items()}
        self._build_mixtures(galleries)
        self.codec = BaseCodec(self.base, self.context.device)
        self.gallery_caches = {name: self._cache_gallery(some, name) for name, some in pictures.items()}
        self._build_mixtures(galleries)  # once more: a record may have broken since its face was looked for
        for mixture in (self.mixture, self.validation_sources):
            for source, pairs in zip(mixture.sources, mixture.pairs, strict=True):
                caption_styles = [caption_style for caption_style, weight in source.captions.items() if weight > 0]
                self.gallery_caches[source.gallery].sentences.read(pairs[:, 1].unique(), caption_styles)
        self.codec.free()

    def _build_mixtures(self, galleries: Mapping[str, AnyGallery]) -> None:
        """What is drawn from, to train and to validate."""
        sources, settings, own = data_settings(self.context.data).sources, self.settings, self.context.own_counts
        self.mixture = Mixture(settings.sources, sources, galleries, settings.alternate, own)
        # A validation never trains, so what it draws may be drawn from the same sources with another seed.
        validation_sources = settings.sources if settings.held_out is None else {settings.held_out: 1.0}
        self.validation_sources = Mixture(validation_sources, sources, galleries, own_counts=own)

    def _cache_gallery(self, pictures: AnyPictures, name: str) -> GalleryCache[TextStates]:
        folder = gallery_folder(self.context.data, name, self.settings.resolution)
        crop = int(self.vision.config.image_size)
        states = TextStates(pictures.gallery, self.text_encoders, folder)
        return cache_gallery(pictures, self.codec, states, folder, crop_side=crop)

    # --- what a step sees -------------------------------------------------------------------------------------------

    def batch(self, images_seen: int, size: int) -> DiffusersBatch:
        seed, settings = self.context.seed, self.settings
        without_text = chance(seed, "drop", images_seen, size, settings.drop_text)
        shares = {"clip": settings.drop_clip, "t5": settings.drop_t5, "byt5": settings.drop_byt5}
        dropped = {
            name: without_text | chance(seed, f"drop {name}", images_seen, size, rate) for name, rate in shares.items()
        }
        strength = 1 - chance(seed, "drop vision", images_seen, size, settings.drop_vision).float()
        return self._batch(self.mixture.draw(seed, images_seen, size), images_seen, dropped, strength)

    def _batch(self, drawn: DrawnPairs, first: int, dropped: Mapping[str, Tensor], strength: Tensor) -> DiffusersBatch:
        """What was drawn, with nothing said of the images in `dropped`, and people of this strength."""
        dropped = {**dropped, "pooled": dropped["clip"]}
        positions, latents, sizes, faces, states = [], [], [], [], []
        for name, here in drawn.by_gallery().items():
            gallery_cache, rows, caption_styles = (
                self.gallery_caches[name],
                drawn.targets[here],
                [drawn.caption_styles[i] for i in here.tolist()],
            )
            positions.append(here)
            latents.append(gallery_cache.latents.take(rows))
            sizes.append(time_ids(gallery_cache.pictures.frames(rows), self.settings.resolution))
            faces.append(gallery_cache.faces(rows))
            states.append(
                gallery_cache.sentences.take(
                    rows, caption_styles, {n: without_text[here] for n, without_text in dropped.items()}
                )
            )
        shifts = uniforms(self.context.seed, "crops", first, len(strength), (2,))
        return DiffusersBatch(
            in_order(positions, latents),
            {name: _in_order(positions, [each[name] for each in states]) for name in states[0]},
            in_order(positions, sizes),
            in_order(positions, faces),
            references(self.gallery_caches, drawn, shifts),
            strength,
        )

    # --- what is learnt ---------------------------------------------------------------------------------------------

    def predict(
        self, noisy: Tensor, steps: Tensor, batch: DiffusersBatch, vision: Tokens, strength: Tensor | None = None
    ) -> Tensor:
        """What the denoiser says of noisy latents (B, C, h, w) at steps (B,) of its schedule, people that strong."""
        dtype = self.unet.dtype
        added = None
        if self.base.xl:
            added = {"text_embeds": batch.states["pooled"].values[:, 0].to(dtype), "time_ids": batch.sizes}
        further = {name: tokens for name, tokens in batch.states.items() if name in _TOKENS}
        conditioning = Conditioning(
            {**further, VISION: vision}, {VISION: batch.strength if strength is None else strength}
        )
        prediction: Tensor = self.unet(
            noisy.to(dtype), steps, encoder_hidden_states=batch.states["clip"].values.to(dtype),
            added_cond_kwargs=added, cross_attention_kwargs={"conditioning": conditioning},
        ).sample  # fmt: skip
        return prediction

    def vision_tokens(self, crops: Tensor) -> Tokens:
        return self.adapter.tokens(VISION, self.vision(crops))

    def noise(self, latents: Tensor, seed: int, images_seen: int) -> tuple[Tensor, Tensor]:
        """Noise like the latents, and steps of the schedule (B,): of each image number its own."""
        count, device = len(latents), latents.device
        noise = normals(seed, "noise", images_seen, count, latents.shape[1:], device)
        share = uniforms(seed, "times", images_seen, count, device=device)
        return noise, (share * self.schedule.config.num_train_timesteps).long()

    def errors(self, batch: DiffusersBatch, vision: Tokens, noise: Tensor, steps: Tensor) -> Tensor:
        """Squared error (B,) of what the base predicts, weighted towards the face."""
        noisy = self.schedule.add_noise(batch.latents, noise, steps)
        target = self.schedule.get_velocity(batch.latents, noise, steps) if self._predicts_velocity else noise
        prediction = self.predict(noisy, steps, batch, vision)
        return squared_error(prediction, target, 1 + (self.settings.face_weight - 1) * batch.faces)

    @property
    def _predicts_velocity(self) -> bool:
        return bool(self.schedule.config.prediction_type == "v_prediction")

    def loss_weights(self, steps: Tensor) -> Tensor:
        """How much an error at these steps counts, (B,): min-SNR, in terms of what is predicted."""
        from diffusers.training_utils import compute_snr

        if self.settings.min_snr_gamma is None:
            return torch.ones_like(steps, dtype=torch.float32)
        snr = compute_snr(self.schedule, steps)
        least = snr.clamp(max=self.settings.min_snr_gamma)
        return least / (snr + 1) if self._predicts_velocity else (self.settings.min_snr_gamma / snr).clamp(max=1)

    def loss(self, batch: DiffusersBatch, images_seen: int) -> Loss:
        if self.unet.dtype != torch.float32 and not torch.is_autocast_enabled(batch.latents.device.type):
            raise ConfigError(
                f"Stage {self.context.name} has base_precision bf16 but computes in fp32: set its precision to bf16."
            )
        noise, steps = self.noise(batch.latents, self.context.seed, images_seen)
        errors = self.errors(batch, self.vision_tokens(batch.crops), noise, steps)
        return Loss(errors * self.loss_weights(steps), {"error": errors.mean()})

    # --- what people look at ----------------------------------------------------------------------------------------

    def show(self, batch: DiffusersBatch, path: Path) -> None:
        """Each reference, as the vision encoder sees it, with its target to the right."""
        self._sheet(path, [batch.crops, self.codec.decode(batch.latents)], columns=4)

    def _sheet(self, path: Path, kinds: Sequence[Tensor], columns: int) -> None:
        """Pictures of several kinds side by side, `columns` items a row."""
        self.codec.free()
        side = min(256, self.settings.resolution)
        scaled = [F.interpolate(pictures.cpu(), size=(side, side), mode="area") for pictures in kinds]
        save_grid(torch.stack(scaled, 1).flatten(0, 1), path, columns=columns * len(kinds))

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        """Errors with each reference, and with another's; some people drawn."""
        count = self.settings.validation_images
        right, wrong = torch.zeros(count), torch.zeros(count)
        # About four at a time and never one alone, which would have nobody else's reference.
        for numbers in torch.arange(count).tensor_split(-(-count // 4)):
            first = int(numbers[0])
            batch = self._validation_batch(first, len(numbers))
            noise, steps = self.noise(batch.latents, VALIDATION_SEED, first)
            seen = self.vision_tokens(batch.crops)
            here = slice(first, first + len(steps))
            right[here] = self.errors(batch, seen, noise, steps).cpu()
            wrong[here] = self.errors(batch, Tokens(seen.values.roll(1, 0)), noise, steps).cpu()
        if self.settings.drawings:
            self._draw(self._validation_batch(0, min(self.settings.drawings, count)), folder / "pictures.png")
        mean, other = float(right.mean()), float(wrong.mean())
        return {"validation_loss": mean, "shuffled_references": other, "reference_ratio": other / mean}

    def _validation_batch(self, first: int, size: int) -> DiffusersBatch:
        drawn = self.validation_sources.draw(VALIDATION_SEED, first, size)
        branches = {name: torch.zeros(size, dtype=torch.bool) for name in ("clip", "t5", "byt5")}
        return to_device(self._batch(drawn, first, branches, torch.ones(size)), self.context.device)

    def _draw(self, batch: DiffusersBatch, path: Path) -> None:
        """Each reference, its target, and what the captions give with the reference and without."""
        from diffusers import DDIMScheduler

        count = len(batch.latents)
        sampler = DDIMScheduler.from_config(self.schedule.config, clip_sample=False)
        sampler.set_timesteps(self.settings.drawing_steps, device=self.context.device)
        empty_sentences = to_device(
            next(iter(self.gallery_caches.values())).sentences.empty_sentences(count), self.context.device
        )
        without_text, vision = replace(batch, states=empty_sentences), self.vision_tokens(batch.crops)
        kinds = [batch.crops, self.codec.decode(batch.latents)]
        for strength in (torch.ones_like(batch.strength), torch.zeros_like(batch.strength)):
            noise, _ = self.noise(batch.latents, VALIDATION_SEED, 0)
            latents = noise * sampler.init_noise_sigma
            for step in sampler.timesteps:
                steps = step.expand(count)
                said = self.predict(latents, steps, batch, vision, strength).float()
                unconditional = self.predict(latents, steps, without_text, vision, torch.zeros_like(strength)).float()
                prediction = unconditional + self.settings.drawing_guidance * (said - unconditional)
                latents = sampler.step(prediction, step, latents).prev_sample
            kinds.append(self.codec.decode(latents))
        self._sheet(path, kinds, columns=1)

    def export(self, folder: Path) -> None:
        """The vision encoder as it is now, and the adapters: what a pipeline around the same base loads."""
        self.vision.save_pretrained(folder / "image_encoder")
        remove_local_paths(folder)
        facts = {
            "base": self.base.kind, "base_name": self.base.folder.resolve().name, "licence": self.settings.licence,
            "encoder": f"ViT of width {self.vision.config.width}, {self.vision.config.image_size} px, "
            f"patch {self.vision.config.patch_size}, trained on",
            "feature_layer": "penultimate", "encoder_fingerprint": fingerprint(self.vision),
        }  # fmt: skip
        (spec,) = self.adapter.branch_specs
        self.adapter.save(folder / "adapter", {**facts, "tokens": str(spec.tokens or self.vision.tokens)})
        if self.text_adapter is not None:
            branches = {name: _TOKENS[name] for name in ("t5", "byt5") if getattr(self.settings, name) is not None}
            tokens = ", ".join(f"{count} {name}" for name, count in branches.items())
            self.text_adapter.save(folder / "text_adapter", {**facts, "tokens": tokens})


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of its network, not of where it came from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _in_order(positions: Sequence[Tensor], pieces: Sequence[Tokens]) -> Tokens:
    """Tokens put where `positions` say, the shorter ones padded."""
    if len(pieces) == 1:
        return pieces[0]
    order, joined = torch.cat(list(positions)).argsort(), join(list(pieces))
    return Tokens(joined.values[order], None if joined.mask is None else joined.mask[order])
