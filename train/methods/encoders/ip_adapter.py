"""IP-Adapter (arXiv 2308.06721): keys and values of their own for the image, the encoder frozen, unpaired pictures.

Every picture is its own reference (source "real"), so nothing separates the person from pose and clothes.
"""

from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.records import VISION
from train.methods.encoding import EncoderSettings, EncoderTask, write_ip_adapter


class IPAdapterSettings(EncoderSettings):
    """Settings of the adapter."""

    sources: dict[str, float] = {"real": 1.0}  # noqa: RUF012  (pydantic copies it)
    projection: Literal["full", "plus"] = "full"


class IPAdapter(EncoderTask):
    """Learn a decoupled image branch and its projection."""

    Settings = IPAdapterSettings
    PARTS: ClassVar[tuple[str, ...]] = ("adapter",)
    NAME: ClassVar[str] = "ip_adapter"
    FUSION: ClassVar[Literal["parallel", "concatenated"]] = "parallel"

    def build(self) -> None:
        width = int(self.vision.config.width)
        spec = BranchSpec(VISION, self.width(), 1.0, False, self.settings.projection, width, self.FUSION)
        self.adapter = Adapter(self.base.unet, [spec], self.settings.lora_rank)
        self.modules["adapter"] = self.adapter.to(self.base.device)

    def represent(self, crops: Tensor) -> Tensor:
        assert self.adapter is not None
        return self.adapter.tokens(VISION, self.vision(crops)).values

    def write(self, folder: Path) -> None:
        write_ip_adapter(self, folder)
