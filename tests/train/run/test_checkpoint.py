"""Checkpoints: written atomically, restored exactly, and loaded strictly."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from imagine.errors import WeightsError
from train.run import checkpoint, parts
from train.run.checkpoint import Checkpoint, Progress, State
from train.run.ema import Average


def state(images_seen: int = 0, width: int = 4, half_life: float = 100, tied: bool = False) -> State:
    torch.manual_seed(images_seen)
    body = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
    if tied:
        body[1].again = body[0]
    chosen = {"body": list(body.parameters())}
    trained = parts.named({"body": body}, chosen)
    optimiser = parts.optimiser(chosen, {"body": 1e-2}, (0.9, 0.99), 0.1)
    return State({"body": body}, trained, optimiser, Average(trained, half_life), Progress(images_seen), {}, "fp32")


def train_a_little(state: State, steps: int = 2) -> None:
    for _ in range(steps):
        state.modules["body"](torch.randn(2, 3, 5, 5)).square().mean().backward()
        state.optimiser.step()
        state.optimiser.zero_grad()
        state.progress.images_seen += 2
        state.average.update(state.progress.images_seen, 2)


def everything(state: State) -> dict[str, torch.Tensor]:
    found = checkpoint.weights(state.modules, ["body"])
    found |= {f"average {name}": value for name, value in state.average.values.items()}
    for name, parameter in state.trained.items():
        found |= {f"{key} {name}": value for key, value in state.optimiser.state[parameter].items()}
    return {name: value.clone() for name, value in found.items()}


def anything(_: Checkpoint) -> bool:
    return True


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_restored_is_what_was_saved(tmp_path: Path, tied: bool) -> None:
    before, after = state(tied=tied), state(99, tied=tied)
    before.modules["body"].to(memory_format=torch.channels_last)
    train_a_little(before)
    checkpoint.save(tmp_path, before, keep=2)
    saved = checkpoint.load(tmp_path, anything)
    assert saved is not None
    checkpoint.restore(after, saved, "here")
    assert after.progress == before.progress
    expected, found = everything(before), everything(after)
    assert expected.keys() == found.keys() and "exp_avg body.0.weight" in found and "body.1.running_mean" in found
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_truncated_newest_checkpoint_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = state()
    for _ in range(2):
        train_a_little(training)
        path = checkpoint.save(tmp_path, training, keep=2)
    path.write_bytes(path.read_bytes()[:-10])
    saved = checkpoint.load(tmp_path, anything)
    assert saved is not None and saved.progress.images_seen == 4 and "cannot be read" in caplog.text


def test_a_folder_with_only_unreadable_checkpoints_is_an_error(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(), keep=2).write_bytes(b"")
    with pytest.raises(WeightsError, match="No checkpoint"):
        checkpoint.load(tmp_path, anything)


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    checkpoint.write_json(path, {"images": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"images": object()})
    assert path.read_text() == '{\n "images": 1\n}' and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    flush = checkpoint._flush

    def recorded(path: Path) -> None:
        flushed.append(path.name)
        flush(path)

    monkeypatch.setattr(checkpoint, "_flush", recorded)
    with checkpoint.replacing(tmp_path / "export") as draft:
        (draft / "unet").mkdir(parents=True)
        (draft / "unet" / "weights").write_text("1")
        (draft / "facts").write_text("1")
    assert {"weights", "unet", "facts", ".export.draft"} <= set(flushed[:-1]) and flushed[-1] == tmp_path.name
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("killed", [False, True])
def test_the_old_folder_is_restored_if_replacing_fails(
    tmp_path: Path, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two renames leaves the old folder under a temporary name; the next call restores it."""

    def write(content: str) -> None:
        with checkpoint.replacing(tmp_path / "export") as draft:
            draft.mkdir()
            (draft / "facts").write_text(content)

    write("old")
    move = os.replace

    def broken(source: Path, place: Path) -> None:
        if Path(source).name.endswith(".draft"):
            raise OSError("the disk is full")
        move(source, place)

    monkeypatch.setattr(os, "replace", broken)
    if killed:
        monkeypatch.setattr(checkpoint, "_restore_previous", lambda *_: None)
    with pytest.raises(OSError, match="full"):
        write("new")
    monkeypatch.undo()
    if killed:
        assert not (tmp_path / "export").exists()
        with pytest.raises(OSError, match="again"), checkpoint.replacing(tmp_path / "export"):
            raise OSError("full again")
    assert (tmp_path / "export" / "facts").read_text() == "old"
    write("newer")
    assert (tmp_path / "export" / "facts").read_text() == "newer" and len(list(tmp_path.iterdir())) == 1


