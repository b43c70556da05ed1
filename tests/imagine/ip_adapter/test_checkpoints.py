"""Files in odd forms: training checkpoints, wrapped names, wrong endings and files that are no weights."""

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import save as accelerate_save
from safetensors.torch import save_file
from torch import Tensor, nn

from imagine.errors import WeightsError
from imagine.inspection import inspect
from imagine.ip_adapter.export import export_adapter
from imagine.ip_adapter.folders import stored_precision
from imagine.ip_adapter.layout import standard_names
from imagine.ip_adapter.reading import find_weights_file, import_adapter, load_encoder, read_ip_adapter
from tests import tiny_ip

Flat = dict[str, Tensor]


@pytest.fixture(scope="module", params=[False, True], ids=["sd15", "sdxl"])
def base(request: pytest.FixtureRequest) -> Any:
    return tiny_ip.unet(bool(request.param))


@pytest.fixture(scope="module")
def file(base: Any) -> Flat:
    return tiny_ip.tensors("plus", base)


class Processor(nn.Module):
    """The processor of one layer in IP-Adapter's own trainer: a module, with weights in cross-attention layers."""

    def __init__(self, weights: Flat) -> None:
        super().__init__()
        for name, weight in weights.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight)
            self.add_module(name, layer)

    def forward(self) -> None: ...


class Trainer(nn.Module):
    """The module whose state IP-Adapter's tutorial_train.py saves: the denoiser, the projection and the branches."""

    def __init__(self, base: Any, file: Flat) -> None:
        super().__init__()
        self.unet = tiny_ip.unet(base.config.addition_embed_type == "text_time")
        processors = {
            name: Processor({each: file[f"ip_adapter.{number}.{each}.weight"] for each in ("to_k_ip", "to_v_ip")}
                            if number % 2 else {})
            for number, name in enumerate(self.unet.attn_processors)
        }  # fmt: skip
        self.unet.set_attn_processor(processors)
        self.image_proj_model = nn.Module()
        for name, tensor in file.items():
            if name.startswith("image_proj."):
                self._add(name.removeprefix("image_proj."), tensor)
        self.adapter_modules = nn.ModuleList(self.unet.attn_processors.values())

    def _add(self, path: str, tensor: Tensor) -> None:
        *parents, last = path.split(".")
        place = self.image_proj_model
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.register_parameter(last, nn.Parameter(tensor))


def assert_equal_to_standard(found: Any, file: Flat) -> None:
    assert found.tensors.keys() == file.keys()
    assert all(torch.equal(found.tensors[name], each) for name, each in file.items())


def as_bin(state: Flat, folder: Path) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def as_safetensors(state: Flat, folder: Path) -> Path:
    """Save as accelerate does, which stores tensors with two names once, under the name in the denoiser."""
    accelerate_save(OrderedDict(state), folder / "model.safetensors", safe_serialization=True)
    return folder / "model.safetensors"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("write", [as_bin, as_safetensors])
def test_a_checkpoint_of_ip_adapters_own_trainer_is_converted(
    write: Callable[[Flat, Path], Path], prefix: str, base: Any, file: Flat, tmp_path: Path
) -> None:
    state = {prefix + name: each.detach() for name, each in Trainer(base, file).state_dict().items()}
    if write is as_safetensors:
        assert any("adapter_modules" in name for name in state)
    path = write(state, tmp_path)
    found = read_ip_adapter(path)
    assert_equal_to_standard(found, file)
    assert "own trainer were converted" in found.notes[-1] and len(found.notes) == 1 + bool(prefix)
    _, report = import_adapter(found, base)
    assert report.notes == found.notes and report.parameters == sum(each.numel() for each in file.values())
    described = inspect(path)
    assert (described["kind"], described["variant"], described["notes"]) == ("IP-Adapter", "plus", list(found.notes))


