"""Attention of stock pipelines, so that nothing takes our adapters off the denoiser unseen.

diffusers' older switches (xformers, slicing, fused projections) put their own processors in the place of others, which
silently undoes IP-Adapters and ours alike. Here they either become a backend, which our attention honours, or say in a
sentence why not. What is done to the denoiser itself, `check_attached` finds before anything is drawn.
"""

from abc import abstractmethod
from typing import Any, cast

from imagine.adapter.adapter import Adapter
from imagine.errors import ConfigError
from imagine.networks.weights import quiet_libraries


class AttentionBackendMixin:
    """The part of a pipeline that switches how attention is computed."""

    unet: Any

    @abstractmethod
    def _adapters(self) -> list[Adapter]:
        """All adapters on the denoiser; the pipeline knows them."""

    def set_attention_backend(self, backend: str) -> None:
        """Compute all attention of the denoiser by another of diffusers' backends, adapters included.

        Such as "native" (the default), "xformers", "flash" or "sage". Raises ConfigError if it cannot be had here.
        """
        try:
            with quiet_libraries():
                self.unet.set_attention_backend(backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(
                f"The attention backend {backend!r} cannot be used here: {str(error).strip().split(chr(10))[0][:200]}"
            ) from error

    def reset_attention_backend(self) -> None:
        """Go back to the default backend: the environment's, or PyTorch's own."""
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
        from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND

        with quiet_libraries():
            self.unet.reset_attention_backend()
        # Setting one for the denoiser made it the active one, which processors without one of their own use.
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName(DIFFUSERS_ATTN_BACKEND))

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """What enable_ and disable_xformers_memory_efficient_attention call: xformers, as a backend beside adapters."""
        if not self._adapters():
            cast(Any, super()).set_use_memory_efficient_attention_xformers(valid, attention_op)
        elif valid:
            self.set_attention_backend("xformers")
        else:
            self.reset_attention_backend()

    def set_attention_slice(self, slice_size: Any) -> None:
        """What enable_attention_slicing calls: refused beside adapters, which it would take off the denoiser."""
        if not self._adapters():
            cast(Any, super()).set_attention_slice(slice_size)
        elif slice_size is not None:
            raise ConfigError(
                "Attention slicing would take the adapters off the denoiser: leave it out (attention needs no more "
                "memory without it), or enable_model_cpu_offload."
            )

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """As in diffusers; refused for the denoiser beside adapters, which it would take off."""
        if unet and self._adapters():
            raise ConfigError(
                "Fused projections would take the adapters off the denoiser: call fuse_qkv_projections(unet=False)."
            )
        cast(Any, super()).fuse_qkv_projections(unet=unet, vae=vae)
