"""The second pass of stock pipelines: which faces it redraws, with which person, and what must not change."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from imagine.errors import ConfigError
from imagine.people.faces import KnownBoxesFinder
from imagine.pipeline.controls import Window
from imagine.pipeline.second_pass import RefineFaces, SmallFace
from imagine.records import FaceBox
from imagine.stock.call import Batch
from imagine.stock.pipelines import PersonalisationMixin, personalised_class
from imagine.stock.second_pass import StockSecondPass
from tests import tiny, tiny_ip, tiny_stock
from tests.imagine.stock.test_combinations import COMBINATIONS
from tests.tiny_stock import OTHER, PROMPT, SIDE, draw, same

SMALL = FaceBox(5.0, 5.0, 4.0, 5.0, 1.0)  # in pictures of 16 pixels
LEFT, RIGHT = FaceBox(2.0, 2.0, 3.0, 3.0, 1.0), FaceBox(11.0, 10.0, 3.0, 3.0, 1.0)
LARGE = FaceBox(4.0, 4.0, 7.0, 8.0, 1.0)
# With this window the identity acts in none of the first pass's two steps and in two of the second pass's three.
LATE: dict[str, Any] = {"identity_window": (0.55, 1.0), "refine_faces": RefineFaces(steps=3)}

OTHERS = (
    "guidance-rescale", "lora-scale", "textual-inversion", "euler", "ancestral", "dpm-solver", "unipc", "lcm",
    "lightning", "freeu", "sequential-offload", "group-offload", "vae-tiling", "bfloat16",
)  # fmt: skip


@pytest.fixture(scope="module")
def enrolled(pipe: Any) -> list[Any]:
    pipe.finder = KnownBoxesFinder([tiny.BOX])
    return [pipe.enroll(tiny.photo(seed)) for seed in (1, 2, 3)]


@pytest.fixture
def people(pipe: Any, enrolled: list[Any]) -> list[Any]:
    """Return three personas, and set the finder to find one small face."""
    pipe.finder = KnownBoxesFinder([SMALL])
    return enrolled


def shown(box: FaceBox) -> torch.Tensor:
    """Return a mask (H, W) of the pixels in the pasted ellipse."""
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    reach = RefineFaces().reach / 2
    return torch.hypot((x - box.centre[0]) / (reach * box.width), (y - box.centre[1]) / (reach * box.height)) < 1


def assert_only_faces_changed(before: torch.Tensor, after: torch.Tensor, *boxes: FaceBox) -> None:
    changed = (before != after)[0].any(0)
    allowed = torch.stack([shown(box) for box in boxes]).any(0)
    assert not changed[~allowed].any() and all(changed[shown(box)].float().mean() > 0.5 for box in boxes)


def result(pipe: Any, **options: Any) -> Any:
    """Return the result of a call with two steps."""
    given = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "pt", "generator": tiny.generator(7)}
    return pipe(**{**given, **options})


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_small_face_is_redrawn_and_nothing_else_changes(pipe: Any, people: list[Any], guidance: float):
    plain, out = (
        result(pipe, reference=people[0], guidance_scale=guidance, refine_faces=refine) for refine in (None, True)
    )
    assert (plain.refined, out.refined, out.notes) == (0, 1, []) and len(out.faces) == 1
    assert_only_faces_changed(plain.images, out.images, SMALL)
    assert torch.equal(result(pipe, reference=people[0], guidance_scale=guidance, refine_faces=True).images, out.images)


def test_it_is_the_person_who_is_drawn_into_it(pipe: Any, people: list[Any]):
    nobody = draw(pipe)
    ann, bob = (result(pipe, reference=person, **LATE) for person in people[:2])
    assert ann.refined == bob.refined == 1
    for each in (ann.images, bob.images):
        assert_only_faces_changed(nobody, each, SMALL)
    assert not same(ann.images, bob.images)
    weak = result(pipe, reference=people[0], identity_scale=0.3, **LATE).images
    assert not same(weak, ann.images)
    layers = {name: [1.0] for name in pipe.adapter.layers()}
    assert same(result(pipe, reference=people[0], identity_scale=layers, **LATE).images, ann.images)


def test_each_of_several_people_is_drawn_into_their_own_face(pipe: Any, people: list[Any]):
    pipe.finder = KnownBoxesFinder([RIGHT, LEFT])
    prompt = "{a} in a red hat, looking to {b}"
    ab, ac, cb = (
        result(pipe, prompt=prompt, reference={"a": people[a], "b": people[b]}, **LATE)
        for a, b in ((0, 1), (0, 2), (2, 1))
    )
    assert ab.refined == 2 and not any("refined" in note for note in ab.notes)
    left, right = shown(LEFT), shown(RIGHT)
    assert torch.equal(ab.images[..., left], ac.images[..., left])
    assert not same(ab.images[..., right], ac.images[..., right])
    assert torch.equal(ab.images[..., right], cb.images[..., right])
    assert not same(ab.images[..., left], cb.images[..., left])
    pipe.finder = KnownBoxesFinder([LEFT])
    out = result(pipe, prompt=prompt, reference={"a": people[0], "b": people[1]}, refine_faces=True)
    assert out.refined == 0
    assert "Picture 1: one face was found for 2 people, so no face was refined." in out.notes


def test_a_batch_is_refined_as_its_pictures_are_alone(pipe: Any, people: list[Any]):
    options: dict[str, Any] = {"guidance_scale": 4.0, "refine_faces": True}
    prompts, scales = [PROMPT, OTHER, PROMPT], [0.5, 1.0, 1.0]
    references, negatives = [people[0], people[1], None], ["a red hat", "", ""]
    out = result(
        pipe, prompt=prompts, reference=references, negative_prompt=negatives, identity_scale=scales,
        generator=[tiny.generator(seed) for seed in range(6)], num_images_per_prompt=2, **options,
    )  # fmt: skip
    assert out.refined == 4
    for row in range(6):
        alone = result(
            pipe, prompt=prompts[row // 2], reference=references[row // 2], negative_prompt=negatives[row // 2],
            identity_scale=scales[row // 2], generator=tiny.generator(row), **options,
        )  # fmt: skip
        assert same(out.images[row : row + 1], alone.images)


def test_its_noise_depends_on_the_call_and_does_not_advance_the_generator(pipe: Any, people: list[Any]):
    one, other = tiny.generator(7), tiny.generator(7)
    result(pipe, reference=people[0], generator=one)
    result(pipe, reference=people[0], generator=other, refine_faces=True)
    assert torch.equal(one.get_state(), other.get_state())
    latents = torch.randn(1, 4, 8, 8, generator=tiny.generator(3))
    first, again = (
        result(pipe, reference=people[0], latents=latents, generator=None, refine_faces=True) for _ in range(2)
    )
    assert first.refined == 1 and torch.equal(first.images, again.images)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(result(pipe, reference=people[0], generator=None, refine_faces=True).images)
    assert torch.equal(drawn[0], drawn[1]) and not same(drawn[1], drawn[2])
    two = result(pipe, prompt=[PROMPT] * 2, reference=people[0], latents=latents.repeat(2, 1, 1, 1), **LATE).images
    assert same(two[:1], two[1:])  # equal start latents give equal faces


def test_seeds_differ_by_picture_and_equal_those_of_single_calls(pipe: Any):
    def seeds(count: int, **given: Any) -> list[int]:
        call = super(PersonalisationMixin, pipe).__call__
        again = StockSecondPass.plan(pipe, call, RefineFaces(), Batch(count, 1, True), given, [], {})
        assert again is not None
        return list(again.seeds)

    def generators() -> list[torch.Generator]:
        return [tiny.generator(seed) for seed in (1, 2)]

    listed = seeds(2, generator=generators())
    assert listed[0] != listed[1] and listed == [seeds(1, generator=each)[0] for each in generators()]
    single = seeds(3, generator=tiny.generator(1))
    assert single[0] == listed[0] and len(set(single)) == 3
    latents = torch.randn(2, 4, 8, 8, generator=tiny.generator(3))
    given = [seeds(1, latents=each[None], generator=tiny.generator(5))[0] for each in latents]
    assert seeds(2, latents=latents) == given and given[0] != given[1]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_every_output_type_and_large_faces_bit_for_bit(pipe: Any, people: list[Any], output_type: str):
    def pixels(refine: bool, found: FaceBox, **options: Any) -> np.ndarray[Any, Any]:
        pipe.finder = KnownBoxesFinder([found])
        options |= {"reference": people[0], "output_type": output_type, "refine_faces": refine}
        out = result(pipe, prompt=[PROMPT] * 2, **options)
        images = out[0]
        assert isinstance(images[0], Image.Image) == (output_type == "pil")
        return np.stack([np.asarray(each) for each in images])

    plain = pixels(False, SMALL)
    refined = pixels(True, SMALL)
    moved = refined.transpose(0, 2, 3, 1) if output_type == "pt" else refined
    kept = plain.transpose(0, 2, 3, 1) if output_type == "pt" else plain
    outside = ~shown(SMALL).numpy()
    assert np.array_equal(moved[:, outside], kept[:, outside]) and refined.dtype == plain.dtype
    assert (moved != kept).any(axis=(1, 2, 3)).all()
    assert np.array_equal(pixels(True, LARGE), plain)
    assert np.array_equal(pixels(True, SMALL, return_dict=False), refined)


def test_no_face_is_refined_without_an_active_identity(pipe: Any, people: list[Any]):
    for options in ({"identity_scale": 0.0}, {"identity_window": (0.0, 0.4)}, {"reference": None}):
        plain, out = (
            result(pipe, **{"reference": people[0], "refine_faces": each, **options}) for each in (False, True)
        )
        assert (out.refined, out.notes) == (0, []) and torch.equal(plain.images, out.images)

    def stop(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    assert result(pipe, reference=people[0], callback_on_step_end=stop, refine_faces=True).refined == 0


def test_it_takes_the_configured_steps_and_callbacks_run_in_the_first_pass_only(pipe: Any, people: list[Any]):
    ran: list[int] = []
    seen: list[int] = []

    def callback(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return tensors

    hook = pipe.unet.register_forward_pre_hook(lambda _, given: ran.append(len(given[0])))
    for settings, steps, wanted in (
        (RefineFaces(), 5, 3), (RefineFaces(), 1, 1), (RefineFaces(strength=0.1), 2, 1), (RefineFaces(steps=7), 2, 7),
        (RefineFaces(strength=1.0, steps=2), 2, 2), (RefineFaces(strength=0.3, steps=9), 2, 9),
    ):  # fmt: skip
        ran.clear()
        seen.clear()
        options: dict[str, Any] = {"num_inference_steps": steps, "callback_on_step_end": callback}
        result(pipe, reference=people[0], guidance_scale=1.0, refine_faces=settings, **options)
        assert ran == [1] * (steps + wanted) and seen == list(range(steps))
        assert len(pipe.scheduler.timesteps) == steps  # the second pass has its own scheduler
    hook.remove()


def photo(seed: int, mode: str = "RGB") -> Image.Image:
    return tiny.photo(seed).resize((SIDE, SIDE)).convert(mode)


PAINTING = {"image": photo(21), "strength": 0.9, "num_inference_steps": 3}
WHOLE = {"mask_image": Image.new("L", (SIDE, SIDE), 255), "height": SIDE, "width": SIDE}
KINDS: dict[str, dict[str, Any]] = {
    "Img2Img": PAINTING,
    "Inpaint": {**PAINTING, **WHOLE},
    "ControlNet": {"image": photo(23)},
    "ControlNetImg2Img": {**PAINTING, "control_image": photo(23)},
    "ControlNetInpaint": {**PAINTING, **WHOLE, "control_image": photo(23)},
}


def other_kind(xl: bool, kind: str, **more: Any) -> tuple[Any, Any]:
    """Return a pipeline of another kind and a persona enrolled with it."""
    if "ControlNet" in kind:
        more["controlnet"] = tiny_stock.controlnet(xl)
    pipe = tiny_stock.personal(tiny_stock.stock(xl, kind, **more))
    person = pipe.enroll(tiny.photo(1))
    pipe.finder = KnownBoxesFinder([SMALL])
    return pipe, person


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pipeline_refines(xl: bool, kind: str):
    pipe, person = other_kind(xl, kind)
    plain, out = (result(pipe, reference=person, refine_faces=each, **KINDS[kind]) for each in (False, True))
    assert out.refined == 1
    assert_only_faces_changed(plain.images, out.images, SMALL)


def test_inpainting_refines_only_what_it_painted(xl: bool):
    pipe, person = other_kind(xl, "Inpaint")
    half = np.zeros((SIDE, SIDE), np.uint8)
    half[:, : int(SMALL.centre[0]) + 1] = 255
    call = {**PAINTING, **WHOLE, "reference": person, "mask_image": Image.fromarray(half)}
    plain, out = (result(pipe, refine_faces=each, **call).images for each in (False, True))
    changed = (plain != out)[0].any(0)
    assert changed.any() and not changed[:, int(SMALL.centre[0]) + 1 :].any()
    call["mask_image"] = Image.fromarray(255 - half)
    out = result(pipe, refine_faces=True, **call)
    assert out.refined == 0 and out.notes == ["Picture 1: no face was found for one person, so no face was refined."]


def test_a_denoiser_made_for_inpainting_refines_too(xl: bool):
    pipe, person = other_kind(xl, "Inpaint")
    torch.manual_seed(0)
    painter = tiny_stock.unet(xl, channels=9)
    pipe = personalised_class(type(pipe)).from_pipe(pipe, unet=painter)
    pipe.load_adapter(tiny_stock.identity(painter))
    pipe.finder = KnownBoxesFinder([SMALL])
    pipe.set_progress_bar_config(disable=True)
    call = {**PAINTING, **WHOLE, "reference": person}
    plain, out = (result(pipe, refine_faces=each, **call) for each in (False, True))
    assert out.refined == 1
    assert_only_faces_changed(plain.images, out.images, SMALL)


def with_ip_adapter(xl: bool, **more: Any) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline with only an IP-Adapter, and the arguments of its call."""
    parts = tiny_ip.components(xl)
    kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    pipe = personalised_class(kind)(**parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(tiny_ip.nested(tiny_ip.tensors("plus", pipe.unet, 0)), image_encoder_folder=None)
    pipe.finder = KnownBoxesFinder([SMALL])
    return pipe, {"height": SIDE, "width": SIDE, "ip_adapter_image": tiny.photo(1), **more}


def test_whom_an_ip_adapter_shows_is_refined(xl: bool):
    pipe, call = with_ip_adapter(xl)
    plain, out = (result(pipe, refine_faces=each, **call) for each in (False, True))
    assert out.refined == 1
    assert_only_faces_changed(plain.images, out.images, SMALL)
    cutoff = diffusers.callbacks.IPAdapterScaleCutoffCallback(None, cutoff_step_index=0)
    pipe.set_ip_adapter_scale(0.8)
    scales: list[Any] = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda _, __, given: scales.append(given["cross_attention_kwargs"]["conditioning"].scales.get("ip_0", 0.0)),
        with_kwargs=True,
    )
    assert result(pipe, refine_faces=True, callback_on_step_end=cutoff, **call).refined == 1
    hook.remove()
    assert [float(torch.as_tensor(each).max()) for each in scales] == pytest.approx([0.8, 0.0, 0.8])
    assert result(pipe, refine_faces=True, **call).refined == 0  # the callback left the scale at 0
    pipe.set_ip_adapter_scale(0.8)
    embeds = pipe._ip_features([tiny.photo(1)], None, guided=True)
    given = {**call, "ip_adapter_image": None, "ip_adapter_image_embeds": embeds}
    assert same(result(pipe, refine_faces=True, **given).images, result(pipe, refine_faces=True, **call).images)


