"""The recogniser of people in the portrait world: its network, and saving and loading of small networks like it.

`Recogniser` turns a masked face crop into a unit vector; the angle between two vectors measures whether two pictures
show the same person. The judge measures with it (`imagine.evaluation.judge`), and enrolling compares drawings with it.
`TransformerRecogniser` does the same by another architecture, for a second opinion.

The residual body is cheap on a CPU in float32: it uses an early stride, and bottlenecks of ordinary 3x3 convolutions,
because depthwise convolutions are slow on a CPU. GroupNorm computes the same function in training and in inference, so
an average of the weights needs no average of batch statistics.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagine.errors import WeightsError
from imagine.networks.files import why_unreadable
from imagine.networks.finite import check_finite

FORMAT_VERSION = 1
Network = TypeVar("Network", bound=nn.Module)


class ResidualBlock(nn.Module):
    """A residual block of two 3x3 convolutions through half the width; it is initialised to the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(group_count(width), width)
        self.conv1 = nn.Conv2d(width, width // 2, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(group_count(width // 2), width // 2)
        self.conv2 = nn.Conv2d(width // 2, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(cast(Tensor, self.conv2.bias))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        return cast(Tensor, x + self.conv2(F.relu(self.norm2(h))))


class Backbone(nn.Module):
    """A stem and stages that halve the side; returns the feature maps of every stage, finest first.

    Pictures (B, 3, S, S) in 0..1 -> [(B, w1, s/2, s/2), (B, w2, s/4, s/4), ...] with s = S / stem_stride.
    """

    def __init__(self, widths: Sequence[int], stem_stride: int, blocks: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], stem_stride + 2, stride=stem_stride, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(group_count(before), before),
                nn.ReLU(),
                nn.Conv2d(before, width, 3, stride=2, padding=1),
                *(ResidualBlock(width) for _ in range(blocks)),
            )
            for before, width in itertools.pairwise(widths)
        )
        self.norm = nn.GroupNorm(group_count(widths[-1]), widths[-1])

    def forward(self, pictures: Tensor) -> list[Tensor]:
        h = self.stem(pictures * 2 - 1)
        maps = []
        for stage in self.stages:
            h = stage(h)
            maps.append(h)
        maps[-1] = F.relu(self.norm(maps[-1]))
        return maps


class Recogniser(nn.Module):
    """Embed masked face crops: (B, 3, size, size) in 0..1 -> unit vectors (B, dimensions); about 50 MFLOP per crop.

    `limit` is the largest distance, 1 minus the cosine, at which two pictures count as one person; None: not measured.
    """

    def __init__(
        self, size: int = 64, widths: Sequence[int] = (32, 48, 96, 192), blocks: int = 1, dimensions: int = 128,
        limit: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config: dict[str, Any] = {
            "size": size, "widths": list(widths), "blocks": blocks, "dimensions": dimensions, "limit": limit,
        }  # fmt: skip
        self.size = size
        self.body = Backbone(widths, stem_stride=2, blocks=blocks)
        self.head = nn.Linear(widths[-1] * (size // 16) ** 2, dimensions)

    def forward(self, crops: Tensor) -> Tensor:
        return F.normalize(self.head(self.body(crops)[-1].flatten(1)), dim=-1)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        save_network(self, folder, dtype)

    @classmethod
    def load(cls, folder: str | Path) -> "Recogniser":
        """Load the network saved in `folder`, in float32 and eval mode. Raises WeightsError if the files do not fit."""
        return load_network(cls, folder)


class TransformerRecogniser(nn.Module):
    """Embed masked face crops as `Recogniser` does, by a small vision transformer; about 65 MFLOP per crop.

    Patches of `patch` pixels become tokens, and blocks with the norm first mix them (arXiv 2010.11929). Faces are
    aligned, so each place in the crop means the same in every picture: instead of an average, all tokens, made thin,
    are read at their places, as in the vision transformers of InsightFace.
    """

    def __init__(
        self, size: int = 64, patch: int = 8, width: int = 96, depth: int = 4, heads: int = 4, feedforward: int = 384,
        thin: int = 24, dimensions: int = 128, limit: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config: dict[str, Any] = {
            "size": size, "patch": patch, "width": width, "depth": depth, "heads": heads, "feedforward": feedforward,
            "thin": thin, "dimensions": dimensions, "limit": limit,
        }  # fmt: skip
        self.size = size
        tokens = (size // patch) ** 2
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, feedforward, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.thin = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, thin), nn.Flatten())
        self.head = nn.Linear(thin * tokens, dimensions)

    def forward(self, crops: Tensor) -> Tensor:
        tokens = self.patches(crops * 2 - 1).flatten(2).transpose(1, 2) + self.places
        return F.normalize(self.head(self.thin(self.blocks(tokens))), dim=-1)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        save_network(self, folder, dtype)

    @classmethod
    def load(cls, folder: str | Path) -> "TransformerRecogniser":
        """Load the network saved in `folder`, in float32 and eval mode. Raises WeightsError if the files do not fit."""
        return load_network(cls, folder)


AnyRecogniser = Recogniser | TransformerRecogniser


def load_recogniser(folder: str | Path) -> AnyRecogniser:
    """Load the recogniser saved in `folder`, of whichever architecture. Raises WeightsError if the files do not fit."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}  # loading it again says what is wrong
    is_transformer = isinstance(config, dict) and config.get("network") == TransformerRecogniser.__name__
    return TransformerRecogniser.load(folder) if is_transformer else Recogniser.load(folder)


def group_count(width: int) -> int:
    """Return the largest number of GroupNorm groups, up to 8, with at least four channels each where possible."""
    return next(groups for groups in (8, 4, 2, 1) if width % groups == 0 and (width // groups >= 4 or groups == 1))


def save_network(network: Any, folder: str | Path, dtype: torch.dtype) -> None:
    """Write a network with its `config` to `folder`, as config.json and model.safetensors."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format_version": FORMAT_VERSION, "network": type(network).__name__, **network.config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_network(cls: type[Network], folder: str | Path) -> Network:
    """Load a network of class `cls`, in float32 and eval mode. Raises WeightsError if the files do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__).lower()
        raise WeightsError(f"{folder} holds no {kind}: {Path(error.filename or '').name or 'a file'} "
                           "is missing; train it with `make weights` or choose another folder.") from error  # fmt: skip
    except SafetensorError as error:
        raise WeightsError(why_unreadable(folder / "model.safetensors", "download or train it again")) from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise WeightsError(f"The files in {folder} are damaged ({error}): download or train them again.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"The config.json in {folder} does not describe a network: download or train it again.")
    found = (config.pop("format_version", None), config.pop("network", None))
    if found != (FORMAT_VERSION, cls.__name__):
        raise WeightsError(f"{folder} holds a {found[1]} in format {found[0]}, but a {cls.__name__} in format "
                           f"{FORMAT_VERSION} is needed: choose the right folder.")  # fmt: skip
    try:
        network = cls(**config)
    except Exception as error:  # wrong values raise many kinds of errors, and all of them have the same remedy
        reason = " ".join(f"{error}".split())[:200]
        raise WeightsError(
            f"The config.json in {folder} does not fit a {cls.__name__} ({reason}): download or train it again."
        ) from error
    _fill(network, tensors, folder)
    return network.eval()


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != given:
        wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        raise WeightsError(f"The weights in {folder} do not fit their config.json: {wrong[0]!r} is "
                           f"{given.get(wrong[0], 'missing')} where {wanted.get(wrong[0], 'nothing')} is expected"
                           f" ({len(wrong)} such tensors); download or train them again.")  # fmt: skip
    check_finite(str(folder), tensors)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
