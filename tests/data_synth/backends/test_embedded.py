"""Test the portrait world's backends: results do not depend on the batch, and match the specification."""

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_synth.__main__ import main
from data_synth.backends.contracts import Draft, Failed, Target
from data_synth.backends.embedded import GrammarCaptioner, GrammarRewriter, Renderer, Truth, WorldPeople
from data_synth.backends.own_generator import ImagineGenerator
from data_synth.records import Candidate, Measures, Reference, TargetSpec
from imagine.errors import ConfigError
from imagine.shards.reading import open_records
from imagine.world.captions import PHRASES
from tests import tiny

AIMS: tuple[dict[str, str], ...] = (
    {"expression": "laughing", "yaw": "left", "scene": "beach", "style": "pencil"},
    {"expression": "sad", "gaze": "right", "pitch": "up", "roll": "left"},
    {"clothes": "suit", "framing": "close-up", "held": "balloon"},
    {},
)
STRANGER = Reference("stranger", b"")


@pytest.fixture(scope="module")
def people() -> list[Reference]:
    return WorldPeople(WorldPeople.Settings(identities=20, size=32)).draw(range(20))


def work(people: list[Reference]) -> list[tuple[Reference, TargetSpec, int]]:
    """Return one item per person; the aims repeat every four people."""
    return [
        (one, TargetSpec(f"{one.key}-0", one.key, "", "", AIMS[number % len(AIMS)], 1000 + number), number % 2)
        for number, one in enumerate(people)
    ]


def generated(renderer: Renderer, some: list[tuple[Reference, TargetSpec, int]]) -> list[Candidate]:
    made = renderer.generate(some)
    assert all(isinstance(one, Candidate) for one in made)
    return [one for one in made if isinstance(one, Candidate)]


def test_references_do_not_depend_on_the_batch(people: list[Reference]) -> None:
    source = WorldPeople(WorldPeople.Settings(identities=20, size=32))
    assert source.draw([7]) == [people[7]]
    assert source.draw([19, 3]) == [people[19], people[3]]
    assert len({one.person for one in people}) == len({one.key for one in people}) == 20
    assert {one.facts["attributes"]["style"] for one in people} == {"photo"}
    assert set(people[0].facts["groups"]) == {"skin tone", "age"}
    with Image.open(io.BytesIO(people[0].image)) as image:
        assert (image.size, image.format) == ((32, 32), "PNG")


def test_targets_do_not_depend_on_the_batch_and_show_their_aims(people: list[Reference]) -> None:
    renderer, some = Renderer(Renderer.Settings(size=32)), work(people)
    together = generated(renderer, some)
    apart = [one for part in (some[:1], some[1:8], some[8:17], some[17:]) for one in generated(renderer, part)]
    assert together == apart
    for (_, spec, _), made in zip(some, together, strict=True):
        shown = made.facts["attributes"]
        # A close-up cuts off held objects.
        wanted = {name: "none" if name == "held" else value for name, value in spec.aims.items()}
        assert {name: shown[name] for name in wanted} == wanted
        assert shown["letters"] == "" or shown["clothes"] in ("t-shirt", "hoodie")


def test_the_rewritten_caption_describes_the_rendered_picture(people: list[Reference]) -> None:
    some = work(people)
    targets = [Target(reference, "", spec.aims, spec.seed) for reference, spec, _ in some]
    rewriter = GrammarRewriter(GrammarRewriter.Settings())
    sentences = rewriter.rewrite(targets)
    assert sentences[4:9] == rewriter.rewrite(targets[4:9])
    pictures = generated(Renderer(Renderer.Settings(size=32)), some)
    mentioned = 0
    for sentence, picture in zip(sentences, pictures, strict=True):
        assert isinstance(sentence, str)
        for name, phrases in PHRASES.items():
            found = [value for value, some in phrases.items() if any(f", {one}" in sentence for one in some)]
            assert found in ([], [picture.facts["attributes"][name]]), (name, sentence)
            mentioned += len(found)
    assert mentioned > 60


def test_more_drift_lowers_the_similarity_that_truth_measures(people: list[Reference]) -> None:
    some = work(people)
    means = []
    for drift in (0.0, 0.06, 0.2):
        made = generated(Renderer(Renderer.Settings(size=32, drift=drift)), some)
        drafts = [Draft(reference, spec, one) for (reference, spec, _), one in zip(some, made, strict=True)]
        measured = [one for one in Truth(Truth.Settings()).measure(drafts) if isinstance(one, Measures)]
        assert len(measured) == 20 and all(one.faces == 1 and len(one.picture_hash) == 16 for one in measured)
        means.append(np.mean([one.similarity or 0.0 for one in measured]))
    assert means[0] == 1.0 and 0.8 < means[1] < 0.88 and 0.4 < means[2] < 0.65


