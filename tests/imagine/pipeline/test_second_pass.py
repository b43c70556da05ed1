"""The second pass: which faces it redraws, what it may change, and what it must not change."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagine.errors import ConfigError
from imagine.people.faces import KnownBoxesFinder
from imagine.pipeline.controls import Window
from imagine.pipeline.drawing import Drawing
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.pipeline.second_pass import (
    RefineFaces,
    ellipse_around,
    find_small_faces,
    noise_from_latents,
    small_faces,
    square_around,
)
from imagine.records import FaceBox
from tests import tiny

PROMPT = "a person smiling on a beach"
SMALL = FaceBox(8.0, 10.0, 6.0, 8.0, 1.0)  # in pictures of 32 pixels
OTHER = FaceBox(20.0, 12.0, 5.0, 6.0, 1.0)
LARGE = FaceBox(8.0, 8.0, 14.0, 16.0, 1.0)


@pytest.fixture(scope="module")
def pipe() -> ImaginePipeline:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def people(pipe: ImaginePipeline) -> list[Any]:
    """Return two personas, enrolled while the finder still finds the photos' faces."""
    return [pipe.enroll(tiny.photo(seed)) for seed in (1, 2)]


def draw(pipe: ImaginePipeline, reference: Any, found: list[FaceBox], **options: Any) -> Any:
    pipe.finder = KnownBoxesFinder(found)
    call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4, "output_type": "pt", **options}
    return pipe(reference=reference, **{"generator": tiny.generator(7), **call})


def test_a_small_face_is_redrawn_and_nothing_else_changes(pipe: ImaginePipeline, people: list[Any]) -> None:
    before = draw(pipe, people[0], [SMALL])
    after = draw(pipe, people[0], [SMALL], refine_faces=True)
    assert (before.refined, after.refined, after.notes) == (0, 1, [])
    changed = (before.images != after.images)[0].any(0)
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    reach = RefineFaces().reach
    across, down = (x - SMALL.centre[0]) / (reach * 3), (y - SMALL.centre[1]) / (reach * 4)
    assert not changed[torch.hypot(across, down) >= 1].any()
    assert changed[torch.hypot(across, down) < 0.6].float().mean() > 0.9


def test_a_new_adapter_gives_the_bases_picture_with_either_default() -> None:
    fresh = tiny.pipeline(fresh=True)
    fresh.register_to_config(default_refine_faces=True)
    ann, adapter = fresh.enroll(tiny.photo(1)), fresh.adapter
    assert adapter is not None and not adapter.active
    drawn, base = draw(fresh, ann, [SMALL]), draw(fresh, None, [SMALL])
    assert drawn.refined == 0 and torch.equal(drawn.images, base.images)
    adapter.parts()["lora"][-1].data.fill_(0.1)  # the last LoRA parameter is a lora_B
    assert adapter.active
    assert draw(fresh, ann, [SMALL]).refined == 1


def test_the_result_depends_on_the_generator_and_the_person(pipe: ImaginePipeline, people: list[Any]) -> None:
    first, again = (draw(pipe, people[0], [SMALL], refine_faces=True).images for _ in range(2))
    assert torch.equal(first, again)
    latents = torch.randn(1, 4, 4, 4, generator=tiny.generator(3))
    ann, bob = (
        draw(pipe, person, [SMALL], latents=latents, identity_window=window, refine_faces=True).images
        for person in people
        for window in [(0.5, 1.0)]
    )
    assert not torch.equal(ann, bob)
    generator = tiny.generator(7)
    draw(pipe, people[0], [SMALL], refine_faces=True, generator=generator)
    plain = tiny.generator(7)
    draw(pipe, people[0], [SMALL], generator=plain)
    assert torch.equal(
        generator.get_state(), plain.get_state()
    )  # so the next picture does not depend on the second pass


