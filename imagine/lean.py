"""Importing and loading the pipeline in less than half the time, for one picture on the command line.

diffusers, transformers and open_clip import whatever optional library is installed, used or not; torch's compiler with
all of sympy for the sake of a few decorators; and the whole of distributed training. That is most of what a cold
`imagine generate` would wait for, and none of it draws. So while the pipeline is imported those libraries look absent,
and for the rest of the process the compiler is a module whose functions return what they are given.

Only the command line's own process does this: it knows that it will neither compile, nor train, nor load a LoRA.
Programs that import the library, or call `imagine.cli.main` with arguments, never see it. Should a new version of a
library not bear it, the command line starts itself again with SWITCH set, the plain and slow way.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

SWITCH = "IMAGINE_PLAIN_IMPORTS"
OPTIONAL = ("onnxruntime", "peft", "scipy", "sklearn", "timm", "xformers")
COMPILER = "torch._dynamo"
IDLE = (COMPILER, "torch._dynamo.eval_frame", "torch._dynamo.utils", "torch.fx.experimental.symbolic_shapes")
CLASSES = {  # libraries and classes that are imported when they are first asked for
    "transformers": ("CLIPTextModel", "CLIPTokenizer", "ByT5Tokenizer", "T5EncoderModel", "T5Tokenizer"),
    "diffusers": ("AutoencoderDC", "FlowMatchEulerDiscreteScheduler", "UNet2DConditionModel"),
    "open_clip.transformer": ("VisionTransformer",),
}


def import_pipeline_lean() -> None:
    """Import the pipeline and the classes that loading it will ask for, unless something is imported already."""
    torch = importlib.util.find_spec("torch")
    if "torch" in sys.modules or torch is None or torch.origin is None or SWITCH in os.environ:
        return
    idle: dict[str, ModuleType] = {name: _Idle(name) for name in IDLE if name not in sys.modules}
    for module in idle.values():
        # The compiler's other submodules, of which transformers needs one, are the real ones.
        module.__path__ = [str(Path(torch.origin).parent / "_dynamo")] if module.__name__ == COMPILER else []
    sys.modules.update(idle)
    if COMPILER in idle:
        idle[COMPILER].eval_frame = idle["torch._dynamo.eval_frame"]  # type: ignore[attr-defined]
        idle["torch._dynamo.eval_frame"].OptimizedModule = _Compiled  # type: ignore[attr-defined]
    with _absent(OPTIONAL):
        _import_all()


def start_again_plainly() -> None:
    """Run this very command again without leanness, in place of this process; return only if that was tried already."""
    if SWITCH not in os.environ:
        os.execve(sys.executable, [sys.executable, "-m", "imagine", *sys.argv[1:]], {**os.environ, SWITCH: "1"})


def _import_all() -> None:
    import torch

    # Every weight comes from a file; on the meta device, drawing an embedding's first values would import sympy.
    torch.nn.Embedding.reset_parameters = _unchanged  # type: ignore[assignment, method-assign]
    distributed, torch.distributed.is_available = torch.distributed.is_available, lambda: False
    try:
        _import_classes()
    finally:
        torch.distributed.is_available = distributed


def _import_classes() -> None:
    importlib.import_module("imagine.pipeline.pipeline")
    for library, names in CLASSES.items():
        module = importlib.import_module(library)
        for name in names:
            getattr(module, name)


@contextmanager
def _absent(names: Iterable[str]) -> Iterator[None]:
    """Make libraries look as if they were not installed, to everything that is imported in this block."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


class _Idle(ModuleType):
    """Stands for a module of the compiler: all its functions return what they are given."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unchanged


class _Compiled:
    """What no module is an instance of: diffusers asks every component whether it was compiled."""


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    return _unchanged if function is None else function
