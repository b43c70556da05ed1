"""The small face finder that we train ourselves: its network, targets, loss and decoding.

`faces` uses it to find faces. The bundled cascade finds photographed faces from the front; this network is trained on
the drawings, the pixel art and the turned heads of the portrait world. Its training task is in `train` and uses the
functions of this module.

It follows CenterNet (Zhou, Wang and Krähenbühl, "Objects as Points", arXiv 1904.07850). A heat map marks the centres
of faces. At each centre two more maps give the width and height of the face and the exact position of its centre, below
the map's resolution. Sizes are trained over the middle of each face and not only in its one centre cell, as in TTFNet
(Liu et al., arXiv 1909.00700), so that a small network can learn from few pictures.

Pictures are scaled to one fixed size (`letterbox`), so that one pass finds large and small faces. A face narrower than
about 8 pixels at that size is not found.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from imagine.errors import WeightsError
from imagine.networks.files import why_unreadable
from imagine.networks.finite import check_finite

FILE_NAME = "finder.safetensors"
FORMAT_VERSION = "1"
STRIDE = 4  # one cell of the maps is 4 x 4 pixels
MAX_FACES = 16  # the most faces that are reported in one picture


class Maps(NamedTuple):
    """The network's output, per cell of a grid of G = side / STRIDE cells per side."""

    heat: Tensor  # (B, 1, G, G) logits that a face is centred here
    size: Tensor  # (B, 2, G, G) log of width and height as fractions of the picture's side
    offset: Tensor  # (B, 2, G, G) from the cell's middle to the face's centre, in cells


class Targets(NamedTuple):
    """The targets of `Maps`; `weight` (B, 1, G, G) is the loss weight of size and offset."""

    heat: Tensor
    size: Tensor
    offset: Tensor
    weight: Tensor


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    # Group normalisation, so that a picture has the same result alone and in a batch.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.GroupNorm(4, outputs), nn.SiLU()
    )


