"""The device of a pipeline is found once in a call, and anew in the next one."""

import threading

import pytest
import torch

from imagine.networks.device import device_found_once, execution_device


class Pipe:
    """A pipeline that counts how often its device is looked for."""

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.looked = device, 0

    @property
    def _execution_device(self) -> torch.device:
        self.looked += 1
        return torch.device(self.device)

    @device_found_once
    def __call__(self, other: "Pipe | None" = None, fails: bool = False) -> list[torch.device]:
        found = [execution_device(each) for each in (self, other or self, self, other or self)]
        if fails:
            raise ValueError
        return found


def test_a_call_looks_once_for_each_pipeline():
    one, other = Pipe("cpu"), Pipe("meta")
    assert [each.type for each in one(other)] == ["cpu", "meta", "cpu", "meta"]
    assert (one.looked, other.looked) == (1, 1)


def test_the_next_call_sees_another_device_also_after_an_error():
    pipe = Pipe("cpu")
    with pytest.raises(ValueError):
        pipe(fails=True)
    pipe.device = "meta"
    assert {each.type for each in pipe()} == {"meta"}
    pipe.device = "cpu"
    assert execution_device(pipe).type == "cpu"


def test_threads_look_for_themselves():
    pipe, found = Pipe(), list[int]()

    def call() -> None:
        pipe()
        found.append(pipe.looked)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert found == [1, 2, 3]
