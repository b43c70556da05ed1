"""Where a stage may begin besides an earlier stage: a folder of weights, such as the one that is shipped.

So training goes on from what was published, when the run that made it is long gone.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from imagine.errors import WeightsError
from train.run import checkpoint

WEIGHT_FOLDERS = {  # module -> its folder among the weights; what is not here (heads that are thrown away) starts fresh
    "vae": "vae", "unet": "unet", "text_adapter": "text_adapter", "adapter": "adapter",
    "image_encoder": "image_encoder", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
    "recogniser": "judge/recogniser", "reader": "judge/reader", "finder": "finder",
}  # fmt: skip


def load_initial(modules: Mapping[str, nn.Module], weights: Path) -> list[str]:
    """Load every module that the folder `weights` holds, strictly; the names of those that were.

    Raises WeightsError as `find_weights` does, and if a module has other names or shapes.
    """
    present = find_weights(modules, weights)
    for name, file in present.items():
        stored = {key: value.float() for key, value in checkpoint.read_tensors(file)[0].items()}
        tensors = {f"{name}.{key}": value for key, value in _untied(modules[name], stored).items()}
        checkpoint.load_weights(modules, tensors, str(file))
    return list(present)


def find_weights(modules: Iterable[str], weights: Path) -> dict[str, Path]:
    """Module -> its file, of those that the folder `weights` holds.

    Raises WeightsError if the folder is missing, or holds none of those that weights can hold.
    """
    if not weights.is_dir():
        raise WeightsError(f"There is no folder {weights} to begin from: name one that holds weights, or leave it out.")
    files = {name: _file(weights / WEIGHT_FOLDERS[name]) for name in modules if name in WEIGHT_FOLDERS}
    present = {name: file for name, file in files.items() if file is not None}
    if files and not present:
        expected = (
            ", ".join(str(weights / WEIGHT_FOLDERS[name]) for name in files) or "weights of this stage's networks"
        )
        raise WeightsError(f"{weights} holds nothing that this stage can begin from; expected: {expected}.")
    return present


def _untied(module: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is stored, with the second names of tensors that the module has under two: files keep only one."""
    own = module.state_dict()
    home = {value.data_ptr(): key for key, value in own.items() if key in stored}
    second = {key: stored[home[value.data_ptr()]] for key, value in own.items() if value.data_ptr() in home}
    return {**second, **stored}


def _file(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.safetensors"))), None)
