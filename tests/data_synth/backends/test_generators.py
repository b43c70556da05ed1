"""Test the diffusers generator with a tiny random Stable Diffusion."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_synth.backends.contracts import Failed
from data_synth.backends.generators import BLOCKED, DiffusersGenerator, noise_of
from data_synth.records import Candidate
from imagine.errors import WeightsError
from tests import tiny_models
from tests.tiny_models import pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.stable_diffusion(tmp_path_factory.mktemp("sd"))


def generator(folder: Path, **settings: object) -> DiffusersGenerator:
    chosen = {"model": str(folder), "device": "cpu", "steps": 2, "guidance_scale": 3.0, **settings}
    made = DiffusersGenerator(DiffusersGenerator.Settings.model_validate(chosen))
    made.load()
    return made


def test_candidates_depend_on_seed_and_attempt_only(folder: Path) -> None:
    draws = generator(folder)
    reference = tiny_models.reference(1)
    spec, other = tiny_models.spec(reference, 0), tiny_models.spec(reference, 1)
    together = draws.generate([(reference, spec, 0), (reference, spec, 1), (reference, other, 0)])
    made = [one for one in together if isinstance(one, Candidate)]
    assert [one.key for one in made] == ["r1-0-0-0", "r1-0-1-0", "r1-1-0-0"]
    assert [(one.ask, one.attempt, one.round) for one in made] == [("r1-0", 0, 0), ("r1-0", 1, 0), ("r1-1", 0, 0)]
    assert len({one.image for one in made}) == 3 and made[0].image.startswith(b"\x89PNG")
    torch.manual_seed(99)
    alone = draws.generate([(reference, other, 0)]) + draws.generate([(reference, spec, 1)])
    assert alone == [together[2], together[1]]  # bit for bit


def test_a_batch_gives_the_same_pictures_up_to_rounding(folder: Path) -> None:
    reference = tiny_models.reference(1)
    items = [(reference, tiny_models.spec(reference, number), 0) for number in range(3)]
    one_by_one, batched = generator(folder).generate(items), generator(folder, batch_size=2).generate(items)
    for one, two in zip(one_by_one, batched, strict=True):
        assert isinstance(one, Candidate) and isinstance(two, Candidate) and one.key == two.key
        assert np.abs(pixels(one).astype(int) - pixels(two)).max() <= 1


def test_half_precision_gives_nearly_the_same_picture(folder: Path) -> None:
    reference = tiny_models.reference(1)
    item = [(reference, tiny_models.spec(reference), 0)]
    (exact,), (rough,) = (generator(folder, dtype=dtype).generate(item) for dtype in ("float32", "bfloat16"))
    assert isinstance(exact, Candidate) and isinstance(rough, Candidate)
    assert 0 < np.abs(pixels(exact).astype(int) - pixels(rough)).mean() < 8


def test_settings_reach_the_pipeline(folder: Path) -> None:
    reference = tiny_models.reference(1)
    item = [(reference, tiny_models.spec(reference), 0)]
    (plain,) = generator(folder).generate(item)
    (wide,) = generator(folder, width=48, height=16).generate(item)
    (framed,) = generator(folder, prompt="{prompt}, as a pencil sketch").generate(item)
    (negative,) = generator(folder, negative_prompt="a red hat").generate(item)
    (rescaled,) = generator(folder, arguments={"guidance_rescale": 0.9}).generate(item)
    assert isinstance(wide, Candidate) and pixels(wide).shape == (16, 48, 3)
    drawn = [one.image for one in (plain, framed, negative, rescaled) if isinstance(one, Candidate)]
    assert len(set(drawn)) == 4


def test_one_bad_item_does_not_affect_the_others(folder: Path) -> None:
    draws = generator(folder, batch_size=2)
    reference = tiny_models.reference(1)
    good, bad = tiny_models.spec(reference, 0), tiny_models.spec(reference, 1)
    original = draws.pipe.check_inputs

    def refuse(prompt: list[str], *rest: object, **named: object) -> None:
        if "unspeakable" in prompt:
            raise ValueError("this is not to be drawn")
        original(prompt, *rest, **named)

    draws.pipe.check_inputs = refuse  # the pipeline's own check with one more error
    bad = tiny_models.spec(reference, 1, prompt="unspeakable")
    first, second = draws.generate([(reference, good, 0), (reference, bad, 0)])
    assert isinstance(first, Candidate)
    assert isinstance(second, Failed) and "not to be drawn" in second.sentence and not second.for_now


def test_a_picture_blocked_by_the_safety_checker_is_a_failure(folder: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "image_size": 32, "patch_size": 16}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    checker.concept_embeds_weights.data.fill_(-2.0)  # every picture exceeds the threshold
    draws = generator(folder)
    draws.pipe.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor(size=32, crop_size=32))
    reference = tiny_models.reference(1)
    (blocked,) = draws.generate([(reference, tiny_models.spec(reference), 0)])
    assert isinstance(blocked, Failed) and blocked.reason == BLOCKED


def test_noise_differs_by_seed_attempt_and_round() -> None:
    drawn = {
        float(torch.randn(1, generator=noise_of(*place))) for place in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (10, 0, 0)]
    }
    assert len(drawn) == 4
    assert torch.equal(torch.randn(3, generator=noise_of(7, 1, 2)), torch.randn(3, generator=noise_of(7, 1, 2)))


def test_unusable_pipelines_raise_one_sentence(tmp_path: Path) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    with pytest.raises(WeightsError, match="cannot be loaded"):
        generator(tmp_path / "nowhere")
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "ddim")
    with pytest.raises(WeightsError, match="does not take a prompt"):
        generator(tmp_path / "ddim")


def test_the_identity_is_available_before_loading(folder: Path) -> None:
    settings = DiffusersGenerator.Settings(model=str(folder), batch_size=8)
    identity = DiffusersGenerator(settings).identity
    assert identity["model"] == folder.name and identity["licence"] == "apache-2.0" and len(identity["weights"]) == 16
    assert not {"model", "batch_size", "device", "offload"} & set(settings.model_dump())
