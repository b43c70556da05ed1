"""`identity_blocks`, `refine_faces` and `attempts` on pipelines of diffusion transformers."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler
from PIL import Image
from torch import Tensor

from imagine.errors import ConfigError
from imagine.people.faces import KnownBoxesFinder
from imagine.pipeline.second_pass import RefineFaces
from imagine.records import FaceBox
from imagine.transformer_bases.blocks import block_factors, presets
from imagine.transformer_bases.families import family_of, sites_of
from imagine.transformer_bases.pipelines import class_by_name
from imagine.transformer_bases.second_pass import encode, redrawing_scheduler
from tests import tiny, tiny_transformers
from tests import tiny_transformer_pipelines as tiny_pipelines
from tests.faces import ColourRecogniser, HalvesFinder
from tests.tiny_transformer_pipelines import arguments, native, personal, stock

NAMES = tuple(tiny_pipelines.PIPELINES)
ONE, OTHER = tiny.photo(1), tiny.photo(2)
SMALL = FaceBox(3.0, 3.0, 2.0, 2.0, 1.0)
LEFT, RIGHT = FaceBox(1.0, 3.0, 2.0, 2.0, 1.0), FaceBox(5.0, 3.0, 2.0, 2.0, 1.0)


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipe(name: str) -> Any:
    return personal(stock(name))


@pytest.fixture(scope="module")
def people(pipe: Any) -> list[Any]:
    return [pipe.enroll(ONE), pipe.enroll(OTHER)]


def call(pipe: Any, name: str, count: int = 1, **options: Any) -> Any:
    """Return the result of a call of two steps without guidance."""
    return pipe(**arguments(name, count, guided=False, **{**native(name), **options}))


# --- identity_blocks --------------------------------------------------------------------------------------------------
def test_blocks_limit_where_the_person_acts(name: str, pipe: Any, people: list[Any]) -> None:
    lists = {site.split(".")[0] for site in sites_of(pipe.transformer)}

    def drawn(blocks: Any, **options: Any) -> Tensor:
        found: Tensor = call(pipe, name, reference=people[0], identity_blocks=blocks, **options).images
        return found

    bare, whole = call(pipe, name).images, drawn("all")
    assert torch.equal(drawn(dict.fromkeys(lists, 1.0)), whole)
    assert torch.equal(drawn(dict.fromkeys(lists, 0.0)), bare)
    some = [drawn("early"), drawn("late"), drawn({min(lists): {"block_0": 0.5}}), whole, bare]
    assert all((one - other).abs().max() > 1e-5 for number, one in enumerate(some) for other in some[:number])
    assert torch.equal(drawn(dict.fromkeys(lists, 0.5)), drawn("all", identity_scale=0.5))


def test_presets_and_mistakes_in_blocks() -> None:
    model = tiny_transformers.transformer("flux2")
    sites = list(sites_of(model))
    found = presets(model, sites)
    assert [len(found[each]) for each in ("early", "middle", "late", "double", "single")] == [2, 1, 2, 2, 3]
    assert found["double"] == ("transformer_blocks.0.attn", "transformer_blocks.1.attn")
    assert block_factors(model, sites, {"single_transformer_blocks": [0.0, 0.5, 1]}) == {
        "single_transformer_blocks.1.attn": 0.5, "single_transformer_blocks.2.attn": 1.0,
    }  # fmt: skip
    assert block_factors(model, sites, "all") is None
    assert "double" not in presets(tiny_transformers.transformer("qwen"), ["transformer_blocks.0.attn"])
    wrong: list[tuple[Any, str]] = [
        ("coarse", "no identity_blocks 'coarse': choose all, early, middle, late, double or single, or give strengths"),
        ({"down": 1.0}, "names 'down', but this denoiser has no branch there: choose transformer_blocks or single_"),
        ({"transformer_blocks": {"block_7": 1.0}}, "'block_7', but this denoiser has no branch there: choose block_0"),
        ({"transformer_blocks": [1.0]}, r"has 1 strengths for 2 blocks with a branch"),
        ({"transformer_blocks": "much"}, "must be"),
    ]
    for blocks, sentence in wrong:
        with pytest.raises(ConfigError, match=sentence):
            block_factors(model, sites, blocks)
    with pytest.raises(ConfigError, match="choose block_0"):  # of an adapter with a branch at every second site
        block_factors(model, sites[::2], {"transformer_blocks": {"block_1": 1.0}})


# --- refine_faces -----------------------------------------------------------------------------------------------------
def shown(side: int, *boxes: FaceBox) -> Tensor:
    """Return a mask (side, side) of the pixels in the pasted ellipses."""
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    reach = RefineFaces().reach / 2
    found = torch.zeros(side, side, dtype=torch.bool)
    for box in boxes:
        found |= ((x - box.centre[0]) / (reach * box.width)).hypot((y - box.centre[1]) / (reach * box.height)) < 1
    return found


def test_a_small_face_is_redrawn_and_nothing_else_changes(name: str, pipe: Any, people: list[Any]) -> None:
    pipe.finder = KnownBoxesFinder([SMALL])
    refine = RefineFaces(strength=0.9)
    plain, out, again = (
        call(pipe, name, reference=people[0], refine_faces=each) for each in (False, refine, refine)
    )  # fmt: skip
    assert (plain.refined, out.refined, out.notes) == (0, 1, plain.notes)
    assert torch.equal(out.images, again.images)
    changed, face = (plain.images != out.images)[0].any(0), shown(out.images.shape[-1], SMALL)
    assert not changed[~face].any() and changed[face].float().mean() > 0.5
    other = call(pipe, name, reference=people[0], refine_faces=refine, identity_window=(0.0, 0.05))
    bare = call(pipe, name, reference=people[0], identity_window=(0.0, 0.05))
    assert other.refined == 0 and torch.equal(other.images, bare.images)  # nobody acts in the second pass
    half = call(pipe, name, reference=people[0], refine_faces=refine, identity_blocks="late")
    assert half.refined == 1


def test_a_square_is_encoded_as_its_pipeline_decodes_it(name: str, pipe: Any) -> None:
    """Drawn from a noise level of nearly 0, a picture is what the autoencoder makes of it."""
    from imagine.networks.diffusion import pack_latents

    side, title = tiny_pipelines.SIDES.get(name, 8), family_of(pipe.transformer).title
    picture = torch.rand(1, 3, side, side, generator=tiny.generator(3))
    sent = picture * 2 - 1
    with torch.no_grad():
        encoded = pipe.vae.encode(sent.unsqueeze(2) if title == "Qwen-Image" else sent)
        raw = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        decoded = pipe.vae.decode(raw).sample
        wanted = ((decoded[:, :, 0] if title == "Qwen-Image" else decoded) / 2 + 0.5).clamp(0, 1)
        latents = encode(pipe, picture)
    if title in ("FLUX.1", "Qwen-Image"):
        latents = pack_latents(latents, 2).flatten(2).transpose(1, 2)
    plain = type(pipe).from_pipe(pipe, scheduler=redrawing_scheduler(pipe.scheduler))
    plain.set_progress_bar_config(disable=True)
    found = call(plain, name, latents=latents, sigmas=[1e-5], num_inference_steps=1).images
    assert plain.scheduler.sigmas.tolist() == [pytest.approx(1e-5), 0.0]
    assert (found - wanted).abs().max() < 1e-3


def test_levels_are_the_end_of_the_first_schedule(name: str, pipe: Any, people: list[Any]) -> None:
    """The second pass takes the steps that the first one would take from there, whose times the base moves."""
    pipe.finder = KnownBoxesFinder([SMALL])
    seen = list[float]()

    def watch(_: Any, args: Any, kwargs: Any) -> None:
        time = args[1] if name == "z_image" else kwargs["timestep"]
        seen.append(float(time.flatten()[0]))

    handle = pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    call(pipe, name, reference=people[0], refine_faces=RefineFaces(strength=0.5), num_inference_steps=4)
    handle.remove()
    assert len(seen) == 6 and seen[4:] == pytest.approx(seen[2:4], rel=1e-5)


KINDS = (
    "Flux2KleinInpaintPipeline",
    "Flux2KleinKVPipeline",
    "ZImageImg2ImgPipeline",
    "QwenImageImg2ImgPipeline",
    "QwenImageInpaintPipeline",
    "FluxImg2ImgPipeline",
    "FluxInpaintPipeline",
    "StableDiffusion3Img2ImgPipeline",
)  # fmt: skip  (the inpainting of Stable Diffusion 3 takes no transformer with so few channels)


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_that_change_a_picture_redraw_faces_too(kind: str) -> None:
    prefixes = {"Flux2": "flux2", "ZImage": "z_image", "Qwen": "qwen", "Flux": "flux", "Stable": "sd3"}
    name = next(each for prefix, each in prefixes.items() if kind.startswith(prefix))
    made = class_by_name(kind).from_pipe(personal(stock(name)))
    made.set_progress_bar_config(disable=True)
    person = made.enroll(ONE)
    side = 64 if name == "flux2" else 16
    given = arguments(name, guided=False, height=side, width=side, reference=person)
    if "KV" in kind:
        given.pop("guidance_scale")
    else:
        given |= {"image": tiny.photo(5).resize((side, side)), "strength": 1.0}
    if "Inpaint" in kind:
        given["mask_image"] = Image.new("L", (side, side), 255)
    made.finder = KnownBoxesFinder([SMALL])
    plain, out = (made(**{**given, "generator": tiny.generator(7), "refine_faces": on}) for on in (False, True))
    assert out.refined == 1
    changed, face = (plain.images != out.images)[0].any(0), shown(side, SMALL)
    assert not changed[~face].any() and changed[face].any()


def test_each_of_several_people_has_their_own_face_and_native_references_stay() -> None:
    pipe = personal(stock("flux2"))
    ann, bob = pipe.enroll(ONE), pipe.enroll(OTHER)
    pipe.finder = KnownBoxesFinder([RIGHT, LEFT])
    given: dict[str, Any] = {"prompt": ["{a} with {b} on the beach"], "image": tiny.photo(5)}

    def drawn(one: Any, other: Any, **options: Any) -> Any:
        return call(pipe, "flux2", reference={"a": one, "b": other}, refine_faces=RefineFaces(strength=1.0),
                    **{**given, **options})  # fmt: skip

    lengths = list[int]()
    watch = lambda _, __, kwargs: lengths.append(kwargs["hidden_states"].shape[1])  # noqa: E731
    handle = pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    out = drawn(ann, bob)
    handle.remove()
    assert out.refined == 2 and len(lengths) == 2 + 2 * 2 and min(lengths) > 16  # the native reference's tokens
    assert not any("refined" in note for note in out.notes)
    placed = {"layout": {"a": (0.5, 0, 1, 1), "b": (0, 0, 0.5, 1)}}  # a stands on the right
    assert (drawn(ann, bob, **placed).images - drawn(ann, ann, **placed).images).abs().max() > 1e-5
    pipe.finder = KnownBoxesFinder([LEFT])
    out = drawn(ann, bob)
    assert out.refined == 0
    assert "Picture 1: one face was found for 2 people, so no face was refined." in out.notes


def test_what_cannot_be_redrawn_is_one_sentence() -> None:
    pipe = personal(stock("flux"))
    person = pipe.enroll(ONE)
    with pytest.raises(ConfigError, match="refine_faces needs pictures"):
        call(pipe, "flux", reference=person, refine_faces=True, output_type="latent")
    fill = class_by_name("FluxFillPipeline").from_pipe(pipe)
    with pytest.raises(ConfigError, match="FluxFillPipeline only fills masks"):
        fill("a person", image=ONE, mask_image=Image.new("L", ONE.size, 255), reference=person, refine_faces=True)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ConfigError, match="cannot follow the noise levels of a DDIMScheduler"):
        call(pipe, "flux", reference=person, refine_faces=True)
    small = AutoencoderTiny(encoder_block_out_channels=(8,), decoder_block_out_channels=(8,),
                            num_encoder_blocks=(1,), num_decoder_blocks=(1,))  # fmt: skip
    pipe.register_modules(scheduler=tiny_pipelines.shifted_scheduler(), vae=small)
    with pytest.raises(ConfigError, match="cannot encode with a AutoencoderTiny"):
        call(pipe, "flux", reference=person, refine_faces=True)


# --- attempts ---------------------------------------------------------------------------------------------------------
class Threshold(ColourRecogniser):
    """Takes a face for the person of any photo if it is darker than a limit, so that some seeds fail."""

    same = 0.5

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def embed(self, image: Image.Image, face: FaceBox) -> Any:
        if image.size == (64, 64):  # a reference
            return np.zeros(3)
        return np.full(3, float(super().embed(image, face).mean() > self.limit))


def test_a_picture_that_is_drawn_again_equals_the_one_of_its_seed(
    name: str, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.finder = HalvesFinder(1)

    def attempt(limit: float, count: int, reference: Any, **options: Any) -> Any:
        recogniser = Threshold(limit)
        monkeypatch.setattr(pipe, "_picture_recogniser", lambda: recogniser)
        monkeypatch.setattr("imagine.people.reference_encoder._photo_recogniser", lambda: recogniser)
        pipe.__dict__.pop("_persona_cache", None)
        return call(pipe, name, count, reference=reference, attempts=5, **options)

    both = {"reference": [ONE, OTHER], "identity_scale": [0.5, 1.0]}
    first = attempt(2.0, 2, **both)
    assert first.attempts == [1, 1] and first.seeds == [None, None] and first.people[0][0].matched
    means = [float(each.mean()) for each in first.images]
    out = attempt(float(np.mean(means)), 2, **both)  # one of two pictures fails
    worse = int(np.argmax(means))
    assert out.attempts[worse] > 1 and out.attempts[1 - worse] == 1
    assert torch.equal(out.images[1 - worse], first.images[1 - worse])
    if out.seeds[worse] is None:
        return  # no attempt was better
    own = {key: _row(value, worse) for key, value in tiny_pipelines.words(name, 2).items()}
    alone = attempt(
        2.0, 1, [[ONE, OTHER][worse]], identity_scale=[0.5, 1.0][worse],
        **{**own, "generator": tiny.generator(out.seeds[worse])},
    )  # fmt: skip
    assert (out.images[worse] - alone.images[0]).abs().max() < 1e-4
    assert (out.images[worse] - first.images[worse]).abs().max() > 1e-4


def _row(value: Any, number: int) -> Any:
    return value[number : number + 1] if isinstance(value, (list, Tensor)) else value
