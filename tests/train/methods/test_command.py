"""The command line of the methods: plans, refusals, drawing, and an evaluation by the judge."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imagine.evaluation import evaluate
from imagine.evaluation.judge import Judge
from tests import tiny
from tests.root import ROOT
from tests.train.methods.tiny_bases import fill, overrides, tiny_run
from train.methods import command
from train.methods.registry import ENCODERS, METHODS, TUNED
from train.methods.runs import load_method_run
from train.methods.system import TunedSystem


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("command"))


def test_every_method_has_a_config_and_every_config_a_method() -> None:
    configs = {path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml")}
    assert set(METHODS) <= configs
    for name in configs - set(METHODS):  # DreamBooth's own ablation
        run = load_method_run("dreambooth", ROOT / "configs" / "methods" / f"{name}.yaml", [])
        assert name.startswith("dreambooth_") and run.stages["dreambooth"].task == "dreambooth"
    for method in METHODS:
        assert load_method_run(method, None, []).stages[method].task == method


@pytest.mark.parametrize("method", TUNED)
def test_a_dry_run_says_what_would_be_learnt(method: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        method,
        "--photos",
        str(home / "anna"),
        "--base",
        str(home / "sd15"),
        "--output",
        str(home / "no"),
        "--dry-run",
    ]
    assert command.main([*words, *overrides(method, home)]) == 0
    out = capsys.readouterr().out
    assert f"method      {method}" in out and "trains" in out and "bytes per person" in out
    assert not (home / "no").exists()


def test_training_drawing_and_the_result(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = home / "anna-lora"
    words = ["dreambooth_lora", "--photos", str(home / "anna"), "--base", str(home / "world"), "--output", str(output)]
    lines = [*overrides("dreambooth_lora", home), f"data.folder={home / 'prior'}"]
    assert command.main([*words, "--json", *lines]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "dreambooth_lora" and found["bytes_per_person"] > 0 and found["tokens"] == ["zq"]
    assert {"seconds_per_person", "seconds_shared", "validation"} <= set(found)
    picture = home / "anna.png"
    draw = ["draw", "--learnt", str(output), "--prompt", "a person", "--output", str(picture), "--steps", "1"]
    assert command.main(draw) == 0
    with Image.open(picture) as image:
        assert image.width >= tiny.SIZE


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["dreambooht", "--photos", "x.png"], "there is no method"),
        (["dreambooth"], "name some with --photos"),
        (["dreambooth", "--photos", "nobody.png"], "There is no file nobody.png"),
        (["ip_adapter", "--photos", "x.png"], "leave out --photos"),
        (["draw"], "--learnt"),
        (["evaluate"], "--of METHOD"),
        (["evaluate", "--of", "ip_adapter"], "no method that is trained for each person"),
        (["draw", "--learnt", "nothing"], "holds no finished run"),
        (["dreambooth", "--photos", "weights/examples/person-1.png", "--base", "/no/such"], "There is no folder"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    output = tmp_path / ("out.png" if words[0] == "draw" else "out")
    assert command.main([*words, "--output", str(output), "settings.drawings=1"]) == 2
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert reason in error and error.endswith(".") and "Traceback" not in captured.err


def test_the_judge_measures_a_method_and_carries_on(home: Path) -> None:
    judge = Judge.from_pretrained(ROOT / "weights" / "judge")
    run = tiny_run("textual_inversion", "world", home)
    run = run.model_copy(update={"data": {key: value for key, value in run.data.items() if key != "photos"}})
    system = TunedSystem(run, home / "people")
    trained: list[Any] = []
    enroll = system.enroll
    system.enroll = lambda *args, **more: trained.append(enroll(*args, **more)) or trained[-1]  # type: ignore[func-returns-value, method-assign]
    options = {"num_inference_steps": 1}
    report = evaluate.run(
        system, home / "judged", "portraits", 2, 1, judge=judge, rows=("full",), options=options, gallery=4
    )
    assert {"prompt", "sim_gt"} <= set(report["metrics"]) and len(trained) == 2
    assert system.costs["people"] == 2 and system.costs["bytes_per_person"] > 0
    picture = home / "judged" / "pictures" / "full" / "000_00.png"
    before = picture.read_bytes()
    picture.unlink()
    again = TunedSystem(run, home / "people")
    evaluate.run(again, home / "judged", "portraits", 2, 1, judge=judge, rows=("full",), options=options, gallery=4)
    assert picture.read_bytes() == before  # the person was found, not trained again
    shutil.rmtree(home / "judged")


def test_encoders_and_tuned_methods_are_apart() -> None:
    assert not set(TUNED) & set(ENCODERS) and torch.get_num_threads() >= 1
