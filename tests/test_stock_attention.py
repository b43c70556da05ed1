"""Whatever switches attention: the adapter stays, or a sentence says why not."""

from collections.abc import Iterator
from typing import Any

import pytest

from imagine.attention import attention_layers
from imagine.errors import ConfigError, WeightsError
from tests import tiny, tiny_stock
from tests.tiny_stock import draw, same


@pytest.fixture(scope="module", params=[False, True], ids=["sd15", "sdxl"])
def xl(request: Any) -> bool:
    return bool(request.param)


@pytest.fixture
def _own_backend() -> Iterator[None]:
    """Backends are also global to diffusers; put the default back."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

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


def test_nothing_takes_the_adapter_off_unseen():
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    pipe = tiny_stock.personal(tiny_stock.stock())
    before = draw(pipe, reference=tiny.photo(1))
    for refused, says in (
        (lambda: pipe.enable_attention_slicing(), "slicing"),
        (lambda: pipe.fuse_qkv_projections(), "unet=False"),
        (lambda: pipe.enable_xformers_memory_efficient_attention(), "xformers"),
        (lambda: pipe.set_attention_backend("flash"), "flash"),
        (lambda: pipe.set_attention_backend("no-such"), "no-such"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
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
