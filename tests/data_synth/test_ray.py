"""Builds on Ray Data: the same shards as in a single process, with separate stages for steps with own resources."""

import importlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_synth.build import build
from data_synth.config import BuildConfig, Cluster
from data_synth.executors import Stage, _connect, choose_executor, stages_of
from data_synth.steps import STEPS, Recipe, Task
from imagine.errors import ConfigError, WeightsError
from tests.root import ROOT
from tests.toy_pairs import built, contents, toy_config

FEW = {"num_cpus": 0.5, "concurrency": 1}


def recipe(config: BuildConfig) -> Recipe:
    return Recipe(config, dict.fromkeys(STEPS, ""), 6)


def test_steps_with_their_own_resources_are_separate_stages() -> None:
    assert [stage.steps for stage in stages_of(recipe(toy_config()))] == [STEPS]
    config = toy_config(ray={"steps": {"caption": {"num_gpus": 1}, "generate": {"concurrency": 4}}})
    stages = stages_of(recipe(config))
    assert [stage.steps for stage in stages] == [
        ("import",), ("caption",), ("rewrite",), ("generate",), ("refine", "measure"),
    ]  # fmt: skip
    assert (
        stages[1].resources.num_gpus == 1 and stages[3].resources.concurrency == 4 and stages[4].resources.num_gpus == 0
    )


def test_a_missing_cluster_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"no Ray cluster at nowhere .*ray start --head"):
        _connect(ray, Cluster(address="nowhere"), [])
    services = importlib.import_module("ray._private.services")
    if services.find_bootstrap_address(None) is None and not services.find_gcs_addresses():
        with pytest.raises(ConfigError, match=r"no Ray cluster at auto .*remove ray.address"):
            _connect(ray, Cluster(address="auto"), [])


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local cluster of two CPUs and one GPU, whose existence Ray does not check."""
    ray = pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
        yield
        ray.shutdown()


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")  # warnings of Ray itself
def test_two_workers_build_the_same_shards_as_one_process(tmp_path: Path) -> None:
    built(toy_config(), tmp_path / "alone")
    config = toy_config(chunk=1, ray={"concurrency": 2, "window": 4})
    made = build(config, str(tmp_path / "ray"), "ray").made
    assert made["generate"] >= 12
    assert contents(tmp_path / "ray") == contents(tmp_path / "alone")
    assert build(config, str(tmp_path / "ray"), "ray").made == {}


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")
def test_a_separate_stage_with_repeated_attempts_builds_the_same_shards(tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    def config(log: str, **values: Any) -> BuildConfig:
        kinds = {"generator": "PlacedGenerator", "captioner": "PlacedCaptioner"}
        placed = {kind: {"backend": f"tests.toy_pairs:{name}", "log": log} for kind, name in kinds.items()}
        return toy_config({"count": 3}, **placed, **values)

    built(config(""), tmp_path / "alone")
    spread = config(str(notes), ray={**FEW, "steps": {"generate": {**FEW, "num_gpus": 1}}})
    assert build(spread, str(tmp_path / "ray"), "ray").made["generate"] > 6, "some need a second attempt"
    assert contents(tmp_path / "ray") == contents(tmp_path / "alone")
    placed = {line for line in notes.read_text().splitlines() if "[" in line}
    assert placed == {"generate [0]", "caption []"}, "each step has the GPUs of its settings"


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")
def test_more_resources_than_available_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="need 3 CPUs and Ray has 2"):
        build(toy_config(ray={"concurrency": 3}), str(tmp_path / "ray"), "ray")
    with pytest.raises(ConfigError, match="need 2 GPUs and Ray has 1"):
        build(toy_config(ray={"steps": {"generate": {"num_gpus": 2, "num_cpus": 0}}}), str(tmp_path / "ray"), "ray")


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")
def test_an_error_in_a_worker_is_the_same_sentence_as_locally(tmp_path: Path) -> None:
    config = toy_config(captioner="tests.toy_pairs:AbsentCaptioner", ray=FEW)
    with pytest.raises(WeightsError, match=r"^The model nowhere cannot be loaded\.$"):
        build(config, str(tmp_path / "ray"), "ray")


def test_an_error_of_one_stage_passes_through_the_next_ones() -> None:
    one = recipe(toy_config(captioner="tests.toy_pairs:AbsentCaptioner"))
    row: dict[str, Any] = {"place": [0], "task": [pickle.dumps(Task([0], {}))]}
    for steps in (("import",), ("caption",), ("rewrite", "generate")):
        row = Stage(one, steps)(row)
    error = pickle.loads(row["task"][0])
    assert isinstance(error, WeightsError) and str(error) == "The model nowhere cannot be loaded."


def test_an_unknown_backend_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="give local or ray"):
        choose_executor(toy_config(), "slurm")
    monkeypatch.setitem(__import__("sys").modules, "ray.data", None)
    with pytest.raises(ConfigError, match="Ray is not installed"):
        choose_executor(toy_config(), "ray")
