"""A small stand-in for ComfyUI's package of this name, for tests where ComfyUI is not at hand (it is not on PyPI)."""