def test_two_people_of_an_ip_adapter_have_their_regions(xl: bool):
    pipe, call = with_ip_adapter(xl)
    pipe.finder = KnownBoxesFinder([LEFT, RIGHT])
    masks = torch.zeros(1, 2, SIDE, SIDE)
    masks[:, 0, :, :8] = masks[:, 1, :, 8:] = 1
    seen: list[torch.Tensor] = []
    pipe.unet.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["cross_attention_kwargs"]["conditioning"].regions["ip_0"]),
        with_kwargs=True,
    )
    call |= {
        "ip_adapter_image": [[tiny.photo(1), tiny.photo(2)]],
        "cross_attention_kwargs": {"ip_adapter_masks": [masks]},
    }
    out = result(pipe, refine_faces=True, **call)
    assert out.refined == 2
    assert [each.float().mean((0, 2, 3)).tolist() for each in seen] == [[0.5, 0.5]] * 2 + [[1.0, 0.0], [0.0, 1.0]]
    assert call["cross_attention_kwargs"]["ip_adapter_masks"][0] is masks


def test_diffusers_own_ip_adapter_is_refined_too():
    stock = diffusers.StableDiffusionPipeline(**tiny_ip.components(False))
    file = tiny_ip.nested(tiny_ip.tensors("plus", stock.unet, 0))
    stock.load_ip_adapter(file, subfolder="", weight_name="", image_encoder_folder=None)
    pipe = personalised_class(type(stock)).from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    pipe.finder = KnownBoxesFinder([SMALL])
    call = {"height": SIDE, "width": SIDE, "ip_adapter_image": tiny.photo(1)}
    plain, out = (result(pipe, refine_faces=each, **call) for each in (False, True))
    assert out.refined == 1
    assert_only_faces_changed(plain.images, out.images, SMALL)
    assert result(pipe.__class__.from_pipe(tiny_stock.stock()), refine_faces=True).refined == 0  # without any person


