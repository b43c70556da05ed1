"""The batches of the training on a public base, and how those with several people are cached and drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from imagine.errors import ConfigError
from imagine.records import Tokens
from train.data.canvas import group_canvas
from train.data.order import choices, shuffled, uniforms
from train.data.portraits import GroupSettings, data_settings
from train.data.public_base import BaseCodec, time_ids
from train.data.recorded_groups import RecordGroups, open_record_groups
from train.data.text_states import FrozenTextEncoder


@dataclass(frozen=True)
class PeopleBatch:
    """Who is in the pictures of a batch that show several people each, and where."""

    present: Tensor  # (B, P) False where a person's reference is dropped
    masks: Tensor  # (B, P, h, w) where each person is seen, 0 to 1; empty where the reference is dropped
    known: Tensor  # (B, h, w) where it is known who is seen, 0 to 1


@dataclass(frozen=True)
class DiffusersBatch:
    """Clean latents, the text states that describe them, and the references that they should resemble."""

    latents: Tensor  # (B, C, h, w), scaled by the base's scaling factor
    states: dict[str, Tokens]  # text states by name: "clip", "pooled" for SDXL, "t5", "byt5"
    sizes: Tensor  # (B, 6) picture height and width, pixels cropped at top and left, target height and width
    faces: Tensor  # (B, 1, h, w) face mask: 1 where a face is, 0 elsewhere
    crops: Tensor  # (B, P, 3, S, S) face crops of the references
    strength: Tensor  # (B,) 0 where the references are dropped
    people: PeopleBatch | None = None  # of images that show several people


@dataclass(frozen=True)
class DrawnGroups:
    """The pictures of a batch from one group of records, and the style of each caption."""

    rows: Tensor  # (B,)
    caption_styles: Sequence[str]


@dataclass(frozen=True)
class GroupInputs:
    """One group of records in the run's `data.groups`: its settings, and its cached inputs."""

    name: str
    settings: GroupSettings
    cached: RecordGroups

    @classmethod
    def open(
        cls, data: Mapping[str, Any], name: str, side: int, folder: Path, codec: BaseCodec, crop_side: int,
        text_encoders: Sequence[FrozenTextEncoder],
    ) -> "GroupInputs":  # fmt: skip
        """Cache what is missing in `folder`: latents and references for a base of `side` pixels, and captions.

        Raises ConfigError if no record can be used.
        """
        checked = data_settings(data)
        settings, address = checked.group(name), checked.group_records(name)
        shape = group_canvas(settings.people, side, side // codec.shape(side)[1])
        gallery = open_record_groups(address, settings.people, shape, folder, checked.most)
        cached = RecordGroups(gallery, side, folder, codec, crop_side, text_encoders)
        if not len(cached.rows):
            raise ConfigError(f"No record of group {name} can be used. See {folder / 'left_out.json'} for the reasons.")
        cached.read_captions([style for style, weight in settings.captions.items() if weight > 0])
        return cls(name, settings, cached)

    def draw(self, seed: int, first: int, size: int) -> DrawnGroups:
        """Draw the pictures of images `first` to `first + size`; each comes once per epoch."""
        styles, rows = list(self.settings.captions), self.cached.rows
        drawn = choices(seed, "group manner", first, size, list(self.settings.captions.values()))
        chosen = rows[shuffled(seed, f"group {self.name}", first, size, len(rows))]
        return DrawnGroups(chosen, [styles[number] for number in drawn.tolist()])

    def batch(
        self, drawn: DrawnGroups, seed: int, first: int, dropped: Mapping[str, Tensor], strength: Tensor,
        drop_person: float = 0.0,
    ) -> DiffusersBatch:  # fmt: skip
        """Return the batch of the drawn pictures; `first` is the number of its first image.

        dropped: for each text branch the images whose caption it drops. strength: (B,), 0 where all references are
        dropped. drop_person: share of the people whose reference is dropped.
        """
        cached, size = self.cached, len(drawn.rows)
        order = cached.gallery.order(drawn.rows, drawn.caption_styles)
        targets, people = cached.targets(drawn.rows, order), order.shape[1]
        present = uniforms(seed, "drop person", first, size, (people,)) >= drop_person
        return DiffusersBatch(
            targets.latents,
            cached.sentences.take(drawn.rows, drawn.caption_styles, dropped),
            time_ids(targets.frames, cached.gallery.shape),
            targets.faces,
            cached.crops(drawn.rows, order, uniforms(seed, "crops", first, size, (people, 3))),
            strength,
            PeopleBatch(present, targets.masks * present[:, :, None, None], targets.known),
        )


def side_by_side(crops: Tensor) -> Tensor:
    """Return the face crops (B, P, 3, S, S) of a picture's people beside each other, (B, 3, S, P * S)."""
    return crops.transpose(1, 2).transpose(2, 3).flatten(3)
