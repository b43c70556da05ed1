"""What a sentence becomes for the denoiser, and how a method replaces the embeddings of its own words in it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from imagine.errors import ConfigError
from imagine.records import Tokens, join, repeat, take


@dataclass(frozen=True)
class TextState:
    """Encoded sentences: the denoiser's own text (`clip`), one vector per sentence, and further text branches.

    `places` (B, L) is k where the k-th learnt word of `inserting` stands in `clip`, counted from 1, and 0 elsewhere.
    """

    clip: Tokens
    pooled: Tensor | None = None  # (B, width)
    branches: Mapping[str, Tokens] = field(default_factory=dict)
    places: Tensor | None = None

    def __len__(self) -> int:
        return len(self.clip.values)

    def take(self, rows: "Tensor | slice | Sequence[int]") -> "TextState":
        """Return the sentences at these indices, which may repeat."""
        rows = rows if isinstance(rows, (Tensor, slice)) else torch.tensor(list(rows))
        return TextState(
            take(self.clip, rows),
            None if self.pooled is None else self.pooled[rows],
            {name: take(tokens, rows) for name, tokens in self.branches.items()},
            None if self.places is None else self.places[rows],
        )

    def repeat(self, copies: int) -> "TextState":
        """Repeat every sentence `copies` times; the copies are adjacent."""
        return TextState(
            repeat(self.clip, copies),
            None if self.pooled is None else self.pooled.repeat_interleave(copies, 0),
            {name: repeat(tokens, copies) for name, tokens in self.branches.items()},
            None if self.places is None else self.places.repeat_interleave(copies, 0),
        )


def join_texts(texts: Sequence[TextState]) -> TextState:
    """Concatenate batches of sentences; `places` are kept if all have them and are of one length."""
    first = texts[0]
    if len(texts) == 1:
        return first
    places = [text.places for text in texts]
    kept = None
    if all(each is not None for each in places) and len({each.shape[1] for each in places if each is not None}) == 1:
        kept = torch.cat(cast("list[Tensor]", places))
    return TextState(
        join([text.clip for text in texts]),
        None if first.pooled is None else torch.cat([cast(Tensor, text.pooled) for text in texts]),
        {name: join([text.branches[name] for text in texts]) for name in first.branches},
        kept,
    )


@dataclass
class _Insertion:
    """Rows by text encoder, (1 or B, words, width), and where the first encoder found the words."""

    rows: Mapping[str, Tensor]
    places: Tensor | None = None


_insertion: ContextVar[_Insertion | None] = ContextVar("insertion", default=None)


@contextmanager
def inserting(rows: Mapping[str, Tensor]) -> Iterator[_Insertion]:
    """Within the block, text encoders read these rows, (1 or B, words, width) by encoder, at the words of `Reader`."""
    insertion = _Insertion(rows)
    token = _insertion.set(insertion)
    try:
        yield insertion
    finally:
        _insertion.reset(token)


class Reader:
    """One text encoder with its tokenizer, to which a method can add words.

    A row of the embedding table is never trained. The rows of the added words take the place of the table's rows during
    a call (`inserting`), so weight decay and the moments of an optimiser cannot change another word.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.words: list[str] = []
        self._first = 0
        self._hooked = False

    @property
    def embedding(self) -> nn.Embedding:
        """The table of word embeddings."""
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def width(self) -> int:
        return int(self.embedding.embedding_dim)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, without start and end."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def add_words(self, words: Sequence[str]) -> None:
        """Add words to the tokenizer and rows of the mean of all words to the table; ConfigError for a known word."""
        known = self.tokenizer.get_vocab()
        if taken := [word for word in words if word in known]:
            raise ConfigError(f"The tokenizer already has the word {taken[0]!r}: choose another token.")
        self.tokenizer.add_tokens(list(words))
        self._first = int(self.tokenizer.convert_tokens_to_ids(words[0]))
        self.words = list(words)
        weight, count = self.embedding.weight, len(self.tokenizer)
        tables = [each for each in self.model.modules() if isinstance(each, nn.Embedding) and each.weight is weight]
        if count > len(weight):
            with torch.no_grad():
                more = weight.mean(0, keepdim=True).expand(count - len(weight), -1)
                longer = nn.Parameter(torch.cat((weight, more)), requires_grad=False)
            self.model.config.vocab_size = count
            for table in tables:  # T5 holds one table under two names
                table.weight, table.num_embeddings = longer, count
        if not self._hooked:
            self._hooked = True
            for table in tables:
                table.register_forward_hook(self._insert)

    @torch.no_grad()
    def write(self, rows: Tensor) -> None:
        """Write rows (words, width) into the table, so that the model can be saved with them."""
        self.embedding.weight[self._first : self._first + len(rows)] = rows.to(self.embedding.weight)

    def mean_row(self, text: str) -> Tensor:
        """Return the mean of the embeddings of a text's tokens, (width,)."""
        ids = torch.tensor(self.ids(text), device=self.embedding.weight.device)
        return self.embedding.weight[ids].detach().mean(0)

    def _insert(self, _: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        insertion = _insertion.get()
        if insertion is None or self.name not in insertion.rows:
            return out
        ids, rows = given[0], insertion.rows[self.name]
        places = (ids - self._first + 1).clamp(min=0)
        places = torch.where(places <= rows.shape[1], places, 0)
        if insertion.places is None:
            insertion.places = places
        for number in range(rows.shape[1]):
            out = torch.where((places == number + 1)[..., None], rows[:, number, None].to(out.dtype), out)
        return out
