"""Break the results of the suite `portraits` down: by attribute, prompt, kind of person, and recogniser.

Also the numbers that belong to a whole row of pictures, not to single ones: distances of distributions, diversity, and
how much a reference disturbs what the base draws.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imagine.evaluation import metrics
from imagine.evaluation.cases import Cases, Judged, JudgedReal
from imagine.evaluation.metrics.comparison import recogniser_agreement
from imagine.evaluation.metrics.distributions import diversity, frechet_distance, kernel_distance
from imagine.evaluation.metrics.intervals import jackknife
from imagine.evaluation.scores import summary
from imagine.world import People
from imagine.world.vocabulary import HAIR_COLOURS, HAIR_STYLES

FEWEST = 3  # people in a group that can be named as the worst
_FOLDS = 10  # groups of people of the jackknife
_MISSED = 0.05  # share of real pictures below the similarity at which a recogniser says "the person"
_THIRDS = {"skin": ("light", "medium", "dark"), "age": ("young", "middle", "old")}


# ---- prompts ----


def attribute_table(cases: Cases, judged: Mapping[str, Judged]) -> dict[str, dict[str, float]]:
    """Return attribute -> how many prompts asked for it, and the share found in each row."""
    names = dict.fromkeys(name for prompt in cases.prompts for name in prompt.asked)
    table: dict[str, dict[str, float]] = {}
    for name in names:
        with_attribute = [case for case in range(len(cases)) if name in cases.prompt(case).asked]
        table[name] = {"asked": len(with_attribute)}
        for row, results in judged.items():
            correct = [metrics.found(cases.prompt(case).asked, results.read[case])[name] for case in with_attribute]
            table[name][row] = sum(correct) / len(correct)
    return table


def prompt_groups(cases: Cases, scores: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Return prompt group -> row -> mean of every main metric."""
    groups = dict.fromkeys(prompt.group for prompt in cases.prompts)
    columns = {g: [i for i, prompt in enumerate(cases.prompts) if prompt.group == g] for g in groups}
    return {
        group: {
            row: {name: float(values[:, columns[group]].mean()) for name, values in numbers.items()}
            for row, numbers in scores.items()
        }
        for group in groups
    }


