"""What can be judged: diffusers' own pipelines, folders of finished pictures, and the refusals."""

import json
from pathlib import Path

import pytest
from PIL import Image

from imagine.errors import ConfigError, PictureError
from imagine.evaluation.report import to_pil
from imagine.evaluation.systems.contracts import Drawing, System
from imagine.evaluation.systems.finished import FinishedPictures, open_finished
from imagine.evaluation.systems.photographs import refuse_drawings, refuse_photographs
from imagine.evaluation.systems.pipelines import DiffusersPipeline, PersonalisedPipeline, as_judgeable, as_system
from imagine.networks.weights import default_folder
from imagine.people.faces import LearnedFinder
from imagine.world import render, sample_contexts, sample_people
from tests import tiny, tiny_stock
from tests.photographs import astronaut


def test_our_pipeline_is_a_system_with_both_rows() -> None:
    system = as_system(tiny.pipeline(), {"num_inference_steps": 1})
    assert isinstance(system, PersonalisedPipeline) and isinstance(system, System)
    assert (system.rows, system.side, system.name) == (("full", "detached"), tiny.SIZE, "ImaginePipeline")
    person = system.enroll([tiny.photo(1)])
    one, two = system.draw([Drawing("a", tiny.SENTENCES[0], person, 1), Drawing("b", tiny.SENTENCES[0], person, 2)])
    (alone,) = system.draw([Drawing("a", tiny.SENTENCES[0], None, 1)])
    assert isinstance(one, Image.Image) and isinstance(two, Image.Image) and isinstance(alone, Image.Image)
    assert len({one.tobytes(), two.tobytes(), alone.tobytes()}) == 3
    assert as_system(system) is system
    with pytest.raises(ConfigError, match="takes its options when it is made"):
        as_system(system, {"num_inference_steps": 2})


def test_a_stock_pipeline_of_diffusers_needs_only_the_adapter_class() -> None:
    pipe = tiny_stock.stock()
    with pytest.raises(ConfigError, match=r"wrap it as imagine\.evaluation.systems\.pipelines\.DiffusersPipeline"):
        as_judgeable(pipe)
    system = DiffusersPipeline(pipe, reference=None, options={"num_inference_steps": 1})
    assert isinstance(system, System) and system.rows == ("full",)
    drawn = system.draw([Drawing("a", "a cat", system.enroll([tiny.photo(1)]), seed) for seed in (1, 1, 2)])
    pictures = [image.tobytes() for image in drawn if isinstance(image, Image.Image)]
    assert len(pictures) == 3 and pictures[0] == pictures[1] != pictures[2]
    slower = DiffusersPipeline(pipe, reference=None, options={"num_inference_steps": 2})
    assert slower.fingerprint() != system.fingerprint()


def test_photos_go_to_the_named_argument() -> None:
    class Call:
        def __init__(self) -> None:
            self.components: dict[str, object] = {}
            self.config: dict[str, object] = {}

        def __call__(self, **given: object) -> object:
            self.given = given
            return type("Output", (), {"images": [tiny.photo(0)], "nsfw_content_detected": [self.blocked]})()

        blocked = False

    pipe, photos = Call(), [tiny.photo(1), tiny.photo(2)]
    one = DiffusersPipeline(pipe, reference="image")
    one.draw([Drawing("a", "a cat", one.enroll(photos), 1, size=(64, 32))])
    assert pipe.given["image"] is photos[0] and (pipe.given["height"], pipe.given["width"]) == (64, 32)
    several = DiffusersPipeline(pipe, reference="image", takes_list=True)
    several.draw([Drawing("a", "a cat", several.enroll(photos), 1)])
    assert pipe.given["image"] == photos
    two = {"a": one.enroll(photos[:1]), "b": one.enroll(photos[1:])}
    one.draw([Drawing("a", "{a} and {b}", two, 1)])
    assert pipe.given["image"] == photos
    pipe.blocked = True
    assert one.draw([Drawing("a", "a cat", None, 1)]) == ["The safety checker of the pipeline replaced the picture."]


def test_finished_pictures_are_found_by_name_or_by_manifest(tmp_path: Path) -> None:
    tiny.photo(1).save(tmp_path / "000_00.jpg")
    tiny.photo(2).save(tmp_path / "other.png")
    finished = FinishedPictures(tmp_path)
    assert finished.path("000_00").name == "000_00.jpg" and finished.path("000_01").name == "000_01.png"
    assert finished.check(["000_00", "000_01"]) == 1
    with pytest.raises(ConfigError, match=r"no picture of this suite: name the files 7\.png"):
        finished.check(["7"])
    (tmp_path / "manifest.jsonl").write_text('{"id": "000_01", "file": "other.png"}\n\n')
    assert FinishedPictures(tmp_path).path("000_01").name == "other.png"
    (tmp_path / "manifest.jsonl").write_text('{"id": "000_01"}\n')
    with pytest.raises(ConfigError, match=r"Line 1 of .*manifest.jsonl is not"):
        FinishedPictures(tmp_path)
    with pytest.raises(ConfigError, match=r"There is no folder .*nothing of pictures"):
        FinishedPictures(tmp_path / "nothing")


def test_finished_pictures_of_any_size_become_squares(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.png")
    assert open_finished(tmp_path / "a.png", 128).size == (128, 128)
    assert open_finished(tmp_path / "a.png").size == (300, 200)
    with pytest.raises(PictureError, match=r"There is no picture b\.png"):
        open_finished(tmp_path / "b.png")


def test_neither_judge_takes_the_others_kind_of_picture() -> None:
    people, contexts = sample_people(range(4)), sample_contexts([1, 2, 3, 4])
    drawings = [to_pil(image) for image in render(people, contexts).images]
    photo = astronaut()
    finder = LearnedFinder.from_folder(default_folder() / "finder")
    refuse_photographs(finder, drawings)
    refuse_photographs(finder, [None])
    refuse_photographs(None, [photo])
    with pytest.raises(ConfigError, match=r"1 of 1 pictures are photographs, .* use --suite photos"):
        refuse_photographs(finder, [photo])
    refuse_photographs(finder, [photo], fewest=2)
    refuse_drawings([photo])
    plain = [to_pil(image) for image in render(people, contexts.replace(style=0, headwear=0, light=0)).images]
    with pytest.raises(ConfigError, match=r"of 4 pictures are drawings of the portrait world"):
        refuse_drawings(plain)


def test_a_manifest_may_hold_any_json_with_these_entries(tmp_path: Path) -> None:
    entry = {"id": 7, "file": "x.png", "seconds": 3.5}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(entry))
    assert FinishedPictures(tmp_path).path("7").name == "x.png"
