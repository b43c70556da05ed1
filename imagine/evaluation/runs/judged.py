"""What the judge found, on disk: one file per batch, so that an interrupted run judges nothing twice.

A file is used only if judge and pictures are the same: it holds a digest of both. Files are written whole or not at
all.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagine.evaluation.runs.folder import config_error_on_failure
from imagine.evaluation.runs.shards import WHOLE, Shard

FOLDER = "judged"


class JudgedStore:
    """Results of one judge in the folder of a run. `judge` is the judge's fingerprint."""

    def __init__(self, output: Path, judge: str, shard: Shard = WHOLE) -> None:
        self.folder, self.judge, self.shard = output / FOLDER, judge, shard
        self.computed = 0  # pictures that were judged and not found here

    def digest(self, source: "str | Tensor") -> str:
        """Return the digest of a batch, from a text that determines its pictures, or from the pictures."""
        digest = hashlib.sha256(self.judge.encode())
        digest.update(source.encode() if isinstance(source, str) else source.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def load(self, name: str, start: int, digest: str) -> tuple[dict[str, Tensor], Any] | None:
        """Return the tensors and the plain values of a batch, or None if they are not here or of other pictures."""
        path = self._path(name, start)
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                if facts.get("digest") != digest:
                    return None
                return {key: file.get_tensor(key) for key in file.keys()}, json.loads(facts["plain"])  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def save(self, name: str, start: int, digest: str, tensors: dict[str, Tensor], plain: Any) -> None:
        """Write a batch."""
        path = self._path(name, start)
        with config_error_on_failure(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.part")
            save_file(
                {key: value.contiguous() for key, value in tensors.items()}, partial,
                {"digest": digest, "plain": json.dumps(plain)},
            )  # fmt: skip
            os.replace(partial, path)

    def _path(self, name: str, start: int) -> Path:
        return self.folder / name.replace(" ", "_") / f"{start:06}.safetensors"


def empty(width: int = 0) -> Tensor:
    """Return no rows."""
    return torch.zeros(0, width)
