"""Test refiners with tiny random pipelines: ours, and a Stable Diffusion with an IP-Adapter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_synth.backends import refiners
from data_synth.backends.contracts import Draft, Failed
from data_synth.backends.generators import candidate_of, noise_of
from data_synth.backends.refiners import (
    NO_FACE,
    ImagineRefiner,
    InpaintRefiner,
    IPAdapterRefiner,
    Region,
    drawable_size,
    encoded,
    face_patch,
    whole_picture,
)
from data_synth.records import Candidate, Reference
from imagine.errors import BadRecordError, ConfigError, ImagineError, PromptError, WeightsError
from imagine.people.faces import KnownBoxesFinder
from imagine.pipeline.second_pass import keep_outside, square_around
from imagine.records import FaceBox
from tests import tiny, tiny_models
from tests.tiny_models import pixels

REGION = Region(around=1.5, reach=1.0, edge=0.3)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tiny_models.stable_diffusion(tmp_path_factory.mktemp("sd"))
    return folder, tiny_models.ip_adapter(tmp_path_factory.mktemp("ip"), folder)


def refiner(folder: Path, kind: Any = ImagineRefiner, **settings: object) -> Any:
    """Return a loaded refiner whose finder returns tiny.BOX for every picture."""
    chosen = {"model": str(folder), "device": "cpu", "steps": 3, "guidance_scale": 2.0, **settings}
    made = kind(kind.Settings.model_validate(chosen))
    made.load()
    if isinstance(made, IPAdapterRefiner):
        made.finder = KnownBoxesFinder([tiny.BOX])
    else:
        made.pipe.finder = KnownBoxesFinder([tiny.BOX])
    return made


def draft(person: int = 1, picture: int = 7, number: int = 0) -> Draft:
    """Return a reference and a candidate of 64 x 64 pixels whose face is in tiny.BOX."""
    reference = tiny_models.reference(person)
    spec = tiny_models.spec(reference, number)
    return Draft(reference, spec, candidate_of(spec, 0, 0, tiny.photo(picture)))


def refined(made: Any, *drafts: Draft) -> list[Candidate]:
    done = made.refine(drafts)
    assert all(isinstance(one, Candidate) for one in done), done
    return done


def again(one: Draft, candidate: Candidate) -> Draft:
    return replace(one, candidate=candidate)


@pytest.fixture(scope="module")
def kinds(ours: Path, stock: tuple[Path, Path]) -> list[Any]:
    """Return one refiner of each kind, loaded once, because results depend on the drafts only."""
    adapter = {"adapter": str(stock[1]), "subfolder": "models", "weight_name": "ip-adapter.safetensors"}
    region = {"region": REGION.model_dump()}
    return [
        refiner(ours),
        refiner(ours, InpaintRefiner, **region),
        refiner(stock[0], IPAdapterRefiner, **adapter, **region),
        refiner(stock[0], IPAdapterRefiner, **adapter, redraw="picture", strength=0.8),
    ]


def test_results_depend_on_draft_and_round_only(kinds: list[Any]) -> None:
    for made in kinds:
        one, two = draft(1), draft(2, number=1)
        first, second = refined(made, one, two)
        assert (first.key, first.ask, first.attempt, first.round) == ("r1-0-0-1", "r1-0", 0, 1)
        assert pixels(first).shape == (64, 64, 3)
        torch.manual_seed(99)
        assert refined(made, two, one) == [second, first]  # bit for bit
        (third,) = refined(made, again(one, first))
        assert third.key == "r1-0-0-2" and third.image != first.image
        # Another round must have different noise, not only a different input.
        (other,) = refined(made, again(one, replace(one.candidate, round=1)))
        assert other.image != first.image


def test_results_depend_on_reference_and_prompt(kinds: list[Any]) -> None:
    for made in kinds:
        one = draft(1)
        (usual,) = refined(made, one)
        (another,) = refined(made, replace(one, reference=tiny_models.reference(3)))
        (prompted,) = refined(made, replace(one, spec=replace(one.spec, prompt=tiny.SENTENCES[1])))
        assert len({usual.image, another.image, prompted.image}) == 3


def test_pixels_outside_the_face_are_bit_identical(kinds: list[Any]) -> None:
    for made in kinds[1:3]:
        one = draft()
        before, after = pixels(one.candidate), pixels(refined(made, one)[0])
        y, x = np.mgrid[0:64, 0:64] + 0.5
        radius = np.hypot((x - tiny.BOX.centre[0]) / 16, (y - tiny.BOX.centre[1]) / 16)  # reach 1: the box's ellipse
        assert (before == after)[radius >= 1].all()
        assert (before != after)[radius < 0.6].any(axis=-1).mean() > 0.9


def test_a_low_strength_changes_little(ours: Path) -> None:
    one = draft()
    image = Image.fromarray(pixels(one.candidate))
    faint = refiner(ours, strength=1e-4, steps=1)
    pipe = faint.pipe
    with torch.no_grad():
        latents = encoded(pipe, image.resize((32, 32), Image.Resampling.LANCZOS))
        coded = pipe._decode(latents, "pil")[0].resize((64, 64), Image.Resampling.LANCZOS)
    (after,) = refined(faint, one)
    assert np.abs(pixels(after).astype(int) - np.asarray(coded)).max() <= 3
    (strong,) = refined(refiner(ours, strength=1.0), one)
    assert np.abs(pixels(strong).astype(int) - np.asarray(coded)).max() > 10


def test_latents_outside_the_mask_do_not_change() -> None:
    pipe = tiny.pipeline()
    clean, noise = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    redrawn = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    redrawn[..., 1:3, 1:3] = True
    levels = [0.6, 0.4, 0.2]
    out = pipe(
        tiny.SENTENCES[0], tiny.photo(1), sigmas=levels, latents=0.4 * clean + 0.6 * noise, output_type="latent",
        callback_on_step_end=keep_outside(clean, noise, levels, redrawn),
    ).images  # fmt: skip
    assert torch.equal(out[~redrawn.expand_as(out)], clean[~redrawn.expand_as(clean)])
    assert not torch.isclose(out, clean)[redrawn.expand_as(out)].any()


def test_identity_scale_zero_ignores_the_reference(ours: Path) -> None:
    unconditioned = refiner(ours, identity_scale=0.0)
    one = draft(1)
    assert refined(unconditioned, one) == refined(
        unconditioned, replace(one, reference=replace(tiny_models.reference(3), key="r9"))
    )


def test_one_bad_draft_does_not_affect_the_others(kinds: list[Any]) -> None:
    for made in kinds:
        good = draft(1)
        unreadable = Reference("broken", b"no picture")
        bad = replace(good, reference=unreadable)
        worse = replace(good, candidate=replace(good.candidate, image=b"no picture"))
        first, second, third = made.refine([bad, worse, good])
        assert isinstance(first, Failed) and isinstance(second, Failed) and not first.for_now
        assert isinstance(third, Candidate)


def test_every_error_about_a_draft_is_its_own_failure() -> None:
    one = draft(1)

    def raising(error: Exception) -> Any:
        def draw(*_: object) -> Image.Image:
            raise error

        return draw

    for about_it in (ImagineError, BadRecordError, PromptError):
        failed = refiners.refined(one, whole_picture, raising(about_it("The numbers are not finite.")))
        assert isinstance(failed, Failed) and failed.sentence == "The numbers are not finite." and not failed.for_now
    for other in (ConfigError, WeightsError, RuntimeError):
        with pytest.raises(other):
            refiners.refined(one, whole_picture, raising(other("The settings are wrong.")))


def test_a_candidate_or_reference_without_a_face_is_a_failure(ours: Path) -> None:
    made = refiner(ours, InpaintRefiner)
    made.pipe.finder = KnownBoxesFinder([])
    (failed,) = made.refine([draft()])
    assert isinstance(failed, Failed) and failed.reason == NO_FACE
    whole = refiner(ours)
    whole.pipe.finder = KnownBoxesFinder([])
    (failed,) = whole.refine([draft()])
    assert isinstance(failed, Failed) and failed.reason == "no usable face"  # in the reference


def test_half_precision_gives_nearly_the_same_picture(ours: Path, stock: tuple[Path, Path]) -> None:
    adapter = {"adapter": str(stock[1]), "subfolder": "models", "weight_name": "ip-adapter.safetensors"}
    one = draft()
    for folder, kind, settings in ((ours, InpaintRefiner, {}), (stock[0], IPAdapterRefiner, adapter)):
        exact, rough = (
            refined(refiner(folder, kind, dtype=dtype, **settings), one) for dtype in ("float32", "bfloat16")
        )
        change = np.abs(pixels(exact[0]).astype(int) - pixels(one.candidate)).mean()
        assert 0 < np.abs(pixels(exact[0]).astype(int) - pixels(rough[0])).mean() < change / 2


def test_squares_around_faces_are_inside_the_picture() -> None:
    assert square_around(FaceBox(20, 30, 20, 16, 1), (100, 80), 2.0) == (10, 18, 50, 58)
    assert square_around(FaceBox(0, 0, 20, 20, 1), (100, 80), 2.0) == (0, 0, 40, 40)
    assert square_around(FaceBox(80, 60, 40, 40, 1), (100, 80), 3.0) == (20, 0, 100, 80)


def test_drawable_sizes_have_the_same_aspect_ratio() -> None:
    assert drawable_size((128, 128), 128, 16) == (128, 128)
    assert drawable_size((1024, 1024), 128, 32) == (128, 128)
    width, height = drawable_size((1600, 900), 1024, 64)
    assert (width % 64, height % 64) == (0, 0) and abs(width / height - 16 / 9) < 0.1
    assert 0.9 < width * height / 1024**2 < 1.1
    assert drawable_size((1000, 10), 64, 32) == (640, 32)


def test_blending_back_an_unchanged_patch_changes_nothing() -> None:
    image = tiny.photo(4)
    patch = face_patch(image, tiny.BOX, Region())
    assert np.array_equal(np.asarray(patch.put_back(patch.part)), np.asarray(image))
    white = np.asarray(patch.put_back(Image.new("RGB", (8, 8), "white")))
    assert (white[32, 32] == 255).all() and np.array_equal(white[0], np.asarray(image)[0])
    whole = whole_picture(image)
    assert np.array_equal(np.asarray(whole.put_back(tiny.photo(5))), np.asarray(tiny.photo(5)))


def test_a_separate_adapter_and_its_identity(ours: Path, tmp_path: Path) -> None:
    from imagine import ImaginePipeline

    bare = tmp_path / "bare"
    pipe = tiny.pipeline()
    adapter = pipe.unload_adapter()
    assert adapter is not None
    pipe.save_pretrained(bare)
    with pytest.raises(WeightsError, match="no identity adapter"):
        refiner(bare)
    whole = ImaginePipeline.from_pretrained(ours)
    assert whole.adapter is not None
    metadata = {name: "test" for name in ("base", "encoder", "feature_layer", "tokens", "licence")}
    whole.adapter.save(tmp_path / "adapter", {**metadata, "encoder_fingerprint": whole.encoder_fingerprint})
    with_it = refiner(bare, adapter=str(tmp_path / "adapter"))
    one = draft()
    assert refined(with_it, one)[0].image == refined(refiner(ours), one)[0].image
    assert with_it.identity["adapter"] and with_it.identity != refiner(ours).identity


def test_an_ip_adapter_for_other_sizes_is_an_error(stock: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, adapter = stock
    with pytest.raises(WeightsError, match="cannot be loaded"):
        refiner(folder, IPAdapterRefiner, adapter=str(adapter), subfolder="models", weight_name="other.safetensors")
    import shutil

    shutil.copytree(adapter, tmp_path / "wrong")
    file = tmp_path / "wrong" / "models" / "ip-adapter.safetensors"
    tensors = load_file(file)
    save_file({name: torch.zeros(3, 3) if "to_k_ip" in name else each for name, each in tensors.items()}, file)
    with pytest.raises(WeightsError, match="cannot be loaded"):
        refiner(folder, IPAdapterRefiner, adapter=str(tmp_path / "wrong"), subfolder="models",
                weight_name="ip-adapter.safetensors")  # fmt: skip


def test_the_ip_adapter_reads_the_face_or_the_picture(stock: tuple[Path, Path]) -> None:
    adapter = {"adapter": str(stock[1]), "subfolder": "models", "weight_name": "ip-adapter.safetensors"}
    face = refiner(stock[0], IPAdapterRefiner, **adapter)
    whole = refiner(stock[0], IPAdapterRefiner, **adapter, look_at="picture")
    one = draft()
    assert face._adapter_image(one.reference).size == (56, 56) and whole._adapter_image(one.reference).size == (64, 64)
    off = refiner(stock[0], IPAdapterRefiner, **adapter, scale=0.0)
    assert refined(off, one) == refined(off, replace(one, reference=replace(tiny_models.reference(3), key="r9")))


def test_noise_differs_by_round() -> None:
    one = torch.randn(4, generator=noise_of(100, 0, 1))
    assert not torch.equal(one, torch.randn(4, generator=noise_of(100, 0, 2)))
