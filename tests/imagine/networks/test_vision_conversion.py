"""Our vision encoder and transformers' give the same outputs after conversion in either direction."""

from typing import Any

import pytest
import torch

from imagine.errors import WeightsError
from imagine.networks.encoders import CLIP_MEAN, CLIP_STD, VisionEncoder
from imagine.networks.vision_conversion import SIZES, build_vision_encoder, from_transformers, to_transformers
from tests import tiny_ip

ENCODERS: dict[str, dict[str, Any]] = {
    "small": {"image_size": 16, "patch_size": 8, "width": 24, "layers": 2, "heads": 2, "embed_width": 20},
    "odd": {  # an inner width that is not a multiple of the width, as in ViT-bigG
        "image_size": 28, "patch_size": 7, "width": 26, "layers": 3, "heads": 2, "embed_width": 8, "mlp_ratio": 4.9231,
    },
    "quick": {
        "image_size": 16, "patch_size": 4, "width": 32, "layers": 4, "heads": 4, "embed_width": 40, "quick_gelu": True,
    },
}  # fmt: skip


def same(one: Any, other: Any) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def differences(encoder: VisionEncoder, theirs: Any, seed: int = 0) -> tuple[float, float]:
    """Return the largest differences of hidden states and embeddings on random crops."""
    crops = torch.rand(2, 3, encoder.config.image_size, encoder.config.image_size)
    pixels = (crops - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        seen = theirs(pixels, output_hidden_states=True)
        tokens, embedding = encoder(crops), encoder.embed(crops)
    assert tokens.shape == seen.hidden_states[-2].shape and tokens.std() > 0.1
    return (
        float((tokens - seen.hidden_states[-2]).abs().max()),
        float((embedding - seen.image_embeds).abs().max()),
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_conversion_in_both_directions(name: str, tmp_path: Any) -> None:
    encoder = VisionEncoder(**ENCODERS[name]).eval()
    for parameter in encoder.parameters():  # biases and normalisations must be random too
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = to_transformers(encoder)
    assert max(differences(encoder, theirs)) < 1e-5
    back = from_transformers(theirs)
    sizes = {name: back.config[name] for name in ENCODERS[name] if name != "mlp_ratio"}
    assert same(back, encoder) and sizes.items() <= ENCODERS[name].items()
    theirs.save_pretrained(tmp_path)
    assert same(type(theirs).from_pretrained(tmp_path, local_files_only=True), theirs)


def test_transformers_encoder_in_half_precision_is_converted_both_ways_bit_for_bit() -> None:
    theirs = tiny_ip.encoder()
    ours = from_transformers(theirs)
    assert max(differences(ours, theirs)) < 1e-5
    assert same(to_transformers(ours), theirs)
    half = from_transformers(theirs.to(torch.float16))
    assert half.dtype == torch.float16 and same(to_transformers(half), theirs)


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"layer_norm_eps": 1e-6}, {"image_size": (16, 32)}])
def test_options_that_ours_does_not_support_are_refused(change: dict[str, Any]) -> None:
    theirs = tiny_ip.encoder()
    for name, value in change.items():
        setattr(theirs.config, name, value)
    with pytest.raises(WeightsError, match="of this image encoder differs from CLIP's"):
        from_transformers(theirs)


def test_public_towers_have_their_published_sizes() -> None:
    millions = {"OpenCLIP ViT-H/14": 632, "OpenCLIP ViT-bigG/14": 1844, "CLIP ViT-L/14": 303}
    with torch.device("meta"):
        towers = {name: build_vision_encoder(name) for name in SIZES}
    for name, tower in towers.items():
        assert sum(each.numel() for each in tower.parameters()) // 1_000_000 == millions[name]
        assert tower.tokens == 257
    assert towers["OpenCLIP ViT-bigG/14"].tower.transformer.resblocks[0].mlp.c_fc.out_features == 8192
