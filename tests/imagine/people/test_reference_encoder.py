"""Encoding references: the encoders' outputs, the cache, and what makes a photo be encoded again."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline

from imagine.errors import ConfigError, FaceError, WeightsError
from imagine.networks.encoders import CLIP_MEAN, CLIP_STD
from imagine.people.faces import KnownBoxesFinder
from imagine.people.reference_encoder import EncoderInfo, vision_features
from imagine.records import FaceBox
from tests import tiny, tiny_ip, tiny_stock


@pytest.fixture
def pipe() -> Any:
    return tiny_stock.personal(tiny_stock.stock())


def encoded_batches(pipe: Any) -> list[int]:
    """Return a list that collects the batch size of every later call of the encoder."""
    batches: list[int] = []
    pipe.vision_encoder.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    return batches


def test_a_photo_is_encoded_once_until_its_file_changes(pipe: Any, tmp_path: Path):
    tiny.photo(1).save(tmp_path / "me.png")
    batches = encoded_batches(pipe)
    first = pipe.enroll(tmp_path / "me.png")
    assert torch.equal(pipe.enroll(str(tmp_path / "me.png")).features, first.features) and batches == [1]
    tiny.photo(2).save(tmp_path / "me.png")
    os.utime(tmp_path / "me.png", ns=(1, 1))
    assert not torch.equal(pipe.enroll(tmp_path / "me.png").features, first.features) and batches == [1, 1]
    pipe.finder = KnownBoxesFinder([tiny.BOX])
    pipe.enroll(tmp_path / "me.png")
    pipe.enroll(tmp_path / "me.png", on_no_face="whole")
    assert batches == [1] * 4
    with torch.no_grad():
        next(pipe.vision_encoder.parameters()).add_(1)  # changes the encoder's weights
    pipe.enroll(tmp_path / "me.png")
    assert batches == [1] * 5


def test_each_photo_may_have_a_face_of_its_own():
    pipe = tiny.pipeline()
    pipe.finder = KnownBoxesFinder([FaceBox(2, 2, 30, 30, 1.0), FaceBox(36, 36, 24, 24, 1.0)])
    photos = [tiny.photo(1), tiny.photo(2)]
    made = pipe.enroll(photos, face=["largest", 1])
    assert [face.index for face in made.faces] == [0, 1]
    assert [face.index for face in pipe.enroll(photos, face=1).faces] == [1, 1]
    with pytest.raises(FaceError, match="2 photos but 1 choices"):
        pipe.enroll(photos, face=[0])


def test_a_persona_of_another_encoder_or_layer_is_refused(pipe: Any):
    persona, before = pipe.enroll(tiny.photo(1)), pipe.encoder_fingerprint
    assert before == pipe.encoder_fingerprint == EncoderInfo.of(pipe.vision_encoder).fingerprint
    pipe.load_adapter(tiny_stock.identity(pipe.unet, projection="linear", input_width=16))
    with pytest.raises(WeightsError, match="enroll the person again"):
        pipe("a person", reference=persona)
    pooled = pipe.enroll(tiny.photo(1))
    assert pooled.features.shape == (1, 16)
    pipe.load_adapter(tiny_stock.identity(pipe.unet))
    with pytest.raises(WeightsError, match="enroll the person again"):
        pipe("a person", reference=pooled)
    with torch.no_grad():
        next(pipe.vision_encoder.parameters()).add_(1)
    assert pipe.encoder_fingerprint != before


def test_encoder_info_is_available_while_the_weights_are_offloaded(pipe: Any, monkeypatch: pytest.MonkeyPatch):
    def offload(pipe: Any) -> None:
        """Run the loop of diffusers' method, which itself does not support the CPU."""
        for name, model in pipe.components.items():
            if isinstance(model, torch.nn.Module) and name not in pipe._exclude_from_cpu_offload:
                cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)

    monkeypatch.setattr(DiffusionPipeline, "enable_sequential_cpu_offload", offload)
    pipe.vision_encoder = None
    pipe.register_modules(image_encoder=tiny_ip.encoder())
    info = EncoderInfo.of(tiny_ip.encoder())
    pipe.enable_sequential_cpu_offload()
    assert pipe.image_encoder.device.type == "meta" and pipe.encoder_fingerprint == info.fingerprint
    assert pipe.enroll(tiny.photo(1)).features.shape == (5, 24)


def test_both_kinds_of_encoder_give_the_penultimate_layer_and_the_pooled_embedding():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 10}
    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=24, intermediate_size=48, **sizes)).eval()
    ours, crops = tiny_stock.encoder(), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert vision_features(ours, crops).shape == vision_features(theirs, crops).shape == (2, 5, 24)
        assert torch.equal(vision_features(ours, crops, pooled=True)[:, 0], ours.embed(crops))
        pixels = (crops - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
        wanted = theirs(pixels, output_hidden_states=True)
        assert torch.equal(vision_features(theirs, crops), wanted.hidden_states[-2])
        assert torch.equal(vision_features(theirs, crops, pooled=True)[:, 0], wanted.image_embeds)
    assert EncoderInfo.of(theirs).tokens == EncoderInfo.of(ours).tokens == 5


def test_a_batch_with_people_of_unequal_length_masks_the_padding(pipe: Any):
    one, two = pipe.enroll(tiny.photo(1)), pipe.enroll([tiny.photo(2), tiny.photo(3)])
    tokens = pipe._vision_tokens([[one], [], [two]], 2)
    assert tokens.values.shape == (6, 10, 16)
    assert tokens.mask.sum(1).tolist() == [5, 5, 0, 0, 10, 10] and pipe._vision_tokens([[one]], 1).mask is None
    assert pipe._vision_tokens([[], []], 1) is None
    assert pipe._vision_groups([[one], [], [two]], 2) is None


def test_several_people_in_a_picture_are_groups_of_equal_length(pipe: Any):
    one, two, three = (
        pipe.enroll(tiny.photo(1)),
        pipe.enroll([tiny.photo(2), tiny.photo(3)]),
        pipe.enroll(tiny.photo(4)),
    )
    people = [[one, two], [], [three]]
    tokens, groups = pipe._vision_tokens(people, 2), pipe._vision_groups(people, 2)
    assert groups.tolist() == [[True, True]] * 2 + [[False, False]] * 2 + [[True, False]] * 2
    assert tokens.values.shape == (6, 2 * 10, 16)
    assert tokens.mask.unflatten(1, (2, 10)).sum(2).tolist() == [[5, 10]] * 2 + [[0, 0]] * 2 + [[5, 0]] * 2
    alone = [pipe._vision_tokens([[person]], 1).values[0] for person in (one, two, three)]
    for row, start, wanted in ((0, 0, alone[0]), (1, 10, alone[1]), (5, 0, alone[2])):
        assert torch.allclose(tokens.values[row, start : start + len(wanted)], wanted, atol=1e-6)


def test_more_people_than_a_router_knows_are_refused(pipe: Any):
    one = pipe.enroll(tiny.photo(1))
    assert pipe._vision_groups([[one] * 5], 1).shape == (1, 5)  # without a router there is no limit
    pipe.load_adapter(tiny_stock.identity(pipe.unet, router=True))
    assert pipe._vision_groups([[one] * 4], 1).shape == (1, 4)
    with pytest.raises(ConfigError, match="A picture can show 4 people, not 5: leave some of them out"):
        pipe._vision_groups([[one] * 5], 1)
