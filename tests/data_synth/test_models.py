"""A build with the production backend of every step, at tiny sizes: files, endpoints, diffusers, inpainting.

The toy detector finds faces in bright areas (tests.tiny_insightface), so random pictures have some.
"""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_synth.backends.embedded import WorldPeople
from data_synth.backends.endpoint import DOWN
from data_synth.config import BuildConfig
from imagine.shards.reading import open_records
from tests import tiny, tiny_models
from tests.chat_endpoint import Reply, Stub, completion, text_of, trouble
from tests.tiny_insightface import tiny_pack
from tests.toy_pairs import built, contents

pytestmark = pytest.mark.filterwarnings("ignore:`estimate` is deprecated:FutureWarning")

CAPTION = "a person in a red hat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two photos and the models of all steps."""
    from diffusers import AutoencoderKL

    root = tmp_path_factory.mktemp("models")
    (root / "photos").mkdir()
    for number, reference in enumerate(WorldPeople(WorldPeople.Settings(identities=2)).draw([0, 1])):
        photo = Image.open(io.BytesIO(reference.image))
        bright = Image.blend(photo, Image.new("RGB", photo.size, "white"), 0.6)
        # BMP: seeds depend on the bytes, which do not depend on an encoder version
        bright.save(root / "photos" / f"{number}.bmp")
    vae = AutoencoderKL.from_pretrained(tiny_models.stable_diffusion(root / "drawing") / "vae")
    vae.decoder.conv_out.bias.data += 0.6  # bright pictures, all different
    vae.save_pretrained(root / "drawing" / "vae")
    tiny.pipeline().save_pretrained(root / "refining")
    tiny_pack(root / "pack")
    return root


def config(folder: Path, url: str, least: float = 0.9999) -> BuildConfig:
    """Return a build of two photos with two targets each, refined below a similarity of `least`."""
    endpoint = {"backend": "endpoint", "model": "some/model", "url": url, "retries": 0, "at_once": 1}
    faces = {"recogniser": "insightface", "recogniser_settings": {"pack": str(folder / "pack")}}
    local = {"device": "cpu", "steps": 2}
    return BuildConfig.model_validate({
        "references": {"backend": "files", "source": str(folder / "photos"), "faces": "some", **faces},
        "captioner": endpoint,
        "rewriter": endpoint,
        "generator": {"backend": "diffusers", "model": str(folder / "drawing"), **local},
        "refiner": {
            "backend": "inpaint", "model": str(folder / "refining"), "insightface": str(folder / "pack"),
            "strength": 0.9, "guidance_scale": 1.0, **local,
        },
        "measurer": {"backend": "pictures", **faces},
        "targets_per_reference": 2,
        "targets": {"distribution": {"gaze": {"left": 1, "right": 1}}},
        "rounds": 1,
        "filters": {
            "faces": None, "similarity": [least, 1.0], "difference": None, "quality": None, "sharpness": None,
            "text": None, "duplicates": None,
        },
    })  # fmt: skip


def answer(number: int, body: dict[str, Any]) -> Reply:
    """Answer with a caption for a picture, or else with the caption rewritten for the wished gaze."""
    text = text_of(body)
    if "painter" in text:
        return completion(CAPTION)
    return completion(f"{CAPTION}, looking {'left' if 'gaze: left' in text else 'right'}")


def between(rejections: Path) -> float:
    """Return a similarity between the unrefined candidates, above some and below others."""
    lines = [json.loads(line) for line in rejections.read_text().splitlines()]
    drawn = [line["detail"] for line in lines if line["key"].endswith("-0-0")]  # attempt 0, round 0
    numbers = [float(detail.removeprefix("Similarity ").partition(",")[0]) for detail in drawn]
    assert len(numbers) == 4 and min(numbers) + 0.003 < max(numbers), "the details have three digits"
    return (min(numbers) + max(numbers)) / 2


def test_production_backends_defer_and_resume_like_a_fresh_build(stub: Stub, folder: Path, tmp_path: Path) -> None:
    stub.reply = lambda number, body: trouble(503)
    down = built(config(folder, stub.url), tmp_path / "out")
    deferred = [json.loads(line) for line in (tmp_path / "out" / "parked.jsonl").read_text().splitlines()]
    assert down.manifest["counts"]["pairs"] == 0 and len(deferred) == 4
    assert {(line["step"], line["reason"]) for line in deferred} == {("caption", DOWN)}

    stub.reply = answer
    made = built(config(folder, stub.url), tmp_path / "out")
    assert (tmp_path / "out" / "parked.jsonl").read_text() == ""
    assert made.made["caption"] == 2 and made.made["rewrite"] == made.made["generate"] == 4 > made.made["import"]
    assert made.funnel.as_json()["rounds"]["1"]["before"]["count"] == made.made["refine"] == 4, (
        "no candidate is that similar"
    )

    least = between(tmp_path / "out" / "rejections.jsonl")
    again = built(config(folder, stub.url, least), tmp_path / "out")
    refined = again.funnel.as_json()["rounds"]["1"]["before"]["count"]
    assert again.made == {} and 0 < refined < 4, "another similarity range generates no picture"
    records = [record for record in open_records(tmp_path / "out", cache=tmp_path / "cache") if record.reference]
    assert len(records) == again.manifest["counts"]["pairs"] > 0
    assert all(record.caption == f"{CAPTION}, looking {record.extra['aims']['gaze']}" for record in records)
    classes = {kind: model["identity"]["class"].rpartition(":")[2] for kind, model in made.manifest["models"].items()}
    assert classes == {
        "references": "Files", "captioner": "EndpointCaptioner", "rewriter": "EndpointRewriter",
        "generator": "DiffusersGenerator", "refiner": "InpaintRefiner", "measurer": "Measurer",
    }  # fmt: skip
    built(config(folder, stub.url, least), tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
