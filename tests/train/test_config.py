"""Run files: their settings, their overrides, and the error for every mistake."""

from pathlib import Path
from typing import Any

import pytest

from imagine.errors import ConfigError, ImagineError
from tests.root import ROOT
from tests.toy_training import ToyTask
from train.__main__ import DONE, STOPPED, main
from train.config import Stage, load_run
from train.plan import plan
from train.stages import TASKS, _check_batch_divides, resolved, run_stages, task_class

TWO_STAGES = """
defaults: {task: toy, batch_size: 8}
data: {size: 128}
stages:
  one: {train: {both: 1e-2}, images: 800}
  two: {start_from: one, train: {first: 1.5e-3, second: 3e-4}, images: 1_600, settings: {width: 5}}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TWO_STAGES)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_run(path, overrides)
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def stage(**settings: object) -> Stage:
    return Stage.model_validate({"task": "toy", "train": {"both": 1e-3}, "images": 1000, "batch_size": 10, **settings})


def test_stages_keep_their_order_and_use_the_defaults(run_file: Path) -> None:
    run = load_run(run_file)
    assert list(run.stages) == ["one", "two"]
    two = run.stages["two"]
    assert (two.task, two.batch_size, two.images, two.start_from) == ("toy", 8, 1600, ("one",))
    assert two.train == {"first": 0.0015, "second": 0.0003} and run.data == {"size": 128}


def test_overrides_can_set_every_level(run_file: Path) -> None:
    given = ["one.images=1e3", "two.train.first=5e-5", "two.settings.width=7", "data.size=64", "defaults.batch_size=4"]
    run = load_run(run_file, given)
    assert run.stages["one"].images == 1000 and run.stages["two"].train["first"] == 5e-5
    assert run.stages["two"].settings == {"width": 7} and run.data == {"size": 64}
    assert run.stages["one"].batch_size == run.stages["two"].batch_size == 4


@pytest.mark.parametrize("key", ["defaults", "data"])
@pytest.mark.parametrize("value", ["5", "[precision, auto]", "fast"])
def test_defaults_and_data_must_be_mappings(key: str, value: str, run_file: Path) -> None:
    text = "\n".join(line for line in TWO_STAGES.splitlines() if not line.startswith(f"{key}:"))
    run_file.write_text(f"{text}\n{key}: {value}\n")
    for overrides in ((), (f"{key}.batch_size=4",)):
        assert f"`{key}` must map names to values" in refusal(run_file, *overrides)
    run_file.write_text(f"{text}\n{key}:\n")  # an empty section is fine
    assert load_run(run_file, ["defaults.task=toy"]).stages["one"].task == "toy"


def test_a_key_that_is_no_name_is_one_sentence(run_file: Path) -> None:
    run_file.write_text(f"{TWO_STAGES}\n1: x\nzzz: y\n")
    assert "has the key 1, which is no name" in refusal(run_file)


def test_a_typo_in_an_override_lists_the_valid_names(run_file: Path) -> None:
    assert "did you mean one?" in refusal(run_file, "onee.images=5")
    sentence = refusal(run_file, "one.imagse=5")
    assert "'imagse' (did you mean images?)" in sentence and "batch_size" in sentence and "stage one" in sentence
    assert "stage.key=value" in refusal(run_file, "images 5")
    assert "images" in refusal(run_file, "one.images=many")
    assert "single value" in refusal(run_file, "one.images.more=5")


def test_every_mistake_in_the_file_is_one_line(tmp_path: Path, run_file: Path) -> None:
    def with_text(text: str) -> Path:
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        return path

    assert "cannot be read" in refusal(tmp_path / "none.yaml")
    assert "not valid YAML" in refusal(with_text("stages: {a: ["))
    assert "'stage' (did you mean stages?)" in refusal(with_text("stage: {}"))
    assert "stages" in refusal(with_text("stages: [a, b]"))
    assert "images is missing" in refusal(with_text("stages: {a: {task: toy, train: {both: 1}}}"))
    assert "the stages before it: one" in refusal(run_file, "two.start_from=three")
    assert "does not divide" in refusal(run_file, "one.accumulation=3")
    assert "cannot be combined with muon" in refusal(run_file, "one.optimiser=adamw8bit", "one.muon=[both]")
    assert "channels_last" in refusal(run_file, "one.optimiser=adamw8bit", "one.channels_last=true")
    assert "'lowest' or 'highest'" in refusal(run_file, "one.best_is=lower")


def test_settings_without_effect_are_errors(run_file: Path) -> None:
    assert "muon: there is no part in train 'boht' (did you mean both?); valid: both" in refusal(
        run_file, "one.muon=[boht]"
    )
    assert "there is no part in train 'second'" in refusal(run_file, "one.muon=[both, second]")
    assert "train.both: " in refusal(run_file, "one.train.both=-1e-3")
    assert "train.both: " in refusal(run_file, "one.train.both=.inf")
    assert "betas.1: " in refusal(run_file, "one.betas=[0.9, 1.0]")


@pytest.mark.parametrize(
    ("task", "wrong", "words"),
    [
        ("base", {"resolution": 100}, "multiple of 16"),
        ("base", {"resolution": 256}, "less than or equal to 128"),
        ("base", {"min_snr_gamma": 0}, "greater than 0"),
        ("base", {"text_branches": ["t5"], "drop_byt5": 0.1}, "drop_byt5 has no effect, as text_branches"),
        ("adapter", {"lora_rank": 0, "lora_targets": ["to_q"]}, "lora_targets has no effect with lora_rank 0"),
        ("diffusers_adapter", {"lora_rank": 0, "lora_targets": ["to_q"]}, "lora_targets has no effect"),
        ("diffusers_adapter", {"drop_t5": 0.1}, "drop_t5 has no effect without t5"),
        ("diffusers_adapter", {"t5": "here", "drop_byt5": 0.1}, "drop_byt5 has no effect without byt5"),
        ("diffusers_adapter", {"ip_adapter": "a.bin", "projection": "full"}, "projection has no effect beside ip_"),
        ("diffusers_adapter", {"ip_adapter": "a.bin", "zero_init": True}, "zero_init has no effect beside ip_"),
        ("diffusers_adapter", {"min_snr_gamma": 0}, "greater than 0"),
        ("clip", {"whole_share": 1.5}, "less than or equal to 1"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(task: str, wrong: dict[str, Any], words: str) -> None:
    settings = {**({"base": "somewhere"} if task == "diffusers_adapter" else {}), **wrong}
    (part, *_) = task_class(task, TASKS, "one").PARTS
    with pytest.raises(ConfigError, match=words):
        resolved("one", stage(task=task, train={part: 1e-3}, settings=settings), TASKS)


def test_settings_with_defaults_filled_in_are_valid_again() -> None:
    for settings in ({}, {"ip_adapter": "a.bin"}, {"projection": "plus", "zero_init": False}):
        given = {"base": "somewhere", **settings}
        once = resolved("one", stage(task="diffusers_adapter", train={"lora": 1e-3}, settings=given), TASKS)
        assert resolved("one", once, TASKS) == once
        expected = (None, None) if "ip_adapter" in settings else (
            settings.get("projection", "full"), settings.get("zero_init", True))  # fmt: skip
        assert (once.settings["projection"], once.settings["zero_init"]) == expected


def test_mistakes_in_later_stages_are_errors_before_the_first_stage_trains(run_file: Path, tmp_path: Path) -> None:
    def refused(*overrides: str) -> str:
        with pytest.raises(ConfigError) as raised:
            run_stages(load_run(run_file, overrides), tmp_path / "out", tasks={**TASKS, "toy": ToyTask})
        assert not (tmp_path / "out").exists()
        with pytest.raises(ImagineError) as planned:
            plan(load_run(run_file, overrides), tmp_path / "out", {**TASKS, "toy": ToyTask})
        assert str(planned.value) == str(raised.value)
        return str(raised.value)

    assert "two, fresh: there is no module 'hat'" in refused("two.fresh=[hat]")
    assert "There is no folder nowhere" in refused("two.initial=nowhere")
    assert "share parameters" in refused("two.train.both=1e-3")
    teacher = ["two.task=likeness", "two.train={likeness: 1e-3}", "two.settings={}"]
    assert "there is no key 'size'" in refused(*teacher)
    run_file.write_text(TWO_STAGES.replace("{size: 128}", "{pictures: 2}"))
    assert "needs an autoencoder" in refused(*teacher)
    assert "set pictures to 2" in refused(*teacher, "data.pictures=1")


def test_parts_tasks_and_their_settings_are_checked_before_anything_trains(run_file: Path, tmp_path: Path) -> None:
    def refused(*overrides: str, only: tuple[str, ...] = ()) -> str:
        with pytest.raises(ConfigError) as error:
            run_stages(load_run(run_file, overrides), tmp_path / "out", only=only, tasks={"toy": ToyTask})
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "no part 'frist' (did you mean first?); valid: first, second, both" in refused("two.train.frist=1")
    assert "no task 'toys' (did you mean toy?)" in refused("two.task=toys")
    assert "no key 'widht' (did you mean width?); valid: width, dropout" in refused("two.settings.widht=1")
    assert "no stage 'three'; valid: one, two" in refused(only=("three",))


def test_missing_settings_get_their_defaults() -> None:
    assert resolved("one", stage(settings={"width": 9}), {"toy": ToyTask}).settings["dropout"] == 0.0


def test_the_command_prints_one_line_for_a_mistake_and_exits_with_2(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(run_file), "--output", str(tmp_path / "out"), "one.imagse=5", "--max-minutes", "1", "two.images=3"]
    assert main(command, {"toy": ToyTask}) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_output_that_cannot_be_a_folder_is_an_error_of_one_line(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_file), "--output", str(run_file / "below")], {"toy": ToyTask}) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "choose another" in printed


def test_a_stopped_run_exits_with_3_and_the_resumed_run_with_0(run_file: Path, tmp_path: Path) -> None:
    smaller = ["one.images=16", "two.images=16", "two.settings.width=4"]
    command = [str(run_file), "--output", str(tmp_path / "out"), *smaller]
    assert main([*command, "--max-minutes", "0"], {"toy": ToyTask}) == STOPPED == 3
    assert not (tmp_path / "out" / "one" / "done.json").exists()
    assert main(command, {"toy": ToyTask}) == DONE == 0


def test_trackers_are_set_for_the_whole_run(run_file: Path) -> None:
    assert load_run(run_file).trackers == ("tensorboard",)
    assert load_run(run_file, ["trackers=wandb"]).trackers == ("wandb",)
    assert load_run(run_file, ["trackers=[]"]).trackers == ()
    run_file.write_text("trackers: [tensorboard, wandb]\n" + TWO_STAGES)
    assert load_run(run_file).trackers == ("tensorboard", "wandb")
    assert "'tensorboard' or 'wandb' (got 'tensorbord')" in refusal(run_file, "trackers=tensorbord")


def test_a_batch_must_divide_evenly_among_processes(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(run_file, ["two.accumulation=4"])
    _check_batch_divides(run, ["one", "two"], processes=2)
    with pytest.raises(
        ConfigError,
        match=r"stage two: batch_size 8 does not divide into 4 micro-batches \(accumulation\) on each of 4 processes",
    ):
        _check_batch_divides(run, ["one", "two"], processes=4)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as if a launcher had started processes for which accelerate finds no device
    with pytest.raises(ConfigError, match="ACCELERATE_USE_CPU=true"):
        run_stages(run, tmp_path / "out", tasks={"toy": ToyTask})


ACCELERATE = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_accepts_its_configs(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    assert len(ACCELERATE) == 4
    loaded = load_config_from_file(str(path))
    assert loaded.mixed_precision == "no"  # precision is a setting of the stage
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "run.py"]))
    sharded = path.stem == "fsdp"
    assert (arguments.num_processes, arguments.use_fsdp) == (
        1 if path.stem == "one-gpu" else 16 if path.stem == "two-nodes" else 8,
        sharded,
    )
    if sharded:
        environment = prepare_multi_gpu_env(arguments)
        assert environment["FSDP_VERSION"] == "2" and environment["FSDP_AUTO_WRAP_POLICY"] == "NO_WRAP"
        assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_learning_rates_are_functions_of_images_seen() -> None:
    trapezoid = stage(warmup_images=100, decay=0.2)
    assert trapezoid.rate(0) == pytest.approx(0.1) and trapezoid.rate(90) == trapezoid.rate(800) == 1
    assert trapezoid.rate(900) == pytest.approx(0.5) and trapezoid.rate(1000) == 0
    longer = stage(warmup_images=100, decay=0.2, images=5000)
    assert all(longer.rate(seen) == trapezoid.rate(seen) for seen in range(0, trapezoid.decay_start, 10))
    cosine, constant = stage(schedule="cosine"), stage(schedule="constant")
    assert cosine.rate(500) == pytest.approx(0.5) and cosine.rate(1000) == pytest.approx(0, abs=1e-9)
    assert constant.rate(0) == constant.rate(999) == 1
