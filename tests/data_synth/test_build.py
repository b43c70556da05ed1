"""End-to-end builds with toy backends: which results are computed, which are reused, and what is written."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image
from rich.console import Console

from data_synth.build import build
from data_synth.card.funnel import print_funnel
from data_synth.config import BuildConfig
from data_synth.filters import STAGES, stage_of
from data_synth.review import decisions as review
from data_synth.review.decisions import Opinion, Review
from data_synth.steps import BACKEND_CRASHED
from imagine.errors import ConfigError, ImagineError
from imagine.shards.reading import Records, open_records
from tests.toy_pairs import built, contents, toy_config


def logged(path: Path) -> Counter[str]:
    """Return step -> number of items processed since the last call."""
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("")
    return Counter(line.split()[0] for line in lines)


def read(output: Path, tmp_path: Path) -> Records:
    return open_records(output, cache=tmp_path / "cache")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted build."""
    output = tmp_path_factory.mktemp("pairs") / "uninterrupted"
    built(toy_config(), output)
    return output


def test_shards_hold_each_reference_once_before_its_targets(uninterrupted: Path, tmp_path: Path) -> None:
    records = read(uninterrupted, tmp_path)
    manifest = json.loads((uninterrupted / "manifest.json").read_text())
    assert records.problems == {}
    assert len(records.pairs()) == manifest["counts"]["pairs"] > 3
    keys = [record.key for record in records]
    assert len(keys) == len(set(keys))
    for reference, target in records.pairs():
        one, two = records[reference], records[target]
        assert reference < target and one.identity == two.identity and one.key == two.reference
        assert (one.source, two.source) == ("real", "synthetic")
        assert two.caption.startswith(one.caption) and two.captions["rewritten"] == two.caption
        assert two.extra["made"]["attempt"] in (0, 1) and two.extra["aims"] == two.extra["attributes"]
    assert [shard["records"] for shard in manifest["shards"]][:-1] == [5] * (len(manifest["shards"]) - 1)


def test_a_pair_is_the_first_candidate_that_passes_and_earlier_ones_have_reasons(uninterrupted: Path) -> None:
    rejected = {line["key"]: line["reason"] for line in lines(uninterrupted / "rejections.jsonl")}
    for record in open_records(uninterrupted):
        if record.reference is None:
            continue
        measures, made = record.extra["measures"], record.extra["made"]
        assert measures["faces"] == 1 and 0.5 <= measures["similarity"] <= 0.97 and measures["difference"] >= 0.2
        spec = record.key.rsplit("-", 2)[0]
        for attempt in range(made["attempt"]):
            assert rejected[f"{spec}-{attempt}-0"], "every earlier attempt has a reason"
        for number in range(made["round"]):
            assert stage_of(rejected[f"{spec}-{made['attempt']}-{number}"]) in ("identity", "faces")


