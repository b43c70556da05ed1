"""Encryption of personas: only the passphrase opens them, and every change is noticed."""

import json
from pathlib import Path

import pytest
import torch

from imagine.errors import ConfigError, WeightsError
from imagine.people.persona import Persona
from imagine.personas.sealing import seal, unseal

WORDS = "correct horse"


def test_only_the_passphrase_opens_and_each_file_has_its_own_salt() -> None:
    (one, parameters), (two, _) = seal(b"secret", WORDS, 10), seal(b"secret", WORDS, 10)
    assert unseal(one, parameters, WORDS, "x") == b"secret" and one != two and b"secret" not in one
    with pytest.raises(WeightsError, match="x cannot be decrypted"):
        unseal(one, parameters, "correct house", "x")


@pytest.mark.parametrize("change", ["data", "salt", "cost"])
def test_changes_are_refused(change: str) -> None:
    sealed, parameters = seal(b"secret", WORDS, 10)
    described = json.loads(parameters)
    if change == "data":
        sealed = bytes([sealed[0] ^ 1]) + sealed[1:]
    described |= {"salt": {"salt": "00" * 16}, "cost": {"log_cost": 40}, "data": {}}[change]
    with pytest.raises(WeightsError):
        unseal(sealed, json.dumps(described, sort_keys=True), WORDS, "x")


def test_short_passphrases_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 8"):
        seal(b"", "secret")


def test_an_encrypted_persona_tells_nothing_and_loads_bit_for_bit(tmp_path: Path) -> None:
    persona, file = Persona(torch.rand(3, 4), "the encoder"), tmp_path / "me.safetensors"
    persona.save(file, WORDS)
    assert b"the encoder" not in file.read_bytes() and persona.features.numpy().tobytes() not in file.read_bytes()
    assert torch.equal(Persona.load(file, WORDS).features, persona.features)
    with pytest.raises(WeightsError, match="is encrypted: give its passphrase"):
        Persona.load(file)
