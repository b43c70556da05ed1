"""Downloads from a hub on this machine: what is taken, what is told, and what is said without a hub."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from imagine.bases.hub import fetch_files, fetch_pipeline, in_gigabytes, pipeline_files
from imagine.bases.opening import download
from imagine.bases.sources import read_source
from imagine.errors import ConfigError, WeightsError
from tests.tiny_bases import COMMIT, files_of, serve

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
INDEX = {
    "_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "feature_extractor": [None, None], "force_zeros_for_empty_prompt": True,
}  # fmt: skip
FILES = {
    "model_index.json": json.dumps(INDEX), "README.md": "x", "sd_xl_base_1.0.safetensors": "all in one",
    "unet/config.json": "{}", "unet/diffusion_pytorch_model.safetensors": "full precision",
    "unet/diffusion_pytorch_model.fp16.safetensors": "half", "unet/diffusion_pytorch_model.bin": "pickle",
    "unet/model.onnx": "other format", "vae/config.json": "{}", "vae/diffusion_pytorch_model.safetensors": "only one",
    "vae/diffusion_pytorch_model-00001-of-00002.bin": "part", "tokenizer/merges.txt": "a b",
    "tokenizer/vocab.json": "{}", "vae_1_0/config.json": "{}",
    "models/x.safetensors": "adapter", "models/image_encoder/config.json": "{}",
}  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        file = tmp_path / "repository" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return tmp_path / "repository"


@pytest.fixture
def api(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the client of a hub with one repository, and a cache of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve({SDXL: repository}) as address:
        yield HfApi(endpoint=address)


def test_a_pipeline_needs_one_format_and_one_precision_of_each_component() -> None:
    common = {"model_index.json", "unet/config.json", "vae/config.json", "tokenizer/merges.txt", "tokenizer/vocab.json"}
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert set(pipeline_files(FILES, INDEX, True)) == {*common, vae, "unet/diffusion_pytorch_model.fp16.safetensors"}
    assert set(pipeline_files(FILES, INDEX, False)) == {*common, vae, "unet/diffusion_pytorch_model.safetensors"}
    pickles = [name for name in FILES if not name.endswith(".safetensors")]
    assert "unet/diffusion_pytorch_model.bin" in pipeline_files(pickles, INDEX, True)


def test_sizes_and_licences_are_told_before_a_download_and_nothing_is_fetched_twice(api: Any, tmp_path: Path) -> None:
    told: list[str] = []
    found = download("sdxl", half=True, tell=told.append, api=api)
    assert "CreativeML Open RAIL++-M" in told[0] and told[1].endswith(f"of {SDXL} (6 files).")
    size = sum(len(FILES[name]) for name in pipeline_files(FILES, INDEX, True))
    # The index was read first, to know the rest.
    assert found["base"].downloaded == size - len(FILES["model_index.json"])
    assert set(files_of(found["base"].folder)) == set(pipeline_files(FILES, INDEX, True))
    again = download("sdxl", tell=told.append, api=api)
    assert again["base"].downloaded == 0 and again["base"].folder == found["base"].folder
    assert "restricted" not in told[-1] and "CreativeML" in told[-1]
    into = tmp_path / "sdxl"
    assert fetch_pipeline(read_source(SDXL), True, into=into, api=api).folder == into
    assert (into / "unet" / "diffusion_pytorch_model.fp16.safetensors").read_text() == "half"


def test_single_files_and_revisions(api: Any) -> None:
    source = read_source(f"{SDXL}@v1:models/x.safetensors")
    found = fetch_files(source, [source.inside], "ip-adapter", api=api)
    assert found.folder.name == COMMIT and (found.folder / source.inside).read_text() == "adapter"
    with pytest.raises(WeightsError, match=r"has no models/y.safetensors: check the name after the colon"):
        fetch_files(source, ["models/y.safetensors"], "ip-adapter", api=api)
    with pytest.raises(WeightsError, match=f"no public repository {SDXL} with the revision v9"):
        fetch_files(read_source(f"{SDXL}@v9:models/x.safetensors"), ["models/x.safetensors"], "ip-adapter", api=api)
    with pytest.raises(WeightsError, match="no public repository someone/nothing: check the name"):
        fetch_pipeline(read_source("someone/nothing"), True, api=api)


def test_a_repository_without_a_pipeline_is_refused(api: Any, repository: Path) -> None:
    (repository / "model_index.json").unlink()
    with pytest.raises(WeightsError, match=r"has no model_index.json, so it is no pipeline of diffusers"):
        fetch_pipeline(read_source(SDXL), True, api=api)


def test_without_a_hub_the_cache_serves_or_one_sentence_says_which_folder_to_give(
    api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = fetch_pipeline(read_source(SDXL), True, api=api).folder
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_pipeline(read_source(SDXL), True).folder == fetched
    place = read_source(f"{SDXL}:vae/config.json")  # a file that came with the pipeline
    assert (fetch_files(place, [place.inside], "ip-adapter").folder / place.inside).is_file()
    with pytest.raises(WeightsError, match="the hub cannot be reached"):
        fetch_files(place, ["models/x.safetensors"], "ip-adapter")
    shutil.rmtree(fetched / "vae")
    with pytest.raises(WeightsError, match="the hub cannot be reached"):
        fetch_pipeline(read_source(SDXL), True)
    other = read_source("someone/base")
    with pytest.raises(WeightsError) as caught:
        fetch_pipeline(other, True)
    assert str(caught.value) == (
        "someone/base is not on this machine, and the hub cannot be reached: run `imagine download someone/base "
        "--output base` where there is a network, and give that folder with --base base."
    )
    with pytest.raises(WeightsError, match="give that folder with --ip-adapter base"):
        fetch_files(other, ["x"], "ip-adapter")


def test_a_folder_needs_no_download(tmp_path: Path) -> None:
    assert fetch_pipeline(read_source(tmp_path), True).folder == tmp_path
    with pytest.raises(ConfigError, match="is on the disk already"):
        download(tmp_path)
    assert in_gigabytes(6_938_000_000) == "6.9 GB" and in_gigabytes(7_000_000) == "7.0 MB"
