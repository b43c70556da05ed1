"""Identity windows and blocks: what leaves a picture unchanged bit for bit, their effects, and invalid values."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

from imagine.adapter.attention import attention_layers
from imagine.errors import ConfigError
from imagine.evaluation.cases import Cases, JudgedReal, judge_pictures, judge_real_pictures, make_cases
from imagine.evaluation.judge import Judge
from imagine.evaluation.report import to_pil
from imagine.evaluation.scores import score
from imagine.evaluation.suites import PORTRAITS
from imagine.networks.diffusion import balance, guide
from imagine.pipeline.controls import Window, block_factors, layer_scales, presets
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.world import render
from tests import tiny, tiny_stock

PROMPT = "a person smiling on a beach"
NOBODY = object()
ONES = {"down": 1.0, "mid": 1.0, "up": 1.0}


@pytest.fixture(scope="module")
def pipe() -> ImaginePipeline:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def sdxl() -> Any:
    """Return a random UNet with SDXL's block types, but narrower and with fewer layers."""
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=2, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
    )  # fmt: skip


def draw(pipe: ImaginePipeline, reference: Any = None, **options: Any) -> torch.Tensor:
    call: dict[str, Any] = {"prompt": PROMPT, "generator": tiny.generator(7), "num_inference_steps": 2, **options}
    if reference is not NOBODY:
        call["reference"] = tiny.photo(1) if reference is None else reference
    pictures = pipe(output_type="pt", **call).images
    assert isinstance(pictures, torch.Tensor)
    return pictures


def base(pipe: ImaginePipeline, **options: Any) -> torch.Tensor:
    return draw(pipe, identity_scale=0.0, **options)


# --- the window -------------------------------------------------------------------------------------------------------
def test_an_open_window_changes_nothing_and_a_closed_one_leaves_the_base(pipe: ImaginePipeline) -> None:
    assert torch.equal(draw(pipe, identity_window=(0, 1)), draw(pipe))
    for closed in ((0, 0), (1, 1), (0.5, 0.5)):
        assert torch.equal(draw(pipe, identity_window=closed), base(pipe))


def test_each_half_of_the_steps_has_an_effect(pipe: ImaginePipeline) -> None:
    early, late = (draw(pipe, identity_window=window) for window in ((0, 0.5), (0.5, 1)))
    pictures = [draw(pipe), base(pipe), early, late]
    assert all((one - other).abs().max() > 1e-4 for place, one in enumerate(pictures) for other in pictures[:place])


def test_a_step_counts_by_the_fraction_done_when_it_begins() -> None:
    assert Window(0, 0.5).steps(4) == [True, True, False, False]
    assert Window(0.5, 1).steps(4) == [False, False, True, True]
    assert Window(0, 0.8).steps(20) == [True] * 16 + [False] * 4  # decimal fractions compare exactly
    assert Window(0.1, 0.2).steps(4) == [False] * 4


