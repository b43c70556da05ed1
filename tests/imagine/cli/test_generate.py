"""`imagine generate`: the pictures it writes, what it prints, and what it refuses."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagine.cli.generate import BATCH
from imagine.networks.weights import default_folder
from imagine.people.faces import KnownBoxesFinder
from imagine.people.persona import Persona
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.records import FaceBox
from tests import pictures, tiny
from tests.commands import Run, assert_refused, generate, process, terminal
from tests.faces import ColourRecogniser


def test_generate_takes_the_controls_of_a_call(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    more = ["--identity-window", "0:0.5", "--identity-blocks", "up", "--refine-faces", "--json"]
    code, out, err = run(*generate(weights, photo, tmp_path / "a.png", *more))
    assert (code, err) == (0, "") and {"refined", "notes"} <= json.loads(out).keys()
    drawn = []
    for more in ([], ["--identity-guidance-scale", "5"], ["--identity-guidance-scale", "5", "--guidance-balance"]):
        assert run(*generate(weights, photo, tmp_path / "b.png", *more))[0] == 0
        drawn.append(np.asarray(Image.open(tmp_path / "b.png")))
    assert (drawn[0] != drawn[1]).any() and (drawn[1] != drawn[2]).any()
    code, _, err = run(*generate(weights, photo, tmp_path / "a.png", "--identity-blocks", "style"))
    assert code == 2 and "choose all, coarse, fine, down, mid or up" in err and err.count("\n") == 1
    for window in ("0.8:0.2", "0.5", "0:2", "a:b"):
        code, _, err = run(*generate(weights, photo, tmp_path / "a.png", "--identity-window", window))
        assert code == 2 and "START:END, two fractions of the steps such as 0:0.8" in err and err.count("\n") == 1


def test_generate_writes_a_picture_that_its_seed_repeats(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    code, out, err = run(*generate(weights, photo, tmp_path / "a.png"))
    assert (code, err) == (0, "") and str(tmp_path / "a.png") in out and "seed 7" in out
    assert run(*generate(weights, photo, tmp_path / "b.png"))[0] == 0
    assert run(*generate(weights, photo, tmp_path / "c.png", "--seed", "8", "--guidance-scale", "1.5"))[0] == 0
    first, again, other = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png", "c.png"))
    assert first.shape == (tiny.SIZE, tiny.SIZE, 3) and (first == again).all() and (first != other).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_a_stock_folder_is_refused_with_the_way_to_use_it(run: Run, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    code, _, err = run(*generate(tmp_path, photo, tmp_path / "a.png"))
    assert code == 2 and "holds a StableDiffusionXLPipeline" in err and "docs/bases.md" in err


def test_generate_agrees_with_the_library(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    assert run(*generate(weights, photo, tmp_path / "a.png", "--identity-scale", "0.5"))[0] == 0
    pipe = ImaginePipeline.from_pretrained(weights)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 2, "identity_scale": 0.5, "generator": tiny.generator(7)}
    wanted = pipe("smiling on a beach", reference=photo, **options).images[0]
    assert (np.asarray(Image.open(tmp_path / "a.png")) == np.asarray(wanted)).all()


def test_generate_as_json_with_several_pictures(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    code, out, err = run(*generate(weights, photo, tmp_path / "x.jpg", "--num-images", "2", "--json"))
    result = json.loads(out)
    assert (code, err) == (0, "")
    assert result["images"] == [str(tmp_path / "x-1.jpg"), str(tmp_path / "x-2.jpg")] and result["seeds"] == [7, 8]
    assert all(Image.open(path).format == "JPEG" for path in result["images"])
    assert result["faces"][0]["reference"] == str(photo) and result["faces"][0]["box"]["width"] > 20


def test_many_pictures_are_drawn_in_batches_each_from_its_own_seed(
    run: Run, refining: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    usual = ImaginePipeline._identity_strength

    def counted(self: ImaginePipeline, scale: Any, personas: Any, copies: int) -> Any:
        drawn.append(copies)
        return usual(self, scale, personas, copies)

    monkeypatch.setattr(ImaginePipeline, "_identity_strength", counted)
    code, out, err = run(*generate(refining, photo, tmp_path / "x.png", "--num-images", BATCH + 2, "--json"))
    assert (code, err, drawn) == (0, "", [BATCH, 2])
    result = json.loads(out)
    assert result["seeds"] == list(range(7, 7 + BATCH + 2)) and len(result["faces"]) == 1
    numbers = [int(note.split(":")[0].removeprefix("Picture ")) for note in result["notes"]]
    assert numbers == sorted(set(numbers)) and BATCH < numbers[-1] <= BATCH + 2
    assert run(*generate(refining, photo, tmp_path / "one.png", "--seed", 7 + BATCH + 1))[0] == 0
    last, one = (np.asarray(Image.open(each)).astype(int) for each in (result["images"][-1], tmp_path / "one.png"))
    assert np.abs(last - one).max() <= 1  # the size of a batch may change the rounding


def test_notes_of_the_second_pass_are_printed_if_it_ran(
    run: Run, weights: Path, refining: Path, photo: Path, tmp_path: Path
) -> None:
    """These weights draw no face that the detector finds; the note appears also if the pass is the weights' default."""
    note = "Picture 1: no face was found for one person"
    for folder, more, expected in ((refining, [], True), (weights, ["--refine-faces"], True), (weights, [], False)):
        code, out, _ = run(*generate(folder, photo, tmp_path / "a.png", *more))
        assert code == 0 and (note in out) is expected


