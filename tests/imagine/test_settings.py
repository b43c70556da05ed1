"""Settings in YAML: numbers with exponents, and one sentence per error."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from imagine.errors import ConfigError
from imagine.settings import read_settings, read_value, unknown_name, validated


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rate: float


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rate: 1e-4\nname: 1e-4x\n")
    assert read_settings(tmp_path / "a.yaml", "run", "keys") == {"rate": 1e-4, "name": "1e-4x"}
    assert read_value("3.5e2", "rate=3.5e2") == 350.0


def test_a_misspelt_key_is_reported_before_the_missing_one() -> None:
    with pytest.raises(ConfigError, match=r"mine: there is no key 'rat' \(did you mean rate\?\); valid: rate"):
        validated(Outer, {"inner": {"rat": 1}}, "mine")
    with pytest.raises(ConfigError, match=r"mine: inner\.rate is missing"):
        validated(Outer, {"inner": {}}, "mine")
    with pytest.raises(ConfigError, match=r"mine: inner\.rate: .* \(got 'fast'\)"):
        validated(Outer, {"inner": {"rate": "fast"}}, "mine")
    assert unknown_name("stage", "x", []).endswith("valid: none")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"- 1\n", "must hold keys"), (b"a: [\n", "not valid YAML"), (b"\xff\xfe\x00", "not valid")],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"The build file .* {sentence}") as caught:
        read_settings(tmp_path / "a.yaml", "build", "keys")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\): name a YAML file"):
        read_settings(tmp_path / "nowhere.yaml", "build", "keys")
    with pytest.raises(ConfigError, match=r"override a=\[: the value is not valid YAML"):
        read_value("[", "a=[")
