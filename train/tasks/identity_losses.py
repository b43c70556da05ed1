"""Further losses of the adapter's training, which are not in the paper: for its ablation, and each off by default.

alignment      the text must act on the denoiser's features as it does without the person (PuLID, arXiv 2404.16022)
localisation   the person's tokens must act inside the face only (FastComposer, arXiv 2305.10431)
preview        the predicted picture must show the person, by a recogniser on the face as the target has it
               (LCM-Lookahead, arXiv 2404.03620; WithAnyone, arXiv 2510.14975, aligns by the target's face)
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagine.people.faces import crop_faces
from imagine.records import Watched


def alignment_losses(with_person: Mapping[str, Watched], without: Mapping[str, Watched]) -> tuple[Tensor, Tensor]:
    """Return PuLID's semantic and layout losses, (B,) each, the mean over the layers.

    Semantic: each text token's response, softmax over the positions of (K Q') times Q, with and without the person.
    Layout: the queries themselves. Both are divided by the mean square of what they are compared with, so that layers
    of different scales count alike.
    """
    semantic, layout = [], []
    for name, plain in without.items():
        query, wanted = with_person[name].query, plain.query.detach()
        semantic.append(_distance(_responses(query, plain.key.detach()), _responses(wanted, plain.key.detach())))
        layout.append(_distance(query, wanted))
    return torch.stack(semantic).mean(0), torch.stack(layout).mean(0)


def _responses(query: Tensor, key: Tensor) -> Tensor:
    """Return (batch, heads, tokens, width): for each text token, the mean of the queries that respond to it."""
    scores = key @ query.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.softmax(-1) @ query


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    error = (found - wanted).square().flatten(1).mean(1)
    return error / wanted.square().flatten(1).mean(1).clamp(min=1e-8)


def outside_share(energies: Mapping[str, Tensor], faces: Tensor) -> Tensor:
    """Return the share of the vision branch's output outside the faces, (B,), 0 to 1; the mean over the layers.

    energies: mean squares by layer, (B, positions). faces: (B, 1, h, w), 1 inside. In parallel attention the weights of
    a branch sum to 1 everywhere, so its output is compared instead of the attention of FastComposer.
    """
    shares = []
    for energy in energies.values():
        side = round(energy.shape[1] ** 0.5)
        inside = F.adaptive_max_pool2d(faces, (side, energy.shape[1] // side)).flatten(1)
        shares.append((energy * (1 - inside)).sum(1) / energy.sum(1).clamp(min=1e-12))
    return torch.stack(shares).mean(0)


def preview_similarity(teacher: nn.Module, pictures: Tensor, boxes: Tensor, targets: Tensor, size: int) -> Tensor:
    """Return the cosine (B,) of the faces in predicted pictures (B, 3, S, S), 0 to 1, to those of the targets.

    Faces are cut from the predictions at the targets' boxes (B, 4), so the loss works at every noise level, where no
    detector would find a face. targets: (B, 3, size, size), the targets' own face crops.
    """
    with torch.no_grad():
        wanted = teacher(targets)
    found: Tensor = teacher(crop_faces(pictures, boxes, size))
    return (found * wanted).sum(1)
