"""The encoders against their sources: open_clip's tower and tokenizer, transformers' own models."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer

from imagine.errors import PromptError
from imagine.networks import encoders
from imagine.networks.encoders import TextEncoders, VisionEncoder, quoted
from imagine.records import Tokens
from tests import tiny

SENTENCES = (
    *tiny.SENTENCES,
    "an old man's portrait, pencil sketch, it's 1999!",
    "Grüße aus München — naïve café",
)


@pytest.fixture(scope="module")
def text() -> TextEncoders:
    pipe = tiny.pipeline()
    return TextEncoders(
        pipe.text_encoder, pipe.tokenizer, pipe.text_encoder_2, pipe.tokenizer_2, pipe.text_encoder_3, pipe.tokenizer_3
    )


# --- vision -----------------------------------------------------------------------------------------------------------
def test_vision_features_are_the_output_of_the_last_block_but_one() -> None:
    encoder = VisionEncoder(16, 8, 24, 3, 2, embed_width=12).eval()
    crops = torch.rand(2, 3, 16, 16)
    seen: list[torch.Tensor] = []
    tower = encoder.tower
    assert isinstance(tower, VisionTransformer)
    hook = tower.transformer.resblocks[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    tower(open_clip_normalised(crops))
    hook.remove()
    assert torch.equal(encoder(crops), seen[0])
    assert encoder(crops).shape == (2, encoder.tokens, 24) == (2, 5, 24)


def test_vision_embedding_is_the_towers_own() -> None:
    encoder = VisionEncoder(16, 8, 24, 2, 2, embed_width=12).eval()
    crops = torch.rand(2, 3, 16, 16)
    assert torch.equal(encoder.embed(crops), encoder.tower(open_clip_normalised(crops)))
    assert encoder.embed(crops).shape == (2, 12)


def open_clip_normalised(crops: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    return (crops - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def test_vision_encoder_is_saved_with_its_sizes_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    encoder = VisionEncoder(16, 4, 24, 2, 3, embed_width=12).eval()
    encoder.save_pretrained(tmp_path)
    loaded = VisionEncoder.from_pretrained(tmp_path)
    crops = torch.rand(1, 3, 16, 16)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert torch.equal(loaded(crops), encoder(crops)) and torch.equal(loaded.embed(crops), encoder.embed(crops))
    assert (loaded.config.patch_size, loaded.config.embed_width) == (4, 12)


def test_vision_encoder_refuses_crops_of_another_size() -> None:
    with pytest.raises(ValueError, match="16, 16"):
        VisionEncoder(16, 8, 24, 2, 2)(torch.rand(1, 3, 32, 32))


def test_default_vision_encoder_has_the_portrait_worlds_size() -> None:
    with torch.device("meta"):
        encoder = VisionEncoder()
    assert encoder.tokens == 65 and encoder.config.width == 160


# --- tokenizers -------------------------------------------------------------------------------------------------------
def test_trimmed_vocabulary_splits_known_sentences_as_clip_does(tmp_path: Path) -> None:
    trimmed = encoders.trim_clip_vocabulary(SENTENCES, tmp_path)
    full = open_clip.tokenizer.SimpleTokenizer()
    for sentence in SENTENCES:
        ours = trimmed.convert_ids_to_tokens(trimmed(sentence)["input_ids"])
        assert ours[1:-1] == [full.decoder[token] for token in full.encode(sentence)]
    assert len(trimmed) < 1000


@pytest.mark.parametrize("prompt", ["zebra", "漢字 🎉", "Żółw", "{a} {b}", "\x07"])
def test_trimmed_vocabulary_tokenises_any_prompt(prompt: str) -> None:
    clip = tiny.tokenizers()[0]
    pieces = clip.convert_ids_to_tokens(clip(prompt)["input_ids"])[1:-1]
    assert pieces and clip.unk_token not in pieces
    assert clip.decode(clip(prompt, add_special_tokens=False)["input_ids"]).replace(" ", "") == prompt.lower().replace(
        " ", ""
    )


def test_t5_tokenizer_splits_any_ascii_without_unknowns(tmp_path: Path) -> None:
    t5 = encoders.train_t5_tokenizer(SENTENCES, tmp_path, vocabulary_size=200)
    ids = t5("Zebra's {x} = 9% of ~all^ [ÿ]")["input_ids"]
    assert ids[-1] == t5.eos_token_id == 1 and t5.pad_token_id == 0 and t5.unk_token_id == 2
    assert ids.count(2) == 1  # only the letter outside ASCII is unknown


def test_trained_t5_tokenizer_is_the_same_after_loading(tmp_path: Path) -> None:
    from transformers import T5Tokenizer

    made = encoders.train_t5_tokenizer(SENTENCES, tmp_path, vocabulary_size=200)
    loaded = T5Tokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert all(made(sentence)["input_ids"] == loaded(sentence)["input_ids"] for sentence in SENTENCES)


# --- encoding ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ('a shirt with "HELLO" on it', "HELLO"),
        ("a shirt with “HELLO” on it", "HELLO"),
        ("ein Hemd mit „HALLO“ darauf", "HALLO"),
        ("une chemise « SALUT »", "SALUT"),
        ('"ONE" and "TWO"', "ONE TWO"),
        ("it's the man's hat", ""),
        ('a 6" pipe', ""),
        ('an empty ""', ""),
        ("", ""),
    ],
)
def test_quoted_text_is_the_text_between_double_quotes(prompt: str, wanted: str) -> None:
    assert quoted(prompt) == wanted


def test_byt5_encodes_only_the_quoted_text(text: TextEncoders) -> None:
    one, other = text.encode_byt5(['a man, "HI"']), text.encode_byt5(['a woman in the snow, "HI", smiling'])
    assert torch.equal(one.values, other.values)
    assert not torch.equal(one.values, text.encode_byt5(['a man, "HO"']).values)
    nothing = text.encode_byt5(["a man"])
    assert nothing.mask is not None and nothing.mask.sum() == 1


def test_byt5_reads_what_several_prompts_quote_once_and_gives_it_to_each(text: TextEncoders) -> None:
    prompts = ["a man", 'a shirt with "HI"', "a woman", 'another "HI"']
    with torch.no_grad():
        together = text.encode_byt5(prompts)
        assert together.mask is not None and len(together.values) == 4
        for row, prompt in enumerate(prompts):
            alone = text.encode_byt5([prompt])
            assert alone.mask is not None and torch.equal(alone.mask[0], together.mask[row])
            length = int(alone.mask.sum())
            torch.testing.assert_close(together.values[row, :length], alone.values[0, :length], atol=1e-5, rtol=1e-5)


def test_a_sentence_as_one_vector_does_not_depend_on_padding(text: TextEncoders) -> None:
    with torch.no_grad():
        clip, others = text.encode(["a person", "an old woman in a blue shirt, smiling on a beach " * 2])
        both = encoders.pooled(clip, others["t5"])
        assert both.shape == (2, text.pooled_width)
        alone, more = text.encode(["a person"])
        torch.testing.assert_close(both[:1], encoders.pooled(alone, more["t5"]), atol=1e-5, rtol=1e-5)
        assert alone.mask is not None
        end = int(alone.mask.sum()) - 1
        torch.testing.assert_close(both[0, : clip.values.shape[2]], alone.values[0, end], atol=1e-5, rtol=1e-5)
    unmasked = encoders.pooled(Tokens(clip.values), Tokens(others["t5"].values))
    assert torch.equal(unmasked[:, : clip.values.shape[2]], clip.values[:, -1])


def test_clip_tokens_are_those_of_the_model_on_the_real_tokens(text: TextEncoders) -> None:
    sentence = tiny.SENTENCES[0]
    ids = torch.tensor([text.clip_tokenizer(sentence)["input_ids"]])
    with torch.no_grad():
        wanted = text.clip(input_ids=ids).last_hidden_state
        ours = text.encode_clip([sentence])
    assert ours.mask is not None and int(ours.mask.sum()) == ids.shape[1] <= 16
    torch.testing.assert_close(ours.values[:, : ids.shape[1]], wanted, atol=1e-5, rtol=1e-5)


def test_long_prompts_are_read_window_by_window(text: TextEncoders) -> None:
    words = "a person smiling on a beach wearing a red hat on a beach smiling a"  # one more than the 14 of a window
    with torch.no_grad():
        long = text.encode_clip([words, "a"])
        last = text.encode_clip([words.split()[-1]])
    assert long.values.shape == (2, 32, 16) and long.mask is not None and last.mask is not None
    assert long.mask.sum(1).tolist() == [16 + 3, 3]
    torch.testing.assert_close(long.values[0, 16:19], last.values[0, :3])
    assert not long.values[1, 16:].any()


def test_neighbours_in_a_batch_do_not_change_a_prompt(text: TextEncoders) -> None:
    prompts = ["a person", 'an old woman in a blue shirt with the letters "OK"', ""]
    with torch.no_grad():
        clip, others = text.encode(prompts)
        for row, prompt in enumerate(prompts):
            alone = text.encode([prompt])
            pairs = [(clip, alone[0]), *((others[name], alone[1][name]) for name in ("t5", "byt5"))]
            for together, own in pairs:
                assert together.mask is not None and own.mask is not None
                torch.testing.assert_close(
                    together.values[row][together.mask[row]], own.values[0][own.mask[0]], atol=1e-5, rtol=1e-5
                )


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("smiling " * 2000, "shorten"),
        ('a sign with "' + "A" * 500 + '"', "between quotes"),
    ],
)
def test_prompts_that_are_too_long_are_refused_in_a_sentence(text: TextEncoders, prompt: str, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        text.encode_byt5([prompt]) if "sign" in prompt else text.encode([prompt])


def test_no_encoder_warns_or_truncates(text: TextEncoders, caplog: Any) -> None:
    text.encode(["a person " * 20])  # longer than one window of CLIP's
    assert not caplog.records
