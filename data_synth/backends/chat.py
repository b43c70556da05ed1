"""Send questions to a language model, with or without a picture, and turn its answers into captions.

Captioners and rewriters send `Question`s to a `LanguageModel`: a model in this process (`ChatModel`) or an endpoint
(endpoint.py). A `ChatModel` answers one question at a time, each with its own random generator, so an answer depends on
its question only. This is fast enough for thousands of pictures. For millions, serve the model with an engine that
batches (vLLM, SGLang, llama.cpp) and use it as an endpoint.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from PIL import Image
from pydantic import Field

from data_synth.backends.contracts import Failed
from data_synth.backends.local_models import ModelSettings, choose_device, choose_dtype, failure, loading
from imagine.errors import PictureError, WeightsError

if TYPE_CHECKING:
    import torch

EMPTY, TRUNCATED, REFUSED = "an empty answer", "an answer that was cut off", "the model refused"

_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL | re.IGNORECASE)
_PREAMBLE = re.compile(
    r"\A(?:(?:sure|certainly|of course)\b[^:\n]{0,80}:|(?:here(?: is|['’]s) )?(?:the |a )?(?:new |rewritten )?"
    r"(?:caption|description)\b[^:\n]{0,40}:)\s*",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\A(?:(?:(?:i['’]?m|i am) (?:very |so )?)?sorry[,.!]?\s|i (?:can ?not|can['’]t)\b|"
    r"(?:i['’]?m|i am) (?:not able|unable)\b|as an ai\b)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?…](?:[\"”’')\]]*)(?=\s|\Z)")


@dataclass(frozen=True)
class Question:
    """One prompt for a model, possibly with a picture."""

    text: str
    seed: int  # for sampling the answer
    image: Image.Image | None = None  # RGB, upright


class LanguageModel(Protocol):
    """A model that answers questions, in this process or behind an endpoint."""

    def answer(self, questions: Sequence[Question]) -> list[str | Failed]:
        """Return one tidied answer per question, in order."""
        ...


def answers(language_model: LanguageModel, questions: Sequence[Question | Failed]) -> list[str | Failed]:
    """Return the model's answers in order; a failure among the questions is returned in its place without a request."""
    answered = iter(language_model.answer([question for question in questions if isinstance(question, Question)]))
    return [next(answered) if isinstance(question, Question) else question for question in questions]


def picture_question(text: str, picture: bytes, seed: int, longest_side: int) -> Question | Failed:
    """Return a question about a picture file, which is turned upright and shrunk to `longest_side` pixels at most.

    Return Failed if the picture cannot be read.
    """
    from imagine.people.photos import open_photo

    try:
        image = open_photo(picture)
    except PictureError as error:
        return failure(error)
    if max(image.size) > longest_side:
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    return Question(text, seed, image)