def test_the_weights_default_applies_if_the_call_gives_none(people: list[Any], tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    plain, refined = (draw(pipe, people[0], [SMALL], refine_faces=refine) for refine in (False, True))
    assert torch.equal(draw(pipe, people[0], [SMALL]).images, plain.images)
    pipe.register_to_config(default_refine_faces=True)
    pipe.save_pretrained(tmp_path)
    for each in (pipe, ImaginePipeline.from_pretrained(tmp_path)):
        assert torch.equal(draw(each, people[0], [SMALL]).images, refined.images)
        assert torch.equal(draw(each, people[0], [SMALL], refine_faces=False).images, plain.images)
        assert draw(each, people[0], [SMALL], output_type="latent").refined == 0


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_pictures_with_large_faces_do_not_change(pipe: ImaginePipeline, people: list[Any], output_type: str) -> None:
    plain, refined = (
        draw(pipe, people[0], [LARGE], refine_faces=refine, output_type=output_type) for refine in (False, True)
    )
    assert refined.refined == 0 and np.array_equal(np.asarray(plain.images[0]), np.asarray(refined.images[0]))


def test_no_face_is_refined_without_an_active_identity(pipe: ImaginePipeline, people: list[Any]) -> None:
    for options in ({"identity_scale": 0.0}, {"identity_window": (0.0, 0.4)}, {"identity_window": (0, 0)}):
        plain, refined = (draw(pipe, people[0], [SMALL], refine_faces=refine, **options) for refine in (False, True))
        assert refined.refined == 0 and torch.equal(plain.images, refined.images)
    assert draw(pipe, None, [SMALL], refine_faces=True).refined == 0


def test_several_people_are_assigned_from_left_to_right(pipe: ImaginePipeline, people: list[Any]) -> None:
    both = {"ann": people[0], "bob": people[1]}
    prompt = "{ann} in a red hat, looking to {bob}"
    size = (32, 32)
    faces, note = small_faces([OTHER, SMALL], 2, 0, size, RefineFaces())
    assert not note and [(face.person, face.box) for face in faces] == [(0, SMALL), (1, OTHER)]
    faces, note = small_faces([LARGE, OTHER], 2, 0, size, RefineFaces())
    assert [(face.person, face.box) for face in faces] == [(1, OTHER)]
    out = draw(pipe, both, [SMALL, OTHER], prompt=prompt, refine_faces=True)
    assert out.refined == 2
    out = draw(pipe, both, [SMALL], prompt=prompt, refine_faces=True)
    note = "Picture 1: one face was found for 2 people, so no face was refined."
    assert out.refined == 0 and out.notes[0] == note and out.notes[1].startswith("Warning: picture 1 shows 1 of 2")
    assert draw(pipe, people[0], [], refine_faces=True).notes == [
        "Picture 1: no face was found for one person, so no face was refined."
    ]


def test_the_redraw_batch_is_no_larger_than_the_first_pass(pipe: ImaginePipeline, people: list[Any]) -> None:
    sizes: list[int] = []
    watch = pipe.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    both = {"ann": people[0], "bob": people[1]}
    out = draw(pipe, both, [SMALL, OTHER], prompt="{ann} in a red hat, looking to {bob}", refine_faces=True)
    watch.remove()
    again = len(RefineFaces().levels(4))
    assert out.refined == 2 and sizes == [sizes[0]] * (4 + 2 * again)


def test_a_refined_batch_equals_single_calls(pipe: ImaginePipeline, people: list[Any]) -> None:
    together = draw(
        pipe, [*people, None], [SMALL], prompt=[PROMPT] * 3, refine_faces=True,
        generator=[tiny.generator(seed) for seed in (1, 2, 3)],
    )  # fmt: skip
    assert together.refined == 2
    for row, person in enumerate(people):
        alone = draw(pipe, person, [SMALL], refine_faces=True, generator=tiny.generator(row + 1))
        assert (together.images[row] - alone.images[0]).abs().max() < 1e-4


def test_the_result_tuple_is_images_and_faces(pipe: ImaginePipeline, people: list[Any]) -> None:
    out = draw(pipe, people[0], [SMALL], refine_faces=True)
    images, faces = out.to_tuple()
    assert images is out.images and faces == out.faces == out[1]
    images, faces = draw(pipe, people[0], [SMALL], refine_faces=True, return_dict=False)
    assert torch.equal(images, out.images) and len(faces) == 1


def test_encoding_and_decoding_use_the_same_normalisation() -> None:
    pipe = tiny.pipeline()
    pictures = torch.rand(2, 3, 32, 32)
    latents = pipe.encode_pictures(pictures)
    raw = pipe.vae.encode(pictures * 2 - 1).latent
    mean, std = (torch.tensor(pipe.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(latents * std + mean, raw)
    with torch.no_grad():
        wanted = (pipe.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(pipe._decode(latents, "pt"), wanted)


def test_squares_stay_in_the_picture_and_ellipses_in_their_squares() -> None:
    assert square_around(FaceBox(0, 0, 10, 10, 1), (100, 50), 2.4) == (0, 0, 24, 24)
    assert square_around(FaceBox(90, 40, 10, 10, 1), (100, 50), 2.4) == (76, 26, 100, 50)
    assert square_around(FaceBox(40, 10, 30, 30, 1), (100, 50), 2.4) == (30, 0, 80, 50)
    shown = ellipse_around(FaceBox(10, 10, 10, 10, 1), (3, 3, 27, 27), 1.4, 0.3)
    assert shown.shape == (24, 24) and shown[12, 12] == 1 and shown[0].max() == shown[:, 0].max() == 0


def test_noise_of_the_second_pass_is_normal_and_depends_on_the_start_latents() -> None:
    start = torch.randn(4, 8, 8)
    noise = noise_from_latents(start, (4, 64, 64))
    assert torch.equal(noise, noise_from_latents(start.clone(), (4, 64, 64)))
    assert not torch.equal(noise, noise_from_latents(start + 1e-3, (4, 64, 64)))
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05


def test_levels_begin_at_the_strength_and_use_its_fraction_of_the_steps() -> None:
    assert RefineFaces(strength=0.5).levels(8) == [0.5, 0.375, 0.25, 0.125]
    assert RefineFaces(strength=0.6, steps=2).levels(8) == [0.6, 0.3]
    assert RefineFaces(strength=0.1).levels(3) == [0.1]


def test_a_window_of_the_full_schedule_applies_to_the_second_pass() -> None:
    for window in (Window(), Window(0.0, 0.5), Window(0.55, 1.0), Window(0.0, 0.4), Window(0.7, 0.75)):
        settings = RefineFaces(strength=0.6, steps=12)
        again = settings.window(window).steps(12)
        assert again == [window.contains(round(1 - level, 6)) for level in settings.levels(20)]
    assert settings.window(Window(0.0, 0.3)) == Window(0.0, 0.0)


def test_a_face_with_a_square_of_the_drawn_size_is_not_small() -> None:
    pictures, chosen = torch.zeros(1, 3, 64, 64), RefineFaces()
    finder = KnownBoxesFinder([FaceBox(20.0, 20.0, 15.0, 15.0, 1.0)])
    assert [len(find_small_faces(pictures, [1], finder, chosen, side)[0]) for side in (36, 37)] == [0, 1]
    region = torch.zeros(1, 1, 64, 64)
    assert find_small_faces(pictures, [1], finder, chosen, 64, region)[0] == []
    region[..., 27, 27] = 1
    assert len(find_small_faces(pictures, [1], finder, chosen, 64, region)[0]) == 1


@pytest.mark.parametrize(
    ("given", "output_type", "message"),
    [
        (True, "latent", "needs pictures"),
        ("yes", "pil", "must be True, False or a RefineFaces"),
        (RefineFaces(strength=0), "pil", "strength=0 must be more than 0"),
        (RefineFaces(strength=1.5), "pil", "strength and edge must be at most 1"),
        (RefineFaces(steps=0), "pil", "RefineFaces.steps=0 must be a whole number"),
    ],
)
def test_invalid_settings_raise(
    pipe: ImaginePipeline, people: list[Any], given: Any, output_type: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(pipe, people[0], [SMALL], refine_faces=given, output_type=output_type)


def test_a_layout_says_who_is_on_the_left(
    pipe: ImaginePipeline, people: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, FaceBox]] = []

    def redraw(drawing: Any, faces: Any, squares: torch.Tensor, second_pass: Any) -> Generator[Any, None, Any]:
        seen.extend((face.person, face.box) for face in faces)
        yield from ()
        return squares

    monkeypatch.setattr(Drawing, "_redraw", redraw)
    prompt = "{ann} in a red hat, looking to {bob}"
    boxes = {"ann": (0.5, 0, 1, 1), "bob": (0, 0, 0.5, 1)}
    for reference, layout in (
        ({"ann": people[0], "bob": people[1]}, None),
        ({"ann": people[0], "bob": people[1]}, boxes),
        ({"bob": people[1], "ann": people[0]}, "left to right"),
    ):
        draw(pipe, reference, [OTHER, SMALL], prompt=prompt, refine_faces=True, layout=layout)
    assert seen == [(0, SMALL), (1, OTHER)] + [(1, SMALL), (0, OTHER)] * 2
