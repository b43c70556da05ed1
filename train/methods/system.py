"""Methods as systems that draw a person and a sentence, for `imagine.evaluation` and for users.

A `TunedSystem` trains the method for each person when the person is enrolled, in a folder of its own, so that an
interrupted evaluation carries on. An `EncoderSystem` only encodes. Both report seconds and bytes per person.
"""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imagine.errors import ConfigError
from imagine.people.photos import open_photo
from train.config import Run
from train.methods.runs import RESULT, open_learnt, train_method


@dataclass(frozen=True)
class Learnt:
    """A person: where a method's result is, or the person's encoded reference."""

    name: str
    folder: Path | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    bytes: int = 0


@dataclass
class Drawn:
    """Pictures, in the form of the outputs of diffusers."""

    images: Any
    notes: list[str] = field(default_factory=list)


class DrawingSystem(ABC):
    """What both kinds share: the interface of a pipeline that `imagine.evaluation` calls, and the costs."""

    adapter = None

    def __init__(self, name: str, facts: Mapping[str, Any]) -> None:
        self.name = name
        # The evaluation recognises other weights by modules in `components`, and by defaults in `config`.
        self.components: dict[str, Any] = {}
        self.config: dict[str, Any] = {"default_method": name, **{f"default_{key}": facts[key] for key in facts}}
        self.people: dict[str, Learnt] = {}

    def set_progress_bar_config(self, **_: Any) -> None:  # noqa: B027  (nothing to configure)
        """Accept what diffusers' pipelines accept; the systems show no bar of their own."""

    @property
    def costs(self) -> dict[str, float]:
        """Return the mean seconds and bytes per person who was enrolled."""
        people = list(self.people.values())
        count = max(len(people), 1)
        return {
            "people": len(people),
            "seconds_per_person": sum(each.seconds for each in people) / count,
            "bytes_per_person": sum(each.bytes for each in people) / count,
        }

    def __call__(
        self,
        prompt: "str | Sequence[str]",
        reference: "Learnt | Sequence[Learnt] | None" = None,
        *,
        generator: "torch.Generator | Sequence[torch.Generator] | None" = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
    ) -> Drawn:
        """Draw one picture per prompt; without a reference the base draws alone."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        people: list[Learnt | None] = [None] * len(prompts)
        if isinstance(reference, Learnt):
            people = [reference] * len(prompts)
        elif reference is not None:
            people = list(reference)
        if len(people) != len(prompts):
            raise ConfigError(f"There are {len(people)} references for {len(prompts)} prompts: give one for each.")
        given = [generator] * len(prompts) if not isinstance(generator, (list, tuple)) else list(generator)
        pictures: list[Tensor | None] = [None] * len(prompts)
        for person in dict.fromkeys(None if each is None else each.name for each in people):
            rows = [row for row, each in enumerate(people) if (None if each is None else each.name) == person]
            drawn = self._draw(
                people[rows[0]], [prompts[row] for row in rows], [given[row] for row in rows], num_inference_steps,
                guidance_scale,
            )  # fmt: skip
            for row, picture in zip(rows, drawn, strict=True):
                pictures[row] = picture
        whole = torch.stack([each for each in pictures if each is not None])
        return Drawn(whole if output_type == "pt" else [_to_pil(picture) for picture in whole])

    @abstractmethod
    def _draw(
        self, person: Learnt | None, prompts: Sequence[str], generators: Sequence[Any], steps: int | None,
        guidance: float | None,
    ) -> Tensor:  # fmt: skip
        """Return pictures (B, 3, S, S), 0 to 1, of one person, or (None) of nobody."""


class TunedSystem(DrawingSystem):
    """Train a method for every person who is enrolled; a person's folder is named after the photos' content."""

    def __init__(self, run: Run, folder: Path, noun: str = "person") -> None:
        ((self.stage_name, stage),) = run.stages.items()
        facts = {
            "run": hashlib.sha256(json.dumps(run.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]
        }
        super().__init__(stage.task, facts)
        self.run, self.folder, self.noun = run, folder, noun
        self._open: tuple[str, Any] | None = None

    def enroll(self, photos: Any, **_: Any) -> Learnt:
        """Train the method on one person's photos (paths or images), or find what an earlier call trained."""
        images = [open_photo(photo) for photo in (photos if isinstance(photos, (list, tuple)) else [photos])]
        name = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:16]
        place = self.folder / name
        paths = []
        for number, image in enumerate(images):
            path = place / "photos" / f"{number:02d}.png"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path.with_suffix(".part"), format="PNG")
                path.with_suffix(".part").rename(path)
            paths.append(str(path.absolute()))
        run = self.run.model_copy(update={"data": {**self.run.data, "photos": [paths]}})
        file = place / "run" / RESULT
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else train_method(run, place / "run")
        if found is None:
            raise ConfigError("The training of a person was stopped: run the same command again, which carries on.")
        learnt = Learnt(name, place / "run", {}, found["seconds_per_person"], found["bytes_per_person"])
        self.people[name] = learnt
        return learnt

    def _draw(
        self, person: Learnt | None, prompts: Sequence[str], generators: Sequence[Any], steps: int | None,
        guidance: float | None,
    ) -> Tensor:  # fmt: skip
        if person is None or person.folder is None:
            raise ConfigError(f"{self.name} draws people that it has learnt: give a reference, or leave out this row.")
        if self._open is None or self._open[0] != person.name:
            self._open = (person.name, open_learnt(person.folder))
        task = self._open[1]
        sentences = [task.naming.personal(prompt, self.noun) for prompt in prompts]
        pictures: Tensor = task.draw(sentences, noise_of(task.base, generators), steps, guidance)
        return pictures


class EncoderSystem(DrawingSystem):
    """Encode people with a trained encoder."""

    def __init__(self, folder: Path, base: str | None = None) -> None:
        self.task = open_learnt(folder, base)
        super().__init__(self.task.NAME, {"run": str(folder)})
        self.components = dict(self.task.modules)

    def enroll(self, photos: Any, **_: Any) -> Learnt:
        """Encode one person's photos (paths or images)."""
        images = [open_photo(photo) for photo in (photos if isinstance(photos, (list, tuple)) else [photos])]
        began = time.monotonic()
        subject: Tensor = self.task.subject(images)
        name = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:16]
        size = subject.numel() * subject.element_size()
        learnt = Learnt(name, None, {"subject": subject}, time.monotonic() - began, size)
        self.people[name] = learnt
        return learnt

    def _draw(
        self, person: Learnt | None, prompts: Sequence[str], generators: Sequence[Any], steps: int | None,
        guidance: float | None,
    ) -> Tensor:  # fmt: skip
        subject = None if person is None else person.tensors["subject"]
        pictures: Tensor = self.task.draw(prompts, subject, noise_of(self.task.base, generators), steps, guidance)
        return pictures


def noise_of(base: Any, generators: Sequence[Any]) -> Tensor:
    """Return noise (B, C, h, w), drawn for each picture by its generator, on the generator's device."""
    drawn = [
        torch.randn(base.latent_shape, generator=each, device=each.device if each is not None else "cpu")
        for each in generators
    ]
    return torch.stack([each.to(base.device) for each in drawn])


def _to_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
