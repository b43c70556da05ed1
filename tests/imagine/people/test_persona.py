"""Personas: saved bit for bit, refused with another encoder, and without a picture."""

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from imagine.errors import ConsentError, ImagineError, PromptError, WeightsError
from imagine.people.persona import Persona
from imagine.personas.consent import Consent
from imagine.pipeline.pipeline import ImaginePipeline
from tests import tiny


@pytest.fixture(scope="module")
def pipe() -> ImaginePipeline:
    return tiny.pipeline()


def test_a_persona_holds_the_vision_encoders_features(pipe: ImaginePipeline) -> None:
    persona = pipe.enroll(tiny.photo(1))
    crop = persona.faces[0].crop
    assert crop is not None and crop.size == (tiny.CROP, tiny.CROP)
    pixels = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(tiny.CROP, tiny.CROP, 3)
    with torch.no_grad():
        wanted = pipe.image_encoder(pixels.permute(2, 0, 1)[None].float() / 255)[0]
    assert torch.equal(persona.features, wanted)
    assert persona.tokens == tiny.TOKENS and persona.encoder == pipe.encoder_fingerprint


def test_features_of_several_photos_are_concatenated(pipe: ImaginePipeline) -> None:
    one, two = pipe.enroll(tiny.photo(1)), pipe.enroll(tiny.photo(2))
    both = pipe.enroll([tiny.photo(1), tiny.photo(2)])
    assert torch.equal(both.features, torch.cat([one.features, two.features]))
    assert [face.reference for face in both.faces] == ["photo 1", "photo 2"]


def test_save_and_load_keep_every_bit_and_no_picture(pipe: ImaginePipeline, tmp_path: Path) -> None:
    photo = tmp_path / "anna-at-home.png"
    tiny.photo(1).save(photo)
    persona = pipe.enroll(photo)
    persona.save(tmp_path / "me.safetensors")
    loaded = Persona.load(tmp_path / "me.safetensors")
    assert torch.equal(loaded.features, persona.features) and loaded.encoder == persona.encoder
    assert loaded.faces[0].box == persona.faces[0].box and loaded.faces[0].crop is None
    assert persona.faces[0].reference == str(photo)
    assert b"anna" not in (tmp_path / "me.safetensors").read_bytes()
    assert (tmp_path / "me.safetensors").stat().st_size < 100_000
    assert not list(tmp_path.glob("*.partial"))


def test_another_encoders_persona_is_refused(pipe: ImaginePipeline) -> None:
    stranger = tiny.pipeline(seed=1).enroll(tiny.photo(1))
    with pytest.raises(WeightsError, match="enroll the person again"):
        pipe("a person", reference=stranger)


def test_a_persona_and_a_photo_can_be_combined(pipe: ImaginePipeline) -> None:
    persona = pipe.enroll(tiny.photo(1))
    joined = pipe.enroll([persona, tiny.photo(2)])
    assert torch.equal(joined.features, pipe.enroll([tiny.photo(1), tiny.photo(2)]).features)


def not_safetensors(path: Path) -> None:
    path.write_text("hello")


def other_tensors(path: Path) -> None:
    save_file({"x": torch.zeros(2)}, path)


def future_version(path: Path) -> None:
    metadata = {"kind": "persona", "encoder": "e", "format_version": "99", "faces": "[]"}
    save_file({"vision_features": torch.zeros(2, 2)}, path, metadata)


def broken_faces(path: Path) -> None:
    metadata = {"kind": "persona", "encoder": "e", "format_version": "1", "faces": '[{"who": 1}]'}
    save_file({"vision_features": torch.zeros(2, 2)}, path, metadata)


@pytest.mark.parametrize("write", [not_safetensors, other_tensors, future_version, broken_faces])
def test_files_that_are_not_personas_are_refused_in_a_sentence(tmp_path: Path, write) -> None:
    path = tmp_path / "x.safetensors"
    write(path)
    with pytest.raises(WeightsError) as caught:
        Persona.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_persona_and_a_missing_folder_are_refused(pipe: ImaginePipeline, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no persona file"):
        Persona.load(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="cannot be written"):
        pipe.enroll(tiny.photo(1)).save(tmp_path / "none" / "me.safetensors")


def test_enrolling_without_a_photo_is_refused(pipe: ImaginePipeline) -> None:
    with pytest.raises(PromptError, match="at least one"):
        pipe.enroll([])
    with pytest.raises(ImagineError):
        pipe.enroll(None)


def test_a_persona_keeps_its_consent_encoder_and_weights(pipe: ImaginePipeline, tmp_path: Path) -> None:
    consent = Consent.state("agreed", "by letter")
    persona = pipe.enroll([tiny.photo(1), tiny.photo(2)], consent=consent)
    persona.save(tmp_path / "me.safetensors")
    loaded = Persona.load(tmp_path / "me.safetensors")
    assert loaded.consent == consent and loaded.encoder_name == "VisionEncoder" and loaded.hash == persona.hash
    assert loaded.photo_weights == persona.photo_weights and len(loaded.photo_weights) == 2
    assert pipe.enroll([loaded, tiny.photo(3)]).consent is None  # nobody consented to the third photo


def test_an_expired_persona_is_refused_in_a_sentence(pipe: ImaginePipeline, tmp_path: Path) -> None:
    old = Consent.state("agreed", days=1, today=date(2020, 1, 1))
    pipe.enroll(tiny.photo(1), consent=old).save(tmp_path / "me.safetensors")
    for reference in (tmp_path / "me.safetensors", Persona.load(tmp_path / "me.safetensors")):
        with pytest.raises(ConsentError, match=r"me.safetensors may not be used.* expired on 2020-01-02"):
            pipe("a person", reference=reference)


def test_files_of_version_1_still_load(pipe: ImaginePipeline, tmp_path: Path) -> None:
    persona = pipe.enroll(tiny.photo(1))
    metadata = {"kind": "persona", "encoder": persona.encoder, "format_version": "1", "tokens": "5", "faces": "[]"}
    save_file({"vision_features": persona.features}, tmp_path / "old.safetensors", metadata)
    loaded = Persona.load(tmp_path / "old.safetensors")
    assert torch.equal(loaded.features, persona.features) and loaded.consent is None and loaded.photo_weights == ()
    assert pipe("a person", reference=loaded, generator=tiny.generator(1)).images


def test_a_changed_encoder_is_named_in_one_sentence(pipe: ImaginePipeline) -> None:
    persona = replace(pipe.enroll(tiny.photo(1)), encoder="0", encoder_name="ViT-B/32")
    with pytest.raises(WeightsError, match=r"made by the vision encoder ViT-B/32 \(0\), but .*; enroll the person"):
        pipe("a person", reference=persona)
