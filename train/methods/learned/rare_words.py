"""Search a rare word for a subject: DreamBooth's identifier (arXiv 2208.12242, section 3.2).

The paper draws uniformly from the T5-XXL ids 5,000 to 10,000 that decode to at most three characters. CLIP orders its
vocabulary by how often a piece was merged, so its rare words are single tokens at the tail of the table. A common
English word is refused: its meaning would compete with the subject's.
"""

import random
from collections.abc import Sequence

from imagine.errors import ConfigError
from train.methods.bases.text import Reader

MOST_CHARACTERS = 3
MOST_TOKENS = 3  # in the text encoders other than the first (the paper's identifiers have one to three tokens)
TAIL = 0.5  # the share of the candidates, the rarest, from which one is drawn
T5_RANGE = range(5_000, 10_000)

# Words and abbreviations of up to three letters that mean something in many captions.
_COMMON = frozenset(
    """
    a ace act add age ago aid aim air all an and ant any ape app are arm art as ash ask at ate bad bag ban bar bat
    bay be bed bee big bin bit boa bob bow box boy bud bug bun bus but buy by cab can cap car cat cop cow cry cub
    cup cut dad day den dew did die dig dim do dog dot dry duo ear eat egg ego elf end era eve eye fan far fat fed
    fee few fig fin fit fix fly fog for fox fun fur gag gap gas gel gem get go god gum gun gut guy gym ham has hat
    hay he hen her hew hey hi him hip his hit hog hop hot how hub hug hut ice icy if ill in ink inn is it its jam
    jar jaw jet job joy keg key kid kit lab lad lap law lay led leg let lid lie lip lit log lot low mad man map mat
    may me men met mid mix mob mom mop mud mug my nap net new no nod nor not now nun nut oak odd of off oh oil ok
    old on one or our out owl own pad pan paw pay pea pen pet pie pig pin pit pot pub pup ran rat raw ray red rib
    rid rim rip rob rod row rub rug run sad sat saw say sea see set she shy sin sip sir sit six sky so son spa sum
    sun tab tag tan tap tar tax tea tee ten the tie tin tip to toe tom ton too top toy try tub two up us use van vat
    vet via viv wax way we web wed wet who why wig win wit won yak yam yen yes yet you zen zip zoo img api usa uk
    gun sks sbs nye cgi sdf tae mtg amc
    """.split()  # noqa: SIM905  (shorter than a list)
)


def candidates(readers: Sequence[Reader]) -> list[str]:
    """Return the rare words that fit all text encoders, rarest first; empty if there are none."""
    first, others = readers[0], readers[1:]
    found = [word for word in _rarest_first(first) if word not in _COMMON]
    return [word for word in found if all(len(reader.ids(word)) <= MOST_TOKENS for reader in others)] or found


def rare_word(readers: Sequence[Reader], seed: int, number: int = 0) -> str:
    """Draw a rare word; `number` counts the subjects of one run, which get different words.

    Raises ConfigError if the tokenizers have none.
    """
    words = candidates(readers)
    tail = words[: max(1, round(TAIL * len(words)))]
    if len(tail) <= number:
        raise ConfigError("The tokenizer has no rare short word for the subject: name one with token=.")
    random.Random(seed).shuffle(tail)
    return tail[number]


def _rarest_first(reader: Reader) -> list[str]:
    """Return the single-token words of at most three letters in an encoder's vocabulary, the highest id first."""
    vocabulary: dict[str, int] = reader.tokenizer.get_vocab()
    ids = T5_RANGE if _is_t5(vocabulary) and len(vocabulary) > T5_RANGE.stop else range(10**9)
    words = {}
    for piece, number in vocabulary.items():
        word = piece.removesuffix("</w>") if piece.endswith("</w>") else piece.removeprefix("▁")
        whole = piece != word
        fits = 2 <= len(word) <= MOST_CHARACTERS and word.isascii() and word.isalpha() and word.islower()
        if whole and fits and number in ids and reader.ids(word) == [number]:
            words[word] = number
    return sorted(words, key=lambda word: -words[word])


def _is_t5(vocabulary: dict[str, int]) -> bool:
    return any(piece.startswith("▁") for piece in vocabulary)
