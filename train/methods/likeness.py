"""The likeness of drawn pictures to the subject's photos, by the judge's recogniser. It measures and never trains."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from imagine.errors import ConfigError
from imagine.evaluation.judge import Judge
from train.methods.subjects import read_square


class LikenessMeter:
    """Mean cosine similarity of faces in pictures to the faces in the photos of all subjects."""

    def __init__(self, weights: Path, subjects: Sequence[Sequence[Path]], side: int) -> None:
        if not (weights / "judge").is_dir():
            raise ConfigError(f"judge: {weights} holds no judge (judge/); name a folder of weights with one, or none.")
        self.judge = Judge.from_pretrained(weights / "judge")
        self.photos = [
            self.judge.embed(torch.stack([read_square(path, side) for path in photos])).mean(0) for photos in subjects
        ]

    def likeness(self, pictures: Tensor) -> float:
        """Return the mean similarity of pictures (N, 3, S, S), which show the subjects in turn."""
        found = self.judge.embed(pictures)
        wanted = torch.stack([self.photos[number % len(self.photos)] for number in range(len(pictures))])
        return float(torch.nn.functional.cosine_similarity(found, wanted).mean())
