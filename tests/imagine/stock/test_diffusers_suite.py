"""diffusers' published pipeline tests, run on our classes and its own: ours must pass what the stock classes pass.

The tests are not part of this repository. IMAGINE_DIFFUSERS_CHECKOUT names a checkout of diffusers, of a release near
the installed one; without it these tests are skipped. They take minutes per file, and some files need the packages
`parameterized` and `requests_mock`.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path

import pytest

from imagine.networks.encoders import trim_clip_vocabulary

CHECKOUT = os.environ.get("IMAGINE_DIFFUSERS_CHECKOUT")
ROOT = Path(__file__).parents[3]
FILES = {  # the files below tests/pipelines, and how many of their tests must pass
    "stable_diffusion/test_stable_diffusion.py": 30,
    "stable_diffusion/test_stable_diffusion_img2img.py": 20,
    "stable_diffusion/test_stable_diffusion_inpaint.py": 30,
    "stable_diffusion_xl/test_stable_diffusion_xl.py": 30,
    "stable_diffusion_xl/test_stable_diffusion_xl_img2img.py": 30,
    "stable_diffusion_xl/test_stable_diffusion_xl_inpaint.py": 30,
    "controlnet/test_controlnet.py": 30,
    "controlnet/test_controlnet_img2img.py": 20,
    "controlnet/test_controlnet_inpaint.py": 20,
    "controlnet/test_controlnet_sdxl.py": 20,
    "controlnet/test_controlnet_sdxl_img2img.py": 10,
    "controlnet/test_controlnet_inpaint_sdxl.py": 10,
}
# Tests that need the network, a graphics card or minutes; the others run on random weights of a few kilobytes.
LEFT_OUT = "not Slow and not Integration and not Ckpt and not DeviceMap and not Memory"

pytestmark = pytest.mark.skipif(not CHECKOUT, reason="IMAGINE_DIFFUSERS_CHECKOUT names no checkout of diffusers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small CLIP tokenizer, which stands for the one that the tests would download."""
    folder = tmp_path_factory.mktemp("clip")
    trim_clip_vocabulary(["A painting of a squirrel eating a burger"], folder, max_tokens=77)
    return folder


def outcomes(file: str, pipelines: str, tokenizer: Path, folder: Path) -> Mapping[str, str]:
    """Run a file of tests in a process of its own, and return "passed", "failed" or "skipped" for each test."""
    assert CHECKOUT is not None
    (folder / "empty.ini").write_text("[pytest]\n")
    report = folder / f"{pipelines}.xml"
    plugin, paths = Path(__file__).with_name("diffusers_plugin.py"), [str(ROOT), str(Path(__file__).parent)]
    assert plugin.is_file()
    command: list[str | Path] = [
        sys.executable, "-m", "pytest", "-c", folder / "empty.ini", "--rootdir", CHECKOUT, "-p", plugin.stem, "-q",
        "-p", "no:cacheprovider", f"--junitxml={report}", "-k", LEFT_OUT, f"{CHECKOUT}/tests/pipelines/{file}",
    ]  # fmt: skip
    variables = {"PIPELINES": pipelines, "TOKENIZER": str(tokenizer), "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, **variables, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if "ModuleNotFoundError" in done.stdout and "during collection" in done.stdout:
        pytest.skip(
            f"{file} needs a package that is not installed: {done.stdout.split('ModuleNotFoundError: ')[1][:60]}"
        )
    assert report.is_file(), f"{file} was not run to its end: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        result = "failed" if case.find("failure") is not None or case.find("error") is not None else "passed"
        result = "skipped" if case.find("skipped") is not None else result
        found[f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"] = result
    return found


@pytest.mark.parametrize("file", FILES)
def test_our_classes_pass_what_the_stock_classes_pass(file: str, tokenizer: Path, tmp_path: Path):
    stock, ours = (outcomes(file, pipelines, tokenizer, tmp_path) for pipelines in ("stock", "ours"))
    passed = [name for name, result in stock.items() if result == "passed"]
    assert len(passed) >= FILES[file]
    worse = {name: ours.get(name) for name in passed if ours.get(name) != "passed"}
    assert not worse
