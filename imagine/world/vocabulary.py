"""The words and colours of the portrait world: the values of every discrete attribute, in the order of their numbers.

Renderer, captions, judge and evaluation all index these tuples, so that a word has the same meaning everywhere.
"""

HAIR_STYLES = ("bald", "buzz cut", "short", "fringe", "side part", "curly", "afro", "long", "bun", "mohawk")
HAIR_COLOURS = ("black", "brown", "blond", "red", "grey", "white", "blue", "pink")
HAIR_RGB = (
    (0.13, 0.11, 0.12), (0.38, 0.23, 0.14), (0.90, 0.74, 0.40), (0.74, 0.30, 0.13),
    (0.52, 0.52, 0.54), (0.93, 0.92, 0.90), (0.18, 0.36, 0.78), (0.93, 0.46, 0.66),
)  # fmt: skip
HAIR_ODDS = (0.2, 0.22, 0.18, 0.13, 0.09, 0.06, 0.06, 0.06)
EYE_COLOURS = ("brown", "blue", "green", "grey")
EYE_RGB = ((0.40, 0.23, 0.11), (0.25, 0.50, 0.86), (0.28, 0.60, 0.30), (0.54, 0.59, 0.62))
BEARDS = ("none", "stubble", "moustache", "goatee", "full beard")
BEARD_ODDS = (0.55, 0.1, 0.11, 0.11, 0.13)
GLASSES = ("none", "round", "square")
GLASSES_ODDS = (0.64, 0.18, 0.18)

EXPRESSIONS = ("neutral", "smiling", "laughing", "sad", "surprised", "angry")
SIDES = ("left", "front", "right")
TILTS = ("left", "upright", "right")
PITCHES = ("up", "level", "down")
GAZES = ("left", "ahead", "right")
LIGHTS = ("soft", "left", "right", "sunset", "moonlight")
SCENES = ("beach", "forest", "city", "mountains", "room", "snow", "desert", "space")
CLOTHES = ("t-shirt", "hoodie", "suit", "striped shirt")
LETTERED_CLOTHES = ("t-shirt", "hoodie")  # clothes that may carry letters
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
COLOUR_RGB = (
    (0.82, 0.16, 0.16), (0.95, 0.52, 0.12), (0.96, 0.83, 0.22), (0.20, 0.58, 0.28),
    (0.18, 0.36, 0.78), (0.52, 0.25, 0.66), (0.13, 0.13, 0.15), (0.93, 0.93, 0.91),
)  # fmt: skip
HEADWEAR = ("none", "cap", "beanie", "sun hat", "crown")
HEADWEAR_ODDS = (0.56, 0.11, 0.11, 0.11, 0.11)
HELD = ("none", "balloon", "flower", "cup")
HELD_ODDS = (0.58, 0.14, 0.14, 0.14)
STYLES = ("photo", "pencil", "watercolour", "pixel art", "comic")
STYLE_ODDS = (0.52, 0.12, 0.12, 0.12, 0.12)
FRAMINGS = ("close-up", "portrait", "half body")
FRAMING_ODDS = (0.25, 0.5, 0.25)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_LETTERS = 3

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "expression": EXPRESSIONS,
    "gaze": GAZES,
    "yaw": SIDES,
    "pitch": PITCHES,
    "roll": TILTS,
    "light": LIGHTS,
    "scene": SCENES,
    "clothes": CLOTHES,
    "clothes_colour": COLOURS,
    "headwear": HEADWEAR,
    "held": HELD,
    "style": STYLES,
    "framing": FRAMINGS,
}
"""Context attributes with a closed list of values; `letters` is free text of at most `MAX_LETTERS` capitals."""

TRAITS: dict[str, tuple[str, ...]] = {
    "hair_style": HAIR_STYLES,
    "hair_colour": HAIR_COLOURS,
    "eye_colour": EYE_COLOURS,
    "beard": BEARDS,
    "glasses": GLASSES,
    "freckles": ("no", "yes"),
}
"""Identity traits with a closed list of values; the others are continuous."""
