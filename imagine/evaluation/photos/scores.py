"""Metrics of pictures that are compared with photographs, as functions of their features.

Identity: SimGT to photos that the system did not get, SimRef to those it got, copy-paste between the two, rank-1 among
the subjects. Things: CLIP-I and DINO, the mean cosine of all pairs of a picture and a photo of its subject; prompts:
CLIP-T (DreamBooth, arXiv 2208.12242, section 4.1). A picture without a face, or one that could not be read, has
features of zeros and keeps its place in the means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imagine.evaluation import metrics

IDENTITY, CLIP, DINO = "identity", "clip", "dino"
OF_CEILING = ("sim_gt", "rank1", "clip_i", "dino")


@dataclass(frozen=True)
class Features:
    """Features by part (identity, clip, dino): of the pictures (N, D), and of each subject's photos (photos, D).

    texts: of the prompt of every picture (N, D), by CLIP; None without CLIP.
    """

    drawn: Mapping[str, Tensor]
    references: Sequence[Mapping[str, Tensor]]
    truths: Sequence[Mapping[str, Tensor]]
    texts: Tensor | None


def measure(
    features: Features, each: int, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, float | None], dict[str, float | None]]:
    """Return every metric of every picture (subjects, each), and the metrics' ceilings and floors, None if unknown.

    A value is NaN where it cannot be measured, because a subject has no further photo.
    """
    scores: dict[str, Tensor] = {}
    ceilings: dict[str, float | None] = {}
    floors: dict[str, float | None] = {}
    if IDENTITY in features.drawn:
        _measure_identity(features, each, scores, ceilings, floors)
    for name, part in (("clip_i", CLIP), ("dino", DINO)):
        if part in features.drawn:
            photos = [own[part] for own in _photos(features, part)]
            scores[name] = _mean_cosine(features.drawn[part].view(len(photos), each, -1), photos)
            ceilings[name], floors[name] = _within(photos), _between(photos)
    if features.texts is not None:
        pictures = features.drawn[CLIP]
        scores["clip_t"] = (pictures * features.texts).sum(-1).view(-1, each)
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
        ceilings["clip_t"], floors["clip_t"] = None, float((pictures * features.texts[order]).sum(-1).mean())
    return scores, ceilings, floors


def _measure_identity(
    features: Features, each: int, scores: dict[str, Tensor], ceilings: dict[str, float | None],
    floors: dict[str, float | None],
) -> None:  # fmt: skip
    count = len(features.references)
    pictures = features.drawn[IDENTITY].view(count, each, -1)
    given = [_known(own[IDENTITY]) for own in features.references]
    kept = [_known(own[IDENTITY]) for own in features.truths]
    scores["face"] = pictures.any(-1).float()
    scores["sim_gt"] = _mean_cosine(pictures, kept)
    scores["sim_ref"] = _mean_cosine(pictures, given)
    ceilings |= {"face": 1.0, "sim_ref": 1.0, "copy_paste": 0.0}
    floors |= {"face": 0.0, "sim_ref": _between(given), "copy_paste": 1.0, "sim_gt": _between(kept, given)}
    pairs = [(one @ two.T).flatten() for one, two in zip(given, kept, strict=True) if len(one) and len(two)]
    ceilings["sim_gt"] = float(torch.cat(pairs).mean()) if pairs else None
    middles = [_middle(own, pictures.shape[-1]) for own in given], [_middle(own, pictures.shape[-1]) for own in kept]
    reference, truth = (torch.stack(own).unsqueeze(1).expand_as(pictures) for own in middles)
    copied = metrics.copy_paste(pictures, truth, reference) * pictures.any(-1)
    known = torch.tensor([[bool(len(own))] for own in kept])
    scores["copy_paste"] = torch.where(known, copied, torch.nan)
    if count > 1:
        both = [_together(one, two) for one, two in zip(given, kept, strict=True)]
        gallery = torch.stack([_middle(own, pictures.shape[-1]) for own in both])
        person = torch.arange(count).repeat_interleave(each)
        scores["rank1"] = metrics.rank1(pictures.flatten(0, 1), gallery, person).view(count, each)
        ceilings["rank1"], floors["rank1"] = 1.0, 1 / count


def summarise(
    names: Sequence[str], scores: Mapping[str, Tensor], ceilings: Mapping[str, float | None],
    floors: Mapping[str, float | None], seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Return `metrics`, `of_ceiling`, `subjects` (each subject's means) and `worst_subject`."""
    means = {name: values.mean(1) for name, values in scores.items()}  # NaN for a subject that cannot be measured
    table: dict[str, dict[str, float | None]] = {}
    for name, values in means.items():
        measured = values[~values.isnan()].double()
        if not len(measured):
            continue
        low, high = metrics.bootstrap(measured, seed)
        table[name] = {
            "value": float(measured.mean()), "low": low, "high": high, "ceiling": ceilings[name], "floor": floors[name],
        }  # fmt: skip
    subjects = {
        subject: {
            name: None if bool(values[row].isnan()) else round(float(values[row]), 4) for name, values in means.items()
        }
        for row, subject in enumerate(names)
    }
    ranking = next((name for name in ("sim_gt", "sim_ref", "dino", "clip_i") if name in table), None)
    known = {subject: own[ranking] for subject, own in subjects.items() if ranking and own[ranking] is not None}
    worst = min(known, key=lambda subject: known[subject] or 0.0) if known else None
    shares: dict[str, float] = {}
    for name, row in table.items():
        ceiling, value = row["ceiling"], row["value"]
        if name in OF_CEILING and ceiling and value is not None:
            shares[name] = value / ceiling
    people = {name: [_or_none(value) for value in values.tolist()] for name, values in means.items()}
    return {
        "metrics": table, "of_ceiling": shares, "subjects": subjects, "worst_subject": worst, "ranked_by": ranking,
        "people": people,
    }  # fmt: skip


