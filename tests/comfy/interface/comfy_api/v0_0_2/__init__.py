"""The part of ComfyUI's V3 node interface that our nodes use, written from its documentation, with its checks."""

from abc import ABC, abstractmethod
from typing import Any

from . import io

__all__ = ["ComfyAPISync", "ComfyExtension", "io"]


class ComfyExtension(ABC):
    """What a module's `comfy_entrypoint` returns."""

    @abstractmethod
    async def get_node_list(self) -> list[type[io.ComfyNode]]: ...


class ComfyAPISync:
    """Collects the progress that nodes report."""

    reported: list[tuple[float, float]] = []  # noqa: RUF012  (shared on purpose, as the interface is a singleton)

    class Execution:
        def set_progress(
            self, value: float, max_value: float, node_id: Any = None, preview_image: Any = None,
            ignore_size_limit: bool = False,
        ) -> None:  # fmt: skip
            ComfyAPISync.reported.append((value, max_value))

    execution = Execution()
