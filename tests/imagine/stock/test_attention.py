"""Attention switches keep the adapter or raise an error that gives the reason."""

from collections.abc import Iterator
from typing import Any

import pytest
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

from imagine.adapter import attention
from imagine.adapter.attention import attention_layers
from imagine.errors import ConfigError, WeightsError
from tests import tiny, tiny_stock
from tests.tiny_stock import draw, same


@pytest.fixture
def _own_backend() -> Iterator[None]:
    """Restore the default backend, which is global in diffusers."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.mark.usefixtures("_own_backend")
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_another_backend_keeps_the_adapter(xl: bool, backend: str):
    pipe = tiny_stock.personal(tiny_stock.stock(xl))
    before, plain = draw(pipe, reference=tiny.photo(1)), draw(pipe)
    pipe.set_attention_backend(backend)
    assert {each.processor._attention_backend.value for each in attention_layers(pipe.unet).values()} == {backend}
    assert same(draw(pipe, reference=tiny.photo(1)), before) and same(draw(pipe), plain)
    pipe.load_adapter(tiny_stock.identity(pipe.unet, seed=9))
    assert not same(draw(pipe, reference=tiny.photo(1)), before)
    pipe.reset_attention_backend()


@pytest.mark.usefixtures("_own_backend")
def test_padding_never_reaches_a_backend_without_masks(monkeypatch: pytest.MonkeyPatch):
    """This includes the active backend, set by the environment or by diffusers' context manager."""
    pipe = tiny_stock.personal(tiny_stock.stock())
    plain: Any = dispatch_attention_fn
    seen = []

    def watched(*rows: Any, attn_mask: Any, backend: Any) -> Any:
        seen.append((attn_mask is not None, backend))
        return plain(
            *rows, attn_mask=attn_mask, backend=AttentionBackendName.NATIVE
        )  # flash attention is not installed

    monkeypatch.setattr(attention, "dispatch_attention_fn", watched)
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.FLASH)
    draw(pipe, ["a person"] * 2, reference=[tiny.photo(1), [tiny.photo(2), tiny.photo(3)]], num_inference_steps=1)
    assert set(seen) == {(True, AttentionBackendName.NATIVE), (False, None)}
    pipe.reset_attention_backend()
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE


def test_nothing_takes_the_adapter_off_unseen():
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    pipe = tiny_stock.personal(tiny_stock.stock())
    before = draw(pipe, reference=tiny.photo(1))
    for refused, message in (
        (lambda: pipe.enable_attention_slicing(), "slicing"),
        (lambda: pipe.fuse_qkv_projections(), "unet=False"),
        (lambda: pipe.enable_xformers_memory_efficient_attention(), "xformers"),
        (lambda: pipe.set_attention_backend("flash"), "flash"),
        (lambda: pipe.set_attention_backend("no-such"), "no-such"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            refused()
        assert "\n" not in str(caught.value)
    pipe.disable_attention_slicing()
    pipe.fuse_qkv_projections(unet=False)
    assert same(draw(pipe, reference=tiny.photo(1)), before)
    for take_off in (
        lambda: pipe.unet.set_attn_processor(AttnProcessor()),
        lambda: pipe.unet.set_attention_slice("auto"),
        lambda: pipe.unet.set_default_attn_processor(),
    ):
        take_off()
        with pytest.raises(WeightsError, match="not attached"):
            draw(pipe, reference=tiny.photo(1))
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    pipe.adapter.attach(pipe.unet)
    assert same(draw(pipe, reference=tiny.photo(1)), before)
