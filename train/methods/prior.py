"""The pictures of prior preservation: other members of the subject's class, which the method must not forget.

DreamBooth (arXiv 2208.12242, section 3.3) generates them with the base before it is tuned; Custom Diffusion takes real
pictures with captions. Generated ones stay latents, and are kept for all people who share a base and a class noun.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from imagine.errors import ConfigError
from train.data.order import normals
from train.methods.bases.contract import AnyBase
from train.methods.bases.opening import draw_latents
from train.methods.subjects import photo_paths, read_square
from train.run.checkpoint import read_tensors, write_tensors
from train.run.stopping import raise_if_stopping

log = logging.getLogger("train")
_TOGETHER = 16  # pictures drawn at a time


@dataclass(frozen=True)
class Prior:
    """Latents (N, C, h, w) and the caption of each."""

    latents: Tensor
    captions: list[str]
    kind: str  # "generated" or "real"


def generated_prior(base: AnyBase, prompt: str, count: int, folder: Path, steps: int | None = None) -> Prior:
    """Draw `count` pictures of the class with the untuned base; pictures that the folder holds are not drawn again."""
    facts = json.dumps([base.mark, prompt, steps or base.steps, base.guidance])
    place = folder / f"prior-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
    parts = []
    for first in range(0, count, _TOGETHER):
        size = min(_TOGETHER, count - first)
        file = place / f"{first:05d}-{size}.safetensors"
        if not file.exists():
            raise_if_stopping()
            log.info("drawing pictures of the class, %d of %d: %s", first, count, prompt)
            write_tensors(file, {"latents": _drawn(base, prompt, first, size, steps)}, {"prompt": prompt})
        parts.append(read_tensors(file)[0]["latents"])
    return Prior(torch.cat(parts), [prompt] * count, "generated")


def _drawn(base: AnyBase, prompt: str, first: int, size: int, steps: int | None) -> Tensor:
    noise = normals(0, "prior", first, size, base.latent_shape, base.device)
    with torch.no_grad():
        text, empty = base.text([prompt]).repeat(size), base.text([""]).repeat(size)
    predict: Callable[..., Tensor] = lambda noisy, step, sentence, _: base.predict(noisy, step, sentence)  # noqa: E731
    return draw_latents(base, noise, lambda _: text, empty, predict, steps).cpu()


@torch.no_grad()
def real_prior(base: AnyBase, folder: Path, prompt: str, count: int) -> Prior:
    """Read up to `count` pictures of a folder, with the captions of its metadata.jsonl, or `prompt` without one."""
    paths = photo_paths([folder])[:count]
    captions = _captions(folder)
    latents = base.encode(torch.stack([read_square(path, base.side) for path in paths]))
    return Prior(latents.cpu(), [captions.get(path.name, prompt) for path in paths], "real")


def _captions(folder: Path) -> dict[str, str]:
    """Return file name -> caption, from a metadata.jsonl as `data_synth world` writes it; empty without one."""
    path = folder / "metadata.jsonl"
    if not path.exists():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found[Path(str(row.get("file") or row["file_name"])).name] = str(row["caption"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{path}, line {number}, has no file and caption: correct it, or remove the file."
            ) from None
    return found
