"""Write captions in three styles, and list the attributes behind them.

- dense: a complete description of person and picture, as a captioning model writes it;
- terse: a few noisy words, like labels of pictures on the web, which give little information;
- rewritten: a description of the picture without the person's identity, as users write prompts.

The prompts in `imagine/evaluation/suites.py` use the same phrases.
"""

from collections.abc import Sequence

import numpy as np

from imagine.world import vocabulary as words
from imagine.world.contexts import Contexts, attribute_indices, letters_text
from imagine.world.people import People

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "expression": {
        "neutral": ("with a neutral expression", "with a calm face"),
        "smiling": ("smiling", "with a smile"),
        "laughing": ("laughing", "laughing out loud"),
        "sad": ("looking sad", "with a sad face"),
        "surprised": ("looking surprised", "with a surprised face"),
        "angry": ("looking angry", "with an angry face"),
    },
    "yaw": {
        "left": ("head turned to the left", "turned left"),
        "front": ("facing the camera", "facing forward"),
        "right": ("head turned to the right", "turned right"),
    },
    "gaze": {
        "left": ("eyes looking left", "glancing to the left"),
        "ahead": ("eyes straight ahead", "looking straight ahead"),
        "right": ("eyes looking right", "glancing to the right"),
    },
    "pitch": {
        "up": ("chin up", "face lifted up"),
        "level": ("head level",),
        "down": ("chin down", "face lowered"),
    },
    "roll": {
        "left": ("head leaning to the left", "leaning left"),
        "upright": ("head upright",),
        "right": ("head leaning to the right", "leaning right"),
    },
    "scene": {
        "beach": ("on a beach", "at the beach by the sea"),
        "forest": ("in a forest", "among trees in a forest"),
        "city": ("in a city", "in front of city buildings"),
        "mountains": ("in the mountains", "in front of mountains"),
        "room": ("in a room", "at home in a room with a window"),
        "snow": ("in the snow", "outside in winter snow"),
        "desert": ("in a desert", "among desert dunes"),
        "space": ("in space", "among the stars in space"),
    },
    "light": {
        "soft": ("in soft light", "in daylight"),
        "left": ("lit from the left", "with light from the left"),
        "right": ("lit from the right", "with light from the right"),
        "sunset": ("at sunset", "in warm sunset light"),
        "moonlight": ("in moonlight", "at night in blue moonlight"),
    },
    "headwear": {
        "none": ("bareheaded",),
        "cap": ("in a cap", "wearing a cap"),
        "beanie": ("in a beanie", "wearing a beanie"),
        "sun hat": ("in a sun hat", "wearing a sun hat"),
        "crown": ("in a crown", "wearing a crown"),
    },
    "held": {
        "none": ("with empty hands",),
        "balloon": ("holding a balloon", "with a red balloon"),
        "flower": ("holding a flower", "with a flower in hand"),
        "cup": ("holding a cup", "with a cup of coffee"),
    },
    "framing": {
        "close-up": ("close-up", "close up of the face"),
        "portrait": ("portrait", "head and shoulders"),
        "half body": ("half body", "half body shot"),
    },
}
STYLE_PHRASES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of", "a photograph of"),
    "pencil": ("a pencil sketch of", "a pencil drawing of"),
    "watercolour": ("a watercolour painting of", "a watercolour of"),
    "pixel art": ("a pixel art picture of", "pixel art of"),
    "comic": ("a comic book drawing of", "a comic of"),
}
_DEFAULTS = {
    "expression": "neutral", "yaw": "front", "gaze": "ahead", "pitch": "level", "roll": "upright", "light": "soft",
    "headwear": "none", "held": "none", "framing": "portrait", "style": "photo",
}  # fmt: skip
_ORDER = ("expression", "yaw", "gaze", "pitch", "roll", "headwear", "held", "scene", "light", "framing")
_EXTREMES = {  # trait -> phrases for values below 0.3 and above 0.7
    "head_width": ("a narrow face", "a wide face"),
    "jaw": ("a pointed chin", "a square jaw"),
    "eye_spacing": ("close-set eyes", "wide-set eyes"),
    "eye_size": ("small eyes", "big eyes"),
    "brow_thickness": ("thin brows", "thick brows"),
    "nose_length": ("a short nose", "a long nose"),
    "nose_width": ("a narrow nose", "a broad nose"),
    "mouth_width": ("a small mouth", "a wide mouth"),
    "lip_fullness": ("thin lips", "full lips"),
    "ear_size": ("small ears", "big ears"),
}
_DENSE_LENGTH = 58  # tokens, so that a dense caption fits into one window of the small CLIP text encoder
_SKINS = ("fair", "light", "tan", "brown", "dark")
_HAIR = {
    "bald": "a bald head", "buzz cut": "a {} buzz cut", "short": "short {} hair", "fringe": "{} hair with a fringe",
    "side part": "{} hair with a side part", "curly": "curly {} hair", "afro": "a {} afro", "long": "long {} hair",
    "bun": "{} hair in a bun", "mohawk": "a {} mohawk",
}  # fmt: skip