def test_offloaded_models_refine_and_leave(xl: bool):
    pipe, person = other_kind(xl, "")
    wanted = result(pipe, reference=person, refine_faces=True)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(result(pipe, reference=person, refine_faces=True).images, wanted.images)
    for name in ("text_encoder", "unet", "vae"):
        assert any(getattr(pipe, name)._hf_hook is each.hook for each in pipe._all_hooks)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2, in some schedulers
@pytest.mark.parametrize("name", OTHERS)
def test_it_goes_with_what_else_people_use(xl: bool, name: str, tmp_path: Path):
    pipe, person = other_kind(xl, "")
    if name == "ancestral":
        pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    call: dict[str, Any] = {"num_inference_steps": 4}
    if name in COMBINATIONS:
        COMBINATIONS[name].arrange(pipe, tmp_path)
        call |= COMBINATIONS[name].call
    plain, out, again = (result(pipe, reference=person, refine_faces=each, **call) for each in (False, True, True))
    assert out.refined == 1 and torch.equal(out.images, again.images)
    assert_only_faces_changed(plain.images, out.images, SMALL)


@pytest.mark.parametrize("absent", ["off", "zeros"])
def test_encoders_may_be_gone(xl: bool, absent: str):
    pipe = tiny_stock.personal(tiny_stock.stock(xl), **tiny_stock.readers())
    pipe.load_adapter(tiny_stock.identity(pipe.unet, absent=absent))
    pipe.load_adapter(tiny.text_adapter(pipe.unet))
    person = pipe.enroll(tiny.photo(1))
    pipe.finder = KnownBoxesFinder([SMALL])
    wanted = result(pipe, prompt=[OTHER, PROMPT], reference=person, refine_faces=True)
    embeds = pipe.encode_prompt([OTHER, PROMPT], "cpu", 1, True) if not xl else pipe.encode_prompt([OTHER, PROMPT])
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    given = dict(zip(names, embeds, strict=False))
    given |= {"branch_embeds": pipe.encode_branches([OTHER, PROMPT])}
    given |= {"negative_branch_embeds": pipe.encode_branches(["", ""])}
    pipe.free_encoders()
    out = result(pipe, prompt=None, reference=person, refine_faces=True, **given)
    assert wanted.refined == out.refined == 2 and same(out.images, wanted.images)


