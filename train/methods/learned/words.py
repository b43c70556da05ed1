"""Words that a method learns: rows beside the tables of word embeddings, one set per text encoder.

A word has `vectors` rows, which stand for consecutive tokens, and `layers` versions of each: one, or one for every
cross-attention layer (P+, arXiv 2303.09522). Textual Inversion (arXiv 2208.01618) is one row and one version.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imagine.errors import ConfigError
from train.methods.bases.contract import AnyBase
from train.methods.bases.text import TextState, inserting


def tokens_of(name: str, vectors: int) -> list[str]:
    """Return the tokens of a word with several vectors, named as diffusers names them: token, token_1, ..."""
    return [name, *(f"{name}_{number}" for number in range(1, vectors))]


class LearntWords(nn.Module):
    """The rows of the subjects' words, (layers, words, width) for every text encoder of a base.

    Tables of different encoders differ in scale: T5's rows are forty times as long as CLIP's. The parameters are
    therefore rows divided by the scale of their table, relative to the first encoder's, so that one learning rate moves
    the rows of all encoders by the same share.
    """

    def __init__(self, base: AnyBase, names: Sequence[str], initial: str, vectors: int = 1, layers: int = 1) -> None:
        super().__init__()
        self.names, self.vectors, self.layers = list(names), vectors, layers
        self.rows = nn.ParameterDict()
        self.scales = table_scales(base)
        words = [token for name in names for token in tokens_of(name, vectors)]
        for reader in base.readers:
            if not reader.ids(initial):
                raise ConfigError(f"The tokenizer {reader.name} reads nothing in {initial!r}: name a class noun.")
            start = reader.mean_row(initial)
            reader.add_words(words)
            self.rows[reader.name] = nn.Parameter(start.repeat(layers, len(words), 1) / self.scales[reader.name])

    def table_rows(self, reader: str) -> Tensor:
        """Return the rows (layers, words, width) in the scale of an encoder's table."""
        found: Tensor = self.rows[reader] * self.scales[reader]
        return found

    def replaced(self, prompt: str) -> str:
        """Return the prompt with the further tokens of each word written out after its name."""
        for name in self.names:
            prompt = prompt.replace(name, " ".join(tokens_of(name, self.vectors)))
        return prompt

    def encode(self, base: AnyBase, prompts: Sequence[str], detached: bool = False) -> TextState:
        """Encode prompts with these rows; with several layers, (B * layers) sentences, those of a prompt adjacent."""
        written = [self.replaced(prompt) for prompt in prompts for _ in range(self.layers)]
        rows = {name: self.table_rows(name).detach() if detached else self.table_rows(name) for name in self.rows}
        if self.layers > 1:
            rows = {name: value.repeat(len(prompts), 1, 1) for name, value in rows.items()}
        with inserting(rows):
            return base.text(written)

    def files(self) -> dict[str, Tensor]:
        """Return the rows (vectors, width) by word and text encoder, under "WORD/ENCODER"; for one layer only."""
        found: dict[str, Tensor] = {}
        for reader in self.rows:
            for number, name in enumerate(self.names):
                start = number * self.vectors
                found[f"{name}/{reader}"] = (
                    self.table_rows(reader)[0, start : start + self.vectors].detach().clone().contiguous()
                )
        return found


def table_scales(base: AnyBase) -> dict[str, float]:
    """Return the standard deviation of every encoder's table, relative to the first encoder's."""
    spreads = {reader.name: float(reader.embedding.weight.float().std()) for reader in base.readers}
    first = spreads[base.readers[0].name]
    return {name: spread / first for name, spread in spreads.items()}


def position(text: TextState, word: int) -> Tensor:
    """Return the state (B, width) of the learnt word number `word` (from 1) in each sentence; zeros if it is absent."""
    if text.places is None:
        raise ConfigError("The sentences have no learnt word: name the token in every template.")
    here = (text.places == word).to(text.clip.values.dtype)
    share = here / here.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bl,blw->bw", share, text.clip.values)
