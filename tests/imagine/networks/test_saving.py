"""A folder is saved whole or not at all."""

from pathlib import Path

import pytest

from imagine.errors import WeightsError
from imagine.networks.saving import check_save_options, write_whole


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, **contents: str) -> None:
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with pytest.raises(KeyboardInterrupt), write_whole(target) as folder:
        write(folder, unet__config_dot_json="new")
        raise KeyboardInterrupt
    assert not target.exists() and not list(target.parent.iterdir())
    with write_whole(target) as folder:
        write(folder, unet__config_dot_json="new")
        assert not target.exists()
    assert files(target) == {"unet/config.json": "new"} and [each.name for each in target.parent.iterdir()] == [
        "target"
    ]


OLD = {
    "README_dot_md": "mine", "model_index_dot_json": "old", "unet__config_dot_json": "old",
    "unet__model-00001-of-00002_dot_safetensors": "old", "unet__model_dot_safetensors_dot_index_dot_json": "old",
    "unet__model_dot_fp16_dot_safetensors": "half", "ip_0__adapter_dot_safetensors": "old", "vae__x_dot_txt": "old",
}  # fmt: skip
NEW = {"model_index_dot_json": "new", "unet__config_dot_json": "new", "unet__model_dot_safetensors": "new"}


def test_an_earlier_save_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    write(tmp_path, **OLD)
    with write_whole(tmp_path, ("ip_*",)) as folder:
        write(folder, **NEW)
    assert files(tmp_path) == {
        "README.md": "mine", "model_index.json": "new", "unet/config.json": "new", "unet/model.safetensors": "new",
        "unet/model.fp16.safetensors": "half", "vae/x.txt": "old",
    }  # fmt: skip
    assert not (tmp_path / "ip_0").exists()


def test_safetensors_files_replace_bin_files_of_the_same_variant(tmp_path: Path) -> None:
    old = ("pytorch_model_dot_bin", "pytorch_model_dot_fp16_dot_bin", "optimizer_dot_bin")
    write(tmp_path, **{f"unet__{name}": "old" for name in old})
    with write_whole(tmp_path) as folder:
        write(folder, **NEW)
    assert {name for name, text in files(tmp_path).items() if text == "old"} == {
        "unet/pytorch_model.fp16.bin", "unet/optimizer.bin",
    }  # fmt: skip


def test_an_adapter_next_to_another_stays(tmp_path: Path) -> None:
    write(tmp_path, **{"first_dot_safetensors": "old"})
    with write_whole(tmp_path) as folder:
        write(folder, **{"second_dot_safetensors": "new"})
    assert files(tmp_path) == {"first.safetensors": "old", "second.safetensors": "new"}


@pytest.mark.parametrize("failing", range(6))
def test_a_failure_while_moving_leaves_the_folder_as_it_was(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, **OLD)
    before, rename, count = files(tmp_path), Path.rename, [0]

    def fail_once(self: Path, target: Path) -> Path:
        count[0] += 1
        if count[0] == failing + 1:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="No space"), write_whole(tmp_path, ("ip_*",)) as folder:
        write(folder, **NEW)
    assert files(tmp_path) == before


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="is a file"), write_whole(tmp_path / "file"):
        pass


@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"use_flashpack": True}])
def test_options_whose_files_could_not_be_loaded_raise(options: dict[str, bool]) -> None:
    with pytest.raises(WeightsError, match=min(options)):
        check_save_options(options)
    check_save_options({name: not value for name, value in options.items()})
