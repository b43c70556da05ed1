"""The import and export commands: results load in diffusers, and wrong input raises one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagine.adapter.adapter import Adapter
from imagine.cli import main
from imagine.networks.encoders import VisionEncoder
from tests import tiny, tiny_ip
from tests.commands import assert_refused


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Stable Diffusion folder."""
    import diffusers

    folder = tmp_path_factory.mktemp("base")
    parts = {**tiny_ip.components(), "image_encoder": None}
    diffusers.StableDiffusionPipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    save_file(tiny_ip.tensors("plus", tiny_ip.unet()), folder / "ip.safetensors")
    tiny_ip.encoder().half().save_pretrained(folder / "image_encoder")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    code = main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_import_then_export_is_bit_identical(base: Path, repository: Path, tmp_path: Path, capsys: Any) -> None:
    mine, out = tmp_path / "mine", tmp_path / "out"
    code, printed, err = run(capsys, "import-ip-adapter", repository, "--base", base, "--output", mine, "--json")
    assert code == 0, err
    found = json.loads(printed)
    assert (found["variant"], found["licence"], found["image_encoder"]) == ("plus", "apache-2.0", True)
    assert len(found["used"]) == 51 + 2 * 7
    adapter = Adapter.load(mine / "adapter", tiny_ip.unet())
    assert adapter.branch_specs[0].name == "vision" and adapter.metadata["imported_from"] == "ip.safetensors"
    assert str(tmp_path) not in json.dumps(adapter.metadata)
    encoder = VisionEncoder.from_pretrained(mine / "image_encoder", torch_dtype=torch.float16)
    assert encoder.config.width == tiny_ip.TOKENS
    out.mkdir()
    code, printed, err = run(capsys, "export-ip-adapter", mine, "--output", out / "ip.safetensors")
    assert code == 0 and "variant: plus" in printed and "standard format holds" not in printed, err
    before, after = load_file(repository / "ip.safetensors"), load_file(out / "ip.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    theirs, ours = (load_file(each / "image_encoder" / "model.safetensors") for each in (repository, out))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_exported_weights_load_in_diffusers(tmp_path: Path, capsys: Any) -> None:
    pipe = tiny.pipeline()
    pipe.save_pretrained(tmp_path / "weights")
    code, printed, err = run(capsys, "export-ip-adapter", tmp_path / "weights", "--output", tmp_path / "ip.safetensors")
    assert code == 0 and "LoRA is in separate files" in printed and "fits only this denoiser" in printed, err
    assert (tmp_path / "image_encoder" / "config.json").is_file()
    unet = tiny.denoiser(pooled_width=32)
    unet._load_ip_adapter_weights([tiny_ip.nested(load_file(tmp_path / "ip.safetensors"))], low_cpu_mem_usage=False)
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_an_adapter_folder_alone_needs_a_base(base: Path, repository: Path, tmp_path: Path, capsys: Any) -> None:
    taking = ("import-ip-adapter", repository / "ip.safetensors", "--base", base, "--output", tmp_path / "mine")
    assert run(capsys, *taking)[0] == 0
    alone = tmp_path / "mine" / "adapter"
    assert_refused(*run(capsys, "export-ip-adapter", alone, "--output", tmp_path / "a.safetensors"))
    giving = ("export-ip-adapter", alone, "--output", tmp_path / "a.safetensors", "--base", base, "--json")
    code, printed, err = run(capsys, *giving)
    assert code == 0 and "No image encoder is next to the file" in " ".join(json.loads(printed)["not_carried"]), err


def test_wrong_input_raises_one_sentence(base: Path, repository: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other"
    tiny_ip.encoder(tokens=26).save_pretrained(other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    capsys.readouterr()  # discards the libraries' progress bars
    taking = ("import-ip-adapter", repository, "--output", tmp_path / "mine")
    wrong: list[tuple[tuple[object, ...], str]] = [
        ((*taking, "--base", "sdxl"), "but Stable Diffusion XL has 70 layers"),
        ((*taking, "--base", "nothing"), "no base 'nothing'"),
        ((*taking, "--base", base, "--image-encoder", other), "are 26 wide"),
        (("import-ip-adapter", "owner/name", "--base", base, "--output", tmp_path / "mine"), "weight_name"),
        (("import-ip-adapter", repository, "--base", base, "--output", tmp_path / "full"), "already exists"),
        (("import-ip-adapter", repository, "--base", base, "--output", tmp_path / "no" / "mine"), "is not writable"),
        (("export-ip-adapter", repository, "--output", tmp_path / "a.safetensors"), "holds an adapter"),
        (("export-ip-adapter", repository, "--output", tmp_path / "a.bin"), "must end in"),
    ]
    for arguments, message in wrong:
        code, out, err = run(capsys, *arguments)
        assert_refused(code, out, err)
        assert message in err
    assert not (tmp_path / "mine").exists()


def test_a_mistyped_image_encoder_causes_no_hub_request(
    base: Path, repository: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("a hub request was made"))
    arguments = ["import-ip-adapter", repository, "--base", base, "--output", tmp_path / "x"]
    code, _, err = run(capsys, *arguments, "--image-encoder", "models/image_encodr")
    assert code == 2 and "There is no folder models/image_encodr" in err and err.count("\n") == 1
