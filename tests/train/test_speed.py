"""Optimisations of the loop: plain attention in bf16 on a CPU, and validation without compiled code."""

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from imagine.errors import ConfigError
from tests.toy_training import ToyBatch, ToyTask
from train import loop
from train.config import Run, Stage
from train.stages import run_stages
from train.task import Loss


def train(output: Path, task: type[ToyTask], **settings: Any) -> None:
    given = {"task": "toy", "train": {"both": 1e-2}, "images": 16, "batch_size": 8, "precision": "fp32", **settings}
    run_stages(Run(stages={"one": Stage.model_validate(given)}, trackers=()), output, tasks={"toy": task})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_attention_is_used_where_the_fused_kernel_is_slow(tmp_path: Path, precision: str) -> None:
    seen: list[tuple[bool, bool]] = []

    class Watching(ToyTask):
        def loss(self, batch: ToyBatch, images_seen: int) -> Loss:
            half = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
            seen.append((torch.backends.cuda.flash_sdp_enabled(), half))
            return super().loss(batch, images_seen)

    train(tmp_path, Watching, precision=precision)
    assert seen == [(False, True) if precision == "bf16" else (True, False)] * 2
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()


def test_plain_attention_equals_fused_attention() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    fused = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with loop.plain_attention():
        plain = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(plain, fused)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # PyTorch causes it itself
def test_validation_does_not_use_compiled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[bool] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    class Eager(nn.Module):
        compile = partialmethod(nn.Module.compile, backend=keep)

    monkeypatch.setattr(nn.Module, "compile", Eager.compile)
    monkeypatch.setattr(loop, "_cpp_compiler", lambda: "a compiler that this test does not run")
    torch.compiler.reset()
    train(tmp_path, ToyTask, compile=True, validate_every=8)
    assert len(graphs) == 2 and all(graphs)  # body and head for training; none for validation, which takes no gradients


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_frozen_networks_are_compiled_and_channels_last_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(loop, "_cpp_compiler", lambda: "a compiler that this test does not run")
    tasks: list[ToyTask] = []

    class Kept(ToyTask):
        def prepare(self) -> None:
            tasks.append(self)

    frozen = {"train": {"second": 1e-2}, "settings": {"image": True}}
    train(tmp_path, Kept, compile=True, channels_last=True, **frozen)
    assert compiled == list(tasks[0].modules.values())
    kernel = next(p for p in tasks[0].modules["body"].parameters() if p.ndim == 4)
    assert not kernel.requires_grad and kernel.is_contiguous(memory_format=torch.channels_last)


def test_compiling_without_a_compiler_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"stage one: compile: true needs a C\+\+ compiler .* Install g\+\+"):
        train(tmp_path, ToyTask, compile=True)


def test_automatic_compiling_without_a_compiler_trains_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(nn.Module, "compile", lambda module: pytest.fail("compiled without a compiler"))
    with caplog.at_level("INFO", "train"):
        train(tmp_path, ToyTask, compile="auto")
    assert "not compiled, because there is no C++ compiler" in caplog.text


def test_automatic_compiling_compiles_with_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(loop, "_cpp_compiler", lambda: "a compiler that this test does not run")
    train(tmp_path, ToyTask, compile="auto")
    assert compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_network_with_pytorchs_attention_module_is_not_compiled_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(loop, "_cpp_compiler", lambda: "a compiler that this test does not run")

    class Attending(ToyTask):
        def prepare(self) -> None:
            self.modules["reader"] = nn.Sequential(nn.MultiheadAttention(4, 2))

    train(tmp_path, Attending, compile=True)
    assert compiled and not any(isinstance(module[0], nn.MultiheadAttention) for module in compiled
                                if isinstance(module, nn.Sequential))  # fmt: skip