def test_a_callback_and_the_window_multiply(pipe: ImaginePipeline) -> None:
    seen: list[float] = []

    def off(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(float(tensors["identity_scale"]))
        return {"identity_scale": torch.zeros_like(tensors["identity_scale"])}

    options = {"callback_on_step_end": off, "callback_on_step_end_tensor_inputs": ["identity_scale"]}
    switched = draw(pipe, **options)
    assert torch.equal(switched, draw(pipe, identity_window=(0, 0.5)))
    assert seen == [1.0, 0.0]
    assert torch.equal(draw(pipe, identity_window=(0.5, 1), **options), base(pipe))
    assert seen[2:] == [1.0, 0.0]  # the callback receives the strength regardless of the window


@pytest.mark.parametrize("window", [(0.8, 0.2), (-0.1, 1), (0, 1.5), (0,), 0.5, "0:1", (0, float("nan")), (0, "1")])
def test_invalid_windows_raise(window: Any) -> None:
    with pytest.raises(ConfigError, match="identity_window"):
        Window.read(window)


# --- blocks -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("guidance", [{"guidance_scale": 1.0}, {"guidance_scale": 3.0, "identity_guidance_scale": 2.0}])
def test_all_blocks_by_name_or_by_ones_change_nothing(pipe: ImaginePipeline, guidance: dict[str, float]) -> None:
    plain = draw(pipe, **guidance)
    assert torch.equal(draw(pipe, identity_blocks="all", **guidance), plain)
    assert torch.equal(draw(pipe, identity_blocks=ONES, **guidance), plain)
    assert torch.equal(draw(pipe, identity_blocks={}, **guidance), base(pipe, **guidance))
    assert torch.equal(draw(pipe, identity_blocks={"down": 0, "mid": [0.0]}, **guidance), base(pipe, **guidance))


def test_presets_draw_different_pictures_and_complete_each_other(pipe: ImaginePipeline) -> None:
    known = presets(pipe.unet)
    assert list(known) == ["coarse", "fine", "down", "mid", "up"]
    assert sorted([*known["coarse"], *known["fine"]]) == sorted([*known["down"], *known["mid"], *known["up"]])
    assert known["fine"][0] == "down_blocks.0.attentions.0" and "mid_block.attentions.0" in known["coarse"]
    pictures = [draw(pipe), base(pipe), *(draw(pipe, identity_blocks=name) for name in ("coarse", "fine"))]
    assert all((one - other).abs().max() > 1e-4 for place, one in enumerate(pictures) for other in pictures[:place])


def test_blocks_and_strength_multiply_picture_by_picture(pipe: ImaginePipeline) -> None:
    two = {"prompt": [PROMPT] * 2, "generator": [tiny.generator(7), tiny.generator(7)]}
    halved = draw(pipe, **two, identity_scale=[1.0, 0.0], identity_blocks={side: 0.5 for side in ONES})
    assert (halved[:1] - draw(pipe, identity_scale=0.5)).abs().max() < 1e-4
    assert (halved[1:] - base(pipe)).abs().max() < 1e-4


def test_the_lora_of_a_block_follows_its_branch(pipe: ImaginePipeline) -> None:
    factors = block_factors(pipe.unet, "mid")
    assert factors is not None
    assert {name.rpartition(".")[2] for name in factors} == {"attn1", "attn2"}
    assert all(name.startswith("mid_block.attentions.0.") for name in factors)
    scales = layer_scales(torch.tensor([0.5, 2.0]), factors)
    assert isinstance(scales, dict) and scales.keys() == factors.keys()
    assert all(isinstance(each, torch.Tensor) and each.tolist() == [0.5, 2.0] for each in scales.values())


@pytest.mark.parametrize(
    "given",
    [
        {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}},
        {"down": {"block_1": 0.3}, "mid": 2.0},
        {"up": 0.5},
        {"up": {"block_0": [0.1, 0.2, 0.3], "block_1": [0.4]}, "mid": [0.7]},
    ],
)
def test_the_mapping_has_the_same_meaning_as_in_diffusers(sdxl: Any, given: dict[str, Any]) -> None:
    theirs = _maybe_expand_lora_scales(sdxl, [given], default_scale=0.0)[0]
    mine = block_factors(sdxl, given) or {}
    for layer in attention_layers(sdxl):
        (block,) = [block for block in theirs if layer.startswith(f"{block}.")]
        assert mine.get(layer, 0.0) == theirs[block]


