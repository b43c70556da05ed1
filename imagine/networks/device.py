"""The device on which a pipeline of diffusers computes, found once in a call.

diffusers walks through all modules of the pipeline to find it, which takes milliseconds. A call of ours needs the
device at several places, and it does not change during a call.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch

Call = TypeVar("Call", bound=Callable[..., Any])

# In a call: the devices of the pipelines that were asked for in it, by the pipeline's id. Otherwise None.
_devices: ContextVar[dict[int, torch.device] | None] = ContextVar("_devices", default=None)


def execution_device(pipe: Any) -> torch.device:
    """Return the device on which a pipeline computes, which is not where its modules are while they are offloaded."""
    devices = _devices.get()
    if devices is None:
        return cast(torch.device, pipe._execution_device)
    if id(pipe) not in devices:
        devices[id(pipe)] = pipe._execution_device
    return devices[id(pipe)]


def device_found_once(call: Call) -> Call:
    """Decorate the call of a pipeline, so that `execution_device` asks diffusers once for each pipeline in it."""

    @functools.wraps(call)
    def with_devices(*arguments: Any, **options: Any) -> Any:
        token = _devices.set({})
        try:
            return call(*arguments, **options)
        finally:
            _devices.reset(token)

    return cast(Call, with_devices)
