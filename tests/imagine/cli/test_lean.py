"""The command's own process: the same picture as the library's, without importing what does not draw."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from imagine.pipeline.pipeline import ImaginePipeline
from tests import tiny
from tests.root import ROOT

SCRIPT = """
import sys
from imagine.cli import main

code = main()
print("heavy:", sorted({"sympy", "peft", "timm", "xformers"} & set(sys.modules)))
sys.exit(code)
"""


def test_a_lean_process_draws_the_same_picture_without_the_heavy_imports(tmp_path: Path) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "weights")
    Image.fromarray(data.astronaut()).crop((110, 0, 350, 240)).save(tmp_path / "photo.png")
    arguments = ["--reference", "photo.png", "--prompt", "smiling", "--output", "out.png", "--weights", "weights"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, "generate", *arguments, "--seed", "7"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "heavy: []" in done.stdout  # and so it did not have to start again the plain way
    pipe = ImaginePipeline.from_pretrained(tmp_path / "weights")
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe("smiling", reference=tmp_path / "photo.png", generator=tiny.generator(7)).images[0]
    # Another number of threads may round differently.
    assert np.abs(np.asarray(Image.open(tmp_path / "out.png")).astype(int) - np.asarray(wanted)).max() <= 1


def test_importing_the_library_is_not_lean() -> None:
    """This very process imported it: everything optional is still there for the asking."""
    import torch._dynamo

    assert hasattr(torch._dynamo, "__file__")
    assert torch.nn.Embedding.reset_parameters.__module__ == "torch.nn.modules.sparse"
