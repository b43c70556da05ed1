"""Test captioners and rewriters with tiny random models of the real classes."""

from pathlib import Path

import pytest
import torch

from data_synth.backends.captioners import TransformersCaptioner
from data_synth.backends.chat import _SeededSampler
from data_synth.backends.contracts import Failed, Target
from data_synth.backends.local_models import fingerprint, source_identity
from data_synth.backends.rewriters import TransformersRewriter
from data_synth.records import Reference
from imagine.errors import ImagineError, WeightsError
from tests import tiny_models

WORDS = set(tiny_models.WORDS.split())


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.vision_language_model(tmp_path_factory.mktemp("vision_model"))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.language_model(tmp_path_factory.mktemp("text_model"))


def captioner(folder: Path, **settings: object) -> TransformersCaptioner:
    chosen = {"model": str(folder), "device": "cpu", "temperature": 1.5, "max_tokens": 40, **settings}
    made = TransformersCaptioner(TransformersCaptioner.Settings.model_validate(chosen))
    made.load()
    return made


def rewriter(folder: Path, **settings: object) -> TransformersRewriter:
    chosen = {"model": str(folder), "device": "cpu", "temperature": 1.5, "max_tokens": 40, **settings}
    made = TransformersRewriter(TransformersRewriter.Settings.model_validate(chosen))
    made.load()
    return made


def target(seed: int, caption: str = "a man with red hair", gaze: str = "left") -> Target:
    return Target(Reference("r", b""), caption, {"gaze": gaze}, seed)


def test_captions_depend_on_the_picture_only(vision_model: Path) -> None:
    captions = captioner(vision_model)
    one, two = tiny_models.reference(1), tiny_models.reference(2)
    broken = Reference("broken", b"no picture")
    together = captions.caption([one, broken, two])
    assert [isinstance(each, str) for each in together] == [True, False, True]
    assert isinstance(together[1], Failed) and "picture" in together[1].reason
    assert together[0] != together[2]
    assert set(str(together[0]).split()) <= WORDS
    torch.manual_seed(99)  # the process's random state must have no effect
    assert captions.caption([two]) + captions.caption([one]) == [together[2], together[0]]


def test_the_caption_depends_on_the_pixels(vision_model: Path) -> None:
    captions = captioner(vision_model, temperature=0.0)
    one, two = tiny_models.reference(1), tiny_models.reference(2)
    same_key = Reference(one.key, two.image)
    config = captions.language_model.model.generation_config
    assert not config.do_sample and config.temperature is None
    with torch.inference_mode():
        answers = [captions.caption([each])[0] for each in (one, same_key)]
    assert answers[0] != answers[1]


def test_captioners_and_rewriters_run_in_half_precision(vision_model: Path, text_model: Path) -> None:
    captions = captioner(vision_model, dtype="bfloat16").caption([tiny_models.reference(1)])
    rewrites = rewriter(text_model, dtype="bfloat16").rewrite([target(1)])
    for text in (*captions, *rewrites):
        assert isinstance(text, Failed) or set(text.split()) <= WORDS


def test_rewriting_depends_on_target_and_seed_only(text_model: Path) -> None:
    rewrites = rewriter(text_model)
    targets = [target(1), target(2), target(1, gaze="right"), target(3, caption="a woman")]
    together = rewrites.rewrite(targets)
    assert all(isinstance(each, str) for each in together) and len(set(together)) == 4
    torch.manual_seed(99)
    assert [rewrites.rewrite([each])[0] for each in reversed(targets)] == list(reversed(together))
    no_aims = Target(Reference("r", b""), "a man", {}, 1)
    assert rewrites.rewrite([no_aims]) == ["a man"]


def test_tokens_are_sampled_from_the_models_distribution() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])

    def drawn(temperature: float, top_p: float) -> torch.Tensor:
        sampler = _SeededSampler(5, temperature, top_p)
        words = [int(sampler(torch.zeros(1, 0), scores).argmax()) for _ in range(4000)]
        return torch.bincount(torch.tensor(words), minlength=4) / len(words)

    assert torch.allclose(drawn(1.0, 1.0), scores[0].softmax(-1), atol=0.03)
    assert torch.allclose(drawn(2.0, 1.0), (scores[0] / 2).softmax(-1), atol=0.03)
    likely = torch.tensor([2.0, 1.0, -torch.inf, -torch.inf]).softmax(-1)  # of all: 0.64 and 0.24
    assert torch.allclose(drawn(1.0, 0.8), likely, atol=0.03)
    assert drawn(1.0, 0.1).tolist() == [1, 0, 0, 0]


def test_an_answer_without_a_complete_sentence_is_a_failure(text_model: Path) -> None:
    short = rewriter(text_model, max_tokens=1).rewrite([target(seed) for seed in range(6)])
    assert any(isinstance(each, Failed) and each.reason == "an answer that was cut off" for each in short)


def test_unusable_models_raise_one_sentence(tmp_path: Path, text_model: Path) -> None:
    plain = tiny_models.language_model(tmp_path / "plain", chat=False)
    with pytest.raises(WeightsError, match="no chat template"):
        rewriter(plain)
    with pytest.raises(WeightsError, match="cannot be loaded"):
        rewriter(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        captioner(text_model)  # a model without a vision encoder
    with pytest.raises(ImagineError, match="no device"):
        rewriter(text_model, device="gpu")


def test_the_identity_depends_on_the_content_of_the_folder_not_its_path(tmp_path: Path, text_model: Path) -> None:
    import shutil

    made = TransformersRewriter(TransformersRewriter.Settings(model=str(text_model)))
    identity = made.identity  # available before load()
    assert identity["class"] == "data_synth.backends.rewriters:TransformersRewriter"
    assert identity["licence"] == "apache-2.0" and len(identity["weights"]) == 16
    moved = tmp_path / text_model.name
    shutil.copytree(text_model, moved)
    (moved / "README.md").unlink()
    assert source_identity(str(moved)) == {"model": text_model.name, "weights": identity["weights"], "licence": ""}
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    fingerprint.cache_clear()
    assert fingerprint(moved) != identity["weights"]
    assert source_identity("owner/name", "abc") == {"model": "owner/name", "weights": "abc", "licence": ""}
    dumped = made.settings.model_dump()
    assert "model" not in dumped and "device" not in dumped and dumped["temperature"] == 0.7


def test_the_fingerprint_of_a_large_file_samples_its_end(tmp_path: Path) -> None:
    file = tmp_path / "large.safetensors"
    file.write_bytes(bytes(3 << 20))
    before = fingerprint(file)
    with file.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    fingerprint.cache_clear()
    assert fingerprint(file) != before
