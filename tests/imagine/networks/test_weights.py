"""Weights that do not fit are refused, each with one sentence that names the problem."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from imagine.errors import WeightsError
from imagine.networks import weights
from imagine.networks.encoders import VisionEncoder
from imagine.networks.vision_conversion import to_transformers
from imagine.paths import PACKAGE
from imagine.pipeline.files import ADAPTERS, MODELS
from imagine.pipeline.pipeline import ImaginePipeline
from tests import tiny

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "weights"))


def a_name(tensors: Tensors) -> str:
    return sorted(name for name in tensors if name.endswith("weight"))[0]


def drop(tensors: Tensors) -> str:
    name = a_name(tensors)
    del tensors[name]
    return name


def rename(tensors: Tensors) -> str:
    name = a_name(tensors)
    tensors[name.replace("weight", "wieght")] = tensors.pop(name)
    return name.replace("weight", "wieght")


def add(tensors: Tensors) -> str:
    tensors["a.stranger"] = torch.zeros(2)
    return "a.stranger"


def reshape(tensors: Tensors) -> str:
    name = a_name(tensors)
    tensors[name] = torch.zeros(3, 3)
    return name


@pytest.mark.parametrize(
    ("part", "change"),
    [
        *(("unet", change) for change in (drop, rename, add, reshape)),
        *(("text_encoder", change) for change in (drop, rename, add, reshape)),
        *((part, drop) for part in ("vae", "text_encoder_2", "image_encoder", "text_adapter", "adapter")),
        ("adapter", rename),
    ],
)
def test_a_file_with_a_tensor_missing_renamed_added_or_misshapen_is_refused(
    folder: Path, part: str, change: Callable[[Tensors], str]
) -> None:
    file = next((folder / part).glob("*.safetensors"))
    tensors, metadata = load_file(file), metadata_of(file)
    name = change(tensors)
    save_file(tensors, file, metadata)
    with pytest.raises(WeightsError) as caught:
        ImaginePipeline.from_pretrained(folder)
    sentence = str(caught.value)
    assert name in sentence and part in sentence and "\n" not in sentence


def metadata_of(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def truncate(folder: Path) -> None:
    file = next((folder / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-64])


def lose_config(folder: Path) -> None:
    (folder / "text_encoder" / "config.json").unlink()


def lose_file(folder: Path) -> None:
    next((folder / "image_encoder").glob("*.safetensors")).unlink()


def lose_part(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def lose_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer_2")


def lose_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


def lose_index(folder: Path) -> None:
    (folder / weights.INDEX).unlink()


def break_index(folder: Path) -> None:
    (folder / weights.INDEX).write_text("{")


def foreign_index(folder: Path) -> None:
    (folder / weights.INDEX).write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


def future_index(folder: Path) -> None:
    index = json.loads((folder / weights.INDEX).read_text())
    (folder / weights.INDEX).write_text(json.dumps({**index, "format_version": "99"}))


def foreign_encoder(folder: Path) -> None:
    torch.manual_seed(99)
    VisionEncoder(tiny.CROP, 8, 24, 2, 2, embed_width=16).save_pretrained(folder / "image_encoder")


def with_index(**entries: Any) -> Callable[[Path], None]:
    """Return a damage that changes entries of model_index.json; None removes one."""

    def damage(folder: Path) -> None:
        index = {**json.loads((folder / weights.INDEX).read_text()), **entries}
        kept = {name: entry for name, entry in index.items() if entry is not None}
        (folder / weights.INDEX).write_text(json.dumps(kept))

    return damage


def with_finder_metadata(**metadata: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "finder").mkdir()
        save_file(
            {}, folder / "finder" / "finder.safetensors", {"kind": "face finder", "format_version": "1", **metadata}
        )

    return damage


def with_adapter_metadata(**metadata: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "adapter" / "adapter.safetensors"
        save_file(load_file(file), file, {**metadata_of(file), **metadata})

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "unet"),
        (lose_config, "config.json"),
        (lose_file, "safetensors"),
        (lose_part, "vae"),
        (lose_tokenizer, "tokenizer_2"),
        (lose_scheduler, "cannot be loaded"),
        (lose_index, "not a weights folder"),
        (break_index, "JSON"),
        (foreign_index, "StableDiffusionPipeline"),
        (future_index, "99"),
        (foreign_encoder, "vision encoder"),
        (with_index(vae=None), "does not mention vae"),
        (with_index(unet=["diffusers", "NoSuchClass"]), r"names \['diffusers', 'NoSuchClass'\] as its unet"),
        (with_index(unet=["diffusers"]), "as its unet"),
        (with_index(unet="diffusers"), "as its unet"),
        (with_index(vae=["diffusers", "AutoencoderOfNobody"]), "vae cannot be loaded"),
        (with_index(scheduler=["diffusers", 7]), "as its scheduler"),
        (with_index(scheduler=["diffusers", "NobodysScheduler"]), "cannot be loaded"),
        (with_index(image_encoder=["antigravity", "VisionEncoder"]), "antigravity"),
        (with_index(tokenizer=["antigravity", "CLIPTokenizer"]), "antigravity"),
        (with_index(adapter=["antigravity", "Adapter"]), "names a class for adapter"),
        (with_index(latents_mean=[0.0] * 3), "latents_mean holds 3 numbers for 4 latent channels"),
        (with_index(latents_std="wide"), "latents_std must be a list of 4 finite numbers"),
        (with_adapter_metadata(lora_rank="many"), "branches and LoRA"),
        (with_adapter_metadata(branches='[{"name": "vision", "width": "wide"}]'), "branches and LoRA"),
    ],
)
def test_a_damaged_folder_is_refused_in_a_sentence(
    folder: Path, damage: Callable[[Path], None], words: str, capfd: Any
) -> None:
    damage(folder)
    with pytest.raises(WeightsError, match=words) as caught:
        ImaginePipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # the libraries' own warnings are suppressed


@pytest.mark.parametrize(
    "metadata", [{}, {"side": "64"}, {"side": "wide", "width": "16"}, {"side": "7", "width": "16"}]
)
def test_a_finder_file_without_valid_sizes_is_refused_in_a_sentence(folder: Path, metadata: dict[str, str]) -> None:
    with_finder_metadata(**metadata)(folder)
    with pytest.raises(WeightsError, match="does not give its sizes properly") as caught:
        _ = ImaginePipeline.from_pretrained(folder).finder
    assert "\n" not in str(caught.value)


def test_a_module_that_a_folder_names_is_never_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "stranger.py").write_text("raise SystemExit('this must never run')")
    monkeypatch.syspath_prepend(folder)
    for name in weights.COMPONENTS:
        with_index(**{name: ["stranger", weights.COMPONENTS[name][1]]})(folder)
        with pytest.raises(WeightsError, match="stranger"):
            ImaginePipeline.from_pretrained(folder)
        with_index(**{name: json.loads((weights.default_folder() / weights.INDEX).read_text())[name]})(folder)


@pytest.mark.parametrize("source", ["no/such/folder/here", "/no-such-folder", "imagine/no-such-weights"])
def test_a_missing_folder_is_refused(source: str) -> None:
    with pytest.raises(WeightsError, match="There is no folder"):
        ImaginePipeline.from_pretrained(source)


def test_a_hub_repository_that_cannot_be_reached_is_refused_in_a_sentence() -> None:
    with pytest.raises(WeightsError, match="could not be fetched"):
        weights.resolve_folder("nobody-at-all/no-such-repository")


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with pytest.raises(WeightsError, match="is a file"):
        ImaginePipeline.from_pretrained(folder / weights.INDEX)


def test_half_precision_files_come_up_in_full_precision(folder: Path) -> None:
    pipe = tiny.pipeline().to(torch.bfloat16)
    pipe.save_pretrained(folder)
    loaded = ImaginePipeline.from_pretrained(folder)
    kinds = {
        parameter.dtype
        for part in loaded.components.values()
        if isinstance(part, torch.nn.Module)
        for parameter in part.parameters()
    }
    assert kinds == {torch.float32}
    weight = next(iter(loaded.unet.parameters()))
    assert torch.equal(weight, next(iter(pipe.unet.parameters())).float())


def test_the_shipped_weights_make_the_same_picture_after_saving_and_loading(tmp_path: Path) -> None:
    before = ImaginePipeline.from_pretrained()
    before.save_pretrained(tmp_path)  # in the current precision, so that loading converts no tensor
    after = ImaginePipeline.from_pretrained(tmp_path)
    example = weights.default_folder() / "examples" / "person-1.png"
    drawn = []
    for pipe in (before, after):
        pipe.set_progress_bar_config(disable=True)
        call: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt", "generator": tiny.generator(7)}
        drawn.append(pipe("a person, smiling, on a beach", reference=example, **call).images)
    assert torch.equal(*drawn)
    for name in (*MODELS, *ADAPTERS):
        one, other = getattr(before, name).state_dict(), getattr(after, name).state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
        # Whether unaligned addresses change the last bits depends on the machine, but the addresses do not.
        odd = [key for key, tensor in other.items() if tensor.data_ptr() % weights.ALIGNMENT]
        assert not odd, f"{name}: {odd}"


def test_fingerprints_tell_encoders_apart_and_match_in_half_precision() -> None:
    encoder = VisionEncoder(16, 8, 24, 2, 2)
    fingerprint = weights.fingerprint(encoder)
    assert fingerprint == weights.fingerprint(encoder) and len(fingerprint) == 16 + 1 + 16
    assert fingerprint != weights.fingerprint(VisionEncoder(16, 8, 24, 2, 2))
    for precision in (torch.float16, torch.bfloat16):
        rounded = weights.fingerprint(copy.deepcopy(encoder).to(precision))
        assert weights.same_encoder(fingerprint, rounded) and weights.same_encoder(rounded, fingerprint)
        again = weights.fingerprint(copy.deepcopy(encoder).to(precision).float())
        assert again == rounded
    with torch.no_grad():
        encoder.tower.proj += 0.1
    assert not weights.same_encoder(weights.fingerprint(encoder), fingerprint)
    assert not weights.same_encoder(fingerprint + ":pooled", fingerprint)


def test_half_precision_has_one_fingerprint_which_never_changes() -> None:
    shipped = weights.default_folder() / "image_encoder"
    encoder = weights.load_model(shipped, "imagine.networks.encoders", "VisionEncoder", torch.float32)
    with safe_open(shipped.parent / "adapter" / "adapter.safetensors", framework="pt") as file:
        assert weights.fingerprint(encoder) == file.metadata()["encoder_fingerprint"]


def test_an_encoder_is_the_same_one_in_either_layout(tmp_path: Path) -> None:
    encoder = VisionEncoder(16, 8, 24, 2, 2)
    theirs = to_transformers(encoder)
    assert weights.fingerprint(theirs) == weights.fingerprint(encoder)
    theirs.half().save_pretrained(tmp_path)
    assert weights.same_encoder(
        weights.fingerprint_of(load_file(tmp_path / "model.safetensors")), weights.fingerprint(encoder)
    )
    with torch.no_grad():
        theirs.vision_model.encoder.layers[1].self_attn.k_proj.bias += 0.1
    assert not weights.same_encoder(weights.fingerprint(theirs), weights.fingerprint(encoder))
    unlike = {"visual_projection.weight": torch.zeros(2, 2), "vision_model.embeddings.class_embedding": torch.zeros(2)}
    assert weights.fingerprint_of(unlike)  # not a vision tower, so hashed without renaming


def test_default_folder_is_the_checkouts_or_says_how_to_get_weights() -> None:
    home = PACKAGE.parent / "weights"
    if (home / weights.INDEX).exists():
        assert weights.default_folder() == home
    else:
        with pytest.raises(WeightsError, match="make weights"):
            weights.default_folder()


def test_the_shipped_weights_take_at_most_64_megabytes() -> None:
    files = [path for path in weights.default_folder().rglob("*") if path.is_file()]
    assert files and sum(path.stat().st_size for path in files) <= 64_000_000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [*MODELS, *ADAPTERS])
def test_a_number_that_is_not_finite_in_any_file_is_refused(folder: Path, part: str, value: float) -> None:
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = a_name(tensors)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata_of(file))
    with pytest.raises(WeightsError, match="not finite") as caught:
        ImaginePipeline.from_pretrained(folder)
    assert part in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
def test_a_statistic_that_is_not_finite_is_refused(folder: Path, name: str) -> None:
    with_index(**{name: [0.5, float("nan"), 1.0, 1.0]})(folder)
    with pytest.raises(WeightsError, match=f"{name} must be a list of 4 finite numbers"):
        ImaginePipeline.from_pretrained(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_one_variant_loads_without_naming_it(sharded: bool, tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    shards: dict[str, Any] = {"max_shard_size": "20KB"} if sharded else {}
    pipe.save_pretrained(tmp_path, variant="fp16", **shards)
    assert not list((tmp_path / "unet").glob("diffusion_pytorch_model.safetensors"))
    known: list[dict[str, Any]] = [{}, {"variant": "fp16"}]
    for options in known:
        loaded = ImaginePipeline.from_pretrained(tmp_path, **options)
        assert all(torch.equal(a, b) for a, b in zip(loaded.unet.parameters(), pipe.unet.parameters(), strict=True))
    with pytest.raises(WeightsError, match="no files of the variant 'bf16'; give variant='fp16'"):
        ImaginePipeline.from_pretrained(tmp_path, variant="bf16")


def test_a_variant_that_a_folder_has_not_is_refused_in_a_sentence(folder: Path) -> None:
    with pytest.raises(WeightsError, match="no files of the variant 'fp16'; leave variant out"):
        ImaginePipeline.from_pretrained(folder, variant="fp16")
    for name in ("bf16", "fp16"):
        shutil.copy(
            folder / "unet" / "diffusion_pytorch_model.safetensors",
            folder / "unet" / f"diffusion_pytorch_model.{name}.safetensors",
        )
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no files without a variant; give variant='bf16' or give variant='fp16'"):
        ImaginePipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"<!DOCTYPE html>", "web page"),
     (b"", "empty"), (b"PK\x03\x04...", "is a pickle")],
)  # fmt: skip
@pytest.mark.parametrize("part", ["unet", "text_encoder", "image_encoder", "adapter"])
def test_a_file_that_was_not_downloaded_is_called_what_it_is(
    folder: Path, part: str, content: bytes, words: str
) -> None:
    next((folder / part).glob("*.safetensors")).write_bytes(content)
    with pytest.raises(WeightsError, match=words) as caught:
        ImaginePipeline.from_pretrained(folder)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_component_that_is_only_a_pickle_is_refused_in_a_sentence(folder: Path) -> None:
    file = next((folder / "unet").glob("*.safetensors"))
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(WeightsError, match=r"as \.bin only"):
        ImaginePipeline.from_pretrained(folder)