def test_strangers_have_a_low_similarity(people: list[Reference]) -> None:
    made = generated(Renderer(Renderer.Settings(size=32, strangers=0.5, drift=0.02)), work(people))
    unlike = [one.facts["similarity"] < 0.5 for one in made]
    assert 4 <= sum(unlike) <= 16


def test_the_difference_is_the_share_of_changed_pose_attributes(people: list[Reference]) -> None:
    facts = {**people[0].facts, "similarity": 1.0}
    same = Candidate("a", "b", b"", facts=facts)
    other = replace(same, facts={**facts, "attributes": {**facts["attributes"], "yaw": "-", "gaze": "-"}})
    spec = TargetSpec("b", people[0].key, "", "")
    measured = Truth(Truth.Settings()).measure([Draft(people[0], spec, same), Draft(people[0], spec, other)])
    assert [one.difference for one in measured if isinstance(one, Measures)] == [0.0, 0.4]


def test_items_of_other_people_fail_without_affecting_the_others(people: list[Reference]) -> None:
    captions = GrammarCaptioner(GrammarCaptioner.Settings()).caption([STRANGER, people[0]])
    assert isinstance(captions[0], Failed) and isinstance(captions[1], str)
    spec = TargetSpec("x-0", "x", "", "", {}, 5)
    made = Renderer(Renderer.Settings(size=32)).generate([(people[1], spec, 0), (STRANGER, spec, 0)])
    assert isinstance(made[0], Candidate) and isinstance(made[1], Failed)
    assert isinstance(GrammarRewriter(GrammarRewriter.Settings()).rewrite([Target(STRANGER, "", {}, 1)])[0], Failed)
    assert isinstance(Truth(Truth.Settings()).measure([Draft(STRANGER, spec, Candidate("", "", b""))])[0], Failed)


@pytest.mark.parametrize(("aims", "sentence"), [({"pose": "x"}, "no pose 'x'"), ({"yaw": "up"}, "no yaw 'up'")])
def test_an_unknown_aim_raises_one_sentence(people: list[Reference], aims: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        GrammarRewriter(GrammarRewriter.Settings()).rewrite([Target(people[0], "", aims, 1)])


def test_the_shipped_build_file_builds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["references.identities=12", "workers=0", "chunk=5", "records_per_shard=20", "filters.difference=0.2"]
    small += ["references.size=32", "generator.size=32", "references.compiled=false", "generator.compiled=false"]
    out = tmp_path / "pairs"
    assert main(["build", "configs/pairs_world.yaml", "--output", str(out), *small]) == 0
    printed = capsys.readouterr().out
    assert "targets asked for" in printed and f"shards: {out}" in printed
    records = open_records(out, cache=tmp_path / "cache")
    pairs = records.pairs()
    assert records.problems == {} and len(pairs) > 30
    shown = Counter(records[target].extra["attributes"]["expression"] for _, target in pairs)
    assert len(shown) == 6
    target = records[pairs[0][1]]
    assert target.box is not None and "person" in target.captions["rewritten"]
    assert {"card.html", "card.json", "funnel.json", "funnel.png", "manifest.json"} <= {
        one.name for one in out.iterdir()
    }


def test_our_own_pipeline_generates_candidates(people: list[Reference], tmp_path: Path) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "weights")
    specs = [
        replace(spec, prompt=prompt)
        for (_, spec, _), prompt in zip(
            work(people)[:3], (*tiny.SENTENCES[:1], "a hat " * 40, "an old woman"), strict=True
        )
    ]
    some = [(reference, spec, 0) for reference, spec in zip(people, specs, strict=False)]
    made = {}
    for size in (1, 3):
        settings = ImagineGenerator.Settings(model=str(tmp_path / "weights"), steps=2, batch_size=size, device="cpu")
        generator = ImagineGenerator(settings)
        generator.load()
        made[size] = generator.generate(some)
    assert generator.identity["model"] == "weights" and len(generator.identity["weights"]) == 16
    too_long = made[3][1]
    assert isinstance(too_long, Failed) and not too_long.for_now
    for one, two in zip(made[1], made[3], strict=True):
        if isinstance(one, Candidate) and isinstance(two, Candidate):
            pixels = [np.asarray(Image.open(io.BytesIO(each.image)), int) for each in (one, two)]
            assert pixels[0].shape == (32, 32, 3) and np.abs(pixels[0] - pixels[1]).max() <= 1
    other = generator.generate([(some[0][0], some[0][1], 1)])[0]
    assert isinstance(other, Candidate) and isinstance(made[3][0], Candidate) and other.image != made[3][0].image


def test_compiling_without_a_compiler_raises_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    Renderer(Renderer.Settings(size=32)).load()
    people = WorldPeople(WorldPeople.Settings(identities=1, compiled=True))
    for backend in (Renderer(Renderer.Settings(compiled=True)), people):
        with pytest.raises(ConfigError, match="install g\\+\\+"):
            backend.load()
