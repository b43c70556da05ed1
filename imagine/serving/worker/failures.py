"""Why a job failed: one code and one sentence for each kind of error."""

import logging

import torch

from imagine.errors import (
    ConfigError,
    ConsentError,
    FaceError,
    ImagineError,
    PictureError,
    PromptError,
    SafetyError,
    WeightsError,
)

LOG = logging.getLogger("imagine.serving")

OUT_OF_MEMORY = "One picture of this size does not fit into the memory of the device; ask for a smaller one."
INTERNAL = "The server could not draw this; the operator finds the reason in its log."

_CODES: tuple[tuple[type[ImagineError], str], ...] = (
    (FaceError, "face_not_usable"),
    (PictureError, "photo_not_usable"),
    (PromptError, "prompt_not_usable"),
    (ConfigError, "invalid_request"),
    (WeightsError, "model_error"),
    (ConsentError, "consent_expired"),
    (SafetyError, "flagged"),
)


class GoneError(ImagineError):
    """Raised when a photo or persona of a job was deleted before the job ran."""


class DeviceLostError(Exception):
    """Raised when the device no longer works; the process ends, and another one takes over its jobs."""


def describe(error: Exception) -> tuple[str, str]:
    """Return code and sentence for an error that ended a job; what is our fault is logged with its traceback."""
    if isinstance(error, GoneError):
        return "gone", str(error)
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, " ".join(str(error).split())
    if is_out_of_memory(error):
        return "out_of_memory", OUT_OF_MEMORY
    LOG.error("job failed", exc_info=error)
    return "internal", INTERNAL


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory of the device, or of the CPU, did not suffice."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "not enough memory" in text)
    )


def is_device_lost(error: BaseException) -> bool:
    """Return whether an error means that the process can no longer use its device."""
    text = str(error)
    return (
        isinstance(error, RuntimeError)
        and not is_out_of_memory(error)
        and ("CUDA error" in text or "device-side assert" in text or "CUBLAS_STATUS" in text)
    )
