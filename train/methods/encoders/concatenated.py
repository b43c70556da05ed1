"""Concatenated attention: the image's tokens share one softmax with the text's (the baseline of arXiv 2409.13346)."""

from typing import ClassVar, Literal

from train.methods.encoders.ip_adapter import IPAdapter, IPAdapterSettings


class ConcatenatedSettings(IPAdapterSettings):
    """Settings of the adapter; pairs, so that only the attention differs from the paper's method."""

    sources: dict[str, float] = {"synthetic": 1.0}  # noqa: RUF012  (pydantic copies it)


class Concatenated(IPAdapter):
    """Learn keys and values of the image that are appended to the text's."""

    Settings = ConcatenatedSettings
    NAME: ClassVar[str] = "concatenated"
    FUSION: ClassVar[Literal["parallel", "concatenated"]] = "concatenated"
