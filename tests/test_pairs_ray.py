"""Builds on Ray Data: the same shards as in a single process, with stages of their own for steps that want them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_synth.build import build
from data_synth.config import BuildConfig
from data_synth.executors import choose_executor, on_ray, stages_of
from data_synth.steps import STEPS, Recipe
from imagine.errors import ConfigError
from tests.toy_pairs import built, contents, toy_config

ROOT = Path(__file__).parent.parent
FEW = {"num_cpus": 0.5, "concurrency": 1}


def recipe(config: BuildConfig) -> Recipe:
    return Recipe(config, dict.fromkeys(STEPS, ""), 6)


def test_steps_with_a_share_of_their_own_are_stages() -> None:
    assert [stage.steps for stage in stages_of(recipe(toy_config()))] == [STEPS]
    config = toy_config(ray={"steps": {"caption": {"num_gpus": 1}, "generate": {"concurrency": 4}}})
    stages = stages_of(recipe(config))
    assert [stage.steps for stage in stages] == [
        ("import",), ("caption",), ("rewrite",), ("generate",), ("refine", "measure"),
    ]  # fmt: skip
    assert stages[1].share.num_gpus == 1 and stages[3].share.concurrency == 4 and stages[4].share.num_gpus == 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers on this machine."""
    ray = pytest.importorskip("ray", reason="pip install 'imagine-yourself-open[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
        yield
        ray.shutdown()


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_workers_build_the_same_shards_as_one_process(tmp_path: Path) -> None:
    built(toy_config(), tmp_path / "alone")
    config = toy_config(chunk=1, ray={"concurrency": 2, "window": 4})
    made = build(config, str(tmp_path / "ray"), "ray").made
    assert made["generate"] >= 12
    assert contents(tmp_path / "ray") == contents(tmp_path / "alone")
    assert build(config, str(tmp_path / "ray"), "ray").made == {}


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")
def test_a_stage_of_its_own_and_attempts_that_lead_back_to_it_build_the_same_shards(tmp_path: Path) -> None:
    toy = {"count": 3}
    built(toy_config(toy), tmp_path / "alone")
    config = toy_config(toy, ray={**FEW, "steps": {"generate": FEW}})
    assert build(config, str(tmp_path / "ray"), "ray").made["generate"] > 6, "some need a second attempt"
    assert contents(tmp_path / "ray") == contents(tmp_path / "alone")


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")
def test_more_than_there_is_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="want 3 CPUs and Ray has 2"):
        build(toy_config(ray={"concurrency": 3}), str(tmp_path / "ray"), "ray")
    with pytest.raises(ConfigError, match="want 1 GPUs and Ray has 0"):
        build(toy_config(ray={"steps": {"generate": {"num_gpus": 1, "num_cpus": 0}}}), str(tmp_path / "ray"), "ray")


def test_an_unknown_backend_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="give local or ray"):
        choose_executor(toy_config(), "slurm")
    monkeypatch.setitem(__import__("sys").modules, "ray.data", None)
    with pytest.raises(ConfigError, match="Ray is not installed"):
        choose_executor(toy_config(), "ray")
    assert callable(on_ray)
