"""The nodes for ComfyUI, driven as ComfyUI drives them.

They run against ComfyUI's own interface if IMAGINE_COMFYUI_CHECKOUT names a checkout whose requirements are installed,
and else against the small stand-in in `interface`.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imagine.errors import ConsentError, FaceError
from imagine.people.persona import Persona
from imagine.pipeline.pipeline import ImaginePipeline
from tests import tiny
from tests.root import ROOT

PACK = ROOT / "comfy" / "imagine_nodes"
INTERFACE = os.environ.get("IMAGINE_COMFYUI_CHECKOUT") or str(ROOT / "tests" / "comfy" / "interface")
GENERATE: dict[str, Any] = {
    "prompt": "a person on a beach", "negative_prompt": "", "seed": 7, "pictures": 1, "steps": 2, "guidance": 0.0,
    "identity": 1.0, "width": 0, "height": 0, "watermark": "off", "names": "a, b, c, d",
}  # fmt: skip


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """The pack, loaded from its file as ComfyUI loads custom nodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [INTERFACE, *sys.path])
        patch.setattr(sys, "argv", ["main.py"])  # ComfyUI parses it
        before = set(sys.modules)
        spec = importlib.util.spec_from_file_location(
            "custom_imagine", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["custom_imagine"] = module
        spec.loader.exec_module(module)
        yield importlib.import_module("custom_imagine.nodes")
        for name in set(sys.modules) - before:
            if name.startswith(("comfy", "custom_imagine")):
                del sys.modules[name]


@pytest.fixture(scope="module")
def pipe() -> ImaginePipeline:
    return tiny.pipeline()


def batch(*seeds: int) -> torch.Tensor:
    """Photos as an IMAGE."""
    pixels = [torch.frombuffer(bytearray(tiny.photo(seed).tobytes()), dtype=torch.uint8) for seed in seeds]
    return torch.stack([each.view(64, 64, 3).float() / 255 for each in pixels])


@pytest.fixture(scope="module")
def person(nodes: Any, pipe: ImaginePipeline) -> Persona:
    persona: Persona = nodes.ImagineEnroll.execute(pipe, batch(1, 2), -1, "mean", "agreed", "a note", 30)[0]
    return persona


def test_every_node_fits_its_schema(nodes: Any) -> None:
    extension = asyncio.run(nodes.comfy_entrypoint())
    found = asyncio.run(extension.get_node_list())
    assert len(found) == 5
    for node in found:
        schema = node.GET_SCHEMA()
        assert schema.node_id == node.__name__ and schema.node_id.startswith("Imagine") and schema.category == "Imagine"
        assert list(inspect.signature(node.execute).parameters) == [port.id for port in schema.inputs]


def test_photos_become_a_persona_with_its_crops(nodes: Any, pipe: ImaginePipeline, person: Persona) -> None:
    assert person.consent is not None and person.consent.note == "a note" and person.pooling == "mean"
    output = nodes.ImagineEnroll.execute(pipe, batch(1), 0, "concatenate", "not recorded", "", 365)
    assert output[0].consent is None and output[1].shape == (1, tiny.CROP, tiny.CROP, 3) and "photo 1: " in output[2]
    assert torch.equal(output[0].features, pipe.enroll(tiny.photo(1)).features)
    with pytest.raises(FaceError, match="no face=5"):
        nodes.ImagineEnroll.execute(pipe, batch(1), 5, "mean", "self", "", 0)


def test_pictures_are_those_of_the_library(nodes: Any, pipe: ImaginePipeline, person: Persona) -> None:
    images, settings, _report = nodes.ImagineGenerate.execute(pipe, **{**GENERATE, "pictures": 2}, person_1=person).args
    wanted = pipe(
        GENERATE["prompt"], reference=person, num_inference_steps=2, num_images_per_prompt=2, output_type="pt",
        generator=[tiny.generator(7), tiny.generator(8)],
    ).images  # fmt: skip
    assert images.shape == (2, tiny.SIZE, tiny.SIZE, 3) and images.dtype == torch.float32
    assert (images - wanted.permute(0, 2, 3, 1)).abs().max() < 1 / 255
    assert "Seed: 7" in settings and "Imagine consent: recorded" in settings


def test_several_people_are_named(nodes: Any, pipe: ImaginePipeline, person: Persona) -> None:
    given = {**GENERATE, "prompt": "{canary} hugs {bob}", "names": "canary, unused, {bob}"}
    output = nodes.ImagineGenerate.execute(pipe, **given, person_1=person, person_3=person)
    assert "canary" not in output[1] and "{a} hugs {b}" in output[1]
    with pytest.raises(ValueError, match="must name every person once"):
        nodes.ImagineGenerate.execute(pipe, **{**given, "names": "ann"}, person_1=person, person_3=person)


def test_progress_and_interruption_go_through_comfyui(
    nodes: Any, pipe: ImaginePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[tuple[float, float]] = []

    def report(self: Any, value: float, max_value: float) -> None:
        reported.append((value, max_value))

    if (execution := getattr(nodes.ComfyAPISync(), "execution", None)) is not None:
        monkeypatch.setattr(type(execution), "set_progress", report)
    else:  # a release of ComfyUI without it
        utils = importlib.import_module("comfy.utils")
        monkeypatch.setattr(utils, "PROGRESS_BAR_HOOK", lambda value, total, *more, **named: report(0, value, total))
    nodes.ImagineGenerate.execute(pipe, **GENERATE)
    assert reported == [(1, 2), (2, 2)]

    class Interrupted(Exception):
        pass

    class Management:
        @staticmethod
        def throw_exception_if_processing_interrupted() -> None:
            raise Interrupted

    monkeypatch.setitem(sys.modules, "comfy.model_management", Management)
    with pytest.raises(Interrupted):
        nodes.ImagineGenerate.execute(pipe, **GENERATE)


def test_personas_are_saved_loaded_and_noticed_when_they_change(
    nodes: Any, pipe: ImaginePipeline, person: Persona, tmp_path: Path
) -> None:
    file, words = str(tmp_path / "me.safetensors"), tmp_path / "words"
    words.write_text("correct horse\n")
    before = nodes.ImagineLoadPersona.fingerprint_inputs(file, "")
    nodes.ImagineSavePersona.execute(person, file, str(words))
    after = nodes.ImagineLoadPersona.fingerprint_inputs(file, "")
    assert before != after and before != before and after == nodes.ImagineLoadPersona.fingerprint_inputs(file, "")
    loaded = nodes.ImagineLoadPersona.execute(file, str(words))[0]
    assert torch.equal(loaded.features, person.features) and loaded.consent == person.consent
    object.__setattr__(loaded.consent, "expires", loaded.consent.given.replace(year=2000))
    with pytest.raises(ConsentError, match="expired"):
        nodes.ImagineGenerate.execute(pipe, **GENERATE, person_1=loaded)


def test_weights_are_loaded_from_a_folder(nodes: Any, pipe: ImaginePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "weights")
    loaded = nodes.ImagineLoad.execute(f" {tmp_path / 'weights'} ", "", "cpu")[0]
    assert type(loaded).__name__ == "ImaginePipeline" and loaded.encoder_fingerprint == pipe.encoder_fingerprint


def test_the_example_workflow_uses_inputs_that_exist(nodes: Any) -> None:
    workflow = json.loads((PACK / "example_workflows" / "one_person.json").read_text())
    for step in workflow.values():
        node = getattr(nodes, step["class_type"], None)
        if node is not None:
            ports = {port.id: port for port in node.GET_SCHEMA().inputs}
            assert set(step["inputs"]) <= set(ports)
            assert {name for name, port in ports.items() if not port.optional} <= set(step["inputs"])


def test_pictures_of_a_pil_image_are_images(nodes: Any) -> None:
    assert torch.equal(nodes.to_image(Image.new("L", (3, 2), 255)), torch.ones(2, 3, 3))