def seed_of(key: str) -> int:
    """Return a 31-bit seed for a record that has a key but no seed."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1


def tidy(answer: str, complete: bool) -> str | Failed:
    """Return an answer as one paragraph, without reasoning, introduction, bold type or quotation marks around it.

    complete: whether the model ended the answer itself; if not, an unfinished last sentence is removed. Return Failed
    for a refusal and for an answer of which nothing is left.
    """
    text = _THOUGHTS.sub("", answer).replace("**", "").strip()
    text = " ".join(_PREAMBLE.sub("", text).split())
    if len(text) > 1 and text[0] + text[-1] in ('""', "''", "“”", "‘’") and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    if not text:
        return Failed(EMPTY)
    if _REFUSAL.match(text):
        return Failed(REFUSED, text[:200])
    if complete:
        return text
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else Failed(TRUNCATED, "The answer has no complete sentence. Increase max_tokens.")


class ChatSettings(ModelSettings):
    """Settings of a language model that runs in this process, with transformers."""

    max_tokens: int = Field(default=300, ge=1)  # maximum length of an answer
    temperature: float = Field(default=0.0, ge=0)  # 0: always the most likely token
    top_p: float = Field(default=1.0, gt=0, le=1)  # sample from the most likely tokens with this total probability
    template: dict[str, Any] = Field(default_factory=dict)  # for the chat template, such as {enable_thinking: false}


class ChatModel:
    """A chat model in this process that reads pictures ("image-text-to-text") or only text ("text-generation")."""

    def __init__(self, settings: ChatSettings, task: Literal["image-text-to-text", "text-generation"]) -> None:
        self.settings, self.task = settings, task
        self.model: Any = None
        self.processor: Any = None

    def load(self) -> None:
        """Load the model with transformers' Auto classes.

        Raises WeightsError if it cannot be loaded or has no chat template.
        """
        import transformers

        settings, has_vision = self.settings, self.task == "image-text-to-text"
        device = choose_device(settings.device)
        source = {} if settings.revision is None else {"revision": settings.revision}
        trusted = {name: value for name, value in settings.options.items() if name == "trust_remote_code"}
        with loading(settings.model):
            processor_class = transformers.AutoProcessor if has_vision else transformers.AutoTokenizer
            model_class = transformers.AutoModelForImageTextToText if has_vision else transformers.AutoModelForCausalLM
            self.processor = processor_class.from_pretrained(settings.model, **source, **trusted)
            dtype = choose_dtype(settings.dtype, device)
            model = model_class.from_pretrained(settings.model, dtype=dtype, **source, **settings.options)
            # With a device_map, transformers has already placed the model.
            self.model = (model if "device_map" in settings.options else model.to(device)).eval()
        if not getattr(self.processor, "chat_template", None):
            raise WeightsError(f"The model {settings.model} has no chat template. Choose an instruction-tuned model.")
        # `_SeededSampler` samples the tokens, so the sampling options of the model's files are disabled.
        config = self.model.generation_config
        config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None

    def answer(self, questions: Sequence[Question]) -> list[str | Failed]:
        """Return one answer per question; the questions are processed one at a time."""
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> str | Failed:
        import torch

        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": self._content(question)}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **self.settings.template,
        )  # fmt: skip
        inputs = inputs.to(self.model.device)
        inputs = {
            name: value.to(self.model.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
            if name != "token_type_ids" or self.task == "image-text-to-text"
        }
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs,
                max_new_tokens=self.settings.max_tokens,
                logits_processor=self._logits_processors(question.seed),
            )[0, inputs["input_ids"].shape[1] :]
        text = getattr(self.processor, "tokenizer", self.processor).decode(tokens, skip_special_tokens=True)
        return tidy(text, complete=bool(torch.isin(tokens.cpu(), self._stop_tokens()).any()))

    def _content(self, question: Question) -> Any:
        if self.task == "text-generation":
            return question.text
        return [{"type": "image", "image": question.image}, {"type": "text", "text": question.text}]

    def _logits_processors(self, seed: int) -> list[Any]:
        if not self.settings.temperature:
            return []
        return [_SeededSampler(seed, self.settings.temperature, self.settings.top_p)]

    def _stop_tokens(self) -> "torch.Tensor":
        import torch

        ends = self.model.generation_config.eos_token_id
        return torch.tensor([] if ends is None else ends, dtype=torch.long).reshape(-1)


class _SeededSampler:
    """A logits processor for transformers' generate that samples the tokens of one answer.

    It adds Gumbel noise to the scores; the token with the largest score is then a sample from their softmax (Maddison
    et al., arXiv 1411.0030). The noise comes from a CPU generator of this answer only. A seed therefore gives the same
    noise on every device, independent of other random draws in the process.
    """

    def __init__(self, seed: int, temperature: float, top_p: float) -> None:
        import torch

        self.generator = torch.Generator().manual_seed(seed)
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Return scores (1, tokens) whose largest entry is the sampled token."""
        import torch

        scores = scores.float() / self.temperature
        if self.top_p < 1:
            ordered, places = scores.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # total probability of all more likely tokens
            unlikely = torch.zeros_like(before, dtype=torch.bool).scatter(-1, places, before >= self.top_p)
            scores = scores.masked_fill(unlikely, -torch.inf)
        exponential_noise = torch.empty(scores.shape).exponential_(generator=self.generator)
        return scores - exponential_noise.log().to(scores.device)
