"""Tests of the judge: CosFace against a direct computation, words and letters, file checks, and face boxes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagine.errors import WeightsError
from imagine.evaluation.judge import (
    IGNORED,
    PRIOR_BOX,
    SECOND,
    Judge,
    Reader,
    boxes_by,
    margin_loss,
    prior_boxes,
    reading_loss,
)
from imagine.networks.recogniser import Recogniser, TransformerRecogniser, load_recogniser
from imagine.people.faces import KnownBoxesFinder
from imagine.records import FaceBox

ATTRIBUTES = {"expression": ("neutral", "smiling"), "scene": ("beach", "city", "snow"), "letters": ()}
TRAITS = {"hair_style": ("bald", "long")}


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    return Judge(
        Recogniser(size=32, widths=(8, 8, 8, 16), dimensions=6),
        Reader(ATTRIBUTES, TRAITS, size=64, widths=(8, 8, 8, 16), hidden=16),
    )


def test_margin_loss_equals_a_direct_computation_of_cosface() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    prototypes = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])  # lengths must not matter
    loss = margin_loss(embeddings, torch.tensor([0, 1]), prototypes, scale=4.0, margin=0.3)

    def direct(cosines: list[float], label: int) -> float:
        right = math.exp(4 * (cosines[label] - 0.3))
        return -math.log(right / (right + sum(math.exp(4 * c) for j, c in enumerate(cosines) if j != label)))

    assert loss.tolist() == pytest.approx([direct([1, 0, -1], 0), direct([0.6, 0.8, -0.6], 1)], rel=1e-5)


def test_a_margin_raises_the_loss_and_no_margin_is_plain_softmax() -> None:
    torch.manual_seed(0)
    embeddings, prototypes, labels = torch.randn(5, 4), torch.randn(7, 4), torch.arange(5)
    cosines = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(prototypes).T
    plain = margin_loss(embeddings, labels, prototypes, 10.0, 0.0)
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(10 * cosines, labels, reduction="none"))
    assert (margin_loss(embeddings, labels, prototypes, 10.0, 0.2) > plain).all()


def test_the_recogniser_learns_to_distinguish_two_people() -> None:
    torch.manual_seed(0)
    network = Recogniser(size=32, widths=(8, 8, 8, 16), dimensions=6)
    prototypes = torch.nn.Parameter(torch.randn(2, 6))
    people = torch.rand(2, 3, 32, 32)
    optimiser = torch.optim.Adam([*network.parameters(), prototypes], lr=3e-3)
    for _ in range(40):
        noisy = people.repeat(4, 1, 1, 1) + 0.1 * torch.randn(8, 3, 32, 32)
        loss = margin_loss(network(noisy), torch.tensor([0, 1] * 4), prototypes, 8.0, 0.2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        one, two = network(people)
        same = network(people[:1] + 0.1 * torch.randn(1, 3, 32, 32))[0]
    assert float(one @ same) > 0.9
    assert float(one @ two) < 0.2


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch(judge: Judge) -> None:
    images = torch.rand(5, 3, 64, 64)
    embedded = judge.embed(images)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(judge.embed(images, batch=2), embedded)
    assert judge.embed(images[:0]).shape == (0, 6)


def test_only_the_face_inside_the_box_is_recognised(judge: Judge) -> None:
    images = torch.rand(1, 3, 64, 64)
    box = torch.tensor([[8.0, 10.0, 12.0, 12.0]])
    elsewhere = images.clone()
    elsewhere[..., 40:, 40:] = 0
    torch.testing.assert_close(judge.embed(images, box), judge.embed(elsewhere, box))
    assert not torch.allclose(judge.embed(images), judge.embed(elsewhere))  # the prior box includes that region


def test_the_judge_uses_the_given_face_finder(judge: Judge) -> None:
    images = torch.rand(2, 3, 64, 64)
    found = boxes_by(KnownBoxesFinder([FaceBox(1, 2, 30, 40, 1.0), FaceBox(5, 6, 7, 8, 1.0)]))
    assert found(images).tolist() == [[1, 2, 30, 40]] * 2
    injected = Judge(judge.recogniser, judge.reader, found)
    torch.testing.assert_close(injected.embed(images), judge.embed(images, found(images)))


def test_the_prior_box_is_used_if_no_face_is_found() -> None:
    images = torch.rand(2, 3, 40, 80)
    assert torch.equal(boxes_by(KnownBoxesFinder([]))(images), prior_boxes(images))
    assert prior_boxes(images)[1].tolist() == pytest.approx(
        [side * share for side, share in zip((80, 40, 80, 40), PRIOR_BOX, strict=True)]
    )


def test_the_reader_gives_one_word_per_attribute_and_trait(judge: Judge) -> None:
    rows = judge.read(torch.rand(3, 3, 128, 128))  # pictures of any size are resized to the reader's
    assert [set(row) for row in rows] == [{"expression", "scene", "hair_style", "letters"}] * 3
    assert all(row["scene"] in ATTRIBUTES["scene"] for row in rows)


def test_words_and_targets_are_inverse(judge: Judge) -> None:
    labels = [
        {"expression": "smiling", "scene": "snow", "hair_style": "bald", "letters": "OK"},
        {"expression": "neutral", "scene": "beach", "hair_style": "long", "letters": ""},
        {"expression": "neutral", "scene": "city", "hair_style": "long", "letters": "XYZ"},
    ]
    targets = judge.reader.targets(labels)
    sizes = {"expression": 2, "scene": 3, "hair_style": 2, "letters": 27}
    certain = {name: torch.nn.functional.one_hot(target, sizes[name]) * 9.0 for name, target in targets.items()}
    assert judge.reader.words(certain) == labels
    assert targets["letters"].tolist() == [[15, 11, 0], [0, 0, 0], [24, 25, 26]]


def test_reading_loss_is_per_sample_and_skips_missing_labels(judge: Judge) -> None:
    logits = judge.reader(torch.rand(2, 3, 64, 64))
    targets = judge.reader.targets([{"expression": "smiling", "letters": "A"}, {"scene": "moon"}])
    assert targets["scene"].tolist() == [IGNORED, IGNORED]
    losses = reading_loss(logits, targets)
    assert {name: loss.shape for name, loss in losses.items()} == dict.fromkeys(targets, torch.Size([2]))
    assert losses["scene"].tolist() == [0, 0]
    expected = -logits["expression"].log_softmax(-1)[0, 1]
    torch.testing.assert_close(losses["expression"], torch.stack([expected, torch.tensor(0.0)]))
    letters = -logits["letters"].log_softmax(-1)[0]
    torch.testing.assert_close(losses["letters"][0], (letters[0, 1] + letters[1, 0] + letters[2, 0]) / 3)


def test_a_name_cannot_be_both_attribute_and_trait() -> None:
    with pytest.raises(ValueError, match=r"\['scene'\] are both attributes and traits"):
        Reader({"scene": ("a", "b")}, {"scene": ("a", "b")})


def test_save_and_load_give_the_same_answers(judge: Judge, tmp_path: Path) -> None:
    judge.save(tmp_path / "judge")
    again = Judge.from_pretrained(tmp_path / "judge")
    images = torch.rand(3, 3, 64, 64)
    assert torch.equal(again.embed(images), judge.embed(images))
    assert again.read(images) == judge.read(images)
    assert again.reader.vocabulary == judge.reader.vocabulary


def test_a_second_recogniser_gives_a_second_opinion(judge: Judge, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = TransformerRecogniser(size=32, width=16, depth=1, heads=2, feedforward=16, thin=4, dimensions=5)
    both = Judge(judge.recogniser, judge.reader, second=other)
    images = torch.rand(3, 3, 64, 64)
    seen = both.look(images)
    assert torch.equal(seen.embeddings, judge.embed(images)) and SECOND not in judge.look(images).others
    assert seen.others[SECOND].shape == (3, 5)
    torch.testing.assert_close(seen.others[SECOND].norm(dim=1), torch.ones(3))
    torch.testing.assert_close(both.look(images[1:2]).others[SECOND], seen.others[SECOND][1:2])
    assert both.fingerprint() != judge.fingerprint()  # results without it are not mixed with results with it

    both.save(tmp_path)
    again = Judge.from_pretrained(tmp_path)
    assert isinstance(again.second, TransformerRecogniser)
    torch.testing.assert_close(again.look(images).others[SECOND], seen.others[SECOND])
    with pytest.raises(WeightsError, match="holds a TransformerRecogniser"):
        Recogniser.load(tmp_path / "second_recogniser")
    assert isinstance(load_recogniser(tmp_path / "recogniser"), Recogniser)
    (tmp_path / "second_recogniser" / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="does not describe a network"):
        Judge.from_pretrained(tmp_path)


def test_the_transformer_sees_where_a_feature_is() -> None:
    torch.manual_seed(0)
    network = TransformerRecogniser(size=32, width=16, depth=1, heads=2, feedforward=16, thin=4, dimensions=8).eval()
    crops = torch.full((2, 3, 32, 32), 0.5)
    crops[0, :, :8, :8] = crops[1, :, 24:, 24:] = 1.0  # the same patch at two places
    with torch.no_grad():
        one, two = network(crops)
    assert float(one @ two) < 0.999


def test_half_precision_files_are_smaller_and_load_as_float32(judge: Judge, tmp_path: Path) -> None:
    judge.recogniser.save(tmp_path / "full")
    judge.recogniser.save(tmp_path / "half", torch.float16)
    full, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.75 * full
    loaded = Recogniser.load(tmp_path / "half")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    crops = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded(crops), judge.recogniser(crops), atol=0.02, rtol=0)


def test_a_folder_that_does_not_fit_is_one_sentence(judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no recogniser: config.json is missing"):
        Recogniser.load(tmp_path / "nowhere")
    judge.save(tmp_path)
    with pytest.raises(WeightsError, match="holds a Reader in format 1, but a Recogniser"):
        Recogniser.load(tmp_path / "reader")
    (tmp_path / "reader" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="damaged"):
        Reader.load(tmp_path / "reader")


@pytest.mark.parametrize("change", ["missing", "renamed", "reshaped"])
def test_a_weight_file_with_one_wrong_key_is_refused(judge: Judge, tmp_path: Path, change: str) -> None:
    judge.recogniser.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bias = tensors.pop("head.bias")
    if change == "renamed":
        tensors["head.offset"] = bias
    if change == "reshaped":
        tensors["head.bias"] = bias[:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"'head\.bias' is .* where \(6,\) is expected"):
        Recogniser.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"colour": 3},
        {"format_version": 2},
        {"widths": 7},
        {"widths": []},
        {"size": "64"},
        {"widths": [8, -8]},
        {"size": 0},
    ],
)
def test_a_config_with_wrong_values_is_refused(judge: Judge, tmp_path: Path, change: dict[str, Any]) -> None:
    judge.recogniser.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(WeightsError) as caught:
        Recogniser.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_not_an_object_is_refused(judge: Judge, tmp_path: Path) -> None:
    judge.recogniser.save(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="does not describe a network"):
        Recogniser.load(tmp_path)


def test_a_truncated_weight_file_is_refused(judge: Judge, tmp_path: Path) -> None:
    judge.recogniser.save(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:100])
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        Recogniser.load(tmp_path)


def test_the_judge_needs_no_gradients(judge: Judge) -> None:
    assert not any(p.requires_grad for p in [*judge.recogniser.parameters(), *judge.reader.parameters()])
