"""Attention switches of stock pipelines that cannot silently remove our adapters from the denoiser.

diffusers' older switches (xformers, slicing, fused projections) replace the attention processors, which silently
removes IP-Adapters and our adapters. Here each switch either selects an attention backend, which our attention uses, or
raises an error that gives the reason. If code changes the processors on the denoiser directly, `check_attached` detects
it before a call draws.
"""

from typing import Any, cast

from imagine.adapter.holder import AdapterHolderMixin
from imagine.errors import ConfigError
from imagine.networks.weights import quiet_libraries


class AttentionBackendMixin(AdapterHolderMixin):
    """Pipeline mixin that selects how attention is computed."""

    def set_attention_backend(self, backend: str) -> None:
        """Compute all attention of the denoiser, adapters included, with one of diffusers' attention backends.

        backend: "native" (the default), "xformers", "flash", "sage" or another of diffusers' names. Raises ConfigError
        if the backend is unknown or unavailable.
        """
        denoiser = self._require_denoiser()
        try:
            with quiet_libraries():
                denoiser.set_attention_backend(backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(
                f"The attention backend {backend!r} cannot be used here: {str(error).strip().split(chr(10))[0][:200]}"
            ) from error

    def reset_attention_backend(self) -> None:
        """Restore the default backend: the one that the environment sets, or PyTorch's own."""
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
        from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND

        with quiet_libraries():
            self._require_denoiser().reset_attention_backend()
        # Setting the denoiser's backend also made it the global one, which processors without their own backend use.
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName(DIFFUSERS_ATTN_BACKEND))

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Switch xformers on or off; with adapters it is selected as an attention backend.

        Called by diffusers' enable_ and disable_xformers_memory_efficient_attention.
        """
        if not self._adapters():
            cast(Any, super()).set_use_memory_efficient_attention_xformers(valid, attention_op)
        elif valid:
            self.set_attention_backend("xformers")
        else:
            self.reset_attention_backend()

    def set_attention_slice(self, slice_size: Any) -> None:
        """Set attention slicing. Raises ConfigError if adapters are attached, because slicing would remove them.

        Called by diffusers' enable_attention_slicing.
        """
        if not self._adapters():
            cast(Any, super()).set_attention_slice(slice_size)
        elif slice_size is not None:
            raise ConfigError(
                "Attention slicing would remove the adapters from the denoiser: leave it out (attention needs no more "
                "memory without it), or call enable_model_cpu_offload."
            )

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Fuse projections as in diffusers. Raises ConfigError for a denoiser with adapters, which it would remove."""
        if unet and self._adapters():
            raise ConfigError(
                "Fused projections would remove the adapters from the denoiser: call fuse_qkv_projections(unet=False)."
            )
        cast(Any, super()).fuse_qkv_projections(unet=unet, vae=vae)
