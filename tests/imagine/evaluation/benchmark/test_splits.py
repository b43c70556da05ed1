"""The fixed splits: pinned, held out, written for other programs, and scored."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imagine.errors import ConfigError
from imagine.evaluation.benchmark import splits
from imagine.evaluation.benchmark.splits import Split, load_split
from imagine.evaluation.judge import Judge
from imagine.evaluation.systems.finished import FinishedPictures
from imagine.world import VERSION, seeds
from tests.commands import Run, assert_refused


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split("test", identities=2, prompts=2, gallery=4)


def test_both_splits_of_this_world_are_pinned_and_differ(split: Split) -> None:
    pinned = {name: splits.DIGESTS[VERSION, name] for name in splits.SEEDS}
    assert split.digest == pinned["test"] and len(set(pinned.values())) == 2
    assert load_split("validation", 2, 1).digest == pinned["validation"]
    assert splits.SEEDS["validation"] != splits.SEEDS["test"] and seeds.HELD_OUT.start + 8_000_000 < seeds.HELD_OUT.stop


def test_a_changed_split_is_refused(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = split.cases.people.replace(skin=0.5)
    assert splits.digest(split.cases) != splits.digest(type(split.cases)(**{**vars(split.cases), "people": changed}))
    monkeypatch.setitem(splits.DIGESTS, (VERSION, "test"), "0" * 64)
    with pytest.raises(ConfigError, match=r"is not the published one .*use the released program"):
        load_split("test", 2, 1)
    with pytest.raises(ConfigError, match="choose from test, validation"):
        load_split("train")
    with pytest.raises(ConfigError, match="up to 51 people"):
        load_split("test", identities=52)


def test_a_method_of_ones_own_is_scored_in_a_few_lines(split: Split, tmp_path: Path) -> None:
    for task in split.tasks():  # this method copies the photo
        task.reference.save(tmp_path / f"{task.id}.png")
    found: dict[str, Any] = split.score(tmp_path, tmp_path / "report", name="copy", judge=Judge.from_pretrained())
    assert found["system"] == "copy" and found["metrics"]["sim_ref"]["value"] > 0.9
    assert found["metrics"]["prompt"]["value"] == pytest.approx(found["metrics"]["prompt"]["floor"], abs=0.01)
    assert found["metrics"]["copy_paste"]["value"] > 0.6


def test_a_split_is_written_for_other_programs(run: Run, tmp_path: Path) -> None:
    options = ["--output", tmp_path, "--identities", "2", "--prompts", "3"]
    code, out, err = run("benchmark", *options)
    assert (code, err) == (0, "") and out.startswith(f"6 tasks of {VERSION}, split test")
    lines = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["000_00", "000_01", "000_02", "001_00", "001_01", "001_02"]
    assert all((tmp_path / line["reference"]).is_file() for line in lines) and lines[0]["seed"] == 0
    facts = json.loads((tmp_path / "benchmark.json").read_text())
    assert facts["benchmark"] == VERSION and facts["digest"] == splits.DIGESTS[VERSION, "test"]
    for name, digest in facts["files"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
        with Image.open(tmp_path / name) as image:
            assert image.size == (128, 128)
    assert FinishedPictures(tmp_path / "references").check(["000", "001"]) == 2
    assert_refused(*run("benchmark", "--output", tmp_path, "--split", "other"))