def test_finder_insightface_replaces_the_face_detector(
    run: Run, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.photo(1).save(tmp_path / "me.png")
    asked = [*generate(weights, tmp_path / "me.png", tmp_path / "a.png"), "--finder", "insightface"]
    code, out, err = run(*asked)
    assert_refused(code, out, err)
    assert "There is no InsightFace model pack buffalo_l" in err
    monkeypatch.setattr("imagine.people.faces.InsightFaceFinder", lambda: KnownBoxesFinder([tiny.BOX]))
    code, out, _ = run(*asked, "--json")
    assert code == 0 and json.loads(out)["faces"][0]["box"]["width"] == tiny.BOX.width
    code, out, _ = run("doctor", tmp_path / "me.png", "--weights", weights, "--finder", "insightface", "--json")
    assert code == 0 and len(json.loads(out)["faces"]) == 1


def test_the_default_device_is_a_gpu_if_there_is_one(
    run: Run, weights: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    code, out, _ = run(*generate(weights, photo, tmp_path / "a.png", "--json", "--device", "auto"))
    assert code == 0 and json.loads(out)["device"] == "cpu"
    for verb in (
        generate(weights, photo, tmp_path / "b.png"),
        ["enroll", photo, "--output", tmp_path / "b.safetensors"],
    ):
        code, out, err = run(*verb, "--device", "cuda")
        assert_refused(code, out, err)
        assert "torch finds no device cuda here: choose cpu" in err
    moved: list[Any] = []

    def to(self: ImaginePipeline, device: Any) -> ImaginePipeline:
        moved.append(device)
        return self

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(ImaginePipeline, "to", to)
    for more in ([], ["--device", "cpu"]):
        assert run(*generate(weights, photo, tmp_path / "c.png", *more))[0] == 0
    assert moved == ["cuda", "cpu"]


def test_generate_from_a_persona_and_from_names(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    persona = tmp_path / "me.safetensors"
    code, out, _ = run("enroll", photo, photo, "--weights", weights, "--output", persona)
    assert code == 0 and str(persona) in out and Persona.load(persona).tokens == 2 * tiny.TOKENS
    assert run(*generate(weights, persona, tmp_path / "a.png"))[0] == 0
    named = ["--prompt", "{ann} looks at {bob}", "--output", tmp_path / "b.png"]
    both = ["--reference", f"ann={photo}", "--reference", f"bob={persona}"]
    code, out, err = run("generate", "--weights", weights, *named, *both, "--json")
    assert code == 0, err
    assert [face["reference"].split(":")[0] for face in json.loads(out)["faces"]] == ["ann", "bob", "bob"]


def rotated(plain: Image.Image, folder: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.rotate(90, expand=True).save(folder / "rotated.jpg", exif=exif)
    return folder / "rotated.jpg"


def cmyk(plain: Image.Image, folder: Path) -> Path:
    plain.convert("CMYK").save(folder / "cmyk.jpg")
    return folder / "cmyk.jpg"


def grey(plain: Image.Image, folder: Path) -> Path:
    plain.convert("L").save(folder / "grey.png")
    return folder / "grey.png"


def animated(plain: Image.Image, folder: Path) -> Path:
    plain.save(folder / "animated.gif", save_all=True, append_images=[plain.convert("L")])
    return folder / "animated.gif"


def deep(plain: Image.Image, folder: Path) -> Path:
    return pictures.deep_png(folder / "deep.png", np.asarray(plain).astype(np.uint16) * 257)


def deep_grey(plain: Image.Image, folder: Path) -> Path:
    return pictures.deep_png(folder / "deep_grey.png", np.asarray(plain.convert("L")).astype(np.uint16) * 257)


def palette_with_alpha(plain: Image.Image, folder: Path) -> Path:
    clear = plain.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, plain.width, 8))
    clear.quantize(256).save(folder / "palette.png")
    with Image.open(folder / "palette.png") as stored:
        assert stored.mode == "P" and "transparency" in stored.info
    return folder / "palette.png"


@pytest.mark.parametrize("make", [rotated, cmyk, grey, animated, deep, deep_grey, palette_with_alpha])
def test_unusual_picture_formats_are_read(
    run: Run, weights: Path, photo: Path, tmp_path: Path, make: Callable[[Image.Image, Path], Path]
) -> None:
    odd = make(Image.open(photo).convert("RGB"), tmp_path)
    code, out, err = run("doctor", odd, "--weights", weights, "--json")
    assert (code, err) == (0, "") and len(json.loads(out)["faces"]) == 1
    code, out, err = run(*generate(weights, odd, tmp_path / "out.png", "--json"))
    assert (code, err) == (0, "") and json.loads(out)["faces"][0]["found"] == 1
    assert Image.open(tmp_path / "out.png").size == (tiny.SIZE, tiny.SIZE)


def test_the_face_used_among_several_is_named(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    one = Image.open(photo)
    both = Image.new("RGB", (2 * one.width, one.height))
    both.paste(one, (0, 0))
    both.paste(one, (one.width, 0))
    both.save(tmp_path / "both.png")
    code, out, err = run(*generate(weights, tmp_path / "both.png", tmp_path / "a.png"))
    assert (code, err) == (0, "") and "The photo holds 2 faces and the largest was used (face=0); pass face=0" in out
    code, out, _ = run(*generate(weights, tmp_path / "both.png", tmp_path / "b.png", "--face", "1", "--json"))
    assert code == 0 and json.loads(out)["faces"][0]["index"] == 1


def test_file_names_that_are_no_text_are_escaped(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(bytes(tmp_path) + b"/m\xff.jpg")
    try:
        Path(odd).write_bytes(photo.read_bytes())
    except OSError:
        pytest.skip("this system's names are all text")
    code, out, err = run(*generate(weights, Path(odd), Path(odd).with_suffix(".png"), "--json"))
    assert (code, err) == (0, "") and json.loads(out)["faces"][0]["reference"] == odd
    code, out, err = run(*generate(weights, Path(odd), Path(odd).with_suffix(".png")))
    assert (code, err) == (0, "") and "m\\udcff.png (seed 7" in out


def text_file(folder: Path) -> Path:
    (folder / "text.png").write_text("not a picture")
    return folder / "text.png"


def truncated(folder: Path) -> Path:
    tiny.photo(1).resize((400, 400)).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-2000])
    return folder / "cut.jpg"


def one_pixel(folder: Path) -> Path:
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    return folder / "one.png"


def huge(folder: Path) -> Path:
    return pictures.png_header_only(folder / "huge.png", 20_000, 20_000)


def faceless(folder: Path) -> Path:
    Image.new("RGB", (200, 200), "skyblue").save(folder / "sky.png")
    return folder / "sky.png"


def missing(folder: Path) -> Path:
    return folder / "missing.jpg"


def a_folder(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize("make", [text_file, truncated, one_pixel, huge, faceless, missing, a_folder])
def test_unusable_photos_are_refused(run: Run, weights: Path, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    code, out, err = run(*generate(weights, make(tmp_path), tmp_path / "out.png"))
    assert_refused(code, out, err)
    assert not (tmp_path / "out.png").exists()


def other_persona(weights: Path, folder: Path) -> list[Any]:
    """A persona that other weights made."""
    tiny.pipeline(seed=5).enroll(tiny.photo(1)).save(folder / "other.safetensors")
    return generate(weights, folder / "other.safetensors", folder / "out.png")


def cut_persona(weights: Path, folder: Path) -> list[Any]:
    whole = folder / "whole.safetensors"
    tiny.pipeline().enroll(tiny.photo(1)).save(whole)
    (folder / "cut.safetensors").write_bytes(whole.read_bytes()[:-8])
    return generate(weights, folder / "cut.safetensors", folder / "out.png")


def cut_weights(weights: Path, folder: Path) -> list[Any]:
    tiny.photo(1).save(folder / "photo.png")
    shutil.copytree(weights, folder / "weights")
    file = next((folder / "weights" / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-64])
    return generate(folder / "weights", folder / "photo.png", folder / "out.png")


def foreign_weights(weights: Path, folder: Path) -> list[Any]:
    """An encoder that the adapter was not trained with."""
    tiny.photo(1).save(folder / "photo.png")
    shutil.copytree(weights, folder / "weights")
    tiny.pipeline(seed=5).image_encoder.save_pretrained(folder / "weights" / "image_encoder")
    return generate(folder / "weights", folder / "photo.png", folder / "out.png")


WRONG_FILES = [
    (other_persona, "made by the vision encoder"),
    (cut_persona, "not a complete safetensors file"),
    (cut_weights, "unet cannot be loaded"),
    (foreign_weights, "trained with the vision encoder"),
]


@pytest.mark.parametrize(("make", "message"), WRONG_FILES)
def test_files_of_other_weights_are_refused(
    run: Run, weights: Path, tmp_path: Path, make: Callable[[Path, Path], list[Any]], message: str
) -> None:
    code, out, err = run(*make(weights, tmp_path))
    assert_refused(code, out, err)
    assert message in err and not (tmp_path / "out.png").exists()


def test_a_face_number_that_is_too_large(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    code, out, err = run(*generate(weights, photo, tmp_path / "out.png", "--face", "3"))
    assert_refused(code, out, err)
    assert "face=3" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt", "   "], "empty"),
        (["--prompt", "word " * 2000], "shorten"),
        (["--prompt", "{ann} smiles"], "ann"),
        (["--prompt", "smiling \udcff"], "bytes that are not valid UTF-8"),
        (["--reference", "x" * 5000], "File name too long"),
        (["--reference", "ann=" + "x" * 5000], "File name too long"),
        (["--reference", "~nobody-at-all/me.jpg"], "There is no file ~nobody-at-all/me.jpg"),
        (["--reference", "-"], "- stands for standard input, which is not read"),
        (["--reference", os.devnull], "is not an ordinary file but standard input, a pipe or a device"),
        (["--weights", "x" * 5000], "File name too long"),
        (["--weights", "~nobody-at-all"], "There is no folder ~nobody-at-all"),
        (["--output", "x" * 5000 + ".png"], "File name too long"),
        (["--output", "x" * 5000 + "/out.png"], "File name too long"),
        (["--device", "tpu"], "--device"),
        (["--finder", "mine"], "--finder"),
        (["--output", "out.txt"], ".png"),
        (["--output", "no/such/folder/out.png"], "folder"),
        (["--output", "."], ".png"),
        (["--weights", "no/such/weights"], "weights"),
        (["--weights", "."], "model_index.json"),
        (["--reference", "ann=other.jpg"], "name"),
        (["--num-images", "0"], "--num-images"),
        (["--steps", "many"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--guidance-scale", "nan"], "--guidance-scale"),
        (["--attempts", "0"], "--attempts"),
        (["--layout", "0,0,1,1"], "layout='0,0,1,1' is unknown"),
        (["--face", "left"], "--face"),
        (["--style", "x"], "--style"),
    ],
)
def test_wrong_arguments_are_refused(
    run: Run, weights: Path, photo: Path, tmp_path: Path, monkeypatch: Any, more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*generate(weights, photo, tmp_path / "out.png", *more))
    assert_refused(code, out, err)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_failed_run_leaves_an_earlier_picture_alone(run: Run, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(b"earlier")
    assert run(*generate(weights, faceless(tmp_path), tmp_path / "out.png"))[0] == 2
    assert (tmp_path / "out.png").read_bytes() == b"earlier"


def test_a_process_refuses_weights_that_do_not_fit(weights: Path, tmp_path: Path) -> None:
    done = process("-m", "imagine", *map(str, foreign_weights(weights, tmp_path)))
    assert_refused(done.returncode, done.stdout, done.stderr)
    assert "trained with the vision encoder" in done.stderr and not (tmp_path / "out.png").exists()


# --- progress ---------------------------------------------------------------------------------------------------------
def test_progress_appears_on_a_terminal(
    run: Run, refining: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImaginePipeline, "finder", KnownBoxesFinder([FaceBox(8.0, 8.0, 6.0, 6.0, 1.0)]))
    with terminal(monkeypatch) as progress:
        code, out, _ = run(*generate(refining, photo, tmp_path / "a.png", "--no-credentials"))
    assert code == 0 and "Small faces redrawn: 1." in out and "denoising" not in out
    stages = ["importing the libraries", "loading the model", "encoding the reference", "denoising", "decoding"]
    stages += ["finding small faces", "redrawing small faces", "saving"]
    found = [progress[0].find(stage) for stage in stages]
    assert -1 not in found and found == sorted(found)
    # stderr is no terminal; and a signature, which is new each time, would make two files differ
    assert run(*generate(refining, photo, tmp_path / "b.png", "--no-credentials"))[2] == ""
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_json_comes_without_progress(
    run: Run, weights: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(monkeypatch) as progress:
        code, out, _ = run(*generate(weights, photo, tmp_path / "a.png", "--json"))
    assert code == 0 and json.loads(out)["seeds"] == [7] and progress == [""]


def test_the_face_crop_can_be_saved(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    code, out, _ = run(*generate(weights, photo, tmp_path / "a.png", "--save-crop", tmp_path / "crop.png", "--json"))
    assert code == 0 and json.loads(out)["crops"] == [str(tmp_path / "crop.png")]
    crop = np.asarray(Image.open(tmp_path / "crop.png"))
    assert crop.shape[0] == crop.shape[1] and (crop[0, 0] == 128).all() and crop.std() > 10  # grey outside the face
    code, out, err = run(*generate(weights, photo, tmp_path / "a.png", "--save-crop", tmp_path / "crop.txt"))
    assert_refused(code, out, err)
    run("enroll", photo, "--weights", weights, "--output", tmp_path / "me.safetensors")
    persona = tmp_path / "me.safetensors"
    code, _, err = run(*generate(weights, persona, tmp_path / "a.png", "--save-crop", tmp_path / "crop.png"))
    assert code == 2 and "a persona file holds none" in err


def test_the_shipped_weights_say_that_they_draw_no_photographs(run: Run, photo: Path, tmp_path: Path) -> None:
    drawing = default_folder() / "examples" / "person-1.png"
    for reference, is_noted in ((photo, True), (drawing, False)):
        code, out, _ = run(*generate(default_folder(), reference, tmp_path / "a.png"))
        assert code == 0 and ("portrait world" in out) is is_noted


def test_the_people_of_a_picture_are_counted(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    arguments = generate(
        weights, Path(f"a={photo}"), tmp_path / "a.png", "--reference", f"b={photo}", "--num-images", 2
    )
    arguments[arguments.index("smiling on a beach")] = "{a} hugs {b}"
    code, out, _ = run(*arguments, "--json")  # tiny weights draw noise, which shows nobody
    found = json.loads(out)
    assert code == 0 and found["people_found"] == [0, 0]
    warnings = [note for note in found["notes"] if note.startswith("Warning: picture")]
    assert [note.split(" shows ")[0] for note in warnings] == ["Warning: picture 1", "Warning: picture 2"]
    assert (
        found["people"]
        == [[{"name": name, "found": False, "similarity": None, "matched": None} for name in ("a", "b")]] * 2
    )
    assert found["attempts"] == [1, 1] and found["seeds"] == [7, 8]
    plain = json.loads(run(*generate(weights, photo, tmp_path / "b.png", "--json"))[1])
    assert not {"people_found", "people", "attempts"} & plain.keys()


class Squares:
    """Finds two faces in the pictures drawn (32 pixels), and one in every photo."""

    def find(self, image: Image.Image) -> tuple[FaceBox, ...]:
        if image.width > 32:
            return (FaceBox(60, 60, 90, 100, 1.0),)
        return FaceBox(2, 4, 12, 20, 1.0), FaceBox(18, 4, 12, 20, 1.0)


class Sides(ColourRecogniser):
    """Photos are like every face in the left half of a picture, and unlike those in the right half."""

    def embed(self, image: Image.Image, face: FaceBox) -> Any:
        return np.full(3, float(image.width == 32 and face.left > 16))


def test_attempts_layout_and_people(
    run: Run, weights: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    usual = ImaginePipeline.__call__
    recogniser = Sides()

    def called(self: ImaginePipeline, *arguments: Any, **options: Any) -> Any:
        seen.append((options["layout"], options["attempts"]))
        return usual(self, *arguments, **options)

    monkeypatch.setattr(ImaginePipeline, "__call__", called)
    monkeypatch.setattr("imagine.people.reference_encoder.default_finder", lambda folder: Squares())
    monkeypatch.setattr("imagine.people.reference_encoder._photo_recogniser", lambda: recogniser)
    monkeypatch.setattr(ImaginePipeline, "_picture_recogniser", lambda self: recogniser)
    first = ["generate", "--weights", weights, "--seed", 7, "--steps", 2, "--output", tmp_path / "a.png"]
    first += [
        "--prompt",
        "{ann} hugs the old man",
        "--reference",
        f"ann={photo}",
        "--reference",
        f"the old man={photo}",
    ]
    boxes = ["--layout", "ann=0,0,.5,1", "--layout", "the old man=.5,0,1,1"]
    code, out, err = run(*first, *boxes, "--attempts", 3, "--num-images", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert seen == [({"ann": [0, 0, 0.5, 1], "the old man": [0.5, 0, 1, 1]}, 3)]
    assert found["people"][0] == [
        {"name": "ann", "found": True, "similarity": 1.0, "matched": True},
        {"name": "the old man", "found": True, "similarity": -0.732, "matched": False},
    ]
    assert found["attempts"] == [3, 3] and len(found["seeds"]) == 2
    code, out, _ = run(*first, "--layout", "left to right")
    assert code == 0 and seen[1] == ("left to right", 1)
    assert "Picture 1: ann found, similarity 1.00, matched.\n" in out
    assert "Picture 1: the old man found, similarity -0.73, not matched.\n" in out
    for wrong, message in (
        (["ann=0,0,1"], "--layout ann=0,0,1 is not NAME=LEFT,TOP,RIGHT,BOTTOM"),
        (["ann=a,b,c,d"], "is not NAME=LEFT"),
        (["left to right", "ann=0,0,1,1"], "--layout left to right is not"),
        (["ann=0,0,.6,1", "the old man=.4,0,1,1"], "'ann' and 'the old man' overlap by 33%"),
        (["eve=0,0,1,1"], "The layout names 'eve', but the references are for 'ann' and 'the old man'"),
    ):
        code, out, err = run(*first, *(each for place in wrong for each in ("--layout", place)))
        assert_refused(code, out, err)
        assert message in err


def test_a_picture_that_was_drawn_again_has_its_own_seed_in_the_result(
    run: Run, weights: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FromTheSecond(ColourRecogniser):
        """Takes the faces of all pictures but the first one for those of the photo; a picture has two faces."""

        embedded = 0

        def embed(self, image: Image.Image, face: FaceBox) -> Any:
            if image.width > 32:
                return np.zeros(3)
            self.embedded += 1
            return np.full(3, float(self.embedded <= 2))

    recogniser = FromTheSecond()
    monkeypatch.setattr("imagine.people.reference_encoder.default_finder", lambda folder: Squares())
    monkeypatch.setattr("imagine.people.reference_encoder._photo_recogniser", lambda: recogniser)
    monkeypatch.setattr(ImaginePipeline, "_picture_recogniser", lambda self: recogniser)
    code, out, _ = run(*generate(weights, photo, tmp_path / "a.png", "--attempts", 3, "--json"))
    found = json.loads(out)
    assert code == 0 and found["attempts"] == [2] and found["people"][0][0]["matched"]
    (seed,) = found["seeds"]
    assert seed != 7 and found["notes"] == [f"Picture 1 was drawn 2 times; the seed {seed} draws it at once."]
    assert run(*generate(weights, photo, tmp_path / "b.png", "--seed", seed))[0] == 0
    first, again = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert (first == again).all()
