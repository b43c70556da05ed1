"""Train the identity adapter: vision encoder, vision branch and LoRA on the frozen base, on real singles and SynPairs.

A real single is both reference and target: it teaches the adapter a person's appearance. A pair shows one person in
two different pictures: it teaches the adapter to separate the person from pose, expression, clothes and scene.

A stage may also train the base's parts. An undertrained base then learns to draw faces with the reference as input. A
stage that trains the adapter alone on the frozen base follows, as in the paper.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from imagine.adapter.adapter import LORA_TARGETS, Adapter, BranchSpec, Fusion, LoraTarget
from imagine.errors import ConfigError
from imagine.networks.diffusion import add_noise, clean_from_velocity, velocity
from imagine.networks.encoders import VisionEncoder
from imagine.networks.recogniser import Recogniser
from imagine.people.faces import crop_faces
from imagine.pipeline.sampling import Guidance, Inputs
from imagine.records import VISION, Conditioning, Tokens
from imagine.world import render, sample_contexts, sample_people
from imagine.world.seeds import HELD_OUT
from train.cache.groups import GroupGallery, GroupPictures
from train.cache.latents import squared_error
from train.cache.pictures import Gallery
from train.cache.sentences import Sentences, SentenceStore
from train.data.denoiser_inputs import references
from train.data.language import parameters
from train.data.order import chance, to_device, uniforms
from train.data.portraits import data_settings, pictures_of
from train.data.sources import DrawnPairs, in_order
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
from train.tasks.groups import (
    GroupBlocks,
    GroupCache,
    People,
    check_group_settings,
    draw_group_rows,
    group_references,
)
from train.tasks.identity_losses import alignment_losses, outside_share, preview_similarity
from train.tasks.likeness_loss import LikenessNetwork
from train.tasks.people_loss import router_iou, router_loss
from train.tasks.recogniser import TEACHER
from train.tasks.shortcut import SHORTCUT, Shortcut, ShortcutBatch, shortcut_batch, shortcut_without_training

PORTRAITS = "train"  # the gallery whose people are shown together in pictures of several people
Record = dict[str, list[Tensor]]
Watch = dict[str, dict[str, Any]]
_HELD_OUT_GROUPS = 48  # held-out pictures of several people per gallery
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
    vision_fusion: Fusion | None = None  # of the vision branch alone; None: as `fusion`
    drop_tokens: Share = 0.0  # share of the vision tokens that each image leaves out, the global one never
    # losses of train.tasks.identity_losses, for pictures of one person; not in the paper
    alignment: Weight = 0.0  # PuLID's semantic alignment
    alignment_layout: Weight = 0.0  # PuLID's layout alignment
    localisation: Weight = 0.0  # share of the vision branch's output outside the face
    preview: Weight = 0.0  # likeness of the decoded prediction, by the network of a stage `teacher`
    # share of the blocks of images that show several people, by gallery in the run's data.groups; not in the paper
    groups: dict[str, Share] = {}  # noqa: RUF012  (pydantic copies it)
    group_block: Annotated[int, Field(ge=1)] = 64  # consecutive images with equally many people: the batch size
    router: Weight = 0.3  # weight of the routers' loss, in images of several people
    people: People = "router"  # or one softmax for all people, the paper's form (section 3.6)
    # share of the images whose pose and expression come by a side path (train.tasks.shortcut); not in the paper
    shortcut: Share | None = None
    judge: Path | None = None  # folder of weights whose judge scores held-out people at every validation

    @model_validator(mode="after")
    def _has_an_effect(self) -> "AdapterSettings":
        check_lora(self.lora_rank, self.lora_targets)
        check_group_settings(self.groups, self.people)
        if self.localisation and (self.vision_fusion or self.fusion) == "concatenated":
            raise ValueError(
                "localisation compares outputs of parallel attention: set it to 0, or the fusion to parallel"
            )
        return self


@dataclass(frozen=True)
class AdapterBatch(BaseBatch):
    """Targets with their captions, and the references that they should resemble."""

    crops: Tensor  # (B, P, 3, S, S) face crops of the references
    strength: Tensor  # (B,) 0 where the references are dropped
    masks: Tensor  # (B, P, H/8, W/8) where each of several people is seen, 0 to 1; (B, 0) for pictures of one person
    boxes: Tensor | None = None  # (B, 4) the targets' face boxes in pixels, for the preview loss
    target_crops: Tensor | None = None  # (B, 3, S, S) the targets' face crops
    shortcut: ShortcutBatch | None = None  # what the side path is told

    @property
    def people(self) -> int:
        """Number of people in each picture."""
        return self.crops.shape[1]


class AdapterTask(BaseTask):
    """Train a vision branch that adds a person's identity to the pictures of a trained base."""

    Settings: ClassVar[type[BaseModel]] = AdapterSettings
    PARTS: ClassVar[tuple[str, ...]] = (*IDENTITY_PARTS, SHORTCUT, *BaseTask.PARTS)
    settings: AdapterSettings

    def __init__(self, settings: AdapterSettings, context: TaskContext) -> None:
        super().__init__(settings, context)
        self.vision = VisionEncoder()
        width = int(self.vision.config.width)
        tokens = self.unet.config.cross_attention_dim
        several = bool(settings.groups)
        branch = BranchSpec(
            VISION, tokens, 1.0, settings.zero_init, "full", width, settings.vision_fusion or settings.fusion,
            router=several and settings.people == "router",
            people="concatenate" if several and settings.people == "concatenate" else "separate",
        )  # fmt: skip
        self.adapter = Adapter(self.unet, [branch], settings.lora_rank, settings.lora_targets)
        self.adapter.attach(self.unet)
        self.modules |= {"image_encoder": self.vision, "adapter": self.adapter}
        self.likeness = self._likeness_network()
        self.teacher = self._teacher()
        self.evaluation: HeldOutEvaluation | None = None
        self.blocks = GroupBlocks(settings.groups, settings.group_block)
        self.shortcut = Shortcut(self.unet) if settings.shortcut else None
        if self.shortcut is not None:
            self.modules[SHORTCUT] = self.shortcut

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

    def _teacher(self) -> Recogniser | None:
        """Return the recogniser of the preview loss, which a stage `teacher` has trained; None without that loss."""
        if not self.settings.preview:
            return None
        if TEACHER not in self.context.earlier:
            raise ConfigError(
                f"Stage {self.context.name} has a preview loss, which needs a trained teacher: name a stage `teacher` "
                "(task recogniser, people: train) in its start_from, or set preview to 0."
            )
        self.modules[TEACHER] = teacher = Recogniser()
        return teacher

    def parts(self) -> dict[str, list[nn.Parameter]]:
        shortcut = {} if self.shortcut is None else {SHORTCUT: parameters(self.shortcut)}
        return {"vision_encoder": parameters(self.vision), **self.adapter.parts(), **shortcut, **super().parts()}

    def check(self) -> list[str]:
        judge = self.settings.judge
        if judge is not None and not (judge / "judge").is_dir():
            raise ConfigError(
                f"Stage {self.context.name}: judge is {judge}, which holds no judge; name a folder of weights with one."
            )
        for name in self.settings.groups:
            data_settings(self.context.data).group_gallery(name)
        context, settings = self.context, self.settings
        untrained = shortcut_without_training(settings.shortcut, tuple(context.trains), bool(context.earlier))
        return [*super().check(), *images_without_effect(context, settings.drop_vision), *untrained]

    def prepare(self) -> None:
        super().prepare()
        data = data_settings(self.context.data)
        if self.settings.groups and PORTRAITS not in self.gallery_caches:  # the references of several people
            self.gallery_caches[PORTRAITS] = self._cache_gallery(pictures_of(self.context.data, PORTRAITS), PORTRAITS)
        galleries = {name: data.group_gallery(name) for name in self.settings.groups}
        self.groups = {name: self._cache_group(gallery, name) for name, gallery in galleries.items()}
        portraits = cast(Gallery, self.held_out.pictures.gallery)
        self.held_out_groups = {
            name: self._cache_group(
                replace(gallery, portraits=portraits, count=min(_HELD_OUT_GROUPS, gallery.count)), f"held-out-{name}"
            )
            for name, gallery in galleries.items()
        }

    def _cache_group(self, gallery: GroupGallery, name: str) -> GroupCache:
        folder = data_settings(self.context.data).folder / f"group-{name}"
        return GroupCache(GroupPictures(gallery, self.codec, folder), SentenceStore(gallery, self.text, folder))

    def crop_side(self) -> int:
        return int(self.vision.config.image_size)

    def batch(self, images_seen: int, size: int) -> AdapterBatch:
        seed = self.context.seed
        if (group := self.blocks.gallery_of(images_seen, size)) is not None:
            return self._group_batch(group, images_seen, size)
        drawn = self.mixture.draw(seed, images_seen, size)
        targets = self._targets(drawn, images_seen)
        return AdapterBatch(
            targets.latents,
            targets.sentences,
            targets.faces,
            targets.weights,
            references(self.gallery_caches, drawn, uniforms(seed, "crops", images_seen, size, (2,))).unsqueeze(1),
            1 - chance(seed, "drop vision", images_seen, size, self.settings.drop_vision).float(),
            torch.zeros(size, 0),
            *self._faces_of_targets(drawn),
            truth=targets.truth,
            shortcut=shortcut_batch(self.gallery_caches, drawn, self.settings.shortcut, seed, images_seen)
            if self.settings.shortcut
            else None,
        )

    def _faces_of_targets(self, drawn: DrawnPairs) -> tuple[Tensor | None, Tensor | None]:
        """Return the targets' face boxes and face crops, for the preview loss."""
        if self.teacher is None:
            return None, None
        by_gallery = drawn.by_gallery()
        boxes, crops = [], []
        for name, here in by_gallery.items():
            cache, rows = self.gallery_caches[name], drawn.targets[here]
            boxes.append(torch.from_numpy(cache.pictures.boxes[rows.numpy()]))
            crops.append(cache.crops(rows, _MIDDLE.expand(len(rows), 2)))
        return in_order(list(by_gallery.values()), boxes), in_order(list(by_gallery.values()), crops)

    def _group_batch(self, name: str, images_seen: int, size: int) -> AdapterBatch:
        """Return targets with several people each, and the references of all of them."""
        seed, cache = self.context.seed, self.groups[name]
        rows, caption_styles = draw_group_rows(seed, name, images_seen, size, cache)
        shifts = uniforms(seed, "crops", images_seen, size, (cache.pictures.gallery.people, 2))
        crops = group_references(cache, rows, self.gallery_caches[PORTRAITS].crops, shifts)
        strength = 1 - chance(seed, "drop vision", images_seen, size, self.settings.drop_vision).float()
        dropped = self._dropped(images_seen, size)
        return self._group_targets(cache, rows, cache.sentences.take(rows, caption_styles, dropped), crops, strength)

    def _group_targets(
        self, cache: GroupCache, rows: Tensor, sentences: Sentences, crops: Tensor, strength: Tensor
    ) -> AdapterBatch:
        targets = cache.pictures.take(rows)
        faces = cache.faces(targets.boxes, (targets.latents.shape[2], targets.latents.shape[3]))
        weights = 1 + (self.settings.face_weight - 1) * faces
        return AdapterBatch(targets.latents, sentences, faces, weights, crops, strength, targets.masks)

    def vision_tokens(self, crops: Tensor) -> Tokens:
        """Return the vision tokens of face crops (B, P, 3, S, S): those of all people of a picture, in order."""
        tokens = self.adapter.tokens(VISION, self.vision(crops.flatten(0, 1))).values
        return Tokens(tokens.unflatten(0, crops.shape[:2]).flatten(1, 2))

    def prediction(
        self, batch: AdapterBatch, vision: Tokens, noise: Tensor, t: Tensor, record: Record | None = None,
        watch: Watch | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the denoiser's predicted velocity (B, C, h, w), conditioned on these vision tokens.

        `record` collects the decisions of the routers, and `watch` what layers show (`Conditioning`).
        """
        noisy = add_noise(batch.latents, noise, t)
        present = torch.ones(len(noisy), batch.people, dtype=torch.bool, device=noisy.device)
        groups = {VISION: present} if batch.people > 1 else {}
        identity = Conditioning({VISION: vision}, {VISION: batch.strength}, groups=groups, record=record, watch=watch)
        if self.shortcut is not None:
            identity = self.shortcut.added(identity, batch.shortcut)
        return self.predict(noisy, t, batch.sentences, identity)

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
        crops = batch.crops.flatten(0, 1) if batch.people == 1 else batch.crops.transpose(1, 2).flatten(3, 4)
        crops = F.interpolate(crops, size=targets.shape[-2:])
        save_grid(torch.stack((crops, targets), 1).flatten(0, 1), path, columns=8)

    def loss(self, batch: AdapterBatch, images_seen: int) -> Loss:  # type: ignore[override]
        # Networks are compiled for pictures of one person: each canvas with several would be compiled for minutes.
        with torch.compiler.set_stance("force_eager") if batch.people > 1 else nullcontext():
            return self._loss(batch, images_seen)

    def _loss(self, batch: AdapterBatch, images_seen: int) -> Loss:
        noise, t = self.noise(batch.latents, self.context.seed, images_seen)
        record: Record = {}
        watch: Watch = {"text": {}} if self._aligns else {}
        watch |= {VISION: {}} if self.settings.localisation and batch.people == 1 else {}
        watch |= self.auxiliary.watch(images_seen) if batch.people == 1 else {}
        vision = self._without_some(self.vision_tokens(batch.crops), images_seen)
        prediction = self.prediction(batch, vision, noise, t, record, watch or None)
        errors = self.weighted(squared_error(prediction, velocity(batch.latents, noise), batch.weights), t)
        if batch.people > 1:
            routed = router_loss(record, batch.masks)
            return Loss(errors + self.settings.router * routed, {"error of groups": errors.mean(), "router": routed})
        terms = self._identity_terms(batch, prediction, noise, t, watch)
        clean = clean_from_velocity(add_noise(batch.latents, noise, t), prediction, t)
        others = self.auxiliary_terms(batch, watch, clean, t, images_seen)
        metrics = self.auxiliary.metrics(others, batch.truth)
        if not terms and not others:
            return Loss(errors, metrics)
        weights = {"strange": self.settings.likeness, "alignment": self.settings.alignment,
                   "layout": self.settings.alignment_layout, "outside": self.settings.localisation,
                   "preview": self.settings.preview}  # fmt: skip
        total = errors + sum((weights[name] * term for name, term in terms.items()), torch.zeros_like(errors))
        total = total + self.auxiliary.weighted(others)
        return Loss(total, {"error": errors.mean(), **{name: term.mean() for name, term in terms.items()}, **metrics})

    @property
    def _aligns(self) -> bool:
        return bool(self.settings.alignment or self.settings.alignment_layout)

    def _without_some(self, tokens: Tokens, images_seen: int) -> Tokens:
        """Mask a share of each image's vision tokens (DropToken); the first, global one always stays."""
        if not self.settings.drop_tokens:
            return tokens
        count, length, device = *tokens.values.shape[:2], tokens.values.device
        kept = uniforms(self.context.seed, "drop tokens", images_seen, count, (length,), device)
        mask = kept >= self.settings.drop_tokens
        mask[:, 0] = True
        return Tokens(tokens.values, mask)

    def _identity_terms(
        self, batch: AdapterBatch, prediction: Tensor, noise: Tensor, t: Tensor, watch: Watch
    ) -> dict[str, Tensor]:
        """Return the losses (B,) on the person, each 0 where the reference is dropped."""
        terms: dict[str, Tensor] = {}
        if self.likeness is not None:
            # The loss falls with the noise level, because a noisier input contains less of the face.
            terms["strange"] = batch.strength * (1 - t) * (1 - self.cosines(batch, prediction, noise, t))
        if self._aligns:
            plain: Watch = {"text": {}}
            without = replace(batch, strength=torch.zeros_like(batch.strength))
            with torch.no_grad():
                self.prediction(without, self.vision_tokens(batch.crops), noise, t, watch=plain)
            semantic, layout = alignment_losses(watch["text"], plain["text"])
            terms |= {"alignment": batch.strength * semantic, "layout": batch.strength * layout}
        if self.settings.localisation:
            terms["outside"] = batch.strength * outside_share(watch[VISION], batch.faces)
        if self.teacher is not None:
            assert batch.boxes is not None and batch.target_crops is not None
            clean = clean_from_velocity(add_noise(batch.latents, noise, t), prediction, t)
            pictures = self.codec.decode_with_gradients(clean)
            size = self.teacher.size
            cosine = preview_similarity(self.teacher, pictures, batch.boxes, batch.target_crops, size)
            terms["preview"] = batch.strength * (1 - cosine)
        return terms

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        # The losses with two references: another picture of the same person, and a picture of a different person.
        targets, firsts = self.held_out_batch(), torch.arange(0, 2 * self.validation_people, 2)
        crops = self.held_out.crops(firsts, _MIDDLE.expand(len(firsts), 2))
        strength = torch.ones(len(firsts))
        batch = AdapterBatch(
            targets.latents, targets.sentences, targets.faces, targets.weights, crops.unsqueeze(1), strength,
            torch.zeros(len(firsts), 0),
        )  # fmt: skip
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
        for name in self.groups:
            numbers |= self._group_numbers(name)
        return numbers | self._judge_scores(folder)

    def _group_numbers(self, name: str) -> dict[str, float]:
        """Return how well held-out pictures of several people are predicted, and how well the routers find each."""
        cache = self.held_out_groups[name]
        rows = torch.arange(len(cache.pictures.gallery))
        middle = torch.full((len(rows), cache.pictures.gallery.people, 2), 0.5)
        crops = group_references(cache, rows, self.held_out.crops, middle)
        sentences = cache.sentences.take(rows, ["rewritten"] * len(rows))
        batch = self._group_targets(cache, rows, sentences, crops, torch.ones(len(rows)))
        batch = to_device(batch, self.context.device)
        noise, t = self.noise(batch.latents, VALIDATION_SEED, 0)
        record: Record = {}
        target, vision = velocity(batch.latents, noise), self.vision_tokens(batch.crops)
        right = float(squared_error(self.prediction(batch, vision, noise, t, record), target, batch.weights).mean())
        exchanged = self.vision_tokens(batch.crops.roll(1, 1))
        wrong = float(squared_error(self.prediction(batch, exchanged, noise, t), target, batch.weights).mean())
        numbers = {f"{name} loss": right, f"{name} exchanged ratio": wrong / right}
        return numbers | ({f"{name} router iou": router_iou(record, batch.masks)} if record else {})

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
            vision = self.vision_tokens(crops[some].unsqueeze(1))
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
        crops = crop_faces(photo.images, photo.boxes, self.vision.config.image_size)
        vision = self.vision_tokens(crops.unsqueeze(1))
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
        most = max((group.pictures.gallery.people for group in self.groups.values()), default=1)
        people = {"people": str(most)} if most > 1 else {}  # pictures of several people then get wider canvases
        self.adapter.save(folder / "adapter", {**ADAPTER_FACTS, "tokens": str(self.vision.tokens), **people})
