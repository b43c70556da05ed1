"""The further losses on the person, on cases that can be computed by hand, and what layers show for them."""

import pytest
import torch

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.networks.recogniser import Recogniser
from imagine.records import Conditioning, Tokens, Watched
from tests import tiny
from train.tasks.identity_losses import alignment_losses, outside_share, preview_similarity


def test_the_outside_share_is_counted_at_each_layers_resolution() -> None:
    faces = torch.zeros(2, 1, 4, 4)
    faces[:, :, :2, :2] = 1  # the upper left quarter
    fine = torch.ones(2, 16)
    coarse = torch.tensor([[1.0, 0, 0, 0], [0.0, 0, 0, 1]])
    shares = outside_share({"fine": fine, "coarse": coarse}, faces)
    assert shares.tolist() == pytest.approx([(0.75 + 0.0) / 2, (0.75 + 1.0) / 2])
    assert outside_share({"off": torch.zeros(2, 16)}, faces).tolist() == [0, 0]


def test_alignment_is_zero_without_a_change_and_semantics_ignore_what_no_word_reads() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 6, 4), torch.randn(2, 2, 3, 4)
    same = {"a": Watched(query, key)}
    semantic, layout = alignment_losses(same, same)
    assert semantic.abs().max() == 0 and layout.abs().max() == 0
    semantic, layout = alignment_losses({"a": Watched(query * 2, key)}, same)
    assert (semantic > 0).all() and layout.tolist() == pytest.approx([1.0, 1.0])
    moved = {"a": Watched(query.flip(2), key)}  # the same features at other places: another layout, the same meaning
    semantic, layout = alignment_losses(moved, same)
    assert semantic.abs().max() < 1e-10 and (layout > 0.1).all()


def test_the_preview_compares_the_face_where_the_target_has_it() -> None:
    torch.manual_seed(0)
    teacher = Recogniser(dimensions=8).requires_grad_(False).eval()
    from imagine.people.faces import crop_faces

    pictures = torch.rand(2, 3, 64, 64)
    boxes = torch.tensor([[10.0, 10, 30, 30], [5.0, 20, 30, 30]])
    targets = crop_faces(pictures, boxes, teacher.size)
    assert preview_similarity(teacher, pictures, boxes, targets, teacher.size).tolist() == pytest.approx(
        [1, 1], abs=1e-5
    )
    drawn = torch.rand(2, 3, 64, 64, requires_grad=True)
    preview_similarity(teacher, drawn, boxes, targets, teacher.size).sum().backward()
    assert drawn.grad is not None and drawn.grad[:, :, 25, 25].any()
    assert not drawn.grad[0, :, -1, -1].any()  # far from the face


def test_layers_show_what_a_call_watches_and_the_picture_stays_the_same() -> None:
    unet = tiny.denoiser()
    adapter = Adapter(unet, [BranchSpec("vision", 16, zero_init=False)])
    torch.manual_seed(0)
    noisy, text, vision = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    scale = torch.tensor([1.0, 0.0])
    with adapter.attach(unet), torch.no_grad():
        seen: dict[str, dict[str, object]] = {"text": {}, "vision": {}}
        outs = [
            unet(noisy, 10, text, cross_attention_kwargs={
                "conditioning": Conditioning({"vision": Tokens(vision)}, {"vision": scale}, watch=watch)}).sample
            for watch in (None, seen)
        ]  # fmt: skip
    assert torch.equal(outs[0], outs[1])
    cross = [name for name in adapter.layers() if "attn2" in name]
    assert sorted(seen["text"]) == sorted(seen["vision"]) == sorted(cross)
    for name in cross:
        energy, text_seen = seen["vision"][name], seen["text"][name]
        assert isinstance(energy, torch.Tensor) and isinstance(text_seen, Watched)
        assert (energy[0] > 0).all() and (energy[1] == 0).all()
        assert torch.allclose(text_seen.attention().sum(-1), torch.ones(2, energy.shape[1]), atol=1e-5)