def test_the_newest_and_the_permanent_checkpoints_are_kept(tmp_path: Path) -> None:
    training = state()
    for turn in range(5):
        train_a_little(training, steps=1)
        checkpoint.save(tmp_path, training, keep=2, permanent=turn == 1)
    assert sorted(path.name[8:] for path in tmp_path.iterdir()) == [
        "0004.kept.safetensors", "0008.safetensors", "0010.safetensors"]  # fmt: skip


def test_a_save_deletes_checkpoints_with_more_images_seen(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(10), keep=2)
    checkpoint.save(tmp_path, state(6), keep=2)
    (tmp_path / ".000000000012.safetensors.draft").write_bytes(b"left by a killed run")
    saved = checkpoint.load(tmp_path, anything)
    assert saved is not None and saved.progress.images_seen == 6 and len(list(tmp_path.iterdir())) == 1


def test_the_best_weights_are_restored_with_the_checkpoint(tmp_path: Path) -> None:
    folder, best = tmp_path / "checkpoints", tmp_path / checkpoint.BEST

    def is_best(value: float) -> None:
        checkpoint.write_tensors(best, {"a": torch.tensor([value])}, {"from": f'{{"value": {value}}}'})

    checkpoint.save(folder, state(2), keep=3)  # no best weights yet
    is_best(0.5)
    checkpoint.save(folder, state(4), keep=3)
    is_best(0.1)
    checkpoint.save(folder, state(6), keep=3)
    assert checkpoint.read_provenance(best) == {"value": 0.1}
    checkpoint.restore_best(folder, 4)
    assert checkpoint.read_provenance(best) == {"value": 0.5} and checkpoint.read_tensors(best)[0]["a"] == 0.5
    checkpoint.restore_best(folder, 2)
    assert not best.exists() and checkpoint.read_provenance(best) == {}
    checkpoint.save(folder, state(4), keep=1)  # another continuation, without best weights so far
    assert sorted(path.name[11:] for path in folder.iterdir()) == ["4.safetensors"]


def test_the_best_weights_are_copied_on_a_disk_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("this disk has no hard links")

    monkeypatch.setattr("os.link", refuse)
    checkpoint.write_tensors(tmp_path / checkpoint.BEST, {"a": torch.ones(1)}, {"from": "{}"})
    checkpoint.save(tmp_path / "checkpoints", state(2), keep=1)
    (tmp_path / checkpoint.BEST).unlink()
    checkpoint.restore_best(tmp_path / "checkpoints", 2)
    assert checkpoint.read_tensors(tmp_path / checkpoint.BEST)[0]["a"] == 1


def test_the_newest_fitting_checkpoint_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for images_seen in (2, 4, 6):
        checkpoint.save(tmp_path, state(images_seen), keep=3)
    saved = checkpoint.load(tmp_path, lambda saved: saved.progress.images_seen <= 4)
    assert saved is not None and saved.progress.images_seen == 4 and not caplog.text
    newest = checkpoint.load(tmp_path, lambda _: False)
    assert newest is not None and newest.progress.images_seen == 6 and "learning rate" in caplog.text
    assert checkpoint.load(tmp_path / "nothing", anything) is None


@pytest.mark.parametrize("other", [{"width": 5}, {"half_life": 0.0}])
def test_a_checkpoint_of_another_stage_is_an_error(tmp_path: Path, other: dict[str, float]) -> None:
    training = state()
    train_a_little(training)
    checkpoint.save(tmp_path, training, keep=2)
    saved = checkpoint.load(tmp_path, anything)
    assert saved is not None
    with pytest.raises(WeightsError, match="here"):
        checkpoint.restore(state(**other), saved, "here")  # type: ignore[arg-type]


def test_weights_are_loaded_by_module_name_and_strictly() -> None:
    linear = nn.Linear(2, 2)
    assert checkpoint.load_weights({"a": linear}, {"b.weight": torch.zeros(2, 2)}, "here") == []
    with pytest.raises(WeightsError, match=r"module a .*bias"):
        checkpoint.load_weights({"a": linear}, {"a.weight": torch.zeros(2, 2)}, "here")
