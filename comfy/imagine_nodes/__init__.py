"""Nodes for ComfyUI: a person from photos, and new pictures of them, with the library `imagine`."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
