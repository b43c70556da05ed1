"""Runs on disk: nothing is computed twice, parts of a run give the same numbers, files hold what made them."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imagine.errors import ConfigError
from imagine.evaluation import evaluate
from imagine.evaluation.cases import judge_pictures
from imagine.evaluation.judge import Judge, Reader
from imagine.evaluation.runs.folder import read_picture
from imagine.evaluation.runs.judged import JudgedStore
from imagine.evaluation.runs.pictures import read_costs
from imagine.evaluation.runs.shards import Shard, run_shards
from imagine.evaluation.systems.contracts import Drawing
from imagine.networks.recogniser import Recogniser
from imagine.people.faces import KnownBoxesFinder
from imagine.records import FaceBox
from imagine.world.vocabulary import ATTRIBUTES, TRAITS
from tests import tiny
from tests.root import ROOT

SETTINGS: dict[str, Any] = {"identities": 3, "prompts": 2, "gallery": 4, "batch": 2}


def tiny_judge() -> Judge:
    torch.manual_seed(0)
    reader = Reader({**ATTRIBUTES, "letters": ()}, TRAITS, size=64, widths=(8, 8, 8, 16), hidden=16)
    finder = KnownBoxesFinder([FaceBox(20, 30, 40, 50, 1.0)])
    return Judge(Recogniser(size=32, widths=(8, 8, 8, 16), dimensions=8), reader, finder=finder)


class Painter:
    """A system that paints the prompt's and the person's colour; picklable, and it counts what it draws."""

    name, rows, side = "painter", ("full", "detached"), 32

    def __init__(self, stops_after: int | None = None, fails_at: str = "") -> None:
        self.drawn: list[str] = []
        self.enrolled = 0
        self.stops_after, self.fails_at = stops_after, fails_at

    def fingerprint(self) -> str:
        return "painter 1"

    def enroll(self, photos: list[Image.Image], subject: str = "person") -> Any:
        self.enrolled += 1
        return photos[0].resize((32, 32))

    def draw(self, drawings: list[Drawing]) -> list[Image.Image | str]:
        if self.stops_after is not None and len(self.drawn) >= self.stops_after:
            raise KeyboardInterrupt
        self.drawn += [each.id for each in drawings]
        return [self._paint(each) for each in drawings]

    def _paint(self, drawing: Drawing) -> Image.Image | str:
        if drawing.id == self.fails_at:
            return "The painter has no paint."
        colours = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(drawing.seed))
        noise = Image.fromarray((colours * 255).byte().permute(1, 2, 0).numpy())
        return noise if drawing.person is None else Image.blend(noise, drawing.person, 0.6)


def run(output: Path, system: Any = None, **more: Any) -> dict[str, Any]:
    return evaluate.run(system or Painter(), output, judge=tiny_judge(), **{**SETTINGS, **more})


def numbers(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in ("costs", "commit")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("straight")
    return run(folder), folder


def test_parts_of_a_run_give_the_same_numbers(straight: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    systems = [Painter() for _ in range(3)]
    for index, system in enumerate(systems[:2]):
        assert run(tmp_path, system, shard=Shard(index, 2)) == {}
        assert not (tmp_path / "report.json").exists()
    assert all(system.drawn for system in systems[:2])
    assert sorted(systems[0].drawn + systems[1].drawn) == sorted(
        2 * [f"00{n}_0{p}" for n in range(3) for p in range(2)]
    )
    summary = run(tmp_path, systems[2])
    assert systems[2].drawn == []  # the parts had drawn everything
    assert numbers(summary) == numbers(straight[0])


def test_nothing_is_drawn_or_judged_twice(straight: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    interrupted = Painter(stops_after=4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted)
    again = Painter()
    assert numbers(run(tmp_path, again)) == numbers(straight[0])
    assert len(interrupted.drawn) + len(again.drawn) == 12
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "judged").rglob("*.safetensors")}
    assert len(before) >= 7
    third = Painter(stops_after=0)
    assert numbers(run(tmp_path, third)) == numbers(straight[0]) and third.enrolled == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_killed_while_judging_continues_there(straight: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "judging row detached":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stop)
    (tmp_path / "pictures" / "full" / "000_00.7.part").write_text("of a killed run")
    stages: list[str] = []
    assert numbers(run(tmp_path, progress=lambda stage, *_: stages.append(stage))) == numbers(straight[0])
    assert not list(tmp_path.rglob("*.part"))


def test_stored_results_belong_to_their_pictures_and_judge(tmp_path: Path) -> None:
    judge, pictures = tiny_judge(), torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    store = JudgedStore(tmp_path, judge.fingerprint())
    load = functools.partial(judge_pictures, judge, 5, batch=2, store=store, name="row")
    first = load(lambda a, b: (pictures[a:b], None))
    assert store.computed == 5
    second = load(lambda a, b: (pictures[a:b], None))
    assert store.computed == 5 and second.read == first.read and torch.equal(second.embeddings, first.embeddings)
    assert torch.equal(second.others["traits"], first.others["traits"])
    load(lambda a, b: (1 - pictures[a:b], None))
    assert store.computed == 10
    next(iter((tmp_path / "judged").rglob("*.safetensors"))).write_bytes(b"damaged")
    load(lambda a, b: (1 - pictures[a:b], None))
    assert store.computed == 12
    assert JudgedStore(tmp_path, "another").load("row", 0, store.digest(1 - pictures[:2])) is not None
    assert JudgedStore(tmp_path, "another").digest("x") != store.digest("x")


def test_a_system_may_give_a_reason_instead_of_a_picture(tmp_path: Path) -> None:
    summary = run(tmp_path, Painter(fails_at="001_01"), rows=("full",))
    assert summary["unreadable"] == {"pictures/full/001_01.png": "The painter has no paint."}
    assert "1 picture could not be read" in summary["notes"][0]
    painter = Painter()
    assert run(tmp_path, painter, rows=("full",))["unreadable"] == {} and painter.drawn == ["001_01"]


def test_pictures_say_what_made_them(straight: tuple[dict[str, Any], Path]) -> None:
    folder = straight[1]
    with Image.open(folder / "pictures" / "full" / "002_01.png") as image:
        facts = dict(image.info)
    line = json.loads((folder / "pictures.jsonl").read_text().splitlines()[5])
    assert facts["prompt"] == line["text"] and facts["system"] == "painter" and facts["weights"] == "painter 1"
    assert (facts["suite"], facts["row"], facts["seed"]) == ("portraits", "full", "5")
    assert read_picture(folder / line["file"]).shape == (3, 32, 32)


def test_costs_are_measured_and_survive_a_broken_line(straight: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    costs = straight[0]["costs"]
    assert costs["people"] == 3 and costs["seconds_per_person"] >= 0 and costs["bytes_per_person"] is None
    assert costs["seconds_per_picture"] > 0
    lines = ['{"person": "0", "seconds": 2.0, "bytes": 10}', '{"person": "0", "seconds": 9', "", "{}"]
    (tmp_path / "costs.jsonl").write_text("\n".join(lines))
    assert read_costs(tmp_path) == {
        "people": 1, "seconds_per_person": 2.0, "bytes_per_person": 10, "seconds_per_picture": None,
    }  # fmt: skip
    assert read_costs(tmp_path / "nothing") is None


def test_variants_measure_diversity(tmp_path: Path) -> None:
    summary = run(tmp_path, rows=("full",), variants=2)
    assert summary["diversity"]["value"] > 0 and summary["diversity"]["floor"] == 0
    assert (tmp_path / "pictures" / "full" / "000_00_1.png").exists()
    with pytest.raises(ConfigError, match="other variants"):
        run(tmp_path, rows=("full",))


def test_our_pipeline_reports_the_bytes_of_a_persona(tmp_path: Path) -> None:
    options = {"num_inference_steps": 1}
    summary = run(tmp_path, tiny.pipeline(), identities=2, prompts=1, rows=("full",), options=options)
    assert summary["costs"]["bytes_per_person"] == tiny.TOKENS * 24 * 4  # width 24, float32


def test_a_part_needs_a_number_within_the_count() -> None:
    for index, count in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="number the parts from 0"):
            Shard(index, count)
    with pytest.raises(ConfigError, match="choose 1 or more"):
        run_shards(print, 0)


def test_two_processes_give_the_numbers_of_one(straight: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    settings = {**SETTINGS, "judge": tiny_judge()}
    summary = evaluate.run_sharded(Painter, tmp_path, 2, **settings)
    assert numbers(summary) == numbers(straight[0])


@pytest.mark.filterwarnings("ignore")  # warnings of Ray itself
def test_ray_gives_the_numbers_of_one_process(
    straight: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        summary = evaluate.run_sharded(Painter, tmp_path, 2, "ray", **{**SETTINGS, "judge": tiny_judge()})
    finally:
        ray.shutdown()
    assert numbers(summary) == numbers(straight[0])