class Finder(nn.Module):
    """Maps pictures (B, 3, side, side), 0 to 1, to `Maps`. 0.28 million parameters at the default width.

    An hourglass network: down to 1/16 to cover a whole head with its shoulders, and up to 1/4 to locate it.
    side: a multiple of 16. width: channels at 1/2 of the resolution, a multiple of 4.
    """

    def __init__(self, side: int = 128, width: int = 16) -> None:
        super().__init__()
        if side % 16 or width % 4:
            raise ValueError(f"Finder needs a side divisible by 16 and a width divisible by 4, not {side} and {width}.")
        self.side, self.width = side, width
        self.stem = _block(3, width, stride=2)
        self.quarter = nn.Sequential(_block(width, 2 * width, stride=2), _block(2 * width, 2 * width))
        self.eighth = nn.Sequential(_block(2 * width, 4 * width, stride=2), _block(4 * width, 4 * width))
        self.sixteenth = nn.Sequential(_block(4 * width, 5 * width, stride=2), _block(5 * width, 5 * width))
        self.from_sixteenth = nn.Conv2d(5 * width, 3 * width, 1)
        self.from_eighth = nn.Conv2d(4 * width, 3 * width, 1)
        self.from_quarter = nn.Conv2d(2 * width, 3 * width, 1)
        self.smooth_eighth = _block(3 * width, 3 * width)
        self.smooth_quarter = _block(3 * width, 3 * width)
        self.head = nn.Conv2d(3 * width, 5, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        # The initial bias predicts a face in one cell in a hundred, which keeps the focal loss stable at the start
        # (arXiv 1708.02002, section 4.1), and faces of 30 % of the picture.
        self.head.bias = nn.Parameter(torch.tensor([-4.6, -1.2, -1.2, 0.0, 0.0]))

    def forward(self, images: Tensor) -> Maps:
        quarter = self.quarter(self.stem(images * 2 - 1))
        eighth = self.eighth(quarter)
        sixteenth = self.from_sixteenth(self.sixteenth(eighth))
        eighth = self.smooth_eighth(self.from_eighth(eighth) + F.interpolate(sixteenth, scale_factor=2.0))
        quarter = self.smooth_quarter(self.from_quarter(quarter) + F.interpolate(eighth, scale_factor=2.0))
        heat, size, offset = self.head(quarter).split((1, 2, 2), dim=1)
        return Maps(heat, size, offset)


def targets(boxes: Tensor, valid: Tensor, side: int) -> Targets:
    """Return the target maps for boxes (B, K, 4): left, top, width, height in pixels of a square picture `side` wide.

    valid (B, K) marks the boxes that count; all are False for a picture without faces.
    Each face is a Gaussian whose width follows the face's size (1904.07850, section 3: overlaps take the larger value).
    Every cell inside it is trained on the size of the face that is strongest there.
    """
    grid = side // STRIDE
    centre = (boxes[..., :2] + boxes[..., 2:] / 2) / STRIDE  # in cells, (B, K, 2)
    spread = (0.1 * boxes[..., 2:].clamp(min=1) / STRIDE).clamp(min=0.7)
    inside = valid.bool() & ((centre >= 0) & (centre < grid)).all(-1)
    cells = torch.arange(grid, device=boxes.device, dtype=boxes.dtype)
    home = centre.floor()  # the cell that holds the centre
    across = ((cells - home[..., :1]) / spread[..., :1]).square()  # (B, K, G)
    down = ((cells - home[..., 1:]) / spread[..., 1:]).square()
    heat = torch.exp(-0.5 * (down.unsqueeze(-1) + across.unsqueeze(-2))) * inside[..., None, None]  # (B, K, G, G)
    strongest, owner = heat.max(dim=1)
    log_size = (boxes[..., 2:].clamp(min=1) / side).log()
    size = _take(log_size, owner)
    middle = torch.stack(torch.meshgrid(cells + 0.5, cells + 0.5, indexing="xy"))
    offset = _take(centre, owner) - middle
    weight = torch.where(strongest > 0.3, strongest, torch.zeros_like(strongest))
    return Targets(strongest.unsqueeze(1), size, offset, weight.unsqueeze(1))


def _take(values: Tensor, owner: Tensor) -> Tensor:
    """Return for each cell the two numbers of its strongest face: (B, K, 2) and (B, G, G) to (B, 2, G, G)."""
    batch, grid = owner.shape[0], owner.shape[1]
    index = owner.flatten(1).unsqueeze(-1).expand(-1, -1, 2)
    return values.gather(1, index).transpose(1, 2).reshape(batch, 2, grid, grid)


def loss(maps: Maps, wanted: Targets) -> Tensor:
    """Return each picture's loss (B,): penalty-reduced focal loss (1904.07850, equation 1) plus L1 on size and offset.

    A picture without faces is normalised as if it had one, so that its weight equals that of the others.
    """
    heat = maps.heat.float()
    hit = wanted.heat.ge(1 - 1e-4)
    right = F.logsigmoid(heat) * torch.sigmoid(-heat).square()
    wrong = F.logsigmoid(-heat) * torch.sigmoid(heat).square() * (1 - wanted.heat).pow(4)
    focal = -torch.where(hit, right, wrong).sum(dim=(1, 2, 3))
    faces = hit.sum(dim=(1, 2, 3)).clamp(min=1)
    share = wanted.weight / wanted.weight.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    size = ((maps.size.float() - wanted.size).abs() * share).sum(dim=(1, 2, 3))
    offset = ((maps.offset.float() - wanted.offset).abs() * share).sum(dim=(1, 2, 3))
    return focal / faces + size + 0.5 * offset


def decode(maps: Maps, side: int) -> tuple[Tensor, Tensor]:
    """Return the MAX_FACES highest peaks, best first: boxes (B, K, 4) in pixels, and scores (B, K).

    A box is left, top, width, height. A peak is a cell that is the maximum within two cells. Scores are probabilities;
    the caller sets the threshold.
    """
    heat = maps.heat.float().sigmoid()
    grid = heat.shape[-1]
    peaks = torch.where(F.max_pool2d(heat, 5, stride=1, padding=2) == heat, heat, torch.zeros_like(heat))
    scores, cells = peaks.flatten(1).topk(min(MAX_FACES, grid * grid))
    index = cells.unsqueeze(1).expand(-1, 2, -1)
    size = maps.size.float().flatten(2).gather(2, index).clamp(max=0.7).exp() * side
    offset = maps.offset.float().flatten(2).gather(2, index)
    middle = torch.stack((cells % grid, cells // grid), dim=1) + 0.5
    corner = (middle + offset) * STRIDE - size / 2
    return torch.cat((corner, size), dim=1).transpose(1, 2), scores


def letterbox(image: Image.Image, side: int) -> tuple[Tensor, float, tuple[int, int]]:
    """Fit the whole picture into a grey square; return (3, side, side), 0 to 1, its scale and its corner's position.

    A point p of the picture is at p * scale + corner in the square.
    """
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    corner = ((side - width) // 2, (side - height) // 2)
    square = Image.new("RGB", (side, side), (128, 128, 128))
    square.paste(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0), corner)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(side, side, 3).permute(2, 0, 1).float() / 255, scale, corner


def save_finder(finder: Finder, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write folder/finder.safetensors; the network's sizes are in its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in finder.state_dict().items()}
    metadata = {"format_version": FORMAT_VERSION, "side": str(finder.side), "width": str(finder.width)}
    save_file(state, folder / FILE_NAME, {"kind": "face finder", **metadata})
    return folder / FILE_NAME


def load_finder(folder: Path) -> Finder:
    """Load the finder saved in a folder, in evaluation mode and fp32. Raise WeightsError unless every key fits."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise WeightsError(f"{folder} holds no {FILE_NAME}: give a weights folder that has a face finder.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise WeightsError(why_unreadable(path, "copy or train it again")) from error
    if metadata.get("kind") != "face finder" or metadata.get("format_version") != FORMAT_VERSION:
        raise WeightsError(f"{path} is not a face finder of format {FORMAT_VERSION}: train it again.")
    try:
        finder = Finder(int(metadata["side"]), int(metadata["width"]))
    except (KeyError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise WeightsError(f"{path} does not give its sizes properly: copy or train it again.") from error
    missing, unexpected = set(finder.state_dict()) - set(state), set(state) - set(finder.state_dict())
    if missing or unexpected:
        raise WeightsError(
            f"{path} does not fit the face finder (missing {sorted(missing)}, unexpected {sorted(unexpected)}): "
            "use the file that belongs to this version."
        )
    try:
        finder.load_state_dict(state)
    except RuntimeError as error:  # a tensor has the wrong shape
        raise WeightsError(f"{path} holds tensors of other shapes than its metadata says: train it again.") from error
    check_finite(str(path), state)
    return finder.eval()
