"""Every method that is trained for each person, on tiny bases of all three kinds."""

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from imagine.errors import ConfigError, PictureError
from tests.train.methods.tiny_bases import fill, overrides, tiny_run
from train.data.order import normals
from train.methods.bases.opening import open_base
from train.methods.registry import METHODS, TUNED
from train.methods.runs import load_method_run, open_learnt, train_method
from train.methods.task import read_card
from train.methods.tuned.custom_diffusion import merged_weights
from train.run import parts
from train.run.checkpoint import read_tensors
from train.stages import run_stages, task_class
from train.task import TaskContext

CPU = torch.device("cpu")
EVERY = [(method, "world") for method in TUNED]
ON_OTHERS = [(method, base) for method in TUNED for base in ("sd15", "sdxl")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("methods"))


@pytest.fixture(autouse=True)
def _copied_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open each tiny base once and copy it, because reading its files takes most of the time of a test."""
    monkeypatch.setattr("train.methods.task.open_base", copied_base)


_opened: dict[str, Any] = {}


def copied_base(source: str, device: torch.device) -> Any:
    if source not in _opened:
        _opened[source] = open_base(source, CPU)
    return copy.deepcopy(_opened[source])


def drawn(task: Any) -> torch.Tensor:
    noise = normals(0, "test", 0, 1, task.base.latent_shape)
    return task.draw([f"a {task.naming.name()}"], noise, 2, 2.0)


def plain_drawing(base: Any) -> torch.Tensor:
    noise = normals(0, "test", 0, 1, base.latent_shape)
    with torch.no_grad():
        text = base.text(["a person"])
        latents: torch.Tensor = base.sample(noise, lambda noisy, step: base.predict(noisy, step, text), 2)
    return latents


def trained_by_hand(method: str, base: str, home: Path, folder: Path) -> Any:
    """Return a task after two steps of Adam on its declared parts, exported to folder / "export"."""
    run = tiny_run(method, base, home)
    stage = run.stages[method]
    kind = task_class(method, METHODS, method)
    context = TaskContext(method, 3, CPU, folder, run.data, trains=tuple(stage.train))
    task = kind(kind.Settings.model_validate(stage.settings), context)
    chosen = parts.choose(task.parts(), stage.train, method)
    training = parts.freeze_all_but(task.modules, chosen)
    with torch.no_grad():
        task.prepare()
    optimiser = torch.optim.AdamW([p for some in chosen.values() for p in some], lr=1e-2, weight_decay=0.1)
    for first in (0, 2):
        loss = task.loss(task.batch(first, 2), first).per_sample.mean()
        assert torch.isfinite(loss)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for some in chosen.values():
        assert all(p.grad is not None for p in some[:1])
    parts.train_mode(task.modules, ())
    assert training
    (folder / "export").mkdir()
    task.export(folder / "export")
    (folder / "stage.yaml").write_text(yaml.safe_dump({**stage.model_dump(mode="json"), "data": run.data}))
    return task


def rows_of(output: Path, method: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / method / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("method", "base"), [*EVERY, *ON_OTHERS])
def test_a_method_learns_what_it_declares_and_nothing_else(method: str, base: str, home: Path, tmp_path: Path) -> None:
    task = trained_by_hand(method, base, home, tmp_path)
    with torch.no_grad():
        in_memory = drawn(task)
    loaded = open_learnt(tmp_path)
    assert torch.equal(drawn(loaded), in_memory)  # what was saved draws what it drew in memory
    card = read_card(tmp_path / "export")
    assert card["bytes"] == (tmp_path / "export" / "learnt.safetensors").stat().st_size and card["method"] == method
    fresh = copied_base(str(home / base), CPU)
    task.detach()
    before, after = fresh.unet.state_dict(), task.base.unet.state_dict()
    assert before.keys() == after.keys()
    if method == "dreambooth":  # its weights are the denoiser's own; every other method can be taken off again
        assert any(not torch.equal(before[name], after[name]) for name in before)
    else:
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert torch.equal(plain_drawing(task.base), plain_drawing(fresh))
    for one, other in zip(fresh.readers, task.base.readers, strict=True):  # other words are untouched, bit for bit
        old, new = one.model.state_dict(), other.model.state_dict()
        assert all(torch.equal(v, new[k][: len(v)] if v.dim() else new[k]) for k, v in old.items())
    with torch.no_grad():  # without what was learnt the picture is another one
        for module in loaded.modules.values():
            for parameter in module.parameters():
                parameter.add_(0.05)
    loaded._texts.clear()
    assert not torch.equal(drawn(loaded), in_memory)


@pytest.mark.parametrize("method", ["textual_inversion", "perfusion", "dreambooth_lora"])
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(method: str, home: Path, tmp_path: Path) -> None:
    run = tiny_run(method, "world", home)
    found = train_method(run, tmp_path / "straight")
    assert found is not None and found["bytes_per_person"] > 0 and found["images"] == 8
    kind = task_class(method, METHODS, method)

    class Interrupted(kind):  # type: ignore[misc, valid-type]
        def batch(self, images_seen: int, size: int) -> Any:
            if images_seen == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(images_seen, size)

    assert not run_stages(run, tmp_path / "run", tasks={method: Interrupted})
    assert train_method(run, tmp_path / "run") is not None
    for name in (f"{method}/export/learnt.safetensors", f"{method}/checkpoints/000000000008.safetensors"):
        one, other = read_tensors(tmp_path / "straight" / name)[0], read_tensors(tmp_path / "run" / name)[0]
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


def test_the_loss_falls_on_the_photos(home: Path, tmp_path: Path) -> None:
    run = tiny_run("dreambooth", "world", home, "images=80", "train.unet=3e-3", "settings.prior=0", "batch_size=4",
                   "validate_every=4", "checkpoint_every_seconds=100")  # fmt: skip
    assert train_method(run, tmp_path / "run") is not None
    losses = [
        r["validate/validation_loss"]
        for r in rows_of(tmp_path / "run", "dreambooth")
        if "validate/validation_loss" in r
    ]
    assert losses[-1] < 0.8 * losses[0]


def test_prior_pictures_are_drawn_once_and_their_error_is_part_of_the_loss(home: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        task = trained_by_hand("dreambooth_lora", "world", home, tmp_path / name)
        files = {path: path.stat().st_mtime_ns for path in (home / "prior").rglob("*.safetensors")}
        if name == "one":
            before = files
    assert files == before and files
    with torch.no_grad():
        found = task.loss(task.batch(0, 2), 0)
    assert float(found.per_sample.mean().detach()) == pytest.approx(
        float((found.metrics["error"] + found.metrics["prior"]).detach()), rel=1e-5
    )


def test_pivotal_tuning_freezes_the_word(home: Path, tmp_path: Path) -> None:
    more = ("settings.vectors=2", "settings.word_images=4", "settings.token=null", "train.words=1e-2")
    train_method(tiny_run("dreambooth_lora", "world", home, *more), tmp_path / "run")
    checkpoints = tmp_path / "run" / "dreambooth_lora" / "checkpoints"
    first, frozen, last = (read_tensors(checkpoints / f"{seen:012d}.safetensors")[0] for seen in (2, 4, 8))
    word, lora = "weights/words.rows.clip", [name for name in first if name.startswith("weights/lora")]
    assert not torch.equal(first[word], frozen[word]) and torch.equal(frozen[word], last[word])
    assert any(not torch.equal(frozen[name], last[name]) for name in lora)


def test_two_subjects_with_cut_mix_and_location_loss(home: Path, tmp_path: Path) -> None:
    more = ("settings.cut_mix=1", "settings.location=1", "settings.prior=0")
    # the sentence for two people does not fit the windows of the tiny text encoders
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "train.methods.sentences.Naming.side_by_side",
            lambda self, left, right: " ".join(self.tokens[number] for number in (left, right)),
        )
        for base in ("world",):
            run = tiny_run("svdiff", base, home, *more, people=("anna", "ben"))
            train_method(run, tmp_path / base)
            row = rows_of(tmp_path / base, "svdiff")[0]
            assert row["location"] > 0 and row["loss"] == pytest.approx(row["error"] + row["location"], rel=1e-4)


def test_custom_diffusion_says_the_scale_and_leaves_out_the_padding(home: Path) -> None:
    from train.methods.subjects import scaled_items

    base = open_base(str(home / "world"), CPU)
    items = scaled_items(base, [[home / "anna" / "0.png"]], 12, 0)
    far = [row for row, words in enumerate(items.prefixes) if words in ("very small", "far away")]
    close = [row for row, words in enumerate(items.prefixes) if words in ("zoomed in", "close up")]
    assert far and close
    assert all(items.weights[row].min() == 0 for row in far) and all(items.weights[row].min() == 1 for row in close)


def test_merged_keys_and_values_keep_both_subjects_and_change_other_words_least() -> None:
    torch.manual_seed(0)
    old = {"layer": torch.randn(6, 10)}
    words = [torch.randn(2, 10), torch.randn(3, 10)]
    tuned = [({"layer": old["layer"] + torch.randn(6, 10)}, each) for each in words]
    others = torch.randn(200, 10)
    merged = merged_weights(old, tuned, others, ridge=0)["layer"]
    for weights, features in tuned:
        assert torch.allclose(features @ merged.T, features @ weights["layer"].T, atol=1e-4)
    change = (others @ (merged - old["layer"]).T).square().sum()
    free = torch.randn(6, 10)
    joined = torch.cat(words)
    free = free - (free @ joined.T) @ torch.linalg.pinv(joined).T  # another solution of the same constraints
    assert change < (others @ (merged + 0.1 * free - old["layer"]).T).square().sum()


def test_wrong_input_is_one_sentence(home: Path) -> None:
    nobody = {"base": str(home / "world"), "photos": [["nobody.png"]]}
    with pytest.raises(PictureError, match="There is no file"):
        train_method(load_method_run("dreambooth", None, overrides("dreambooth", home), nobody), home / "no")
    with pytest.raises(ConfigError, match="cut_mix needs two subjects"):
        train_method(tiny_run("svdiff", "world", home, "settings.cut_mix=0.5"), home / "no")
    with pytest.raises(ConfigError, match="one subject"):
        train_method(tiny_run("neti", "world", home, people=("anna", "ben")), home / "no")
    with pytest.raises(ConfigError, match=r"no method 'dreambooht'.*did you mean dreambooth"):
        load_method_run("dreambooht", None, [])
    with pytest.raises(ConfigError, match="there is no key 'rankk'"):
        load_method_run("dreambooth_lora", None, ["settings.rankk=3"])
