"""Load initial weights of a stage from a folder of weights, such as the shipped one, instead of from an earlier stage.

So training can continue from published weights without the run that made them.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from imagine.errors import WeightsError
from train.run import checkpoint

WEIGHT_FOLDERS = {  # module -> its folder in the weights; other modules (heads for training) start from random weights
    "vae": "vae", "unet": "unet", "text_adapter": "text_adapter", "adapter": "adapter",
    "base_lora": "lora", "image_encoder": "image_encoder", "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2", "text_encoder_3": "text_encoder_3",
    "recogniser": "judge/recogniser", "second_recogniser": "judge/second_recogniser", "reader": "judge/reader",
    "finder": "finder",
}  # fmt: skip
_PREFIXES = {"base_lora": "transformer."}  # module -> what the names of its tensors begin with in a file of diffusers


def load_initial(modules: Mapping[str, nn.Module], weights: Path, fresh: Sequence[str] = ()) -> list[str]:
    """Load every module that the folder `weights` holds, strictly, and return the names of the loaded modules.

    `fresh` holds patterns, such as unet.conv_in.*, of tensors that keep their random values (module name first).

    Raises WeightsError as `find_weights` does, and if the names or shapes of a module's tensors differ.
    """
    present = find_weights(modules, weights)
    for name, file in present.items():
        prefix = _PREFIXES.get(name, "")
        stored = {key.removeprefix(prefix): value.float() for key, value in checkpoint.read_tensors(file)[0].items()}
        tensors = {f"{name}.{key}": value for key, value in _untied(modules[name], stored).items()}
        checkpoint.load_weights(modules, tensors, str(file), fresh)
    return list(present)


def find_weights(modules: Iterable[str], weights: Path) -> dict[str, Path]:
    """Return module -> file for the modules that the folder `weights` holds.

    Raises WeightsError if the folder is missing, or if it holds none of the modules that a weights folder can hold.
    """
    if not weights.is_dir():
        raise WeightsError(f"There is no folder {weights}. Set `initial` to a folder of weights, or leave it out.")
    files = {name: _file(weights / WEIGHT_FOLDERS[name]) for name in modules if name in WEIGHT_FOLDERS}
    present = {name: file for name, file in files.items() if file is not None}
    if files and not present:
        expected = (
            ", ".join(str(weights / WEIGHT_FOLDERS[name]) for name in files) or "weights of this stage's networks"
        )
        raise WeightsError(f"{weights} holds no weights that this stage can start from. Expected: {expected}.")
    return present


def _untied(module: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the stored tensors, plus the second names of tied tensors: files keep only one name of each."""
    own = module.state_dict()
    home = {value.data_ptr(): key for key, value in own.items() if key in stored}
    second = {key: stored[home[value.data_ptr()]] for key, value in own.items() if value.data_ptr() in home}
    return {**second, **stored}


def _file(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.safetensors"))), None)
