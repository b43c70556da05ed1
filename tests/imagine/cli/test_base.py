"""`imagine generate --base`, `imagine download` and `imagine licences`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagine.cli.base import is_online
from tests import tiny_bases, tiny_faces, tiny_ip
from tests.commands import Run


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Return a base and an IP-Adapter for it, by family."""
    folder, found = tmp_path_factory.mktemp("public"), {}
    for family, name in (("sd15", "sd15"), ("sdxl", "sdxl_vit-h")):
        file = folder / "models" / f"ip-adapter-plus-face_{name}.safetensors"
        xl = family == "sdxl"
        found[family] = tiny_bases.save_base(folder / family, xl), tiny_bases.save_ip_adapter(file, xl=xl)
    return found


@pytest.fixture(scope="module")
def base(public: dict[str, tuple[Path, Path]]) -> Path:
    return public["sd15"][0]


@pytest.fixture(scope="module")
def adapter(public: dict[str, tuple[Path, Path]]) -> Path:
    return public["sd15"][1]


def words(base: Path, adapter: Path, photo: "Path | str", output: Path, *more: Any) -> list[Any]:
    return [
        "generate", "--base", base, "--ip-adapter", adapter, "--reference", photo, "--prompt", "a person on a beach",
        "--output", output, "--seed", "7", "--steps", "2", "--width", "16", "--height", "16", "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_person_is_drawn_with_a_public_base(
    run: Run, public: dict[str, tuple[Path, Path]], family: str, photo: Path, tmp_path: Path
) -> None:
    base, adapter = public[family]
    code, out, err = run(*words(base, adapter, photo, tmp_path / "a.png", "--json", "--save-crop", tmp_path / "c.png"))
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["base"] == str(base) and found["faces"][0]["found"] == 1
    guidance = {"sd15": 7.5, "sdxl": 5.0}[family]
    assert found["settings"] == {"guidance_scale": guidance, "num_inference_steps": 2}
    assert Image.open(tmp_path / "a.png").size == (16, 16) and Image.open(tmp_path / "c.png").size == (16, 16)
    drawn = [np.asarray(Image.open(tmp_path / "a.png"))]
    if family == "sdxl":  # what each argument does is the same
        return
    for more in (
        ["--preset", "likeness"], ["--negative-prompt", "blue"], ["--identity-scale", "0"], ["--guidance-scale", "2"],
        ["--identity-window", "0:0.5"],
    ):  # fmt: skip
        assert run(*words(base, adapter, photo, tmp_path / "b.png", *more))[0] == 0
        drawn.append(np.asarray(Image.open(tmp_path / "b.png")))
    assert all((one != other).any() for number, one in enumerate(drawn) for other in drawn[:number])
    code, out, _ = run(*words(base, adapter, photo, tmp_path / "n.png", "--num-images", "2"))
    assert code == 0 and (tmp_path / "n-2.png").is_file()
    assert (np.asarray(Image.open(tmp_path / "n-1.png")) == drawn[0]).all()


def test_several_people_are_placed(run: Run, base: Path, adapter: Path, photo: Path, tmp_path: Path) -> None:
    arguments = words(base, adapter, f"ann={photo}", tmp_path / "a.png", "--reference", f"bob={photo}")
    arguments[arguments.index("a person on a beach")] = "{ann} hugs {bob}"
    code, out, err = run(*arguments)
    assert code == 0 and "placed from left to right" in out, err


def test_wrong_arguments_are_one_sentence(
    run: Run, public: dict[str, tuple[Path, Path]], base: Path, adapter: Path, photo: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a.png"
    other = public["sdxl"][1]
    plain = ["generate", "--reference", photo, "--prompt", "x", "--output", output]
    for arguments, message in (
        (words(base, adapter, photo, output, "--guidance-balance"), "--guidance-balance belongs to imagine's own"),
        (words(base, adapter, photo, output, "--weights", base), "--weights belongs to imagine's own weights"),
        ([*plain, "--negative-prompt", "y"], "--negative-prompt needs --base"),
        ([*plain, "--base", base, "--image-encoder", base], "--image-encoder belongs to --ip-adapter"),
        ([*plain, "--base", base, "--preset", "likeness"], "--preset needs a public IP-Adapter"),
        ([*plain, "--base", base], "shows nobody without --ip-adapter or --adapter"),
        ([*plain, "--base", "sdxxl"], "There is no base sdxxl"),
        ([*plain, "--base", "sdxl", "--ip-adapter", adapter], "imagine download sdxl --output stable-diffusion-xl"),
        (words(base, other, photo, output), "plus-face-sdxl is made for sdxl"),
    ):  # fmt: skip
        code, out, err = run(*arguments)
        assert code == 2 and message in err and err.count("\n") == 1 and out == "", err
    assert not output.exists()


def test_a_face_recogniser_that_is_missing_is_one_sentence(
    run: Run, base: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(tiny_faces.instant_id(tiny_ip.unet()), tmp_path / "x.safetensors")
    code, _, err = run(*words(base, tmp_path / "x.safetensors", photo, tmp_path / "a.png"))
    assert code == 2 and "no InsightFace model pack buffalo_l" in err and err.count("\n") == 1


def test_only_names_of_the_hub_need_a_network(base: Path, adapter: Path) -> None:
    from imagine.cli import _parser

    def online(*more: Any) -> bool:
        given = ["generate", "--reference", "x", "--prompt", "x", "--output", "x.png", *map(str, more)]
        return is_online(_parser().parse_args(given))

    assert not online() and not online("--base", base) and not online("--base", base, "--ip-adapter", adapter)
    assert online("--base", "sdxl") and online("--base", base, "--ip-adapter", "plus-face-sd15")
    assert online("--base", base, "--lora", "someone/lora") and not online("--base", "nothing/at/all")


def test_licences_are_listed(run: Run) -> None:
    code, out, _ = run("licences")
    assert code == 0 and "CreativeML Open RAIL++-M" in out and "no commercial use" in out and "no legal advice" in out
    found = json.loads(run("licences", "--json")[1])["licences"]
    assert {"name", "licence", "commercial", "source"} <= found[0].keys()


def test_a_download_without_a_network_is_one_sentence(run: Run, tmp_path: Path) -> None:
    code, _, err = run("download", "sdxl")
    assert code == 2 and err.count("\n") == 1 and "the hub cannot be reached" in err
    code, _, err = run("download", tmp_path)
    assert code == 2 and "is on the disk already" in err