def test_the_safetensors_file_of_the_trainer_has_its_branches_in_the_denoiser_only(
    base: Any, file: Flat, tmp_path: Path
) -> None:
    path = as_safetensors({name: each.detach() for name, each in Trainer(base, file).state_dict().items()}, tmp_path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        names = list(opened.keys())
    assert not any(name.startswith("adapter_modules.") for name in names)  # as this file tests the harder form


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda file: {f"_orig_mod.{name}": each for name, each in file.items()}, "prefix _orig_mod."),
        (lambda file: {f"module.{name}": each for name, each in file.items()}, "prefix module."),
        (lambda file: {name.replace("image_proj.", "image_proj._orig_mod."): e for name, e in file.items()}, "_orig_"),
        (lambda file: {"state_dict": file, "step": 3}, "taken from 'state_dict', and step left out"),
        (lambda file: {"module": tiny_ip.nested(file), "epoch": 1, "args": None}, "taken from 'module'"),
    ],
)  # fmt: skip
def test_wrapped_names_are_read_and_said(wrap: Callable[[Flat], Any], words: str, file: Flat, tmp_path: Path) -> None:
    torch.save(wrap(file), tmp_path / "ip.bin")
    for found in (read_ip_adapter(wrap(file)), read_ip_adapter(tmp_path / "ip.bin")):
        assert_equal_to_standard(found, file)
        assert words in found.notes[0]
    assert read_ip_adapter(file).notes == ()


def test_two_tensors_of_one_name_are_not_guessed(file: Flat) -> None:
    doubled = {**file, **{f"module.{name}": each + 1 for name, each in file.items()}}
    assert standard_names(doubled) == ({name: name for name in doubled}, [])
    with pytest.raises(WeightsError, match="besides image_proj"):
        read_ip_adapter(doubled)


def test_a_file_is_read_by_its_content_not_by_its_ending(file: Flat, tmp_path: Path) -> None:
    torch.save(tiny_ip.nested(file), tmp_path / "pickle.safetensors")
    found = read_ip_adapter(tmp_path / "pickle.safetensors")
    assert_equal_to_standard(found, file)
    assert "pickle of torch despite its name" in found.notes[0]
    assert inspect(tmp_path / "pickle.safetensors")["kind"] == "IP-Adapter"
    save_file(file, tmp_path / "safe.bin")
    assert_equal_to_standard(read_ip_adapter(tmp_path / "safe.bin"), file)
    assert inspect(tmp_path / "safe.bin")["kind"] == "IP-Adapter"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("form", ["state dict", "safetensors", "bin"])
def test_a_number_that_is_not_finite_is_refused_and_named(form: str, value: float, file: Flat, tmp_path: Path) -> None:
    bad = {name: each.clone() for name, each in file.items()}
    bad["image_proj.latents"].view(-1)[3] = value
    source: Any = bad
    if form == "safetensors":
        save_file(bad, source := tmp_path / "ip.safetensors")
    elif form == "bin":
        torch.save(bad, source := tmp_path / "ip.bin")
    with pytest.raises(WeightsError, match=r"not finite, in image_proj\.latents"):
        read_ip_adapter(source)


@pytest.mark.parametrize("read", [inspect, find_weights_file])
def test_standard_input_and_pipes_are_called_so(read: Callable[[Any], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="pipe or a device, which is not read: save the file"):
        read(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="- stands for standard input"):
        read("-")


# --- encoders as .bin -------------------------------------------------------------------------------------------------
@pytest.fixture
def bin_encoder(tmp_path: Path) -> Path:
    folder = tmp_path / "image_encoder"
    tiny_ip.encoder().half().save_pretrained(folder)
    torch.save(tiny_ip.encoder().half().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_an_encoder_as_bin_only_is_read_without_running_code(bin_encoder: Path) -> None:
    assert stored_precision(bin_encoder) == torch.float16
    loaded = load_encoder(bin_encoder.parent, bin_encoder.name, torch.float32, {})
    wanted = tiny_ip.encoder().half().float().state_dict()
    assert all(torch.equal(each, wanted[name]) for name, each in loaded.state_dict().items())


class Code:
    """An object whose pickle writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_an_encoders_pickle_never_runs(bin_encoder: Path, tmp_path: Path) -> None:
    torch.save({"x": Code(tmp_path / "ran")}, bin_encoder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_encoder(bin_encoder.parent, bin_encoder.name, torch.float32, {})
    assert not (tmp_path / "ran").exists()


# --- export whole or not at all ---------------------------------------------------------------------------------------
def test_an_export_that_fails_at_the_encoder_leaves_nothing(
    base: Any, file: Flat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    encoder = tiny_ip.encoder()
    monkeypatch.setattr(type(encoder), "save_pretrained", full_disk)
    adapter, _ = import_adapter(read_ip_adapter(file), base)
    (tmp_path / "other.safetensors").write_bytes(b"mine")
    with pytest.raises(OSError, match="No space"):
        export_adapter(adapter, base, tmp_path / "ip.safetensors", encoder)
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]