def leakage_table(
    cases: Cases, judged: Mapping[str, Judged], references: Sequence[Mapping[str, str]]
) -> dict[str, dict[str, float]]:
    """Return attribute -> how often it could leak from the reference, and the share that leaked in each row.

    "all" pools the attributes.
    """
    counts: dict[str, dict[str, list[bool]]] = {"all": {row: [] for row in judged}}
    for row, results in judged.items():
        for case in range(len(cases)):
            words = references[case // len(cases.prompts)]
            for name, has_leaked in metrics.leaked(cases.prompt(case).asked, words, results.read[case]).items():
                counts.setdefault(name, {}).setdefault(row, []).append(has_leaked)
                counts["all"][row].append(has_leaked)
    return {
        name: {
            "possible": len(next(iter(by_row.values()))),
            **{row: sum(d) / max(len(d), 1) for row, d in by_row.items()},
        }
        for name, by_row in counts.items()
    }


# ---- people ----


def kinds_of_people(people: People) -> dict[str, dict[str, list[int]]]:
    """Return trait -> group -> the rows of its people: thirds of skin tone and age, hair styles and hair colours."""
    kinds: dict[str, dict[str, list[int]]] = {}
    for trait, words in _THIRDS.items():
        thirds = (getattr(people, trait) * 3).long().clamp(0, 2).tolist()
        kinds[trait] = {word: [row for row, third in enumerate(thirds) if third == n] for n, word in enumerate(words)}
    discrete: dict[str, tuple[str, ...]] = {"hair_style": HAIR_STYLES, "hair_colour": HAIR_COLOURS}
    for trait, names in discrete.items():
        numbers = getattr(people, trait).tolist()
        kinds[trait] = {
            word: [row for row, number in enumerate(numbers) if number == n] for n, word in enumerate(names)
        }
    return {trait: {word: rows for word, rows in groups.items() if rows} for trait, groups in kinds.items()}


def people_table(
    people: People, scores: Mapping[str, Mapping[str, Tensor]], counts: Mapping[str, Tensor], seed: int,
    names: Sequence[str] = ("sim_gt", "rank1", "prompt"),
) -> dict[str, Any]:  # fmt: skip
    """Return `people_groups` (trait -> group -> people, metrics of the first row, ceilings) and `worst_group`.

    The worst group has the lowest share of its own ceiling in sim_gt, of the groups with at least FEWEST people; None
    if there is none.
    """
    main = next(iter(scores))
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for trait, groups in kinds_of_people(people).items():
        table[trait] = {}
        for word, rows in groups.items():
            cell: dict[str, Any] = {"people": len(rows)}
            for name in names:
                cell[name] = summary(scores[main][name][rows], counts[name][rows], seed)
                cell[name]["ceiling"] = summary(scores["ceiling"][name][rows], counts[name][rows], seed)["value"]
            table[trait][word] = cell
    large = [
        (cell["sim_gt"]["value"] / max(cell["sim_gt"]["ceiling"], 1e-9), trait, word)
        for trait, groups in table.items()
        for word, cell in groups.items()
        if cell["people"] >= FEWEST
    ]
    if not large:
        return {"people_groups": table, "worst_group": None}
    share, trait, word = min(large)
    worst = {"trait": trait, "group": word, "people": table[trait][word]["people"], "of_ceiling": share}
    return {"people_groups": table, "worst_group": worst}


# ---- recognisers ----


def agreement(judged: Mapping[str, Judged], real: JudgedReal) -> dict[str, Any]:
    """Return how far each further recogniser agrees with the first, over all rows of pictures.

    A recogniser says "the person" above the similarity that 95 % of the real pictures of the right person exceed.
    """
    table = {}
    for name in real.truths.others:
        pairs = [_similarities(judged[row], real, name) for row in judged]
        limits = _similarities(judged["ceiling"], real, name)
        low = tuple(float(torch.quantile(each.double(), _MISSED)) for each in limits)
        one, two = (torch.cat(parts).tolist() for parts in zip(*pairs, strict=True))
        table[name] = recogniser_agreement(one, two, (low[0], low[1]))
    return table


def _similarities(judged: Judged, real: JudgedReal, name: str) -> tuple[Tensor, Tensor]:
    """Return the similarities to the truth of the readable pictures, by the first recogniser and by another."""
    first = metrics.similarity(judged.embeddings, real.truths.embeddings)
    second = metrics.similarity(judged.others[name], real.truths.others[name])
    return first[judged.readable], second[judged.readable]


# ---- whole rows ----


def distribution_table(
    cases: Cases, judged: Mapping[str, Judged], real: JudgedReal
) -> dict[str, dict[str, dict[str, float]]]:
    """Return row -> Frechet and kernel distance of its embeddings to those of the real pictures, with intervals.

    Pictures that could not be read have no features, and are left out here. The intervals are jackknives over people.
    """
    folds = min(_FOLDS, cases.identities)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for row, results in judged.items():
        groups = [torch.nonzero((cases.person % folds == fold) & results.readable).flatten() for fold in range(folds)]
        groups = [group for group in groups if len(group)]
        if len(groups) < 2 or sum(map(len, groups)) < 4:
            continue
        table[row] = {}
        for name, distance in (("frechet", frechet_distance), ("kernel", kernel_distance)):

            def value(rows: Tensor, distance: Any = distance, results: Judged = results) -> float:
                return float(distance(results.embeddings[rows], real.truths.embeddings[rows]))

            low, high = jackknife(value, groups)
            table[row][name] = {"value": value(torch.cat(groups)), "low": low, "high": high}
    return table


def diversity_table(cases: Cases, variants: Sequence[Judged], real: JudgedReal, seed: int) -> dict[str, float] | None:
    """Return the diversity of pictures that differ in their seed only, by the reader's features; None for one seed.

    The ceiling is that of two real pictures that follow the same prompt, and the floor 0, the same picture.
    """
    if len(variants) < 2:
        return None
    shape = (cases.identities, -1)
    values = diversity(torch.stack([each.features for each in variants], 1)).view(shape)
    ceiling = diversity(torch.stack((real.rows["ceiling"].features, real.truths.features), 1))
    return {**summary(values, torch.ones_like(values), seed), "ceiling": float(ceiling.mean()), "floor": 0.0}


def disturbance_table(
    cases: Cases, judged: Mapping[str, Judged], real: JudgedReal, seed: int
) -> dict[str, float] | None:
    """Return how much a reference changes what the base draws from the same noise, by the reader's features.

    1 minus the cosine of the features of the two pictures; lower is better. The ceiling is what another person alone
    changes in a real picture, and the floor two unrelated real pictures of one prompt.
    """
    if "full" not in judged or "detached" not in judged or real.scenes is None:
        return None
    ceiling = real.rows["ceiling"].features
    values = _change(judged["full"].features, judged["detached"].features).view(cases.identities, -1)
    return {
        **summary(values, torch.ones_like(values), seed),
        "ceiling": float(_change(ceiling, real.scenes.features).mean()),
        "floor": float(_change(real.rows["other"].features, real.truths.features).mean()),
    }


def _change(one: Tensor, two: Tensor) -> Tensor:
    return 1 - torch.nn.functional.cosine_similarity(one, two, dim=-1)