def test_instant_style_presets_exist_for_sdxl_only(sdxl: Any, pipe: ImaginePipeline) -> None:
    known = presets(sdxl)
    assert known["style"] == ("up_blocks.0.attentions.1",) and known["layout"] == ("down_blocks.2.attentions.1",)
    style = block_factors(sdxl, "style")
    assert style == block_factors(sdxl, {"up": {"block_0": [0, 1, 0]}}) and style
    with pytest.raises(ConfigError, match="no identity_blocks 'style': choose all, coarse, fine, down, mid or up,"):
        draw(pipe, identity_blocks="style")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nonsense", "no identity_blocks 'nonsense': choose all, coarse"),
        ({"sideways": 1.0}, "'sideways', but this denoiser has no attention there: choose down, up or mid"),
        ({"down": {"block_7": 1.0}}, "'block_7', but this denoiser has no attention there: choose block_0 or block_1"),
        ({"up": {"block_0": [1, 2, 3, 4]}}, "4 strengths for 2 attention blocks"),
        ({"mid": "much"}, "'much' must be a finite number"),
    ],
)
def test_invalid_blocks_raise(pipe: ImaginePipeline, given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(pipe, identity_blocks=given)


# --- balanced guidance ------------------------------------------------------------------------------------------------
def test_both_guidance_vectors_are_brought_to_the_smaller_norm() -> None:
    text, identity = torch.randn(3, 4, 2, 2), 5 * torch.randn(3, 4, 2, 2)
    identity[2] = 0
    one, other = balance(text, identity, torch.tensor([True, False, True]))
    assert torch.equal(one[1:], text[1:]) and torch.equal(
        other[1:], identity[1:]
    )  # balancing is off in row 1, and row 2 has a zero vector
    assert torch.allclose(one[0].norm(), other[0].norm()) and torch.equal(one[0], text[0])
    cosine = torch.nn.functional.cosine_similarity(other[0].flatten(), identity[0].flatten(), 0)
    assert torch.allclose(cosine, torch.tensor(1.0))


def test_balanced_guidance_is_guidance_with_balanced_vectors() -> None:
    nothing, sentence, full = torch.randn(3, 2, 4, 2, 2)
    everybody = torch.tensor([True, True])
    text, identity = balance(sentence - nothing, full - sentence, everybody)
    guided = guide(nothing, sentence, full, 3.0, 2.0, balanced=everybody)
    assert torch.equal(guided, nothing + 3.0 * text + 2.0 * identity)
    assert torch.equal(
        guide(nothing, sentence, full, 3.0, 2.0, balanced=~everybody), guide(nothing, sentence, full, 3.0, 2.0)
    )


def test_balance_does_not_change_pictures_without_people_or_without_guidance(pipe: ImaginePipeline) -> None:
    balanced = draw(pipe, guidance_scale=3.0, guidance_balance=True)
    assert (balanced - draw(pipe, guidance_scale=3.0, identity_guidance_scale=3.001)).abs().max() > 1e-3
    assert torch.equal(draw(pipe, guidance_scale=1.0, guidance_balance=True), draw(pipe, guidance_scale=1.0))
    both = pipe(
        [PROMPT] * 2, reference=[tiny.photo(1), None], guidance_scale=3.0, guidance_balance=True, output_type="pt",
        generator=[tiny.generator(7), tiny.generator(7)], num_inference_steps=2,
    ).images  # fmt: skip
    assert (both[:1] - balanced).abs().max() < 1e-4
    assert (both[1:] - base(pipe, guidance_scale=3.0)).abs().max() < 1e-4


# --- the same on stock pipelines --------------------------------------------------------------------------------------
@pytest.mark.parametrize("xl", [False, True], ids=["sd15", "sdxl"])
def test_stock_pipelines_also_have_windows_and_blocks(xl: bool) -> None:
    stock = tiny_stock.stock(xl)
    alone = draw(stock, reference=NOBODY)
    known = tiny_stock.personal(stock)
    plain = draw(known)
    assert torch.equal(draw(known, identity_window=(0, 1)), plain) and torch.equal(
        draw(known, identity_blocks=ONES), plain
    )
    outside: list[dict[str, Any]] = [
        {"identity_window": (0, 0)}, {"identity_window": (1, 1)}, {"identity_blocks": {}},
    ]  # fmt: skip
    for nobody in outside:
        assert torch.equal(draw(known, **nobody), alone)
    steps: list[int] = []

    def count(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return tensors

    early = draw(known, identity_window=(0, 0.5))
    pictures = [plain, alone, early, draw(known, identity_window=(0.5, 1)), draw(known, identity_blocks="up")]
    assert all((one - other).abs().max() > 1e-4 for place, one in enumerate(pictures) for other in pictures[:place])
    assert torch.equal(draw(known, identity_window=(0, 0.5), callback_on_step_end=count), early) and steps == [0, 1]
    assert torch.equal(draw(known, identity_blocks="up"), draw(known, identity_scale=block_factors(known.unet, "up")))


# --- effects with the shipped weights (docs/controls.md uses more people) ---------------------------------------------
PEOPLE = 3


class Studio:
    """The shipped pipeline and judge, with held-out people."""

    def __init__(self, count: int) -> None:
        self.pipe = ImaginePipeline.from_pretrained()
        self.pipe.set_progress_bar_config(disable=True)
        self.judge = Judge.from_pretrained()
        self.cases = make_cases(PORTRAITS[:1], count, seed=5, gallery=count)  # the prompt asks for a laugh
        photos = render(self.cases.people[:count], self.cases.references).images
        self.people = [self.pipe.enroll([to_pil(photo)], on_no_face="whole") for photo in photos]

    def cases_for(self, number: int) -> Cases:
        """Return the cases of all people with one of the suite's prompts."""
        return make_cases(PORTRAITS[number : number + 1], len(self.people), seed=5, gallery=len(self.people))

    def draw(self, cases: Cases, **options: Any) -> Any:
        call: dict[str, Any] = {"num_inference_steps": 8, "output_type": "pt", "refine_faces": False, **options}
        count = len(self.people)
        generators = [tiny.generator(100 + number) for number in range(count)]
        return self.pipe([cases.prompt(0).text] * count, reference=self.people, generator=generators, **call)

    def likeness(self, cases: Cases, real: JudgedReal, pictures: torch.Tensor) -> float:
        """Return the mean similarity to another picture of each person."""
        seen = judge_pictures(self.judge, len(cases), lambda start, stop: (pictures[start:stop], None))
        return float(score(cases, seen, real)["sim_gt"].mean())


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(PEOPLE)


def test_likeness_follows_from_the_first_steps_and_the_fine_blocks(studio: Studio) -> None:
    real = judge_real_pictures(studio.cases, studio.judge)

    def likeness(**options: Any) -> float:
        return studio.likeness(studio.cases, real, studio.draw(studio.cases, **options).images)

    plain, early, late = likeness(), likeness(identity_window=(0, 0.5)), likeness(identity_window=(0.5, 1))
    coarse, fine = (likeness(identity_blocks=name) for name in ("coarse", "fine"))
    assert plain > 0.4  # other people have a similarity of about 0
    assert plain > early > late + 0.1
    assert coarse < fine - 0.05 < plain - 0.05


def test_balanced_guidance_equalises_both_norms_with_the_shipped_weights(studio: Studio) -> None:
    start = torch.randn(PEOPLE, 32, 8, 8, generator=tiny.generator(1))

    def velocity(**options: Any) -> torch.Tensor:
        step = {"latents": start, "num_inference_steps": 1, "output_type": "latent", **options}
        return start - studio.draw(studio.cases, **step).images

    full, sentence = velocity(guidance_scale=1.0), velocity(guidance_scale=1.0, identity_scale=0.0)
    nothing = (3 * sentence - velocity(guidance_scale=3.0, identity_scale=0.0)) / 2
    text, person = sentence - nothing, full - sentence
    norms = [vector.flatten(1).norm(dim=1) for vector in (text, person)]
    assert ((norms[0] / norms[1]).log().abs() > 0.1).all()  # the norms differ without balancing
    one, other = balance(text, person, torch.ones(PEOPLE, dtype=torch.bool))
    balanced = velocity(guidance_scale=5.0, identity_guidance_scale=8.0, guidance_balance=True)
    torch.testing.assert_close(balanced, nothing + 5 * one + 8 * other, atol=5e-3, rtol=1e-3)
    plain = velocity(guidance_scale=5.0, identity_guidance_scale=8.0)
    assert ((balanced - nothing).flatten(1).norm(dim=1) < 0.97 * (plain - nothing).flatten(1).norm(dim=1)).all()


def test_the_second_pass_increases_similarity_of_small_faces() -> None:
    studio = Studio(12)  # three people are too few for a significant difference
    cases = studio.cases_for(
        next(n for n, prompt in enumerate(PORTRAITS) if prompt.asked.get("framing") == "half body")
    )
    real = judge_real_pictures(cases, studio.judge)
    plain, refined = (studio.draw(cases, refine_faces=refine) for refine in (False, True))
    assert plain.refined == 0 and refined.refined >= 10 and not refined.notes  # the others are large enough
    assert studio.likeness(cases, real, refined.images) > studio.likeness(cases, real, plain.images) + 0.01
