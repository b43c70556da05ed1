"""Sample contexts: batched records of pose, expression, light, scene, clothes, style and framing of a picture.

Each attribute that captions name has well-separated values (a head is turned by at least 20 degrees or by less than 8),
so that a classifier can read it from the picture without ambiguity.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from imagine.world import vocabulary as words
from imagine.world.tables import Table

SCENE_VARIATIONS = 4


@dataclass(frozen=True)
class Contexts(Table):
    """One row per picture. Angles are in radians; tensors are (N,), except `letters` (N, 3) and `variation` (N, 4)."""

    yaw: Tensor  # positive: turned towards the right edge of the picture
    pitch: Tensor  # positive: looking down
    roll: Tensor  # positive: head tilted clockwise
    gaze: Tensor  # -1: towards the left edge of the picture, 1: towards the right edge
    expression: Tensor
    light: Tensor
    scene: Tensor
    clothes: Tensor
    clothes_colour: Tensor
    headwear: Tensor
    headwear_colour: Tensor
    held: Tensor
    letters: Tensor  # 0 for none, else 1 to 26
    style: Tensor
    framing: Tensor
    zoom: Tensor  # jitter of the head's size, around 1
    shift_x: Tensor  # jitter of the head's place, as a share of the picture's side
    shift_y: Tensor
    variation: Tensor  # 0 to 1: random details of a scene


def sample_contexts(seeds: Sequence[int]) -> Contexts:
    """Sample one context per seed; a seed gives the same context in any batch."""
    rows = [_draw(seed) for seed in seeds]
    return Contexts(**{s.name: torch.as_tensor(np.array([row[s.name] for row in rows])) for s in fields(Contexts)})


def give_words(contexts: Contexts, seeds: Sequence[int], which: Tensor) -> Contexts:
    """Return the contexts with a word on a t-shirt or a hoodie in the rows `which` (N,) bool, and no close-up in them.

    A seed gives the same word in any batch. Everything else stays as it was sampled.
    """
    letters, clothes, framing = contexts.letters.clone(), contexts.clothes.clone(), contexts.framing.clone()
    for row in which.nonzero().flatten().tolist():
        random = np.random.default_rng([seeds[row], 7])
        letters[row] = torch.from_numpy(_word(random))
        if words.CLOTHES[int(clothes[row])] not in words.LETTERED_CLOTHES:
            clothes[row] = words.CLOTHES.index(str(random.choice(words.LETTERED_CLOTHES)))
        if words.FRAMINGS[int(framing[row])] == "close-up":
            framing[row] = words.FRAMINGS.index("portrait")
    return contexts.replace(letters=letters, clothes=clothes, framing=framing)


def attribute_indices(contexts: Contexts) -> dict[str, Tensor]:
    """Return each attribute with a closed list of values as indices (N,) into `vocabulary.ATTRIBUTES`."""
    return {
        "yaw": _side_index(contexts.yaw, 0.2),
        "pitch": _side_index(contexts.pitch, 0.13),
        "roll": _side_index(contexts.roll, 0.12),
        "gaze": _side_index(contexts.gaze, 0.4),
        **{name: getattr(contexts, name) for name in words.ATTRIBUTES if name not in ("yaw", "pitch", "roll", "gaze")},
    }


def letters_text(letters: Tensor) -> str:
    """Convert one row of letter numbers to text; no letters give an empty string."""
    return "".join(words.LETTERS[number - 1] for number in letters.tolist() if number > 0)


def letter_numbers(text: str) -> Tensor:
    """Convert at most three letters to numbers (3,), padded with 0."""
    numbers = [words.LETTERS.index(letter) + 1 for letter in text.upper()[: words.MAX_LETTERS]]
    return torch.tensor(numbers + [0] * (words.MAX_LETTERS - len(numbers)))


def _side_index(values: Tensor, edge: float) -> Tensor:
    return (values > edge).long() - (values < -edge).long() + 1


def _turn(random: np.random.Generator, still: float, small: float, low: float, high: float) -> np.float32:
    """Return an angle near zero with probability `still`, else one clearly to one side."""
    if random.random() < still:
        return np.float32(np.clip(random.normal(0, small), -2 * small, 2 * small))
    return np.float32(random.choice((-1, 1)) * random.uniform(low, high))


def _letters(random: np.random.Generator) -> np.ndarray:
    return _word(random) if random.random() < 0.45 else np.zeros(words.MAX_LETTERS, np.int64)


def _word(random: np.random.Generator) -> np.ndarray:
    text = np.zeros(words.MAX_LETTERS, np.int64)
    count = random.integers(1, words.MAX_LETTERS + 1)
    text[:count] = random.integers(1, len(words.LETTERS) + 1, count)
    return text


def _draw(seed: int) -> dict[str, object]:
    random = np.random.default_rng([seed, 2])

    def pick(odds: Sequence[float]) -> int:
        return int(random.choice(len(odds), p=odds))

    def even(values: Sequence[str]) -> int:
        return int(random.integers(len(values)))

    framing, clothes = pick(words.FRAMING_ODDS), even(words.CLOTHES)
    close = words.FRAMINGS[framing] == "close-up"
    plain = words.CLOTHES[clothes] in words.LETTERED_CLOTHES
    letters, held = _letters(random), pick(words.HELD_ODDS)
    return {
        "yaw": _turn(random, 0.4, 0.06, 0.36, 0.62),
        "pitch": _turn(random, 0.6, 0.04, 0.22, 0.36),
        "roll": _turn(random, 0.6, 0.03, 0.2, 0.34),
        "gaze": _turn(random, 0.5, 0.07, 0.8, 1.0),
        "expression": pick((0.25, 0.15, 0.15, 0.15, 0.15, 0.15)),
        "light": pick((0.4, 0.15, 0.15, 0.15, 0.15)),
        "scene": even(words.SCENES),
        "clothes": clothes,
        "clothes_colour": even(words.COLOURS),
        "headwear": pick(words.HEADWEAR_ODDS),
        "headwear_colour": even(words.COLOURS),
        "held": 0 if close else held,
        "letters": letters if plain and not close else np.zeros_like(letters),
        "style": pick(words.STYLE_ODDS),
        "framing": framing,
        "zoom": np.float32(random.uniform(0.95, 1.05)),
        "shift_x": np.float32(random.uniform(-0.025, 0.025)),
        "shift_y": np.float32(random.uniform(-0.02, 0.02)),
        "variation": random.random(SCENE_VARIATIONS).astype(np.float32),
    }
