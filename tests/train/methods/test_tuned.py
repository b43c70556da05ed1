"""Every method that is trained for each person, on tiny bases of all three kinds."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from imagine.errors import ConfigError, PictureError
from tests.train.methods.tiny_bases import BASES, fill, overrides, tiny_run
from train.data.order import normals
from train.methods.bases.opening import open_base
from train.methods.registry import METHODS, TUNED
from train.methods.runs import load_method_run, open_learnt, train_method
from train.methods.task import read_card
from train.methods.tuned.custom_diffusion import merged_weights
from train.run.checkpoint import read_tensors
from train.stages import run_stages, task_class

CPU = torch.device("cpu")
CHANGES = {"dreambooth": ("",), "custom_diffusion": ("to_k.", "to_v."), "svdiff": ("bias", "norm")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module")
def learnt(home: Path) -> Callable[[str, str], Path]:
    """Return a function that trains a method on a base once and returns the folder of the run."""
    made: dict[tuple[str, str], Path] = {}

    def train_once(method: str, base: str) -> Path:
        if (method, base) not in made:
            output = home / "runs" / f"{method}-{base}"
            assert train_method(tiny_run(method, base, home), output) is not None
            made[method, base] = output
        return made[method, base]

    return train_once


def drawn(task: Any) -> torch.Tensor:
    sentence = f"a {task.naming.name()}"
    noise = normals(0, "test", 0, 1, task.base.latent_shape)
    return task.draw([sentence], noise, 2, 2.0)


def rows_of(output: Path, method: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / method / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", TUNED)
def test_a_method_learns_only_what_it_declares(
    method: str, base: str, home: Path, learnt: Callable[[str, str], Path]
) -> None:
    output = learnt(method, base)
    assert all(math.isfinite(row["loss"]) for row in rows_of(output, method) if "loss" in row)
    task = open_learnt(output)
    fresh = open_base(str(home / base), CPU)
    with torch.no_grad():
        plain = fresh.sample(
            normals(0, "test", 0, 1, fresh.latent_shape),
            lambda noisy, step: fresh.predict(noisy, step, fresh.text(["a person"])), 2,
        )  # fmt: skip
    task.detach()
    before, after = fresh.unet.state_dict(), task.base.unet.state_dict()
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    allowed = CHANGES.get(method, ())
    if method != "dreambooth":  # its weights are the denoiser's own; every other method can be taken off again
        assert changed == []
        with torch.no_grad():
            again = task.base.sample(
                normals(0, "test", 0, 1, fresh.latent_shape),
                lambda noisy, step: task.base.predict(noisy, step, task.base.text(["a person"])), 2,
            )  # fmt: skip
        assert torch.equal(plain, again)
    else:
        assert changed and allowed
    for one, other in zip(fresh.readers, task.base.readers, strict=True):
        old, new = one.model.state_dict(), other.model.state_dict()
        for name, value in old.items():
            assert torch.equal(value, new[name][: len(value)] if value.dim() else new[name]), name


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", TUNED)
def test_a_loaded_method_draws_what_it_drew_when_it_was_trained(
    method: str, base: str, home: Path, learnt: Callable[[str, str], Path]
) -> None:
    output = learnt(method, base)
    task = open_learnt(output)
    loaded = drawn(task)
    assert torch.equal(loaded, drawn(open_learnt(output)))
    with torch.no_grad():  # what was learnt matters: without it the picture is another one
        for module in task.modules.values():
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.ones_like(parameter))
    task._texts.clear()
    assert not torch.equal(loaded, drawn(task))
    found = json.loads((output / "result.json").read_text())
    export = output / method / "export"
    assert found["bytes_per_person"] == (export / "learnt.safetensors").stat().st_size > 0
    assert found["seconds_per_person"] >= 0 and found["images"] == 8 and found["method"] == read_card(export)["method"]


@pytest.mark.parametrize("method", TUNED)
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    method: str, home: Path, learnt: Callable[[str, str], Path], tmp_path: Path
) -> None:
    straight = learnt(method, "world")
    run = tiny_run(method, "world", home)
    kind = task_class(method, METHODS, method)

    class Interrupted(kind):  # type: ignore[misc, valid-type]
        def batch(self, images_seen: int, size: int) -> Any:
            if images_seen == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(images_seen, size)

    assert not run_stages(run, tmp_path / "run", tasks={method: Interrupted})
    assert train_method(run, tmp_path / "run") is not None
    names = [f"{method}/export/learnt.safetensors", f"{method}/checkpoints/000000000008.safetensors"]
    for name in names:
        one, other = read_tensors(straight / name)[0], read_tensors(tmp_path / "run" / name)[0]
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


def test_the_loss_falls_on_the_photos(home: Path, tmp_path: Path) -> None:
    run = tiny_run("dreambooth", "world", home, "images=160", "train.unet=3e-3", "settings.prior=0", "batch_size=4",
                   "validate_every=4", "checkpoint_every_seconds=100")  # fmt: skip
    assert train_method(run, tmp_path / "run") is not None
    losses = [r["validate/validation_loss"] for r in rows_of(tmp_path / "run", "dreambooth") if "validate/validation_loss" in r]
    assert losses[-1] < 0.8 * losses[0]


def test_prior_pictures_are_drawn_once_and_their_error_is_part_of_the_loss(
    home: Path, learnt: Callable[[str, str], Path], tmp_path: Path
) -> None:
    learnt("dreambooth", "world")
    files = {path: path.stat().st_mtime_ns for path in (home / "prior").rglob("*.safetensors")}
    assert files
    run = tiny_run("dreambooth", "world", home)
    train_method(run, tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in files} == files
    row = rows_of(tmp_path / "run", "dreambooth")[0]
    assert row["loss"] == pytest.approx(row["error"] + row["prior"], rel=1e-4)


def test_pivotal_tuning_freezes_the_word(home: Path, tmp_path: Path) -> None:
    more = ("settings.vectors=2", "settings.word_images=4", "settings.token=null", "train.words=1e-2")
    train_method(tiny_run("dreambooth_lora", "world", home, *more), tmp_path / "run")
    checkpoints = tmp_path / "run" / "dreambooth_lora" / "checkpoints"
    tensors = [read_tensors(path)[0] for path in sorted(checkpoints.glob("*.safetensors"))]
    rows = [each["weights/words.rows.clip"] for each in tensors]
    lora = [next(value for key, value in each.items() if "lora_B" in key) for each in tensors]
    assert not torch.equal(rows[0], rows[1]) and torch.equal(rows[-1], rows[-2])
    assert not torch.equal(lora[-1], lora[-2])


def test_two_subjects_with_cut_mix_and_location_loss(home: Path, tmp_path: Path) -> None:
    more = ("settings.cut_mix=1", "settings.location=1", "settings.prior=0")
    # the sentence for two people does not fit the windows of the tiny text encoders
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.methods.sentences.Naming.side_by_side", lambda self, left, right: " ".join(
            self.tokens[number] for number in (left, right)))
        for base in ("world", "sd15"):
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
    with pytest.raises(PictureError, match="There is no file"):
        train_method(load_method_run("dreambooth", None, overrides("dreambooth", home),
                                     {"base": str(home / "world"), "photos": [["nobody.png"]]}), home / "no")  # fmt: skip
    with pytest.raises(ConfigError, match="cut_mix needs two subjects"):
        train_method(tiny_run("svdiff", "world", home, "settings.cut_mix=0.5"), home / "no")
    with pytest.raises(ConfigError, match="one subject"):
        train_method(tiny_run("neti", "world", home, people=("anna", "ben")), home / "no")
    with pytest.raises(ConfigError, match="no method 'dreambooht'.*did you mean dreambooth"):
        load_method_run("dreambooht", None, [])
    with pytest.raises(ConfigError, match="there is no key 'rankk'"):
        load_method_run("dreambooth_lora", None, ["settings.rankk=3"])


def test_files_of_a_person_are_small(learnt: Callable[[str, str], Path]) -> None:
    sizes = {
        method: sum(v.numel() for v in load_file(learnt(method, "world") / method / "export" / "learnt.safetensors").values())
        for method in TUNED
    }
    assert sizes["textual_inversion"] < sizes["prompt_plus"] < sizes["custom_diffusion"] < sizes["dreambooth"]