class Censor(torch.nn.Module):
    """A safety checker that flags all pictures after the first `first` calls."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, first: int) -> None:
        super().__init__()
        self.left = first

    def forward(self, images: Any, clip_input: Any) -> tuple[Any, list[bool]]:
        self.left -= 1
        flagged = self.left < 0
        return (images * 0 if flagged else images), [flagged] * len(images)


def test_a_face_flagged_by_the_safety_checker_does_not_change():
    from transformers import CLIPImageProcessor

    pipe, person = other_kind(False, "")
    plain = result(pipe, reference=person).images
    pipe.register_modules(feature_extractor=CLIPImageProcessor(size=16, crop_size=16))
    for first, kept in ((2, False), (1, True), (0, False)):
        pipe.register_modules(safety_checker=Censor(first))
        out = result(pipe, reference=person, refine_faces=True)
        assert out.refined == (first == 2) and torch.equal(out.images, plain) == kept
    assert not out.images.any()


def test_a_face_of_the_size_that_the_base_draws_is_not_enlarged(pipe: Any, people: list[Any]):
    pipe.finder = KnownBoxesFinder(
        [FaceBox(10.0, 10.0, 8.0, 8.0, 1.0)]
    )  # its square has 19 pixels, and the base draws 16
    call = {"reference": people[0], "height": 32, "width": 24}
    plain, out = (result(pipe, refine_faces=each, **call) for each in (False, True))
    assert out.refined == 0 and torch.equal(plain.images, out.images)
    pipe.finder = KnownBoxesFinder([FaceBox(10.0, 10.0, 6.0, 6.0, 1.0)])
    sizes: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[-1]))
    assert result(pipe, refine_faces=True, **call).refined == 1 and sizes == [12, 12, 8]
    hook.remove()


def test_a_faces_call_has_its_prompts_arguments_from_the_first_pass():
    embeds = [torch.arange(4.0).view(4, 1, 1)]
    given: dict[str, Any] = {
        "prompt": ["a", "b"], "negative_prompt": "c", "guidance_scale": 3.0, "num_inference_steps": 4,
        "guidance_rescale": 0.7, "ip_adapter_image_embeds": embeds, "cross_attention_kwargs": {"scale": 0.5},
    }  # fmt: skip
    people: Any = [["ann"], ["bob", "cid"]]
    identity = {"identity_scale": [0.3, 0.5], "identity_window": Window(0.7, 1.0), "identity_blocks": "up"}
    again = StockSecondPass(RefineFaces(strength=0.5), Batch(2, 3, True), given, people, identity, [], [])
    face = SmallFace(4, 1, SMALL, (0, 0, 8, 8))
    call = again.arguments(face, (16, 16), {name: None for name in given if name != "guidance_rescale"})
    assert call.pop("ip_adapter_image_embeds")[0].flatten().tolist() == [1.0, 3.0]
    assert call.pop("identity_window").start == pytest.approx(0.4) and call.pop("reference") == "cid"
    assert call.pop("identity_scale") == 0.5 and call.pop("identity_blocks") == "up"
    assert call == {
        "prompt": "b",
        "negative_prompt": "c",
        "guidance_scale": 3.0,
        "cross_attention_kwargs": {"scale": 0.5},
    }


@pytest.mark.parametrize(
    ("given", "output_type", "message"),
    [
        (True, "latent", "needs pictures"),
        ("yes", "pil", "must be True, False or a RefineFaces"),
        (RefineFaces(strength=1.5), "pil", "strength and edge must be at most 1"),
    ],
)
def test_invalid_settings_raise_before_anything_is_drawn(
    pipe: Any, people: list[Any], given: Any, output_type: str, message: str
):
    ran: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, given: ran.append(len(given[0])))
    with pytest.raises(ConfigError, match=message) as caught:
        result(pipe, reference=people[0], refine_faces=given, output_type=output_type)
    hook.remove()
    assert not ran and "\n" not in str(caught.value)
