"""Define the prompt suites: fixed sentences, each with the attributes that its pictures must show.

The sentences read like a user's prompts and use the vocabulary of the world. `contexts_for` turns requested attributes
into contexts to render, so that real pictures which follow a prompt can be compared with the pipeline's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import radians

import torch
from torch import Tensor

from imagine.errors import ConfigError
from imagine.world import Contexts, sample_contexts
from imagine.world.contexts import letter_numbers
from imagine.world.vocabulary import ATTRIBUTES, CLOTHES, LETTERED_CLOTHES

_TURNS = {"yaw": radians(28), "pitch": radians(17), "roll": radians(15), "gaze": 0.9}  # clearly to one side
_DEFAULTS = {
    "style": "photo", "light": "soft", "headwear": "none", "held": "none", "letters": "", "framing": "portrait",
    "pitch": "level", "roll": "upright",
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """One sentence, the attributes that it requests (attribute -> word) and the group that reports list it in."""

    text: str
    group: str
    asked: Mapping[str, str]


def _p(group: str, text: str, **asked: str) -> Prompt:
    return Prompt(text, group, asked)


# "left" and "right" are sides of the picture, from the viewer. The first 13 prompts request every attribute at least
# once.
PORTRAITS: tuple[Prompt, ...] = (
    _p("expression", "a person, laughing", expression="laughing"),
    _p("gaze and head turn", "a person, head turned to the left, eyes looking right", yaw="left", gaze="right"),
    _p("gaze and head turn", "a person, chin up, head leaning to the right", pitch="up", roll="right"),
    _p("scene", "a person, on a beach", scene="beach"),
    _p("clothes", "a person, wearing a red hoodie", clothes="hoodie", clothes_colour="red"),
    _p("headwear", "a person, wearing a crown", headwear="crown"),
    _p("held", "a person, holding a balloon", held="balloon"),
    _p("style", "a pencil sketch of a person", style="pencil"),
    _p("light", "a person, in moonlight", light="moonlight"),
    _p("framing", "a photo of a person, close-up", framing="close-up", style="photo"),
    _p("letters", 'a person, wearing a white t-shirt with the letters "OK"', letters="OK", clothes="t-shirt",
       clothes_colour="white"),
    _p("combined", "a watercolour painting of a person, smiling, in the snow", expression="smiling", scene="snow",
       style="watercolour"),
    _p("combined", "a person, looking surprised, wearing a blue suit, in a city", expression="surprised",
       clothes="suit", clothes_colour="blue", scene="city"),
    # -- expression
    _p("expression", "a person, smiling", expression="smiling"),
    _p("expression", "a person with a sad face", expression="sad"),
    _p("expression", "a person, looking surprised", expression="surprised"),
    _p("expression", "a photo of a person, looking angry", expression="angry", style="photo"),
    _p("expression", "a person with a calm face", expression="neutral"),
    # -- gaze and head turn
    _p("gaze and head turn", "a person, head turned to the right", yaw="right"),
    _p("gaze and head turn", "a person, facing the camera", yaw="front"),
    _p("gaze and head turn", "a person, eyes looking left", gaze="left"),
    _p("gaze and head turn", "a person, glancing to the right", gaze="right"),
    _p("gaze and head turn", "a person, chin down", pitch="down"),
    _p("gaze and head turn", "a person, head leaning to the left", roll="left"),
    _p("gaze and head turn", "a person, head turned to the left, eyes looking left", yaw="left", gaze="left"),
    _p("gaze and head turn", "a person, head turned to the right, chin up", yaw="right", pitch="up"),
    # -- scene
    _p("scene", "a person, in a forest", scene="forest"),
    _p("scene", "a person, in front of city buildings", scene="city"),
    _p("scene", "a photo of a person, in the mountains", scene="mountains", style="photo"),
    _p("scene", "a person, at home in a room with a window", scene="room"),
    _p("scene", "a person, in the snow", scene="snow"),
    _p("scene", "a person, among desert dunes", scene="desert"),
    _p("scene", "a person, among the stars in space", scene="space"),
    # -- clothes
    _p("clothes", "a person, wearing a green t-shirt", clothes="t-shirt", clothes_colour="green"),
    _p("clothes", "a person, wearing a black suit", clothes="suit", clothes_colour="black"),
    _p("clothes", "a person, wearing a yellow striped shirt", clothes="striped shirt", clothes_colour="yellow"),
    _p("clothes", "a person, wearing a purple hoodie", clothes="hoodie", clothes_colour="purple"),
    _p("clothes", "a person, wearing an orange t-shirt", clothes="t-shirt", clothes_colour="orange"),
    _p("clothes", "a person, wearing a white suit", clothes="suit", clothes_colour="white"),
    # -- headwear
    _p("headwear", "a person, wearing a cap", headwear="cap"),
    _p("headwear", "a person, in a beanie", headwear="beanie"),
    _p("headwear", "a person, wearing a sun hat", headwear="sun hat"),
    # -- held
    _p("held", "a person, holding a flower", held="flower"),
    _p("held", "a person, with a cup of coffee", held="cup"),
    # -- style
    _p("style", "a watercolour of a person", style="watercolour"),
    _p("style", "pixel art of a person", style="pixel art"),
    _p("style", "a comic book drawing of a person", style="comic"),
    _p("style", "a photograph of a person", style="photo"),
    # -- light
    _p("light", "a person, in warm sunset light", light="sunset"),
    _p("light", "a person, lit from the left", light="left"),
    _p("light", "a person, with light from the right", light="right"),
    _p("light", "a person, in daylight", light="soft"),
    # -- framing
    _p("framing", "a person, head and shoulders", framing="portrait"),
    _p("framing", "a person, half body shot", framing="half body"),
    # -- letters
    _p("letters", 'a person, wearing a yellow t-shirt with the letters "A"', letters="A", clothes="t-shirt",
       clothes_colour="yellow"),
    _p("letters", 'a person, wearing a blue hoodie with the letters "NO"', letters="NO", clothes="hoodie",
       clothes_colour="blue"),
    _p("letters", 'a person, wearing a black t-shirt with the letters "SUN"', letters="SUN", clothes="t-shirt",
       clothes_colour="black"),
    _p("letters", 'a person, wearing a green hoodie with the letters "XYZ"', letters="XYZ", clothes="hoodie",
       clothes_colour="green"),
    # -- combined
    _p("combined", "a person, laughing, wearing a sun hat, on a beach", expression="laughing", scene="beach",
       headwear="sun hat"),
    _p("combined", "a person, looking sad, chin down, in a forest", expression="sad", pitch="down", scene="forest"),
    _p("combined", "a comic of a person, looking angry, head turned to the left", expression="angry", yaw="left",
       style="comic"),
    _p("combined", "a person, smiling, holding a flower, in the mountains, at sunset", expression="smiling",
       held="flower", scene="mountains", light="sunset"),
    _p("combined", "a person, wearing a purple suit, in a crown, in space", headwear="crown", clothes="suit",
       clothes_colour="purple", scene="space"),
    _p("combined", 'a person, laughing, wearing a white t-shirt with the letters "GO", in a room',
       expression="laughing", clothes="t-shirt", clothes_colour="white", letters="GO", scene="room"),
    _p("combined", "a photo of a person, close up of the face, eyes looking left, in moonlight", framing="close-up",
       gaze="left", light="moonlight", style="photo"),
    _p("combined", "pixel art of a person, looking surprised, holding a cup", expression="surprised", held="cup",
       style="pixel art"),
    _p("combined", "a person, half body, wearing a black hoodie, wearing a beanie, in the snow", framing="half body",
       clothes="hoodie", clothes_colour="black", headwear="beanie", scene="snow"),
)  # fmt: skip

SUITES = {"portraits": PORTRAITS}
# The versions of `portraits`: version -> number of the first prompt that it changed. Version 2 asks for "GO" where
# version 1 asked for "HI", which the judge reads in 2 of 24 real pictures.
_CHANGED = {2: 63}
OTHER_SUITES = ("people", "dreambench", "photos")  # which imagine.evaluation.people and photos define


def load_suite(name: str) -> tuple[Prompt, ...]:
    """Return the prompts of a suite of one person. Raises ConfigError for an unknown name."""
    if name not in SUITES:
        raise ConfigError(f"There is no suite {name!r}: choose from {', '.join((*SUITES, *OTHER_SUITES))}.")
    return SUITES[name]


def suite_version(prompts: int = len(PORTRAITS)) -> int:
    """Return the version of the first prompts of `portraits`: numbers of different versions do not compare."""
    return max((version for version, number in _CHANGED.items() if prompts > number), default=1)


def contexts_for(asked: Sequence[Mapping[str, str]], seeds: Sequence[int]) -> Contexts:
    """Return one context per row that shows the requested attributes; the rest is as in an everyday photo.

    Expression, head turn, gaze, scene and clothes that a row does not request are drawn from the row's seed. Every
    other attribute takes a plain default, which a sentence implies if it does not name the attribute: a
    head-and-shoulders photo in soft light, head upright, no hat, nothing in hand, no letters.
    """
    contexts = sample_contexts(seeds)
    columns = {name: getattr(contexts, name).clone() for name in (*ATTRIBUTES, "letters")}
    for row, wanted in enumerate(asked):
        for name, word in {**_DEFAULTS, **_required_changes(wanted, columns, row), **wanted}.items():
            columns[name][row] = _value(name, word, columns[name][row])
    return contexts.replace(**columns)


def _required_changes(wanted: Mapping[str, str], columns: Mapping[str, Tensor], row: int) -> dict[str, str]:
    """Return the attributes that must change so that requested letters are visible: clothes that can carry letters."""
    if "letters" in wanted and CLOTHES[int(columns["clothes"][row])] not in LETTERED_CLOTHES:
        return {"clothes": "t-shirt"}
    return {}


def _value(name: str, word: str, like: Tensor) -> Tensor:
    if name == "letters":
        return letter_numbers(word)
    number = ATTRIBUTES[name].index(word)
    if name in _TURNS:
        return torch.tensor((number - 1) * _TURNS[name], dtype=like.dtype)
    return torch.tensor(number, dtype=like.dtype)
