"""The small finder: targets, decoding as their inverse, a loss that can be minimised, and strict files."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from imagine.errors import WeightsError
from imagine.people.finder import FILE_NAME, Finder, Maps, decode, letterbox, load_finder, loss, save_finder, targets

SIDE = 64


def batch(*pictures: list[tuple[float, float, float, float]]) -> tuple[Tensor, Tensor]:
    boxes, valid = torch.zeros(len(pictures), 3, 4), torch.zeros(len(pictures), 3, dtype=torch.bool)
    for row, faces in enumerate(pictures):
        for place, face in enumerate(faces):
            boxes[row, place], valid[row, place] = torch.tensor(face), True
    return boxes, valid


def perfect(boxes: Tensor, valid: Tensor) -> Maps:
    wanted = targets(boxes, valid, SIDE)
    return Maps(torch.logit(wanted.heat.clamp(1e-4, 1 - 1e-4)), wanted.size, wanted.offset)


def test_decode_inverts_targets() -> None:
    faces = [[(5.0, 9.0, 18.0, 20.0), (37.5, 30.25, 13.0, 15.5)], [(20.0, 20.0, 40.0, 40.0)], []]
    boxes, valid = batch(*faces)
    found, scores = decode(perfect(boxes, valid), SIDE)
    for row, expected in enumerate(faces):
        sure = found[row][scores[row] > 0.9]
        assert len(sure) == len(expected)
        assert torch.allclose(sure[sure[:, 0].argsort()], torch.tensor(expected).view(-1, 4), atol=1e-3)


def test_overlapping_faces_stay_apart() -> None:
    boxes, valid = batch([(4.0, 10.0, 24.0, 24.0), (24.0, 12.0, 24.0, 24.0)])
    found, scores = decode(perfect(boxes, valid), SIDE)
    assert int((scores[0] > 0.9).sum()) == 2
    assert torch.allclose(found[0, :2].sort(dim=0).values, boxes[0, :2].sort(dim=0).values, atol=1e-3)


def test_faces_outside_the_picture_and_invalid_boxes_leave_no_trace() -> None:
    boxes = torch.tensor([[[-40.0, 0.0, 20.0, 20.0], [10.0, 10.0, 20.0, 20.0]]])
    wanted = targets(boxes, torch.tensor([[True, False]]), SIDE)
    assert wanted.heat.max() == 0 and wanted.weight.max() == 0


def test_loss_is_lowest_for_the_truth_and_grows_with_each_mistake() -> None:
    boxes, valid = batch([(5.0, 9.0, 18.0, 20.0)], [])
    wanted = targets(boxes, valid, SIDE)
    truth = perfect(boxes, valid)
    best = loss(truth, wanted)
    assert best.shape == (2,) and best[1] < 0.01
    for worse in (
        truth._replace(heat=truth.heat.flip(-1)),
        truth._replace(size=truth.size + 0.3),
        truth._replace(offset=truth.offset + 0.5),
    ):
        assert loss(worse, wanted)[0] > best[0] + 0.1
    ghost = truth._replace(heat=truth.heat[[0, 0]])  # a face in a picture without faces
    assert loss(ghost, wanted)[1] > best[1] + 1


def test_a_tiny_finder_learns_where_the_bright_discs_are() -> None:
    torch.manual_seed(0)
    network = Finder(side=SIDE, width=8)
    optimiser = torch.optim.Adam(network.parameters(), lr=4e-3)
    for step in range(40):
        images, boxes, valid = discs(8, seed=step)
        optimiser.zero_grad()
        loss(network(images), targets(boxes, valid, SIDE)).mean().backward()
        optimiser.step()
    images, boxes, valid = discs(16, seed=10_000)
    found, scores = decode(network.eval()(images), SIDE)
    for row in range(16):
        sure = found[row][scores[row] > 0.2]
        assert len(sure) == int(valid[row].sum())
        for box in sure:
            assert (box - boxes[row, 0]).abs().max() < 10


def discs(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return pictures of one disc each; every fourth picture is empty."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.rand(count, generator=generator) * 16 + 14
    centre = torch.rand(count, 2, generator=generator) * 24 + 20
    valid = (torch.arange(count) % 4 != 0)[:, None]
    axis = torch.arange(SIDE) + 0.5
    distance = (axis[None, None, :] - centre[:, 0, None, None]) ** 2 + (axis[:, None] - centre[:, 1, None, None]) ** 2
    disc = ((distance.sqrt() < side[:, None, None] / 2) & valid[:, :, None]).float()
    images = (0.3 + 0.6 * disc)[:, None].expand(-1, 3, -1, -1)
    boxes = torch.cat((centre - side[:, None] / 2, side[:, None].expand(-1, 2)), dim=1)[:, None]
    return images, boxes, valid


def test_network_is_small_and_pictures_are_independent() -> None:
    network = Finder().eval()
    assert sum(parameter.numel() for parameter in network.parameters()) < 300_000
    images = torch.rand(3, 3, 128, 128)
    together, alone = network(images), network(images[1:2])
    assert together.heat.shape == (3, 1, 32, 32) and together.size.shape == together.offset.shape == (3, 2, 32, 32)
    assert torch.allclose(together.heat[1:2], alone.heat, atol=1e-5)


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (30, 20)])
def test_letterbox_maps_points(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "black")
    image.paste("white", (size[0] // 2, size[1] // 2, size[0], size[1]))
    square, scale, corner = letterbox(image, SIDE)
    assert square.shape == (3, SIDE, SIDE)
    x, y = round(size[0] * 0.75 * scale + corner[0]), round(size[1] * 0.75 * scale + corner[1])
    assert square[:, y, x].min() > 0.99 and square[:, SIDE - 1 - y, SIDE - 1 - x].max() < 0.01


def test_saved_finder_is_the_same(tmp_path: Path) -> None:
    network = Finder(side=SIDE, width=8).eval()
    save_finder(network, tmp_path)
    images = torch.rand(1, 3, SIDE, SIDE)
    loaded = load_finder(tmp_path)
    assert all(torch.equal(one, two) for one, two in zip(network(images), loaded(images), strict=True))


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no finder"):
        load_finder(tmp_path)
    path = save_finder(Finder(side=SIDE, width=8), tmp_path)
    state = load_file(path)
    metadata = {"kind": "face finder", "format_version": "1", "side": str(SIDE), "width": "8"}
    save_file({name: value for name, value in state.items() if name != "head.bias"}, path, metadata)
    with pytest.raises(WeightsError, match=r"missing \['head.bias'\]"):
        load_finder(tmp_path)
    save_file({**state, "extra": torch.zeros(1)}, path, metadata)
    with pytest.raises(WeightsError, match=r"unexpected \['extra'\]"):
        load_finder(tmp_path)
    save_file({**state, "head.bias": torch.zeros(4)}, path, metadata)
    with pytest.raises(WeightsError, match="other shapes"):
        load_finder(tmp_path)
    save_file(state, path, {**metadata, "kind": "judge"})
    with pytest.raises(WeightsError, match="not a face finder"):
        load_finder(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"\0" * 50)
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        load_finder(tmp_path)