def _photos(features: Features, part: str) -> list[Mapping[str, Tensor]]:
    """Return all photos of each subject once; in DreamBench references and truths are the same photos."""
    both: list[Mapping[str, Tensor]] = []
    for one, two in zip(features.references, features.truths, strict=True):
        same = one[part].shape == two[part].shape and torch.equal(one[part], two[part])
        both.append({part: one[part] if same else _together(one[part], two[part])})
    return both


def _mean_cosine(pictures: Tensor, photos: Sequence[Tensor]) -> Tensor:
    """Return the mean cosine of every picture (subjects, each, D) with all photos of its subject; NaN without any."""
    rows = [
        (own @ shown.T).mean(-1) if len(shown) else own.new_full((len(own),), torch.nan)
        for own, shown in zip(pictures, photos, strict=True)
    ]
    return torch.stack(rows)


def _within(photos: Sequence[Tensor]) -> float | None:
    """Return the mean cosine of two photos of one subject."""
    values = [(own @ own.T)[~torch.eye(len(own), dtype=torch.bool)] for own in photos if len(own) > 1]
    return float(torch.stack([each.mean() for each in values]).mean()) if values else None


def _between(photos: Sequence[Tensor], others: Sequence[Tensor] | None = None) -> float | None:
    """Return the mean cosine of photos of two subjects."""
    others = photos if others is None else others
    values = [
        (one @ two.T).mean()
        for i, one in enumerate(photos)
        for j, two in enumerate(others)
        if i != j and len(one) and len(two)
    ]
    return float(torch.stack(values).mean()) if values else None


def _known(features: Tensor) -> Tensor:
    """Return the rows of photos in which a face was found."""
    return features[features.any(-1)] if len(features) else features


def _together(one: Tensor, two: Tensor) -> Tensor:
    """Return the rows of both; without rows, features have no width."""
    return one if not len(two) else two if not len(one) else torch.cat((one, two))


def _middle(features: Tensor, width: int) -> Tensor:
    return F.normalize(features.mean(0), dim=0) if len(features) else torch.zeros(width)


def _or_none(value: float) -> float | None:
    return None if value != value else round(value, 6)