def attributes(people: People, contexts: Contexts) -> list[dict[str, str]]:
    """Return all attributes of each picture by name: context attributes, letters (may be empty) and identity traits."""
    numbers = attribute_indices(contexts)
    rows = []
    for i in range(len(contexts)):
        row = {name: values[int(numbers[name][i])] for name, values in words.ATTRIBUTES.items()}
        row["letters"] = letters_text(contexts.letters[i])
        row |= {name: values[int(getattr(people, name)[i])] for name, values in words.TRAITS.items()}
        rows.append(row)
    return rows


def captions(people: People, contexts: Contexts, style: str = "dense", seed: "int | Sequence[int]" = 0) -> list[str]:
    """Return one caption per row in the style "dense", "terse" or "rewritten"; `seed` is one per row or one for all."""
    write = {"dense": _dense, "terse": _terse, "rewritten": _rewritten}.get(style)
    if write is None:
        raise ValueError(f"There is no caption style {style!r}: choose dense, terse or rewritten.")
    seeds = [seed] * len(contexts) if isinstance(seed, int) else seed
    facts = attributes(people, contexts)
    return [
        write(people, i, row, np.random.default_rng([number, 4]))
        for i, (row, number) in enumerate(zip(facts, seeds, strict=True))
    ]


def choose(random: np.random.Generator, options: Sequence[str]) -> str:
    """Return one of the options."""
    return options[int(random.integers(len(options)))]


def garment(row: dict[str, str]) -> str:
    """Return the phrase for the garment in a row of `attributes`, with the letters on it."""
    text = f"wearing a {row['clothes_colour']} {row['clothes']}"
    if text.startswith("wearing a orange"):
        text = text.replace(" a ", " an ", 1)
    return text + (f' with the letters "{row["letters"]}"' if row["letters"] else "")


def _picture(
    row: dict[str, str], random: np.random.Generator, probability: float, default_probability: float
) -> list[str]:
    """Return phrases for the context, with random omissions, in a fixed order or (half of the time) shuffled."""
    parts = []
    for name in _ORDER:
        chance = default_probability if row[name] == _DEFAULTS.get(name) else probability
        if random.random() < chance:
            parts.append(choose(random, PHRASES[name][row[name]]))
    if row["letters"] or random.random() < probability:
        parts.insert(min(2, len(parts)), garment(row))
    if random.random() < 0.5:
        random.shuffle(parts)
    return parts


def _opening(row: dict[str, str], random: np.random.Generator) -> str:
    """Return the phrase for the style; a photo often gets none."""
    if row["style"] == "photo" and random.random() < 0.4:
        return ""
    return choose(random, STYLE_PHRASES[row["style"]]) + " "


def _rewritten(people: People, i: int, row: dict[str, str], random: np.random.Generator) -> str:
    return _opening(row, random) + ", ".join(["a person", *_picture(row, random, 0.85, 0.3)])


def _dense(people: People, i: int, row: dict[str, str], random: np.random.Generator) -> str:
    opening, picture = _opening(row, random), _picture(row, random, 0.9, 0.25)
    tokens_left = _DENSE_LENGTH - _length(opening) - sum(map(_length, picture))
    return opening + ", ".join([describe_person(people, i, row, tokens_left, random), *picture])


def _length(text: str) -> int:
    """Estimate the number of tokens of a phrase and its comma."""
    return len(text.replace("-", " - ").split()) + 1


def describe_person(people: People, i: int, row: dict[str, str], tokens_left: int, random: np.random.Generator) -> str:
    """Describe the person: the most visible traits first, then as many finer traits as fit into the tokens left."""
    age, skin = float(people.age[i]), float(people.skin[i])
    noun = "a young person" if age < 0.35 else "an old person" if age > 0.7 else "a person"
    hair = _HAIR[row["hair_style"]].format(row["hair_colour"])
    parts = [f"{_SKINS[min(4, int(skin * 5))]} skin", hair]
    if row["beard"] != "none":
        parts.append(row["beard"] if row["beard"] == "stubble" else f"a {row['hair_colour']} {row['beard']}")
    if row["glasses"] != "none":
        parts.append(f"{row['glasses']} glasses")
    finer = [f"{row['eye_colour']} eyes"] + ["freckles"] * (row["freckles"] == "yes")
    for name, (low, high) in _EXTREMES.items():
        value = float(getattr(people, name)[i])
        if value < 0.3 or value > 0.7:
            finer.append(low if value < 0.3 else high)
    random.shuffle(finer)
    tokens_left -= sum(map(_length, parts)) + 4
    for phrase in finer:
        tokens_left -= _length(phrase)
        if tokens_left >= 0:
            parts.append(phrase)
    return f"{noun} with {', '.join(parts)}"


def _terse(people: People, i: int, row: dict[str, str], random: np.random.Generator) -> str:
    tags = [
        row["scene"],
        row["clothes"],
        row["expression"],
        row["headwear"],
        row["hair_colour"] + " hair",
        row["style"],
    ]
    tags = [tag for tag in tags if tag not in ("none", "neutral", "photo") and random.random() < 0.5]
    if random.random() < 0.3:
        tags.append(choose(random, ("portrait", "me", "img", "profile pic", "best shot", "holiday")))
    random.shuffle(tags)
    return " ".join(["person", *tags])
