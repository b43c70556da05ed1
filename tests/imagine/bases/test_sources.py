"""Names of bases, adapters and files, and the table of licences."""

from pathlib import Path

import pytest
import yaml

from imagine.bases.public_adapters import PRESETS, PUBLIC_ADAPTERS, preset_of, public_adapter
from imagine.bases.sources import read_base_source, read_source
from imagine.errors import ConfigError
from imagine.licences import USES, adapter_card, base_names, licence_of, licence_sentence, licences


def test_a_path_wins_and_a_hub_id_may_have_a_revision_and_a_place(tmp_path: Path) -> None:
    source = read_source(tmp_path)
    assert source.path == tmp_path and not source.is_hub
    assert read_source(f"{tmp_path}:models/x.bin").inside == "models/x.bin"
    source = read_source("owner/name@v1:models/x.safetensors")
    assert (source.repository, source.revision, source.inside) == ("owner/name", "v1", "models/x.safetensors")
    assert read_source("owner/name", "v2").revision == "v2" and read_source("owner/name@v2", "v2").revision == "v2"


def test_a_short_name_is_its_repository() -> None:
    assert read_base_source("sdxl").repository == "stabilityai/stable-diffusion-xl-base-1.0"
    assert read_base_source("sdxl@abc").revision == "abc" and read_base_source("sdxl", "abc").revision == "abc"
    assert read_base_source("sd15").given == "sd15"


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("sdxxl", None, "There is no base sdxxl: give a folder, a hub id such as owner/name, or one of sdxl, sd15"),
        ("a/b/c", None, "There is no base a/b/c"),
        ("owner/name@v1", "v2", "names the revision v1, and --revision another one"),
        (".", "v1", "--revision belongs to hub ids"),
    ],
)
def test_other_names_raise_one_sentence(name: str, revision: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_base_source(name, revision)


def test_every_line_of_the_table_says_where_it_was_read() -> None:
    found = licences()
    assert {each.kind for each in found} == {"base", "adapter", "encoder", "recogniser"}
    assert len({each.name for each in found}) == len(found)
    assert all(each.source and each.commercial in USES for each in found)
    hubs = [name for each in found for name in each.hub]
    assert len(set(hubs)) == len(hubs)
    for name in ("sdxl", "h94/IP-Adapter-FaceID", "InstantX/InstantID"):
        assert licence_of(name) is not None
    assert "no commercial use" in licence_sentence("h94/IP-Adapter-FaceID")
    assert "not confirmed, read the licence" in licence_sentence("flux1-dev")
    assert "read its model card" in licence_sentence("someone/else") and "portrait" not in base_names()


def test_a_card_names_the_licences_of_the_adapter_and_of_its_base() -> None:
    facts = {"base_name": "stable-diffusion-xl-base-1.0", "licence": "Apache-2.0", "encoder": "ViT", "tokens": "16"}
    front, text = adapter_card(facts).split("---\n")[1:]
    assert yaml.safe_load(front)["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert "Its licence is Apache-2.0." in text and "CreativeML Open RAIL++-M" in text and "- tokens: 16" in text
    unknown = adapter_card({})
    assert "Its licence is not stated" in unknown and "license: other" in unknown and "read its model card" in unknown


def test_every_public_adapter_has_a_licence_an_encoder_and_two_presets() -> None:
    for each in PUBLIC_ADAPTERS:
        assert licence_of(each.repository) is not None and set(each.presets) == set(PRESETS)
        balanced, likeness = (each.presets[name] for name in PRESETS)
        assert 0 < balanced.scale < likeness.scale <= 1 and balanced.steps == 30
        assert public_adapter(each.name) is each
        assert public_adapter(f"{each.repository}:{each.file}") is each
        assert (each.encoder is None) == (
            each.file.endswith("faceid_sd15.bin") or ("plus" not in each.file and ".bin" in each.file)
        )
    assert public_adapter("downloads/ip-adapter-plus-face_sdxl_vit-h.safetensors").name == "plus-face-sdxl"  # type: ignore[union-attr]
    assert public_adapter("ip-adapter.bin") is None and public_adapter("other.safetensors") is None


def test_presets_need_a_public_adapter() -> None:
    face = public_adapter("plus-face-sdxl")
    assert preset_of(face, None) == preset_of(face, "balanced") and preset_of(None, None) is None
    assert preset_of(face, "likeness").arguments() == {"guidance_scale": 5.0, "num_inference_steps": 30}  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="--preset needs a public IP-Adapter"):
        preset_of(None, "likeness")
    with pytest.raises(ConfigError, match="There is no preset 'other': choose balanced or likeness"):
        preset_of(face, "other")
