"""Train the identity adapter on a public base: a frozen U-Net or diffusion transformer with our adapter attached.

It trains on real singles, pairs and pictures of several people, like the portrait world's adapter
(`train.tasks.adapter`). The base determines the rest (`train.bases`): what it predicts, how its latents are noised and
normalised, and the states of its text encoders. On Stable Diffusion 1.5 and XL, T5 and ByT5 may be branches of a second
adapter whose output starts at zero.

Latents, face crops and text states come from the cache. Autoencoder and text encoders are freed before the first step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from imagine.adapter.adapter import LORA_TARGETS, Adapter, BranchSpec, LoraTarget
from imagine.blueprints.blueprint import AdapterShape, Blueprint, Component
from imagine.errors import ConfigError
from imagine.networks.weights import fingerprint, remove_local_paths
from imagine.records import VISION, Conditioning, Tokens, join
from train.bases.base_lora import NAME as BASE_LORA
from train.bases.base_lora import BaseLora
from train.bases.contract import PublicBase, TransformerSettings
from train.bases.opening import open_public_base
from train.bases.stable_diffusion import READERS
from train.bases.transformer import Transformer
from train.cache.latents import squared_error
from train.cache.pictures import AnyGallery, AnyPictures
from train.data.denoiser_inputs import GalleryCache, cache_gallery, references
from train.data.language import parameters
from train.data.order import chance, normals, to_device, uniforms
from train.data.portraits import check_sources, data_settings, gallery_folder, pictures_of
from train.data.public_base import T5TextEncoder, load_vision, time_ids
from train.data.sources import DrawnPairs, Mixture, in_order
from train.data.text_states import FrozenTextEncoder, TextStates
from train.run.grids import save_grid
from train.task import Loss, Share, TaskContext, Weight
from train.tasks.base import VALIDATION_SEED, Gamma, check_lora, images_without_effect
from train.tasks.diffusers_identity import check_for_transformer, identity_adapter
from train.tasks.diffusers_inputs import DiffusersBatch, GroupInputs, side_by_side
from train.tasks.groups import GroupBlocks, People, check_group_settings
from train.tasks.people_loss import router_iou, router_loss

Record = dict[str, list[Tensor]]
LORA_FOLDER = "lora"  # in an export
_TOKENS = {"t5": 256, "byt5": 128}  # highest number of tokens per caption


class DiffusersSettings(BaseModel):
    """Settings of the base, of the adapter and its initial weights, and of the training."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: str  # folder of a pipeline in diffusers' layout, or a hub id
    transformer: TransformerSettings | None = None  # settings of a base with a diffusion transformer
    # folder of a VisionEncoder or a CLIPVisionModelWithProjection; None: the base's image_encoder
    vision: Path | None = None
    t5: Path | None = None  # folder of a T5 encoder with its tokenizer; None: no T5 branch
    byt5: Path | None = None  # folder of a ByT5 encoder with its tokenizer; None: no ByT5 branch
    ip_adapter: Path | None = None  # IP-Adapter Plus or Full file with the initial weights of the vision branch
    projection: Literal["full", "plus"] | None = None  # without ip_adapter; default: full
    # without ip_adapter: the output of the vision branch starts at zero (paper, section 3.4.1); default: true
    zero_init: bool | None = None
    lora_rank: Annotated[int, Field(ge=0)] = 64  # 0: no LoRA
    lora_targets: tuple[LoraTarget, ...] = LORA_TARGETS
    resolution: Annotated[int, Field(ge=8)] = 512  # pixels
    sources: dict[str, float] = {"real": 1.0}
    alternate: Annotated[int, Field(ge=1)] = 1  # consecutive images from one source
    drop_text: Share = 0.1  # share of images for which every text branch reads an empty sentence, for guidance
    drop_clip: Share = 0.0  # share of images for which this branch alone reads an empty sentence
    drop_t5: Share = 0.0
    drop_byt5: Share = 0.0
    drop_vision: Share = 0.1  # share of images trained without their reference, for guidance
    face_weight: Weight = 1.0  # loss weight inside the face's box; 1 elsewhere
    min_snr_gamma: Gamma | None = None  # the gamma of min-SNR loss weights (arXiv 2303.09556)
    # compute denoiser and vision encoder again in the backward pass, which needs far less memory
    gradient_checkpointing: bool = False
    base_precision: Literal["fp32", "bf16"] = "fp32"  # of the frozen denoiser's weights
    # share of the blocks of images that show several people, by group of records in the run's data.groups
    groups: dict[str, Share] = {}
    group_block: Annotated[int, Field(ge=1)] = 64  # consecutive images with equally many people: the batch size
    router: Weight = 0.3  # weight of the routers' loss, in images of several people
    people: People = "router"  # or one softmax for all people, the paper's form (section 3.6)
    drop_person: Share = 0.0  # share of the people, in images of several, who are trained without their reference
    held_out: str | None = None  # source to validate on; None: validate on pictures of the training sources
    validation_images: Annotated[int, Field(ge=2)] = 32
    drawings: Annotated[int, Field(ge=0)] = 4  # pictures drawn at every validation
    drawing_steps: Annotated[int, Field(ge=1)] = 30
    drawing_guidance: float = 5.0
    licence: str = "unspecified"  # licence in the metadata of the exported adapter

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, given: Any) -> Any:
        """Without an IP-Adapter file, default to the paper's vision branch: full projection, initialised to zero."""
        if not isinstance(given, dict) or given.get("ip_adapter") is not None:
            return given
        explicit = {name: value for name, value in given.items() if value is not None}
        return {"projection": "full", "zero_init": True, **explicit}

    @model_validator(mode="after")
    def _has_an_effect(self) -> "DiffusersSettings":
        check_lora(self.lora_rank, self.lora_targets)
        check_group_settings(self.groups, self.people)
        if self.drop_person and not self.groups:
            raise ValueError("drop_person has no effect without groups: name some, or leave it out")
        for name, branch, share in (("t5", self.t5, self.drop_t5), ("byt5", self.byt5, self.drop_byt5)):
            if share and branch is None:
                raise ValueError(f"drop_{name} has no effect without {name}: remove drop_{name}, or set {name}")
        for name, value in (("projection", self.projection), ("zero_init", self.zero_init)):
            if value is not None and self.ip_adapter is not None:
                raise ValueError(f"{name} has no effect beside ip_adapter, whose file determines it: remove {name}")
        return self


