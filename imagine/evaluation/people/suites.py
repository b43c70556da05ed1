"""Define the sentences of the suite `people`: two or three named people, and what each picture must show.

A sentence names people as {a}, {b} and {c}, in the order of their references. It asks something of each person, often
the place too, and something of the whole picture. It uses the phrases of `imagine.world`, and leaves the places out in
two of five sentences, so that the pipeline may choose them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

NAMES = ("a", "b", "c")


@dataclass(frozen=True)
class AskedPerson:
    """What a sentence asks of one person: attributes (attribute -> word) and the place, counted from the left.

    The place is None if the sentence leaves it out.
    """

    asked: Mapping[str, str]
    place: int | None = None


@dataclass(frozen=True)
class GroupPrompt:
    """One sentence, what it asks of the picture (attribute -> word), and what it asks of each person."""

    text: str
    picture: Mapping[str, str]
    people: tuple[AskedPerson, ...]

    @property
    def has_places(self) -> bool:
        """Whether the sentence says where everyone stands."""
        return all(person.place is not None for person in self.people)


def _person(expression: str, clothes: str, headwear: str = "", place: int | None = None) -> AskedPerson:
    """Return what is asked of a person; `clothes` starts with the colour, and no headwear is not asked for."""
    colour, garment = clothes.split(" ", 1)
    asked = {"expression": expression, "clothes": garment, "clothes_colour": colour}
    return AskedPerson({**asked, "headwear": headwear} if headwear else asked, place)


def _group(text: str, *people: AskedPerson, **picture: str) -> GroupPrompt:
    return GroupPrompt(text, picture, people)


# The first sentence of each number gives the places, because the exchange of references is judged by it.
PAIRS = (
    _group(
        "two people on a beach: {a} on the left, smiling, wearing a red t-shirt; "
        "{b} on the right, looking surprised, wearing a blue suit",
        _person("smiling", "red t-shirt", place=0), _person("surprised", "blue suit", place=1), scene="beach",
    ),
    _group(
        "a photo of two people in a city, at sunset: {a} on the right, laughing, in a beanie, wearing a black hoodie; "
        "{b} on the left, with a neutral expression, wearing a white suit",
        _person("laughing", "black hoodie", "beanie", 1), _person("neutral", "white suit", place=0),
        scene="city", light="sunset", style="photo",
    ),
    _group(
        "two people in the snow: {a}, looking sad, wearing a green hoodie; "
        "{b}, smiling, in a sun hat, wearing a yellow t-shirt",
        _person("sad", "green hoodie"), _person("smiling", "yellow t-shirt", "sun hat"), scene="snow",
    ),
    _group(
        "a watercolour painting of two people in a forest: {a} on the left, looking angry, wearing a purple hoodie; "
        "{b} on the right, laughing, in a cap, wearing a white t-shirt",
        _person("angry", "purple hoodie", place=0), _person("laughing", "white t-shirt", "cap", 1),
        scene="forest", style="watercolour",
    ),
    _group(
        "two people in the mountains, in moonlight: {a}, laughing, wearing an orange striped shirt; "
        "{b}, with a calm face, in a crown, wearing a black suit",
        _person("laughing", "orange striped shirt"), _person("neutral", "black suit", "crown"),
        scene="mountains", light="moonlight",
    ),
)  # fmt: skip
TRIPLES = (
    _group(
        "three people in a forest: {a} on the left, smiling, wearing a red hoodie; "
        "{b} in the middle, looking surprised, wearing a white t-shirt; "
        "{c} on the right, laughing, wearing a blue suit",
        _person("smiling", "red hoodie", place=0), _person("surprised", "white t-shirt", place=1),
        _person("laughing", "blue suit", place=2), scene="forest",
    ),
    _group(
        "a photo of three people on a beach: {a} in the middle, laughing, in a sun hat, wearing a yellow t-shirt; "
        "{b} on the right, smiling, wearing a green striped shirt; "
        "{c} on the left, looking sad, wearing a black hoodie",
        _person("laughing", "yellow t-shirt", "sun hat", 1), _person("smiling", "green striped shirt", place=2),
        _person("sad", "black hoodie", place=0), scene="beach", style="photo",
    ),
    _group(
        "three people in a city: {a}, looking angry, wearing a black suit; "
        "{b}, smiling, in a cap, wearing an orange hoodie; {c}, looking surprised, wearing a purple t-shirt",
        _person("angry", "black suit"), _person("smiling", "orange hoodie", "cap"),
        _person("surprised", "purple t-shirt"), scene="city",
    ),
    _group(
        "a comic book drawing of three people in the mountains: {a} on the right, laughing, wearing a green hoodie; "
        "{b} on the left, with a calm face, in a beanie, wearing a red striped shirt; "
        "{c} in the middle, smiling, wearing a white suit",
        _person("laughing", "green hoodie", place=2), _person("neutral", "red striped shirt", "beanie", 0),
        _person("smiling", "white suit", place=1), scene="mountains", style="comic",
    ),
    _group(
        "three people in a desert, at sunset: {a}, smiling, in a crown, wearing a blue t-shirt; "
        "{b}, looking sad, wearing a white hoodie; {c}, laughing, wearing a black striped shirt",
        _person("smiling", "blue t-shirt", "crown"), _person("sad", "white hoodie"),
        _person("laughing", "black striped shirt"), scene="desert", light="sunset",
    ),
)  # fmt: skip

GROUP_SUITES: Mapping[str, Mapping[int, tuple[GroupPrompt, ...]]] = {"people": {2: PAIRS, 3: TRIPLES}}
