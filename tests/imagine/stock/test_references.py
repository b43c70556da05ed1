"""`reference=` over loaded IP-Adapters: each shows the person from the part of the photo that it was trained with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from imagine.errors import ConfigError, WeightsError
from imagine.people.faces import KnownBoxesFinder
from imagine.people.persona import Persona
from imagine.people.readings import with_embedding
from imagine.pipeline.second_pass import RefineFaces
from imagine.stock.people import PLACED_NOTE
from imagine.stock.pipelines import personalised_class
from tests import tiny, tiny_faces, tiny_ip, tiny_stock
from tests.imagine.stock.test_face_id import FACE, face_id, face_id_plus
from tests.imagine.stock.test_second_pass import SMALL
from tests.tiny_stock import draw, same

PLACE: dict[str, Any] = {"subfolder": "", "weight_name": "", "image_encoder_folder": None}
SIZE = {"height": 16, "width": 16}
ANN, BOB = tiny.photo(1), tiny.photo(2)
KINDS = ("base", "plus", "plus-face", "full-face", "faceid", "faceid-plus", "instantid")
# InstantID is published for SDXL only.
CASES = [f"{base}-{kind}" for base in ("sd15", "sdxl") for kind in KINDS if (base, kind) != ("sd15", "instantid")]


def file_of(kind: str, unet: Any) -> Any:
    if kind == "faceid":
        return face_id(unet)
    if kind == "faceid-plus":
        return face_id_plus(unet)
    if kind == "instantid":
        return tiny_faces.instant_id(unet)
    return tiny_ip.tensors({"base": "linear", "full-face": "full"}.get(kind, "plus"), unet)


def pipeline(*kinds: str, xl: bool = False) -> Any:
    """Return our pipeline with IP-Adapters of these kinds, its finder and its recogniser."""
    import diffusers

    stock: Any = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    pipe = personalised_class(stock)(**tiny_ip.components(xl))
    pipe.set_progress_bar_config(disable=True)
    crops = [{"plus-face": "aligned", "full-face": "aligned-masked"}.get(kind) for kind in kinds]
    files = [file_of(kind, pipe.unet) for kind in kinds]
    pipe.load_ip_adapter(files, **{**PLACE, "weight_name": [""] * len(files)}, reference_crop=crops)
    pipe.finder = KnownBoxesFinder([tiny.BOX])
    pipe.face_recogniser = tiny_faces.RandomEmbedder(512 if "instantid" in kinds else FACE)
    return pipe


@pytest.fixture(scope="module", params=["plus-face", "faceid-plus", "instantid"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipe(kind: str) -> Any:
    return pipeline(kind)


def by_hand(pipe: Any, kind: str, photo: Image.Image) -> Tensor:
    """Draw from what the adapter reads, given as in diffusers: the crop, or embeddings made with the recogniser."""
    crop = pipe.enroll(photo).faces[0].crop
    if kind not in ("faceid", "faceid-plus", "instantid"):
        return draw(pipe, ip_adapter_image=crop, **SIZE)
    face = torch.from_numpy(pipe.face_recogniser.embed(photo, tiny.BOX))
    face = face if kind == "instantid" else face / face.norm()
    rows = torch.stack([torch.zeros_like(face), face])
    if kind == "faceid-plus":
        vision, zero = pipe.encode_image(crop, "cpu", 1, True)
        rows = torch.stack([with_embedding(rows[0], zero[0]), with_embedding(rows[1], vision[0])])
    return draw(pipe, ip_adapter_image_embeds=[rows[:, None]], **SIZE)


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_picture_that_the_adapter_draws_from_the_crop(case: str) -> None:
    base, kind = case.split("-", 1)
    pipe = pipeline(kind, xl=base == "sdxl")
    shown = draw(pipe, reference=ANN, **SIZE)
    assert (shown - by_hand(pipe, kind, ANN)).abs().max() < 1e-4
    assert not same(shown, draw(pipe, reference=BOB, **SIZE))
    assert torch.equal(draw(pipe, reference=ANN, identity_scale=0.0, **SIZE), draw(pipe, **SIZE))


def test_batches_personas_and_strengths(pipe: Any, kind: str, tmp_path: Path) -> None:
    people = [ANN, BOB]
    alone = [draw(pipe, reference=each, seed=7 + row, **SIZE) for row, each in enumerate(people)]
    generators = [tiny.generator(7), tiny.generator(8)]
    together = draw(pipe, [tiny_stock.PROMPT] * 2, reference=people, generator=generators, **SIZE)
    assert all(same(together[row : row + 1], alone[row]) for row in range(2))
    pipe.enroll(ANN).save(tmp_path / "ann.safetensors")
    assert same(draw(pipe, reference=Persona.load(tmp_path / "ann.safetensors"), **SIZE), alone[0])
    half = draw(pipe, reference=ANN, identity_scale=0.5, **SIZE)
    pipe.set_ip_adapter_scale(0.5)
    assert same(draw(pipe, reference=ANN, **SIZE), half) and not same(half, alone[0])
    pipe.set_ip_adapter_scale(1.0)
    generators = [tiny.generator(7), tiny.generator(8)]
    strengths = draw(
        pipe, [tiny_stock.PROMPT] * 2, reference=[ANN, ANN], identity_scale=[0.5, 0.0], generator=generators, **SIZE
    )
    assert same(strengths[:1], half) and same(strengths[1:], draw(pipe, seed=8, **SIZE))


def test_windows_blocks_and_several_photos_and_people(pipe: Any) -> None:
    whole, bare = draw(pipe, reference=ANN, **SIZE), draw(pipe, **SIZE)
    early = draw(pipe, reference=ANN, identity_window=(0, 0.5), **SIZE)
    coarse = draw(pipe, reference=ANN, identity_blocks="coarse", **SIZE)
    two = draw(pipe, reference=[ANN, BOB], **SIZE)
    drawn = [whole, bare, early, coarse, two]
    assert not any(same(one, other) for number, one in enumerate(drawn) for other in drawn[:number])
    both = {"ann": ANN, "bob": BOB}
    out = pipe("{ann} and {bob}", reference=both, generator=tiny.generator(7), num_inference_steps=2, output_type="pt",
               **SIZE)  # fmt: skip
    assert PLACED_NOTE in out.notes
    halves = {"ann": (0, 0, 0.5, 1), "bob": (0.5, 0, 1, 1)}
    assert torch.equal(out.images, draw(pipe, "{ann} and {bob}", reference=both, layout=halves, **SIZE))
    exchanged = draw(pipe, "{ann} and {bob}", reference={"ann": BOB, "bob": ANN}, layout=halves, **SIZE)
    assert not same(out.images, exchanged)


def test_small_faces_are_redrawn_with_the_person(pipe: Any) -> None:
    small = pipe.finder
    pipe.finder = KnownBoxesFinder([SMALL])
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "reference": ANN}
    out = pipe("a person", refine_faces=RefineFaces(), generator=tiny.generator(7), **options)
    pipe.finder = small
    assert out.refined == 1


def test_two_adapters_read_two_parts_of_one_photo(tmp_path: Path) -> None:
    pipe = pipeline("plus", "plus-face")
    assert {reading.crop for reading in pipe._readings()} == {"picture", "aligned"}
    persona = pipe.enroll(ANN)
    persona.save(tmp_path / "ann.safetensors")
    again = Persona.load(tmp_path / "ann.safetensors")
    assert list(again.others) == list(persona.others) and len(again.others) == 1
    shown = draw(pipe, reference=ANN, **SIZE)
    assert torch.equal(draw(pipe, reference=again, **SIZE), shown)
    picture, face = (pipeline(kind).enroll(ANN).faces[0].crop for kind in ("plus", "plus-face"))
    assert (draw(pipe, ip_adapter_image=[picture, face], **SIZE) - shown).abs().max() < 1e-4
    # An image for the first leaves the second for the person.
    mixed = draw(pipe, reference=ANN, ip_adapter_image=[tiny.photo(3), None], **SIZE)
    assert (draw(pipe, ip_adapter_image=[tiny.photo(3), face], **SIZE) - mixed).abs().max() < 1e-4
    with pytest.raises(WeightsError, match="This persona was made by"):
        draw(pipe, reference=pipeline("base").enroll(ANN), **SIZE)


def test_personas_need_no_encoder() -> None:
    pipe = pipeline("plus-face")
    persona, (wanted, unwanted) = pipe.enroll(ANN), pipe.encode_prompt(tiny_stock.PROMPT, "cpu", 1, True)
    options = {"prompt_embeds": wanted, "negative_prompt_embeds": unwanted, "reference": persona, **SIZE}
    shown = draw(pipe, None, **options)
    pipe.free_encoders()
    assert torch.equal(draw(pipe, None, **options), shown)
    with pytest.raises(WeightsError, match="The vision encoder was freed"):
        draw(pipe, None, **{**options, "reference": BOB})


def test_callbacks_change_the_scale_and_xl_and_guidance_off_draw() -> None:
    from diffusers.callbacks import IPAdapterScaleCutoffCallback

    pipe = pipeline("plus-face", xl=True)
    whole = draw(pipe, reference=ANN, **SIZE)
    callback = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    ended = draw(pipe, reference=ANN, callback_on_step_end=callback, **SIZE)
    pipe.set_ip_adapter_scale(1.0)
    unguided = draw(pipe, reference=ANN, guidance_scale=1.0, **SIZE)
    assert not same(whole, ended) and not same(unguided, draw(pipe, guidance_scale=1.0, **SIZE))
    pipe.set_ip_adapter_scale({"up": {"block_1": 1.0}})
    by_block = draw(pipe, reference=ANN, **SIZE)
    assert same(by_block, draw(pipe, ip_adapter_image=pipe.enroll(ANN).faces[0].crop, **SIZE))
    assert not same(by_block, whole)


def test_our_own_adapter_takes_the_reference_and_the_ip_adapter_the_image() -> None:
    pipe = pipeline("base")
    alone = draw(pipe, reference=ANN, **SIZE)
    pipe = type(pipe).from_pipe(pipe, vision_encoder=tiny_stock.encoder())
    pipe.set_progress_bar_config(disable=True)
    pipe.load_adapter(tiny_stock.identity(pipe.unet))
    pipe.finder = KnownBoxesFinder([tiny.BOX])
    assert not same(draw(pipe, reference=ANN, **SIZE), alone)
    assert not same(draw(pipe, reference=ANN, ip_adapter_image=BOB, **SIZE), draw(pipe, reference=ANN, **SIZE))


def test_the_name_of_a_file_says_what_it_was_trained_with(tmp_path: Path) -> None:
    pipe = pipeline("base")
    for name, kind, crop in (
        ("ip-adapter-plus_sd15", "plus", "picture"), ("ip-adapter-plus-face_sd15", "plus", "aligned"),
        ("ip-adapter-full-face_sd15", "full", "aligned-masked"), ("ip-adapter_sd15", "linear", "picture"),
    ):  # fmt: skip
        save_file(tiny_ip.tensors(kind, pipe.unet), tmp_path / f"{name}.safetensors")
        pipe.load_ip_adapter(tmp_path / f"{name}.safetensors", image_encoder_folder=None)
        assert pipe._readings()[0].crop == crop
    for name, shortcut in (("ip-adapter-faceid-plus_sd15", False), ("ip-adapter-faceid-plusv2_sd15", True)):
        torch.save(face_id_plus(pipe.unet), tmp_path / f"{name}.bin")
        pipe.load_ip_adapter(tmp_path / f"{name}.bin", image_encoder_folder=None)
        assert pipe.ip_adapters[0].branch_specs[0].shortcut is shortcut


def test_what_cannot_be_shown_raises_one_sentence() -> None:
    pipe = pipeline("plus")
    for options, error, message in (
        ({"reference": ANN, "ip_adapter_image": BOB}, ConfigError, "gives an image for every IP-Adapter"),
        ({"ip_adapter_image": [None]}, ConfigError, "has None for an image"),
        (
            {"reference": ANN, "cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 16, 16)]}},
            ConfigError, "give layout= instead",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            draw(pipe, **options, **SIZE)
    face = pipeline("faceid")
    face.face_recogniser = tiny_faces.RandomEmbedder(FACE + 1)
    with pytest.raises(WeightsError, match="reads face embeddings of width 20, but the recogniser tiny gives 21"):
        draw(face, reference=ANN, **SIZE)
    face.face_recogniser, face.finder = tiny_faces.RandomEmbedder(FACE), KnownBoxesFinder([])
    with pytest.raises(WeightsError, match="no face was found in the photo"):
        draw(face, reference=ANN, on_no_face="whole", **SIZE)
    with pytest.raises(ConfigError, match="reference_crop='whole' is unknown"):
        pipe.load_ip_adapter(tiny_ip.tensors("plus", pipe.unet), **PLACE, reference_crop="whole")
    assert np.asarray(ANN).shape == (64, 64, 3)
