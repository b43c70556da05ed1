"""Rare words, learnt words, names in sentences, and the files that diffusers reads."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from imagine.errors import ConfigError
from imagine.pipeline.pipeline import ImaginePipeline
from tests import tiny_stock
from tests.root import ROOT
from tests.train.methods.tiny_bases import fill, tiny_run
from train.methods.bases.opening import open_base
from train.methods.bases.text import Reader
from train.methods.learned.rare_words import _COMMON, candidates, rare_word
from train.methods.learned.words import LearntWords, position
from train.methods.runs import open_learnt, train_method
from train.methods.sentences import Naming
from train.methods.tuned.custom_diffusion import WEIGHTS
from train.methods.tuned.textual_inversion import FILE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("words"))


def shipped_readers() -> list[Reader]:
    from transformers import CLIPTokenizer, T5Tokenizer

    clip = CLIPTokenizer.from_pretrained(ROOT / "weights" / "tokenizer", local_files_only=True)
    t5 = T5Tokenizer.from_pretrained(ROOT / "weights" / "tokenizer_2", local_files_only=True)
    return [Reader("clip", None, clip), Reader("t5", None, t5)]


def test_rare_words_are_short_single_tokens_that_mean_nothing() -> None:
    readers = shipped_readers()
    words = candidates(readers)
    assert len(words) > 20
    assert all(len(word) <= 3 and word not in _COMMON and len(readers[0].ids(word)) == 1 for word in words)
    assert all(len(readers[1].ids(word)) <= 3 for word in words)
    assert rare_word(readers, 3) == rare_word(readers, 3)
    assert len({rare_word(readers, 3, number) for number in range(5)}) == 5
    assert len({rare_word(readers, seed) for seed in range(10)}) > 3
    ids = [readers[0].ids(word)[0] for word in words]
    assert ids == sorted(ids, reverse=True)  # rarest first


def test_a_user_sentence_is_made_to_name_the_subject() -> None:
    naming = Naming(("zq",), "person")
    assert naming.personal("a pencil sketch of a person, smiling") == "a pencil sketch of a zq person, smiling"
    assert naming.personal("a person hugs a zq person") == "a person hugs a zq person"
    assert naming.personal("on a beach") == "a zq person, on a beach"
    assert naming.personal("two personal persons") == "a zq person, two personal persons"
    assert Naming(("zq",), "balloon").personal("a person") == "a zq balloon"
    assert Naming(("zq",), "").personal("a person, laughing") == "a zq, laughing"


@pytest.mark.parametrize("base", ["world", "sd15", "sdxl"])
def test_a_new_word_reads_as_its_initial_word(base: str, home: Path) -> None:
    opened = open_base(str(home / base), CPU)
    noun = next(word for word in ("red", "hat", "person") if all(len(r.ids(word)) == 1 for r in opened.readers[:1]))
    words = LearntWords(opened, ["<one>", "<two>"], noun)
    with torch.no_grad():
        marked, plain = words.encode(opened, [f"a <two> {noun}"]), opened.text([f"a {noun} {noun}"])
    assert marked.places is not None and (marked.places == 2).sum() == 1 and not (marked.places == 1).any()
    if all(len(reader.ids(noun)) == 1 for reader in opened.readers):
        assert torch.allclose(marked.clip.values, plain.clip.values, atol=1e-5)
    assert position(marked, 2).shape == (1, marked.clip.values.shape[2])


def test_gradients_reach_only_the_words_that_a_sentence_names(home: Path) -> None:
    base = open_base(str(home / "world"), CPU)
    words = LearntWords(base, ["<one>", "<two>"], "person")
    words.encode(base, ["a <two> person"]).clip.values.square().sum().backward()
    gradient = words.rows["clip"].grad
    assert gradient is not None and gradient[0, 1].any() and not gradient[0, 0].any()
    assert base.readers[0].embedding.weight.grad is None


def test_a_known_word_is_refused(home: Path) -> None:
    base = open_base(str(home / "world"), CPU)
    with pytest.raises(ConfigError, match="already has the word"):
        base.readers[0].add_words(["person</w>"])


@pytest.mark.parametrize("xl", [False, True])
def test_diffusers_reads_the_words(xl: bool, home: Path, tmp_path: Path) -> None:
    name = "sdxl" if xl else "sd15"
    train_method(tiny_run("textual_inversion", name, home, "settings.vectors=2"), tmp_path / "run")
    file = tmp_path / "run" / "textual_inversion" / "export" / "diffusers" / FILE
    learnt = open_learnt(tmp_path / "run")
    pipe = tiny_stock.stock(xl)
    pipe.register_modules(tokenizer=copy.deepcopy(pipe.tokenizer))  # the tests share one
    if xl:
        from safetensors.torch import load_file

        state = load_file(file)
        assert set(state) == {"clip_l", "clip_g"}
        pipe.load_textual_inversion(
            state["clip_l"], token="<subject-1>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
        )
        return
    pipe.load_textual_inversion(str(file))
    embeds = pipe.encode_prompt("a <subject-1> person", CPU, 1, False)[0]
    with torch.no_grad():
        ours = learnt.text(["a <subject-1> person"]).clip.values
    assert torch.allclose(embeds, ours, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_diffusers_reads_the_lora(name: str, home: Path, tmp_path: Path) -> None:
    more = ("settings.rank=2", "train.lora=0.1")
    train_method(tiny_run("dreambooth_lora", name, home, *more), tmp_path / "run")
    folder = tmp_path / "run" / "dreambooth_lora" / "export" / "diffusers"
    pipe = tiny_stock.stock(name == "sdxl")
    pipe.load_lora_weights(folder)
    task: Any = open_learnt(tmp_path / "run")
    noise, text = torch.randn(1, *task.base.latent_shape), task.base.text(["a zq person"])
    task.base.unet, ours = pipe.unet, task.base.predict(noise, torch.tensor([500]), text)
    assert torch.allclose(task.base.predict(noise, torch.tensor([500]), text), ours, atol=1e-5)


def test_diffusers_reads_the_keys_and_values_of_custom_diffusion(home: Path, tmp_path: Path) -> None:
    train_method(tiny_run("custom_diffusion", "sd15", home, "train.keys_values=0.05"), tmp_path / "run")
    folder = tmp_path / "run" / "custom_diffusion" / "export" / "diffusers"
    from safetensors.torch import load_file

    pipe = tiny_stock.stock()
    state = load_file(folder / WEIGHTS)
    plain: dict[str, Any] = {name: {} for name in pipe.unet.attn_processors if "attn1" in name}
    # `load_attn_procs` builds the processors, but sets them for pipelines only; so they are set here (see docs).
    pipe.unet.set_attn_processor(pipe.unet._process_custom_diffusion({**state, **plain}))
    task: Any = open_learnt(tmp_path / "run")
    noise, text = torch.randn(1, *task.base.latent_shape), task.base.text(["a person"])
    ours = task.base.predict(noise, torch.tensor([500]), text)
    theirs = pipe.unet(noise, torch.tensor([500]), text.clip.values).sample
    fresh = tiny_stock.stock().unet(noise, torch.tensor([500]), text.clip.values).sample
    assert torch.allclose(theirs, ours, atol=1e-4) and not torch.allclose(fresh, ours, atol=1e-3)


def test_a_tuned_denoiser_replaces_that_of_the_base(home: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    train_method(tiny_run("dreambooth", "world", home), tmp_path / "run")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "run" / "dreambooth" / "export" / "diffusers" / "unet")
    pipe = ImaginePipeline.from_pretrained(home / "world")
    old = pipe.unet.state_dict()
    assert unet.state_dict().keys() == old.keys()
    assert any(not torch.equal(value, old[name]) for name, value in unet.state_dict().items())
