"""Test recognisers: the shipped judge on rendered people, and InsightFace's own classes with tiny ONNX graphs."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from data_synth.backends.contracts import Failed
from data_synth.backends.recognisers import (
    InsightFaceRecogniser,
    JudgeRecogniser,
    KnownFace,
    make_finder,
    make_recogniser,
    similarity,
)
from imagine.errors import ConfigError, WeightsError
from imagine.people.faces import InsightFaceFinder
from imagine.world import render, sample_contexts, sample_people
from imagine.world.seeds import HELD_OUT
from tests.photographs import astronaut
from tests.tiny_insightface import tiny_pack

# insightface aligns faces with a function that scikit-image has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`estimate` is deprecated:FutureWarning")


# --- our judge --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Return six held-out people in two contexts each; pictures of one person are consecutive."""
    people = sample_people([HELD_OUT[number] for number in range(6) for _ in range(2)])
    images = render(people, sample_contexts(range(12)), 128).images
    return [Image.fromarray((each.clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy()) for each in images]


@pytest.fixture(scope="module")
def judge() -> JudgeRecogniser:
    made = JudgeRecogniser(JudgeRecogniser.Settings())
    made.load()
    return made


def only(faces: tuple[KnownFace, ...] | Failed) -> KnownFace:
    assert isinstance(faces, tuple) and len(faces) == 1
    return faces[0]


def test_the_judge_recognises_the_same_person_in_another_context(
    pictures: list[Image.Image], judge: JudgeRecogniser
) -> None:
    recognised = judge.recognise(pictures)
    faces = [each[0] for each in recognised if isinstance(each, tuple) and each]
    assert len(faces) == len(pictures)
    same = [similarity(faces[2 * number], faces[2 * number + 1]) for number in range(6)]
    other = [
        similarity(faces[2 * number], faces[2 * place + 1])
        for number in range(6)
        for place in range(6)
        if place != number
    ]
    assert float(np.mean(same)) > float(np.mean(other)) + 0.2
    assert all(abs(float(np.linalg.norm(face.embedding)) - 1) < 1e-5 for face in faces)


def test_results_do_not_depend_on_the_batch(pictures: list[Image.Image], judge: JudgeRecogniser) -> None:
    file = io.BytesIO()
    pictures[0].save(file, "PNG")
    mixed = judge.recognise([file.getvalue(), b"no picture", Image.new("RGB", (64, 64)), pictures[1]])
    assert isinstance(mixed[1], Failed) and not mixed[1].for_now
    assert mixed[2] == ()
    (first,), (last,) = judge.recognise([pictures[0]])[0], judge.recognise([pictures[1]])[0]  # type: ignore[misc]
    assert np.array_equal(only(mixed[0]).embedding, first.embedding)
    assert np.array_equal(only(mixed[3]).embedding, last.embedding)


def test_each_face_of_a_group_is_recognised(pictures: list[Image.Image], judge: JudgeRecogniser) -> None:
    group = Image.new("RGB", (256, 128))
    group.paste(pictures[0], (0, 0))
    group.paste(pictures[2], (128, 0))
    (faces,) = judge.recognise([group])
    assert isinstance(faces, tuple) and len(faces) == 2
    left, right = sorted(faces, key=lambda face: face.box.left)
    alone = [only(each) for each in judge.recognise([pictures[0], pictures[2]])]
    assert similarity(left, alone[0]) > similarity(left, alone[1])
    assert similarity(right, alone[1]) > similarity(right, alone[0])


def test_the_identity_contains_the_weights_of_the_judge(judge: JudgeRecogniser, tmp_path: Path) -> None:
    from imagine.networks.recogniser import Recogniser

    assert judge.identity["model"] == "recogniser" and judge.identity["finder"]
    Recogniser(32, (8, 8, 8, 8), 1, 16).save(tmp_path / "judge" / "recogniser")
    other = make_recogniser("judge", {"judge": str(tmp_path / "judge")})
    assert (judge.identity["licence"], other.identity["licence"]) == ("Apache-2.0", "")
    assert other.identity["weights"] != judge.identity["weights"] and other.identity["finder"] == ""
    with pytest.raises(WeightsError, match="recogniser"):
        make_recogniser("judge", {"judge": str(tmp_path)}).load()


def test_recognisers_are_made_by_name() -> None:
    assert isinstance(make_recogniser("judge"), JudgeRecogniser)
    assert isinstance(make_recogniser("data_synth.backends.recognisers:InsightFaceRecogniser"), InsightFaceRecogniser)
    with pytest.raises(ConfigError, match="no recogniser 'juge'"):
        make_recogniser("juge")
    with pytest.raises(ConfigError, match=r"insightface: there is no key 'pck' .*valid: pack, root, threshold"):
        make_recogniser("insightface", {"pck": "x"})


# --- InsightFace ------------------------------------------------------------------------------------------------------
def faces_at(*corners: tuple[int, int], colour: str = "white") -> Image.Image:
    """Return a black picture of 128 x 128 with a bright cell of the detector (64 pixels a side here) at each corner."""
    image = Image.new("RGB", (128, 128))
    for left, top in corners:
        image.paste(colour, (left, top, left + 64, top + 64))
    return image


@pytest.fixture(scope="module")
def arcface(tmp_path_factory: pytest.TempPathFactory) -> InsightFaceRecogniser:
    pack = tiny_pack(tmp_path_factory.mktemp("pack"))
    made = InsightFaceRecogniser(InsightFaceRecogniser.Settings(pack=str(pack)))
    made.load()
    return made


def test_insightface_finds_and_embeds_every_face(arcface: InsightFaceRecogniser) -> None:
    white, none, two, broken = arcface.recognise(
        [faces_at((64, 64)), faces_at(), faces_at((0, 0), (64, 64)), b"no picture"]
    )
    face = only(white)
    # The detector's box is (40, 40) to (56, 56) of 64 pixels, so (80, 80) to (112, 112) here; ours starts lower.
    assert (face.box.left, face.box.width) == pytest.approx((80, 32))
    assert face.box.top == pytest.approx(80 + 0.12 * 32)
    assert face.embedding.shape == (16,) and abs(float(np.linalg.norm(face.embedding)) - 1) < 1e-5
    assert none == () and isinstance(two, tuple) and len(two) == 2
    assert isinstance(broken, Failed)


def test_insightface_distinguishes_and_aligns_faces(arcface: InsightFaceRecogniser) -> None:
    def picture(turn: int, corner: int) -> Image.Image:
        cell = Image.new("RGB", (64, 64), "white")
        cell.paste((255, 120, 0), (14, 10, 40, 20))
        image = Image.new("RGB", (128, 128))
        image.paste(cell.rotate(turn), (corner, corner))
        return image

    one, moved, turned = (only(each) for each in arcface.recognise([picture(0, 64), picture(0, 0), picture(180, 64)]))
    assert similarity(one, one) == pytest.approx(1)
    assert similarity(one, moved) > similarity(one, turned)


def test_unusable_packs_raise_one_sentence(tmp_path: Path) -> None:
    def load(pack: Path) -> InsightFaceRecogniser:
        made = InsightFaceRecogniser(InsightFaceRecogniser.Settings(pack=str(pack), root=str(tmp_path)))
        made.load()
        return made

    with pytest.raises(WeightsError, match="no InsightFace model pack"):
        load(Path("buffalo_l"))
    with pytest.raises(WeightsError, match="no recogniser"):
        load(tiny_pack(tmp_path / "detector_only", recogniser=False))
    (tiny_pack(tmp_path / "recogniser_only") / "det.onnx").unlink()
    with pytest.raises(WeightsError, match="no face detector"):
        load(tmp_path / "recogniser_only")
    with pytest.raises(WeightsError, match="is a file"):
        load(tmp_path / "recogniser_only" / "w600k.onnx")
    flat = load(tiny_pack(tmp_path / "flat", landmarks=False))
    with pytest.raises(WeightsError, match="no landmarks"):
        flat.recognise([faces_at((64, 64))])


def test_finders_for_refiners(tmp_path: Path) -> None:
    pack = tiny_pack(tmp_path / "pack")
    assert isinstance(make_finder(str(pack)), InsightFaceFinder)
    assert hasattr(make_finder(), "find")


def test_the_identity_of_a_pack_depends_on_its_content(arcface: InsightFaceRecogniser) -> None:
    identity = arcface.identity
    assert len(identity["weights"]) == 16 and "research" in identity["licence"]
    assert set(arcface.settings.model_dump()) == {"threshold"}


def test_recognising_computes_no_gradients(pictures: list[Image.Image], judge: JudgeRecogniser) -> None:
    assert not any(parameter.requires_grad for parameter in judge.network.parameters())
    assert torch.is_grad_enabled() and judge.recognise([pictures[0]])[0] != ()


def test_dlib_recognises_photographs_and_refuses_drawings(tmp_path: Path) -> None:
    recogniser = make_recogniser("dlib")
    recogniser.load()
    people = sample_people([HELD_OUT.start])
    drawn = render(people, sample_contexts([3]), size=128).images[0]
    Image.fromarray((drawn * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "drawn.png")
    bright = ImageEnhance.Brightness(astronaut()).enhance(1.3)
    one, two, nobody, drawing, broken = recogniser.recognise(
        [astronaut(), bright, Image.new("RGB", (256, 256)), tmp_path / "drawn.png", b"no picture"]
    )
    assert isinstance(one, tuple) and isinstance(two, tuple)
    assert len(one) == len(two) == 1 and similarity(one[0], two[0]) > 0.95
    assert nobody == ()
    assert isinstance(drawing, Failed) and "drawing" in drawing.reason
    assert isinstance(broken, Failed)
    assert recogniser.identity["licence"] == "CC0-1.0" and len(recogniser.identity["finder"]) == 64
