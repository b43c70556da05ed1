"""Persona files: described from their headers, listed, and really deleted."""

import os
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from imagine.errors import WeightsError
from imagine.people.persona import Persona
from imagine.personas.consent import Consent
from imagine.personas.files import delete_persona, list_personas, read_persona_facts

PERSONA = Persona(torch.ones(3, 4), "abc", (), (0.5,), consent=Consent.state("self", "by mail"), encoder_name="ViT")


def test_facts_are_those_that_were_saved(tmp_path: Path) -> None:
    PERSONA.save(tmp_path / "me.safetensors")
    facts = read_persona_facts(tmp_path / "me.safetensors")
    assert (facts.encoder, facts.encoder_name, facts.tokens, facts.pooling) == ("abc", "ViT", 3, "concatenate")
    assert facts.consent == PERSONA.consent and facts.state() == "valid" and facts.photo_weights == (0.5,)
    assert facts.state(date(2100, 1, 1)) == "expired" and facts.as_dict()["consent"]["note"] == "by mail"


def test_a_list_has_every_persona_and_nothing_else(tmp_path: Path) -> None:
    PERSONA.save(tmp_path / "b.safetensors")
    replace(PERSONA, consent=None).save(tmp_path / "a.safetensors", passphrase="correct horse")
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "notes.txt").write_text("x")
    damaged = {"kind": "persona", "encoder": "e", "tokens": "many"}
    save_file({"vision_features": torch.zeros(1, 1)}, tmp_path / "c.safetensors", damaged)
    found, notes = list_personas(tmp_path)
    assert [(each.path.name, each.state()) for each in found] == [
        ("a.safetensors", "encrypted"), ("b.safetensors", "valid"),
    ]  # fmt: skip
    assert len(notes) == 1 and "c.safetensors" in notes[0]
    with pytest.raises(WeightsError, match="no folder"):
        list_personas(tmp_path / "none")


def test_deleting_unlinks_the_file_the_link_and_what_a_save_left(tmp_path: Path) -> None:
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    PERSONA.save(real)
    (tmp_path / "real.safetensors.partial").write_bytes(b"half")
    link.symlink_to(real)
    os.link(real, tmp_path / "copy")
    deleted = delete_persona(link)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
    assert {path.name for path in deleted.files} == {"real.safetensors", "link.safetensors", "real.safetensors.partial"}
    assert "hard link" in deleted.notes[0] and deleted.facts.tokens == 3


def test_nothing_but_a_persona_is_deleted(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    for name in ("weights.safetensors", "none.safetensors"):
        with pytest.raises(WeightsError):
            delete_persona(tmp_path / name)
    assert (tmp_path / "weights.safetensors").exists()