class DiffusersTask:
    """Train a vision branch that adds a person's identity to the pictures of a public base."""

    Settings: ClassVar[type[BaseModel]] = DiffusersSettings
    PARTS: ClassVar[tuple[str, ...]] = (
        "vision_encoder", "vision_branch", "vision_router", "vision_projection", "lora", BASE_LORA, "t5_branch",
        "byt5_branch",
    )  # fmt: skip

    def __init__(self, settings: DiffusersSettings, context: TaskContext) -> None:
        self.settings, self.context = settings, context
        self.base: PublicBase = open_public_base(settings.base, settings.transformer, context.device.type == "meta")
        if isinstance(self.base, Transformer):
            check_for_transformer(settings, self.base.kind)
        dtype = torch.bfloat16 if settings.base_precision == "bf16" else torch.float32
        self.denoiser: Any = self.base.denoiser(context.device, dtype)
        if settings.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.vision = load_vision(settings.vision or self.base.folder / "image_encoder", context.device)
        self.vision.tower.set_grad_checkpointing(settings.gradient_checkpointing)
        self.adapter = identity_adapter(settings, self.base, self.denoiser, int(self.vision.config.width))
        self.adapter.attach(self.denoiser)
        self.modules: dict[str, nn.Module] = {
            self.base.denoiser_name: self.denoiser, "image_encoder": self.vision, "adapter": self.adapter,
        }  # fmt: skip
        self.base_lora = self._base_lora()
        self.text_encoders = self._text_encoders()
        self.blocks = GroupBlocks(settings.groups, settings.group_block)
        self.text_adapter: Adapter | None = None
        if len(self.text_encoders) > 1:
            specs = [
                BranchSpec(text_encoder.name, text_encoder.width)
                for text_encoder in self.text_encoders
                if isinstance(text_encoder, T5TextEncoder)
            ]
            self.text_adapter = self.modules["text_adapter"] = Adapter(self.denoiser, specs)
            self.text_adapter.attach(self.denoiser)

    def _base_lora(self) -> BaseLora | None:
        """Put LoRA on a transformer's layers; a U-Net's LoRA belongs to the adapter."""
        if not isinstance(self.base, Transformer) or not self.settings.lora_rank:
            return None
        lora = BaseLora(self.denoiser, self.settings.lora_rank, self.base.flow.lora)
        self.modules[BASE_LORA] = lora
        return lora

    def _text_encoders(self) -> list[FrozenTextEncoder]:
        given = {"t5": self.settings.t5, "byt5": self.settings.byt5}
        device = self.context.device
        further = [T5TextEncoder(name, path, _TOKENS[name], device) for name, path in given.items() if path is not None]
        return [self.base.text_encoders(device), *further]

    def parts(self) -> dict[str, list[nn.Parameter]]:
        text = {} if self.text_adapter is None else self.text_adapter.parts()
        lora = {} if self.base_lora is None else {BASE_LORA: parameters(self.base_lora)}
        absent: dict[str, list[nn.Parameter]] = {name: [] for name in self.PARTS}
        return {**absent, "vision_encoder": parameters(self.vision), **self.adapter.parts(), **lora, **text}

    def compile(self) -> None:
        """Compile the networks; of a transformer its repeated blocks, since the hooks around it do not compile."""
        for name, module in self.modules.items():
            if name == "transformer":
                self.denoiser.compile_repeated_blocks()
            else:
                module.compile()

    def blueprint(self) -> Blueprint:
        """Return the networks that a step computes, for planning its memory and operations."""
        networks = self.base.networks()
        networks["vision_encoder"] = Component("VisionEncoder", dict(self.vision.config))
        components = {name: Component(each.kind, _plain(each.config)) for name, each in networks.items()}
        identity = AdapterShape(self.adapter.branch_specs, self.settings.lora_rank, self.settings.lora_targets)
        if isinstance(self.base, Transformer):
            sizes = self.base.settings
            identity = replace(
                identity, lora_targets=self.base.flow.lora, heads=sizes.branch_heads, every=sizes.branch_every
            )
        text = {} if self.text_adapter is None else {"text_adapter": AdapterShape(self.text_adapter.branch_specs)}
        return Blueprint(self.base.kind, components, {**text, "adapter": identity})

    @property
    def most_text_tokens(self) -> int:
        """The most tokens of the base's own text that the denoiser sees."""
        return max(count for count, _ in self.text_encoders[0].shapes.values())

    # --- caches -----------------------------------------------------------------------------------------------------

    def check(self) -> list[str]:
        check_sources(self.context.data, self.settings.sources)
        if self.settings.held_out is not None:
            check_sources(self.context.data, {self.settings.held_out: 1.0})
        self.base.codec(self.context.device).shape(self.settings.resolution)
        for name in self.settings.groups:
            data_settings(self.context.data).group_records(name)
        warnings = images_without_effect(self.context, self.settings.drop_vision)
        return [*warnings, *self._router_without_training()]

    def _router_without_training(self) -> list[str]:
        """Return a warning if pictures of several people are trained on, but the routers are not."""
        shown = self.settings.people == "router" and any(self.settings.groups.values())
        if not shown or not self.context.trains or "vision_router" in self.context.trains:
            return []
        return ["groups: the part vision_router does not train, so the routers stay as they are; add it to `train`."]

    def prepare(self) -> None:
        data = data_settings(self.context.data)
        validation_sources = [self.settings.held_out] if self.settings.held_out else []
        names_in_use = [*self.settings.sources, *validation_sources]
        names = sorted({data.sources[name].gallery for name in names_in_use if name in data.sources})
        side = self.settings.resolution
        pictures = {name: pictures_of(self.context.data, name, side) for name in names}
        galleries = {name: some.gallery for name, some in pictures.items()}
        self._build_mixtures(galleries)
        self.codec = self.base.codec(self.context.device)
        self.gallery_caches = {name: self._cache_gallery(some, name) for name, some in pictures.items()}
        # Built again, because a record that became unreadable while it was cached must not be drawn.
        self._build_mixtures(galleries)
        for mixture in (self.mixture, self.validation_sources):
            for source, pairs in zip(mixture.sources, mixture.pairs, strict=True):
                caption_styles = [caption_style for caption_style, weight in source.captions.items() if weight > 0]
                self.gallery_caches[source.gallery].sentences.read(pairs[:, 1].unique(), caption_styles)
        self.groups = {name: self._cache_group(name) for name in self.settings.groups}
        self.codec.free()

    def _cache_group(self, name: str) -> GroupInputs:
        side, crop = self.settings.resolution, int(self.vision.config.image_size)
        folder = gallery_folder(self.context.data, f"group-{name}", side)
        return GroupInputs.open(self.context.data, name, side, folder, self.codec, crop, self.text_encoders)

    def _build_mixtures(self, galleries: Mapping[str, AnyGallery]) -> None:
        """Build the mixtures of sources that training and validation draw from."""
        sources, settings, own = data_settings(self.context.data).sources, self.settings, self.context.own_counts
        self.mixture = Mixture(settings.sources, sources, galleries, settings.alternate, own)
        # Without a held-out source, validation draws from the training sources with a different seed.
        validation_sources = settings.sources if settings.held_out is None else {settings.held_out: 1.0}
        self.validation_sources = Mixture(validation_sources, sources, galleries, own_counts=own)

    def _cache_gallery(self, pictures: AnyPictures, name: str) -> GalleryCache[TextStates]:
        folder = gallery_folder(self.context.data, name, self.settings.resolution)
        crop = int(self.vision.config.image_size)
        states = TextStates(pictures.gallery, self.text_encoders, folder)
        return cache_gallery(pictures, self.codec, states, folder, crop_side=crop)

    # --- batches ----------------------------------------------------------------------------------------------------

    def batch(self, images_seen: int, size: int) -> DiffusersBatch:
        seed, settings = self.context.seed, self.settings
        strength = 1 - chance(seed, "drop vision", images_seen, size, settings.drop_vision).float()
        dropped = self._dropped_text(images_seen, size)
        if (group := self.blocks.gallery_of(images_seen, size)) is not None:
            drawn = self.groups[group].draw(seed, images_seen, size)
            return self.groups[group].batch(drawn, seed, images_seen, dropped, strength, settings.drop_person)
        return self._batch(self.mixture.draw(seed, images_seen, size), images_seen, dropped, strength)

    def _dropped_text(self, images_seen: int, size: int) -> dict[str, Tensor]:
        """Return for each text branch the images (B,) whose caption it drops."""
        seed, settings = self.context.seed, self.settings
        without_text = chance(seed, "drop", images_seen, size, settings.drop_text)
        shares = {"clip": settings.drop_clip, "t5": settings.drop_t5, "byt5": settings.drop_byt5}
        dropped = {
            name: without_text | chance(seed, f"drop {name}", images_seen, size, rate) for name, rate in shares.items()
        }
        return {**dropped, "pooled": dropped["clip"], "text": dropped["clip"]}

    def _batch(self, drawn: DrawnPairs, first: int, dropped: Mapping[str, Tensor], strength: Tensor) -> DiffusersBatch:
        """Return the batch of the drawn pairs; `dropped` holds for each text branch the images whose caption it drops.

        `first` is the number of the batch's first image. `strength` (B,) is 0 where the reference is dropped.
        """
        side = self.settings.resolution
        positions, latents, sizes, faces, states = [], [], [], [], []
        for name, here in drawn.by_gallery().items():
            gallery_cache, rows = self.gallery_caches[name], drawn.targets[here]
            caption_styles = [drawn.caption_styles[i] for i in here.tolist()]
            positions.append(here)
            latents.append(gallery_cache.latents.take(rows))
            sizes.append(time_ids(gallery_cache.pictures.frames(rows), (side, side)))
            faces.append(gallery_cache.faces(rows))
            states.append(
                gallery_cache.sentences.take(
                    rows, caption_styles, {branch: mask[here] for branch, mask in dropped.items()}
                )
            )
        shifts = uniforms(self.context.seed, "crops", first, len(strength), (2,))
        return DiffusersBatch(
            in_order(positions, latents),
            {name: _in_order(positions, [each[name] for each in states]) for name in states[0]},
            in_order(positions, sizes),
            in_order(positions, faces),
            references(self.gallery_caches, drawn, shifts).unsqueeze(1),
            strength,
        )

    # --- predictions and losses -------------------------------------------------------------------------------------

    def predict(
        self, noisy: Tensor, times: Tensor, batch: DiffusersBatch, vision: Tokens, strength: Tensor | None = None,
        record: Record | None = None, guidance: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the denoiser's prediction for noisy latents (B, C, h, w) at times (B,) in the base's unit.

        `strength` (B,) scales the vision branch; None: the batch's own. With `record`, it collects the decisions of the
        routers (`Conditioning.record`). `guidance` is for bases with an embedding for it.
        """
        further = {name: tokens for name, tokens in batch.states.items() if name in READERS}
        scales = {VISION: batch.strength if strength is None else strength}
        groups = {} if batch.people is None else {VISION: batch.people.present}
        conditioning = Conditioning({**further, VISION: vision}, scales, groups=groups, record=record)
        return self.base.predict(self.denoiser, noisy, times, batch.states, batch.sizes, conditioning, guidance)

    def vision_tokens(self, batch: DiffusersBatch) -> Tokens:
        """Return the vision tokens of a batch's face crops: those of all people of a picture, in order.

        The tokens of people who are dropped are masked.
        """
        tokens = self.adapter.tokens(VISION, self.vision(batch.crops.flatten(0, 1)))
        if batch.people is None:
            return tokens
        values = tokens.values.unflatten(0, batch.crops.shape[:2])
        mask = batch.people.present.repeat_interleave(values.shape[2], 1) if self.settings.drop_person else None
        return Tokens(values.flatten(1, 2), mask)

    def noise(self, latents: Tensor, seed: int, images_seen: int) -> tuple[Tensor, Tensor]:
        """Return noise of the latents' shape, and times (B,); both depend on image numbers alone."""
        noise = normals(seed, "noise", images_seen, len(latents), latents.shape[1:], latents.device)
        return noise, self.base.times(seed, images_seen, latents)

    def errors(
        self, batch: DiffusersBatch, vision: Tokens, noise: Tensor, times: Tensor, record: Record | None = None
    ) -> Tensor:
        """Return the squared error (B,) of the base's prediction, with faces weighted by face_weight."""
        noised = self.base.noised(batch.latents, noise, times)
        prediction = self.predict(noised.noisy, times, batch, vision, record=record)
        return squared_error(prediction, noised.target, 1 + (self.settings.face_weight - 1) * batch.faces)

    def loss_weights(self, times: Tensor) -> Tensor:
        """Return the loss weights (B,) of these times."""
        return self.base.loss_weights(times, self.settings.min_snr_gamma)

    def loss(self, batch: DiffusersBatch, images_seen: int) -> Loss:
        if self.denoiser.dtype != torch.float32 and not torch.is_autocast_enabled(batch.latents.device.type):
            raise ConfigError(
                f"Stage {self.context.name} has base_precision bf16, but computes in fp32: set its precision to bf16."
            )
        noise, times = self.noise(batch.latents, self.context.seed, images_seen)
        if batch.people is None:
            errors = self.errors(batch, self.vision_tokens(batch), noise, times)
            return Loss(errors * self.loss_weights(times), {"error": errors.mean()})
        record: Record = {}
        errors = self.errors(batch, self.vision_tokens(batch), noise, times, record)
        routed = router_loss(record, batch.people.masks, batch.people.known)
        weighted = errors * self.loss_weights(times) + self.settings.router * routed
        return Loss(weighted, {"error of groups": errors.mean(), "router": routed})

    # --- picture grids, validation and export -----------------------------------------------------------------------

    def show(self, batch: DiffusersBatch, path: Path) -> None:
        """Save a grid of the references, as the vision encoder receives them, each with its target on the right."""
        self._sheet(path, [side_by_side(batch.crops), self.codec.decode(batch.latents)], columns=4)

    def _sheet(self, path: Path, kinds: Sequence[Tensor], columns: int) -> None:
        """Save a grid of several kinds of pictures (count, 3, H, W) side by side, with `columns` items per row."""
        self.codec.free()
        side, (height, width) = min(256, self.settings.resolution), kinds[-1].shape[-2:]
        shape = (side, round(side * width / height))
        scaled = [F.interpolate(pictures.cpu(), size=shape, mode="area") for pictures in kinds]
        save_grid(torch.stack(scaled, 1).flatten(0, 1), path, columns=columns * len(kinds))

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        """Return the losses with each person's own reference and with another's, and save some drawn pictures."""
        count = self.settings.validation_images
        right, wrong = torch.zeros(count), torch.zeros(count)
        # About four images at a time, and never one alone, because the wrong references come from the same batch.
        for numbers in torch.arange(count).tensor_split(-(-count // 4)):
            first = int(numbers[0])
            batch = self._validation_batch(first, len(numbers))
            noise, times = self.noise(batch.latents, VALIDATION_SEED, first)
            vision = self.vision_tokens(batch)
            here = slice(first, first + len(times))
            right[here] = self.errors(batch, vision, noise, times).cpu()
            wrong[here] = self.errors(batch, Tokens(vision.values.roll(1, 0)), noise, times).cpu()
        if self.settings.drawings:
            self._draw(self._validation_batch(0, min(self.settings.drawings, count)), folder / "pictures.png")
        mean, other = float(right.mean()), float(wrong.mean())
        results = {"validation_loss": mean, "shuffled_references": other, "reference_ratio": other / mean}
        for name in self.groups:
            results |= self._validate_group(name, folder)
        return results

    def _validate_group(self, name: str, folder: Path) -> dict[str, float]:
        """Return the loss on pictures of several people, how much it rises if two people exchange their references, and
        how well the routers find each person; save some drawn pictures.
        """
        count = min(self.settings.validation_images, len(self.groups[name].cached.rows))
        right, wrong, found = torch.zeros(count), torch.zeros(count), []
        for numbers in torch.arange(count).split(4):
            batch = self._validation_group(name, int(numbers[0]), len(numbers))
            assert batch.people is not None, "a group shows several people"
            noise, times = self.noise(batch.latents, VALIDATION_SEED, int(numbers[0]))
            record: Record = {}
            right[numbers] = self.errors(batch, self.vision_tokens(batch), noise, times, record).cpu()
            exchanged = self.vision_tokens(replace(batch, crops=batch.crops.roll(1, 1)))
            wrong[numbers] = self.errors(batch, exchanged, noise, times).cpu()
            found.append(router_iou(record, batch.people.masks, batch.people.known))
        if self.settings.drawings:
            self._draw(self._validation_group(name, 0, min(self.settings.drawings, count)), folder / f"{name}.png")
        mean, overlaps = float(right.mean()), [value for value in found if not math.isnan(value)]
        results = {f"{name} loss": mean, f"{name} exchanged ratio": float(wrong.mean()) / mean}
        return results | ({f"{name} router iou": sum(overlaps) / len(overlaps)} if overlaps else {})

    def _validation_group(self, name: str, first: int, size: int) -> DiffusersBatch:
        group = self.groups[name]
        drawn = group.draw(VALIDATION_SEED, first, size)
        batch = group.batch(drawn, self.context.seed, first, _none_dropped(size), torch.ones(size))
        return to_device(batch, self.context.device)

    def _validation_batch(self, first: int, size: int) -> DiffusersBatch:
        drawn = self.validation_sources.draw(VALIDATION_SEED, first, size)
        return to_device(self._batch(drawn, first, _none_dropped(size), torch.ones(size)), self.context.device)

    def _draw(self, batch: DiffusersBatch, path: Path) -> None:
        """Save a grid of each reference, its target, and pictures of its caption with and without the reference."""
        count = len(batch.latents)
        empty_sentences = to_device(
            next(iter(self.gallery_caches.values())).sentences.empty_sentences(count), self.context.device
        )
        without_text, vision = replace(batch, states=empty_sentences), self.vision_tokens(batch)
        kinds = [side_by_side(batch.crops), self.codec.decode(batch.latents)]
        scale = self.settings.drawing_guidance
        for strength in (torch.ones_like(batch.strength), torch.zeros_like(batch.strength)):

            def predict(latents: Tensor, times: Tensor, strength: Tensor = strength) -> Tensor:
                conditional = self.predict(latents, times, batch, vision, strength, guidance=scale).float()
                if self.base.distilled:
                    return conditional
                none = torch.zeros_like(strength)
                unconditional = self.predict(latents, times, without_text, vision, none, guidance=scale).float()
                return unconditional + scale * (conditional - unconditional)

            noise, _ = self.noise(batch.latents, VALIDATION_SEED, 0)
            kinds.append(self.codec.decode(self.base.draw(noise, predict, self.settings.drawing_steps)))
        self._sheet(path, kinds, columns=1)

    def export(self, folder: Path) -> None:
        """Write the trained vision encoder and the adapters, which a pipeline around the same base loads."""
        self.vision.save_pretrained(folder / "image_encoder")
        remove_local_paths(folder)
        facts = {
            "base": self.base.kind, "base_name": self.base.folder.resolve().name, "licence": self.settings.licence,
            "encoder": f"ViT of width {self.vision.config.width}, {self.vision.config.image_size} px, "
            f"patch {self.vision.config.patch_size}, trained on",
            "feature_layer": "penultimate", "encoder_fingerprint": fingerprint(self.vision),
        }  # fmt: skip
        if self.groups:
            facts["people"] = str(max(group.cached.gallery.people for group in self.groups.values()))
        (spec,) = self.adapter.branch_specs
        self.adapter.save(folder / "adapter", {**facts, "tokens": str(spec.tokens or self.vision.tokens)})
        if self.base_lora is not None:
            self.base_lora.save(folder / LORA_FOLDER)
        if self.text_adapter is not None:
            branches = {name: _TOKENS[name] for name in ("t5", "byt5") if getattr(self.settings, name) is not None}
            tokens = ", ".join(f"{count} {name}" for name, count in branches.items())
            self.text_adapter.save(folder / "text_adapter", {**facts, "tokens": tokens})


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without its private entries, which describe where it came from, not the network."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _in_order(positions: Sequence[Tensor], pieces: Sequence[Tokens]) -> Tokens:
    """Join the pieces' tokens, put the rows at `positions`, and pad the shorter ones."""
    if len(pieces) == 1:
        return pieces[0]
    order, joined = torch.cat(list(positions)).argsort(), join(list(pieces))
    return Tokens(joined.values[order], None if joined.mask is None else joined.mask[order])


def _none_dropped(size: int) -> dict[str, Tensor]:
    """Return for each text branch that no image (B,) drops its caption."""
    return {name: torch.zeros(size, dtype=torch.bool) for name in ("clip", "pooled", "text", *READERS)}
