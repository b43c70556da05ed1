"""Build files: valid keys, overrides, the documented examples, and error messages."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from data_synth.__main__ import main
from data_synth.backends.recognisers import RECOGNISERS
from data_synth.backends.registry import BACKENDS, CALLS, make_backend
from data_synth.config import BackendChoice, BuildConfig, Cluster, _expand_name, load_config
from data_synth.filters import FilterSettings
from data_synth.targets import TargetSettings
from imagine.errors import ConfigError
from tests.root import ROOT

CONFIGS, DOCS = (ROOT / name for name in ("configs", "docs"))
SMALL: dict[str, Any] = {
    "references": {"backend": "world", "identities": 3}, "captioner": "grammar", "rewriter": "grammar",
    "generator": {"backend": "renderer", "drift": 0.1}, "measurer": "truth",
}  # fmt: skip


def loaded(tmp_path: Path, *overrides: str, **changes: Any) -> BuildConfig:
    path = tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return load_config(path, overrides)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("pairs_*.yaml")), ids=lambda path: path.name)
def test_the_shipped_build_files_name_existing_backends_and_settings(path: Path) -> None:
    config = load_config(path)
    for kind, choice in config.choices.items():
        assert make_backend(kind, choice).settings is not None


def test_every_name_in_the_registry_is_a_class_with_settings_and_the_call_of_its_kind() -> None:
    for kind, names in BACKENDS.items():
        for place in names.values():
            module, _, name = place.partition(":")
            made = getattr(importlib.import_module(module), name)
            assert made.Settings.model_config["extra"] == "forbid" and made.Settings.model_config["frozen"], place
            calls = ("collect",) if hasattr(made, "collect") else CALLS[kind]
            assert all(hasattr(made, name) for name in ("identity", "load", *calls)), place


@pytest.mark.parametrize("page", ["pairs", "pairs_backends", "pairs_card"])
def test_the_build_files_in_the_documents_are_valid(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    files = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    kinds = "|".join(BACKENDS)
    lines = [yaml.safe_load(line) for line in re.findall(rf"`((?:{kinds}): [^`]+)`", text)]
    assert len(files) >= {"pairs": 3}.get(page, 0) and len(lines) >= {"pairs_backends": 15}.get(page, 0)
    for content in files:
        BuildConfig.model_validate(content if "references" in content else {**SMALL, **content})
    for content in (*files, *lines):
        for kind in BACKENDS.keys() & content.keys():
            choice = content[kind]
            if isinstance(choice, str) or not {"ADDRESS", "my_package.flux:Generator"} & {*map(str, choice.values())}:
                made = make_backend(kind, BackendChoice.model_validate(_expand_name(choice)))
                assert made.settings is not None


def test_every_setting_of_a_backend_is_documented() -> None:
    text = (DOCS / "pairs_backends.md").read_text(encoding="utf-8").partition("## All settings")[2]
    sections = dict(section.split("\n", 1) for section in text.split("\n### ")[1:])
    everything = {**BACKENDS, "recogniser": RECOGNISERS}
    assert sections.keys() == everything.keys()
    for kind, names in everything.items():
        words = set(re.findall(r"`([^`]+)`", sections[kind]))
        for place in names.values():
            module, _, name = place.partition(":")
            fields = getattr(importlib.import_module(module), name).Settings.model_fields
            assert fields.keys() <= words, (kind, place)


def test_every_key_of_a_build_file_is_documented() -> None:
    text = (DOCS / "pairs.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`([^`]+)`", text.partition("## The build file\n")[2].partition("\n## ")[0]))
    for model in (BuildConfig, FilterSettings, TargetSettings, Cluster):
        assert model.model_fields.keys() <= words, model


def test_one_line_switches_a_backend(tmp_path: Path) -> None:
    assert loaded(tmp_path).captioner == BackendChoice(backend="grammar")
    switched = loaded(tmp_path, "captioner.backend=endpoint", "captioner.model=some-vlm")
    assert switched.captioner == BackendChoice.model_validate({"backend": "endpoint", "model": "some-vlm"})
    other = loaded(tmp_path, "generator.backend=imagine").generator
    assert other == BackendChoice(backend="imagine"), "the drift of the old backend is removed"
    assert loaded(tmp_path, "generator.drift=1e-2").generator == BackendChoice.model_validate(
        {"backend": "renderer", "drift": 0.01}
    )
    assert loaded(tmp_path, "filters.similarity=[0.1, 0.9]").filters.similarity == (0.1, 0.9)
    assert loaded(tmp_path, "attempts=3").attempts == 3


def test_a_nested_override_expands_a_backend_written_as_its_name(tmp_path: Path) -> None:
    refined = loaded(tmp_path, "refiner.region.reach=1.2", refiner="inpaint").refiner
    assert refined == BackendChoice.model_validate({"backend": "inpaint", "region": {"reach": 1.2}})
    assert make_backend("refiner", refined).settings.region.reach == 1.2


def test_a_tilde_in_a_build_file_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loaded(tmp_path, "work=~/scratch").work == tmp_path / "scratch"
    for kind, name, more in (
        ("captioner", "transformers", {}), ("rewriter", "transformers", {}), ("generator", "diffusers", {}),
        ("generator", "imagine", {}), ("refiner", "inpaint", {"adapter": "~/b"}),
        ("refiner", "ip_adapter", {"adapter": "~/b", "weight_name": "c.safetensors"}),
    ):  # fmt: skip
        choice = BackendChoice.model_validate({"backend": name, "model": "~/a", **more})
        settings = make_backend(kind, choice).settings
        assert settings.model == str(tmp_path / "a"), name
        assert getattr(settings, "adapter", str(tmp_path / "b")) == str(tmp_path / "b"), name
    hub = BackendChoice.model_validate({"backend": "diffusers", "model": "owner/name"})
    assert make_backend("generator", hub).settings.model == "owner/name"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["atempts=3"], "there is no key 'atempts' \\(did you mean attempts\\?\\)"),
        (["filters.similarty=[0, 1]"], "did you mean similarity"),
        (["rounds=2"], "2 rounds of refinement need a refiner"),
        (["rewriter=null"], "a generator needs a rewriter"),
        (["generator=null"], "rewriter and refiner need a generator"),
        (["attempts=0"], "attempts: Input should be greater than or equal to 1 \\(got 0\\)"),
        (["attempts"], "not of the form key=value"),
        (["generator.drift.x=1"], "drift is a single value"),
        (["attempts=[1"], "not valid YAML"),
        (["ray.steps.paint.num_gpus=1"], "ray.steps.paint"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        loaded(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"backend": "grammer"}, "captioner: there is no backend 'grammer' \\(did you mean grammar\\?\\)"),
        ({"backend": "grammar", "size": 3}, "captioner grammar: there is no key 'size'; valid: none"),
        ({"backend": "endpoint", "modl": "x"}, "did you mean model"),
        ({"backend": "no_such_package.there:Captioner"}, "cannot be imported"),
    ],
)
def test_a_wrong_backend_is_one_sentence(choice: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_backend("captioner", BackendChoice.model_validate(choice))


class _Half:
    """An incomplete backend."""

    class Settings(BaseModel):
        size: int = 1

    def __init__(self, settings: Any) -> None:
        self.size = settings.size

    def load(self) -> None:
        """Nothing to load."""


class _Bare:
    """A class without settings."""


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        (
            "captioner",
            "_Half",
            ":_Half has no settings and no identity and no caption: data_synth/backends/contracts.py",
        ),
        ("references", "_Half", "no identity and no count and no draw: data_synth/backends/contracts.py"),
        ("generator", "_Bare", "_Bare has no Settings: data_synth/backends/contracts.py"),
    ],
)
def test_an_incomplete_custom_backend_is_one_sentence(kind: str, name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_backend(kind, BackendChoice(backend=f"tests.data_synth.test_config:{name}"))


def test_the_command_line_takes_overrides_on_both_sides_of_its_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    assert main(["build", str(path), "attempts=0", "--output", str(tmp_path / "out")]) == 2
    assert "got 0" in capsys.readouterr().err
    assert main(["build", str(path), "--output", str(tmp_path / "out"), "attempts=-1"]) == 2
    assert "got -1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as exit_:
        main(["build", str(path), "--output", "out", "--bogus"])
    assert exit_.value.code == 2 and "Unrecognized arguments: --bogus" in capsys.readouterr().err


def test_an_invalid_build_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [")
    for name, sentence in (("list", "must hold keys"), ("broken", "not valid YAML"), ("none", "cannot be read")):
        with pytest.raises(ConfigError, match=sentence):
            load_config(tmp_path / f"{name}.yaml")