def test_choose_best_makes_all_attempts_and_takes_the_most_similar_candidate(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    config = toy_config({"log": str(log)}, attempts=3, choose="best")
    first = built(config.model_copy(update={"choose": "first"}), out)
    made = logged(log)
    best = built(config, out)
    assert made["generate"] < 36 and logged(log)["generate"] == 36 - made["generate"], (
        "all attempts are made, none twice"
    )
    better = [one for one in lines(out / "rejections.jsonl") if one["reason"] == STAGES["choice"][0]]
    assert better and best.funnel.reasons["filter", STAGES["choice"][0]] == len(better)
    assert first.funnel.reasons["filter", STAGES["choice"][0]] == 0
    for one in better:
        chosen = one["detail"].split()[0]
        assert chosen != one["key"] and chosen.rsplit("-", 2)[0] == one["key"].rsplit("-", 2)[0]
    assert best.funnel.kept.as_json()["similarity"] > first.funnel.kept.as_json()["similarity"]


def test_the_funnel_adds_up_and_shows_every_round(uninterrupted: Path) -> None:
    funnel = json.loads((uninterrupted / "funnel.json").read_text())
    counts = {row["name"]: row["count"] for row in funnel["rows"]}
    numbers = list(counts.values())
    assert (counts["references"], counts["targets asked for"]) == (6, 12)
    assert numbers[2:] == sorted(numbers[2:], reverse=True) and counts["pairs"] == funnel["pairs"]["count"]
    effect = funnel["rounds"]["1"]
    assert effect["after"]["similarity"] == pytest.approx(effect["before"]["similarity"] + 0.1, abs=2e-4)
    assert effect["better"] == effect["before"]["count"] > 0
    assert funnel["pairs"]["similarity"] > funnel["candidates"]["similarity"]
    reasons = Counter((line["step"], line["reason"]) for line in lines(uninterrupted / "rejections.jsonl"))
    assert {(step, reason): n for step, one in funnel["rejected"].items() for reason, n in one.items()} == reasons
    with Image.open(uninterrupted / "funnel.png") as image:
        assert image.width > 500


def test_the_manifest_names_seeds_models_and_licences(uninterrupted: Path) -> None:
    manifest = json.loads((uninterrupted / "manifest.json").read_text())
    assert manifest["seeds"] == {"seed": 0, "targets": 0}
    assert manifest["licences"]["models"]["generator"] == "CC0-1.0"
    assert set(manifest["licences"]["references"]) == {"CC-BY-4.0"}
    assert manifest["models"]["refiner"]["identity"]["class"] == "ToyRefiner"
    assert manifest["config"]["rounds"] == 2
    for shard in manifest["shards"]:
        assert (
            json.loads((uninterrupted / shard["name"].replace(".tar", ".json")).read_text())["sha256"]
            == shard["sha256"]
        )


def test_a_repeated_build_computes_nothing_and_changes_nothing(tmp_path: Path) -> None:
    config, log = toy_config({"log": str(tmp_path / "log")}), tmp_path / "log"
    first = built(config, tmp_path / "out")
    assert sum(first.made.values()) == sum(logged(log).values()) > 30
    before = contents(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert built(config, tmp_path / "out").made == {}
    assert logged(log) == {} and contents(tmp_path / "out") == before
    assert {path: path.stat().st_mtime_ns for path in times} == times, "existing shards are not rewritten"


def test_items_shared_by_targets_are_computed_once(tmp_path: Path) -> None:
    built(toy_config({"log": str(tmp_path / "log")}), tmp_path / "out")
    items = Counter((tmp_path / "log").read_text().splitlines())
    rewrites = Counter({line: n for line, n in items.items() if line.startswith("rewrite")})
    assert set(rewrites.values()) == {2}, "each reference has two targets"
    assert set((items - rewrites).values()) == {1}


def test_another_threshold_reuses_every_picture(tmp_path: Path) -> None:
    usual: dict[str, Any] = {"attempts": 1, "rounds": 0}
    log, toy = tmp_path / "log", {"log": str(tmp_path / "log")}
    loose = {"similarity": [0.2, 1.0], "faces": None}
    first = built(toy_config(toy, filters=loose, **usual), tmp_path / "out")
    before = logged(log)
    strict = built(toy_config(toy, filters={**loose, "similarity": [0.45, 1.0]}, **usual), tmp_path / "out")
    assert before["generate"] == 12 and logged(log) == {} and strict.made == {}
    fewer, more = (one.manifest["counts"]["pairs"] for one in (strict, first))
    assert 0 < fewer < more
    assert len(read(tmp_path / "out", tmp_path).pairs()) == fewer
    assert contents(tmp_path / "out") == contents_of(toy_config(filters={**loose, "similarity": [0.45, 1.0]}, **usual),
                                                     tmp_path / "fresh")  # fmt: skip


def contents_of(config: BuildConfig, output: Path) -> dict[str, bytes]:
    built(config, output)
    return contents(output)


def test_a_stricter_similarity_range_computes_only_missing_results(tmp_path: Path) -> None:
    log, toy = tmp_path / "log", {"log": str(tmp_path / "log")}
    built(toy_config(toy, filters={"similarity": [0.3, 1.0]}), tmp_path / "out")
    first = logged(log)
    built(toy_config(toy, filters={"similarity": [0.6, 1.0]}), tmp_path / "out")
    again = logged(log)
    assert again["import"] == again["caption"] == again["rewrite"] == 0
    assert 0 < again["generate"] < first["generate"] and again["refine"] > 0
    fresh = contents_of(toy_config(filters={"similarity": [0.6, 1.0]}), tmp_path / "fresh")
    assert contents(tmp_path / "out") == fresh


def test_another_generator_keeps_captions_and_prompts(tmp_path: Path) -> None:
    log, toy = tmp_path / "log", {"log": str(tmp_path / "log")}
    built(toy_config(toy), tmp_path / "out")
    logged(log)
    config = toy_config(toy, generator={"backend": "tests.toy_pairs:ToyGenerator", "flavour": "other", **toy})
    built(config, tmp_path / "out")
    again = logged(log)
    assert set(again) == {"generate", "refine", "measure"} and again["generate"] >= 12


def test_more_references_keep_existing_results(tmp_path: Path) -> None:
    log, toy = tmp_path / "log", {"log": str(tmp_path / "log")}
    whole: dict[str, Any] = {"targets": {"distribution": {"gaze": {"left": 1, "right": 1}}}, "attempts": 1, "rounds": 0}
    built(toy_config({**toy, "count": 100}, **whole), tmp_path / "out")
    first = logged(log)
    built(toy_config({**toy, "count": 104}, **whole), tmp_path / "out")
    assert first == {"import": 100, "caption": 100, "rewrite": 200, "generate": 200, "measure": 200}
    assert logged(log) == {"import": 4, "caption": 4, "rewrite": 8, "generate": 8, "measure": 8}, "blocks of 100"
    assert contents(tmp_path / "out") == contents_of(toy_config({"count": 104}, **whole), tmp_path / "fresh")


def test_more_targets_keep_existing_results(tmp_path: Path) -> None:
    log, toy = tmp_path / "log", {"log": str(tmp_path / "log")}
    usual: dict[str, Any] = {"attempts": 1, "rounds": 0, "filters": {"duplicates": None}}
    built(toy_config(toy, **usual), tmp_path / "out")
    logged(log)
    built(toy_config(toy, targets_per_reference=3, **usual), tmp_path / "out")
    assert logged(log) == {"rewrite": 6, "generate": 6, "measure": 6}, (
        "one more target per reference, with the default distribution"
    )
    fresh = toy_config(targets_per_reference=3, **usual)
    assert contents(tmp_path / "out") == contents_of(fresh, tmp_path / "fresh")


def test_failed_items_are_rejected_with_their_reason_for_good(tmp_path: Path) -> None:
    toy = {"failing": ("p1", "p2-0-0"), "raising": ("p3-1-0",)}
    out = built(toy_config(toy), tmp_path / "out")
    rejected = [(line["step"], line["key"], line["reason"]) for line in lines(tmp_path / "out" / "rejections.jsonl")]
    assert rejected.count(("import", "reference 1", "refused")) == 2  # both targets of the reference are lost
    assert out.funnel.as_json()["rejected"]["import"] == {"refused": 1}, "counted once"
    assert out.funnel.as_json()["rejected"]["generate"] == {"an item that cannot be used": 1, "refused": 1}
    assert (tmp_path / "out" / "parked.jsonl").read_text() == ""
    assert built(toy_config(), tmp_path / "out").made == {}, "stored failures are not retried"


def test_items_that_crash_the_backend_are_deferred_and_done_by_the_next_run(tmp_path: Path) -> None:
    out = built(toy_config({"breaking": ("p2-0-0", "p4")}), tmp_path / "out")
    deferred = lines(tmp_path / "out" / "parked.jsonl")
    assert {(line["step"], line["reason"]) for line in deferred} == {
        ("import", BACKEND_CRASHED),
        ("generate", BACKEND_CRASHED),
    }
    assert out.funnel.deferred == len(deferred) == 3 and "RuntimeError: broke at p4" in deferred[-1]["detail"]
    assert contents(tmp_path / "out") != contents_of(toy_config(), tmp_path / "fresh")
    again = built(toy_config(), tmp_path / "out")
    assert again.funnel.deferred == 0 and 0 < again.made["generate"] < 12
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_backend_that_crashes_at_every_item_ends_the_build_with_any_chunk(tmp_path: Path) -> None:
    for chunk in (1, 4):
        everything = {"breaking": tuple(f"p{number}" for number in range(6))}
        with pytest.raises(ImagineError, match=r"failed at all \d items .*broke at p"):
            built(toy_config(everything, chunk=chunk), tmp_path / str(chunk))
    out = built(toy_config({"breaking": ("p0", "p1", "p2", "p4", "p5")}, chunk=1), tmp_path / "some")
    assert out.funnel.deferred == 10, "fewer than four in a row may have other causes than the backend"


def test_items_of_an_endpoint_that_is_down_are_deferred_and_the_build_continues(tmp_path: Path) -> None:
    (tmp_path / "down").write_text("p0 p5")
    config = toy_config({"down": str(tmp_path / "down")})
    out = built(config, tmp_path / "out")
    assert out.funnel.as_json()["parked"] == {"import": {"the endpoint is down": 4}}
    console = Console(file=io.StringIO(), width=200)
    print_funnel(out.funnel, console)
    printed = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "4 targets are deferred (parked.jsonl): run the same command again" in printed
    assert "import the endpoint is down 4 for example: p0 was not answered." in printed
    assert out.funnel.deferred == 4 and out.manifest["counts"]["parked"] == 4 and out.manifest["counts"]["pairs"] > 0
    assert {line["reason"] for line in lines(tmp_path / "out" / "parked.jsonl")} == {"the endpoint is down"}
    (tmp_path / "down").unlink()
    assert built(config, tmp_path / "out").funnel.deferred == 0
    assert read(tmp_path / "out", tmp_path).mark == read_mark(toy_config(), tmp_path / "fresh")


def read_mark(config: BuildConfig, output: Path) -> str:
    built(config, output)
    return open_records(output).mark


def test_a_backend_that_fails_at_every_item_stops_the_build(tmp_path: Path) -> None:
    with pytest.raises(ImagineError, match=r"import: ToyPeople failed at all 2 items \(RuntimeError: broke at p1; in "):
        built(toy_config({"breaking": tuple(f"p{number}" for number in range(6))}), tmp_path / "out")


def test_worker_processes_give_the_same_pairs(uninterrupted: Path, tmp_path: Path) -> None:
    built(toy_config(workers=2, chunk=1), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(uninterrupted)


def test_shards_and_reports_go_to_any_filesystem(uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name a local folder as work=DIR"):
        build(toy_config(), "memory://pairs")
    build(toy_config(work=tmp_path / "work"), "memory://pairs")
    filesystem = fsspec.filesystem("memory")
    there = {name.rsplit("/", 1)[-1]: filesystem.cat_file(name) for name in filesystem.ls("/pairs", detail=False)}
    assert there == contents(uninterrupted)
    build(toy_config(work=tmp_path / "work", records_per_shard=4), "memory://pairs")
    assert open_records("memory://pairs", cache=tmp_path / "cache").counts[0] == 4


def test_an_output_that_cannot_be_written_is_reported_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    log = tmp_path / "log"
    config = toy_config({"log": str(log)}, work=tmp_path / "work")
    with pytest.raises(ConfigError, match="cannot be written"):
        build(config, str(tmp_path / "file" / "pairs"))
    with pytest.raises(ConfigError, match="cannot be used as the output folder"):
        build(config, "no-such-protocol://pairs")
    assert not log.exists(), "nothing was computed"
    build(config, "memory://probed")
    assert not [name for name in fsspec.filesystem("memory").ls("/probed", detail=False) if "build." in name]


def test_two_outputs_with_one_work_folder_do_not_affect_each_other(uninterrupted: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    built(toy_config(work=work), tmp_path / "one")
    other = toy_config(work=work, filters={"similarity": [0.6, 1.0]}, title="Others")
    built(other, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(uninterrupted)
    assert contents(tmp_path / "two") == contents_of(other.model_copy(update={"work": None}), tmp_path / "fresh")
    assert {path.name.split(".")[0] for path in work.iterdir()} == {"store", "build"}, (
        "the work folder holds no reports"
    )


@pytest.mark.parametrize("settings", [None, '{"version": 1, "seed": 0}'])
def test_shards_that_no_build_wrote_are_not_overwritten(tmp_path: Path, settings: str | None) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    out.mkdir()
    (out / "00007.tar").write_bytes(b"by img2dataset")
    (out / "00007.json").write_text("{}")
    if settings is not None:  # as written by `data_synth world --shards`
        (out / "settings.json").write_text(settings)
    before = contents(out)
    with pytest.raises(ConfigError, match="holds shards that no build wrote"):
        built(toy_config({"log": str(log)}), out)
    assert contents(out) == before and not log.exists(), "reported before any work"
    built(toy_config(work=out), tmp_path / "elsewhere")
    assert contents(out) == before


def test_a_smaller_build_deletes_surplus_shards(tmp_path: Path) -> None:
    built(toy_config(filters={"similarity": [0.0, 1.0]}), tmp_path / "out")
    many = len(list((tmp_path / "out").glob("*.tar")))
    built(toy_config(filters={"similarity": [0.6, 1.0]}), tmp_path / "out")
    assert 0 < len(list((tmp_path / "out").glob("*.tar"))) < many
    assert contents(tmp_path / "out") == contents_of(toy_config(filters={"similarity": [0.6, 1.0]}), tmp_path / "fresh")


def test_the_next_build_applies_the_decisions_of_reviewers(tmp_path: Path) -> None:
    out, config = tmp_path / "out", toy_config(review="optional")
    pairs = built(config, out).manifest["counts"]["pairs"]
    session = Review(out / review.FILE)
    numbers = session.state("ann")["open"]
    assert len(numbers) == pairs
    shown = session.pair(numbers[0], "ann")
    assert shown["rounds"], "the similarity after each round is shown"
    session.decide(numbers[0], Opinion("ann", "reject", reason="another person"))
    session.decide(numbers[1], Opinion("ann", "fix", caption="somebody in better words"))
    fixed = session.pair(numbers[1], "ann")["key"]
    again = built(config, out)
    assert again.made == {} and again.manifest["counts"]["pairs"] == pairs - 1
    records = {record.key: record for record in open_records(out, cache=tmp_path / "cache")}
    assert shown["key"] not in records
    assert records[fixed].caption == records[fixed].captions["rewritten"] == "somebody in better words"
    assert ("review", "another person") in again.funnel.reasons
    strict = built(toy_config(review="required"), out)
    assert (
        strict.manifest["counts"]["pairs"] == 1 and strict.funnel.reasons["review", "waits for a reviewer"] == pairs - 2
    )


def test_near_duplicates_across_the_build_are_rejected(tmp_path: Path) -> None:
    off = built(toy_config(filters={"duplicates": None}, targets_per_reference=30), tmp_path / "out")
    on = built(toy_config(targets_per_reference=30), tmp_path / "out")
    gone = on.funnel.reasons["filter", "nearly the same as another picture"]
    assert on.made == {} and gone > 0
    assert on.manifest["counts"]["pairs"] == off.manifest["counts"]["pairs"] - gone


def test_a_build_without_usable_photos_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no photo that can be used"):
        built(toy_config({"count": 0}), tmp_path / "out")
