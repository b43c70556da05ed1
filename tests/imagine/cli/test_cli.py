"""The command line: what it writes, what it says, and how it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data

from imagine import __version__
from imagine.cli import BATCH, main
from imagine.people.faces import KnownBoxesFinder
from imagine.people.persona import Persona
from imagine.pipeline.pipeline import ImaginePipeline
from tests import pictures, tiny
from tests.root import ROOT

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def refining(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, which draw small faces once more unless told not to."""
    folder = Path(shutil.copytree(weights, tmp_path_factory.mktemp("refining") / "weights"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "default_refine_faces": True}))
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph with one face, which the embedded finder finds."""
    path = tmp_path_factory.mktemp("photos") / "astronaut.jpg"
    Image.fromarray(data.astronaut()).crop((110, 0, 350, 240)).save(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: Any) -> tuple[int, str, str]:
        code = main([str(each) for each in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def generate(weights: Path, photo: Path, output: Path, *more: Any) -> list[Any]:
    usual = ["generate", "--weights", weights, "--prompt", "smiling on a beach", "--seed", "7", "--steps", "2"]
    return [*usual, "--reference", photo, "--output", output, *more]


# --- controls ---------------------------------------------------------------------------------------------------------
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
        assert code == 2 and "START:END, two shares of the steps such as 0:0.8" in err and err.count("\n") == 1


# --- what is written and said -----------------------------------------------------------------------------------------
def test_generate_writes_a_picture_that_its_seed_repeats(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    code, out, err = run(*generate(weights, photo, tmp_path / "a.png"))
    assert (code, err) == (0, "") and str(tmp_path / "a.png") in out and "seed 7" in out
    assert run(*generate(weights, photo, tmp_path / "b.png"))[0] == 0
    assert run(*generate(weights, photo, tmp_path / "c.png", "--seed", "8", "--guidance-scale", "1.5"))[0] == 0
    first, again, other = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png", "c.png"))
    assert first.shape == (tiny.SIZE, tiny.SIZE, 3) and (first == again).all() and (first != other).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_generate_says_how_to_draw_with_a_stock_folder(run: Run, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    code, _, err = run(*generate(tmp_path, photo, tmp_path / "a.png"))
    assert code == 2 and "holds a StableDiffusionXLPipeline" in err and "docs/backbones.md" in err


def test_generate_agrees_with_the_library(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    from imagine import ImaginePipeline

    assert run(*generate(weights, photo, tmp_path / "a.png", "--identity-scale", "0.5"))[0] == 0
    pipe = ImaginePipeline.from_pretrained(weights)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 2, "identity_scale": 0.5, "generator": tiny.generator(7)}
    wanted = pipe("smiling on a beach", reference=photo, **options).images[0]
    assert (np.asarray(Image.open(tmp_path / "a.png")) == np.asarray(wanted)).all()


def test_generate_as_json_with_several_pictures(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    code, out, err = run(*generate(weights, photo, tmp_path / "x.jpg", "--num-images", "2", "--json"))
    said = json.loads(out)
    assert (code, err) == (0, "")
    assert said["images"] == [str(tmp_path / "x-1.jpg"), str(tmp_path / "x-2.jpg")] and said["seeds"] == [7, 8]
    assert all(Image.open(path).format == "JPEG" for path in said["images"])
    assert said["faces"][0]["reference"] == str(photo) and said["faces"][0]["box"]["width"] > 20


def test_many_pictures_are_drawn_a_batch_at_a_time_each_from_its_own_seed(
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
    said = json.loads(out)
    assert said["seeds"] == list(range(7, 7 + BATCH + 2)) and len(said["faces"]) == 1
    numbers = [int(note.split(":")[0].removeprefix("Picture ")) for note in said["notes"]]  # of pictures without a face
    assert numbers == sorted(set(numbers)) and BATCH < numbers[-1] <= BATCH + 2
    assert run(*generate(refining, photo, tmp_path / "one.png", "--seed", 7 + BATCH + 1))[0] == 0
    last, one = (np.asarray(Image.open(each)).astype(int) for each in (said["images"][-1], tmp_path / "one.png"))
    assert np.abs(last - one).max() <= 1  # a batch may round otherwise


def test_notes_are_told_whoever_asked_for_the_second_pass(
    run: Run, weights: Path, refining: Path, photo: Path, tmp_path: Path
) -> None:
    """These weights draw no face that could be found, which a user must hear where the weights refine by default."""
    note = "Picture 1: no face was found for one person"
    for folder, more, told in ((refining, [], True), (weights, ["--refine-faces"], True), (weights, [], False)):
        code, out, _ = run(*generate(folder, photo, tmp_path / "a.png", *more))
        assert code == 0 and (note in out) is told


def test_the_finder_is_insightface_where_that_is_asked_for(
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


def test_the_device_is_a_gpu_where_there_is_one(
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
        assert "torch sees no device cuda here: choose cpu" in err
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


def test_inspect_says_what_things_are(run: Run, weights: Path) -> None:
    code, out, _ = run("inspect", weights / "adapter", "--json")
    assert code == 0 and json.loads(out)["kind"] == "adapter"
    code, out, _ = run("inspect", weights)
    assert code == 0 and "kind: weights" in out and "UNet2DConditionModel" in out


def test_doctor_reports_on_the_installation_and_on_a_photo(run: Run, weights: Path, photo: Path) -> None:
    code, out, _ = run("doctor", "--weights", weights, "--json")
    assert code == 0 and "unet" in json.loads(out)["components"]
    code, out, _ = run("doctor", photo, "--weights", weights, "--json")
    assert code == 0 and len(json.loads(out)["faces"]) == 1
    code, out, _ = run("doctor", photo, "--weights", weights)
    assert code == 0 and "sharpness" in out


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
def test_odd_pictures_serve_as_well_as_plain_ones(
    run: Run, weights: Path, photo: Path, tmp_path: Path, make: Callable[[Image.Image, Path], Path]
) -> None:
    odd = make(Image.open(photo).convert("RGB"), tmp_path)
    code, out, err = run("doctor", odd, "--weights", weights, "--json")
    assert (code, err) == (0, "") and len(json.loads(out)["faces"]) == 1
    code, out, err = run(*generate(weights, odd, tmp_path / "out.png", "--json"))
    assert (code, err) == (0, "") and json.loads(out)["faces"][0]["found"] == 1
    assert Image.open(tmp_path / "out.png").size == (tiny.SIZE, tiny.SIZE)


def test_of_several_faces_it_is_said_which_was_used(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    one = Image.open(photo)
    both = Image.new("RGB", (2 * one.width, one.height))
    both.paste(one, (0, 0))
    both.paste(one, (one.width, 0))
    both.save(tmp_path / "both.png")
    code, out, err = run(*generate(weights, tmp_path / "both.png", tmp_path / "a.png"))
    assert (code, err) == (0, "") and "The photo holds 2 faces and the largest was used (face=0;" in out
    code, out, _ = run(*generate(weights, tmp_path / "both.png", tmp_path / "b.png", "--face", "1", "--json"))
    assert code == 0 and json.loads(out)["faces"][0]["index"] == 1


# --- names that are no text -------------------------------------------------------------------------------------------
def test_names_that_are_no_text_are_printed_as_escapes(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(bytes(tmp_path) + b"/m\xff.jpg")
    try:
        Path(odd).write_bytes(photo.read_bytes())
    except OSError:
        pytest.skip("this system's names are all text")
    code, out, err = run(*generate(weights, Path(odd), Path(odd).with_suffix(".png"), "--json"))
    assert (code, err) == (0, "") and json.loads(out)["faces"][0]["reference"] == odd
    code, out, err = run(*generate(weights, Path(odd), Path(odd).with_suffix(".png")))
    assert (code, err) == (0, "") and "m\\udcff.png (seed 7" in out


def test_a_terminal_that_knows_few_letters_shows_the_others_as_escapes(tmp_path: Path) -> None:
    (tmp_path / "é").mkdir()
    tiny.pipeline().enroll(tiny.photo(1)).save(tmp_path / "é" / "me.safetensors")
    for more, shown in (([], "\\xe9"), (["--json"], "\\u00e9")):
        done = process("-m", "imagine", "inspect", str(tmp_path / "é"), *more, PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, "") and shown in done.stdout
    assert json.loads(done.stdout)["path"] == str(tmp_path / "é")


def test_a_result_that_cannot_be_printed_is_told_in_a_sentence(weights: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    command = f"{sys.executable} -m imagine inspect {weights} > /dev/full"
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1 and "cannot be printed (No space left" in ran.stderr


# --- what is refused --------------------------------------------------------------------------------------------------
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
def test_photos_that_cannot_be_used(run: Run, weights: Path, tmp_path: Path, make: Callable[[Path], Path]) -> None:
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


@pytest.mark.parametrize(("make", "says"), WRONG_FILES)
def test_files_that_do_not_fit(
    run: Run, weights: Path, tmp_path: Path, make: Callable[[Path, Path], list[Any]], says: str
) -> None:
    code, out, err = run(*make(weights, tmp_path))
    assert_refused(code, out, err)
    assert says in err and not (tmp_path / "out.png").exists()


def test_enroll_looks_for_the_photos_before_it_loads_anything(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")  # loading this would be the next thing to fail
    code, out, err = run("enroll", "nobody.jpg", "--weights", tmp_path, "--output", tmp_path / "me.safetensors")
    assert_refused(code, out, err)
    assert "There is no file nobody.jpg" in err


def test_evaluate_looks_at_its_output_before_it_loads_anything(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    for output in (tmp_path / "model_index.json", tmp_path / "model_index.json" / "below"):
        code, out, err = run("evaluate", "--weights", tmp_path, "--output", output)
        assert_refused(code, out, err)
        assert "choose another" in err and "JSON" not in err


def test_a_face_that_is_not_there(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    code, out, err = run(*generate(weights, photo, tmp_path / "out.png", "--face", "3"))
    assert_refused(code, out, err)
    assert "face=3" in err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt", "   "], "empty"),
        (["--prompt", "word " * 2000], "shorten"),
        (["--prompt", "{ann} smiles"], "ann"),
        (["--prompt", "smiling \udcff"], "bytes that are not valid UTF-8"),
        (["--reference", "x" * 5000], "File name too long"),
        (["--reference", "ann=" + "x" * 5000], "File name too long"),
        (["--reference", "~nobody-at-all/me.jpg"], "There is no file ~nobody-at-all/me.jpg"),
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
        (["--face", "left"], "--face"),
        (["--style", "x"], "--style"),
    ],
)
def test_arguments_that_do_not_fit(
    run: Run, weights: Path, photo: Path, tmp_path: Path, monkeypatch: Any, more: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*generate(weights, photo, tmp_path / "out.png", *more))
    assert_refused(code, out, err)
    assert says in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["generate"],
        ["enroll", "nobody.jpg", "--output", "me.png"],
        ["inspect", "nothing.safetensors"],
        ["inspect", "x" * 5000],
        ["inspect", "~nobody-at-all"],
        ["enroll", "x" * 5000, "--output", "me.safetensors"],
        ["evaluate", "--output", "x" * 5000],
        ["import-ip-adapter", "x.safetensors", "--base", "sdxl", "--output", "x" * 5000],
        ["export-ip-adapter", "~nobody-at-all", "--output", "x.safetensors"],
        ["doctor", "nobody.jpg"],
        ["doctor", "--weights", "nowhere"],
        ["evaluate", "--weights", "nowhere", "--output", "report"],
        ["evaluate", "--output", "report", "--identities", "none"],
    ],
)
def test_commands_that_cannot_be_done(run: Run, tmp_path: Path, monkeypatch: Any, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(*run(*arguments))
    assert not list(tmp_path.iterdir())


def assert_refused(code: int, out: str, err: str) -> None:
    """Exit code 2 and exactly one line, a sentence, on stderr."""
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.strip().endswith(".") and "Traceback" not in err


def test_a_failed_run_leaves_an_earlier_picture_alone(run: Run, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(b"earlier")
    assert run(*generate(weights, faceless(tmp_path), tmp_path / "out.png"))[0] == 2
    assert (tmp_path / "out.png").read_bytes() == b"earlier"


def test_our_own_faults_exit_with_one_and_without_a_traceback(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("imagine.inspection.inspect", lambda path: [][1])
    code, out, err = run("inspect", tmp_path)
    assert (code, out) == (1, "") and "IndexError" in err and "Traceback" not in err
    monkeypatch.setenv("IMAGINE_DEBUG", "1")
    with pytest.raises(IndexError):
        run("inspect", tmp_path)


# --- as a process -----------------------------------------------------------------------------------------------------
def process(*arguments: str, **setting: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **setting}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def test_help_and_version_come_without_heavy_imports() -> None:
    check = (
        "import sys; from imagine.cli import main; code = main(['--help']); print(sorted(sys.modules)); sys.exit(code)"
    )
    done = process("-c", check)
    assert done.returncode == 0 and "generate" in done.stdout
    modules = done.stdout.splitlines()[-1]
    assert not any(f"'{name}'" in modules for name in ("torch", "diffusers", "transformers", "PIL", "numpy"))


def test_the_module_is_the_command() -> None:
    done = process("-m", "imagine", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"imagine {__version__}")
    done = process("-m", "imagine", "generate", "--reference", "x.jpg", "--prompt", "smiling", "--output", "x.png")
    assert_refused(done.returncode, done.stdout, done.stderr)


def test_the_lean_process_refuses_weights_that_do_not_fit(weights: Path, tmp_path: Path) -> None:
    done = process("-m", "imagine", *map(str, foreign_weights(weights, tmp_path)))
    assert_refused(done.returncode, done.stdout, done.stderr)
    assert "trained with the vision encoder" in done.stderr and not (tmp_path / "out.png").exists()


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m imagine inspect {tmp_path / 'weights'} | true; exit ${{PIPESTATUS[0]}}"
    tiny.pipeline().save_pretrained(tmp_path / "weights")
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
