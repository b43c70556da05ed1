"""The nodes: load weights, enroll a person, load and save a persona, generate.

They are written for the V3 interface of ComfyUI, in its pinned version `comfy_api.v0_0_2`. A node keeps no state: what
one makes travels to the next over the wires IMAGINE_PIPE and IMAGINE_PERSONA. A mistake in an input is the one sentence
that the library raises. Interruption and progress go through ComfyUI at every denoising step.
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.v0_0_2 import ComfyAPISync, ComfyExtension, io

CATEGORY = "Imagine"
PIPE, PERSONA = io.Custom("IMAGINE_PIPE"), io.Custom("IMAGINE_PERSONA")
MOST_PEOPLE = 4
DEFAULT_NAMES = "a, b, c, d"
NOT_RECORDED = "not recorded"


class ImagineLoad(io.ComfyNode):
    """Load weights: the shipped ones, a folder, or Stable Diffusion 1.5 or XL in diffusers' form."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImagineLoad",
            display_name="Load Imagine",
            category=CATEGORY,
            description="Loads a base with its adapter. Empty fields take the shipped weights and their own adapter.",
            inputs=[
                io.String.Input("weights", default="", tooltip="folder of weights, or a hub id; empty: shipped"),
                io.String.Input("adapter", default="", tooltip="folder of another identity adapter; empty: its own"),
                io.Combo.Input("device", options=["auto", "cpu", "cuda", "mps"], default="auto"),
            ],
            outputs=[PIPE.Output("pipe", display_name="pipe")],
        )

    @classmethod
    def execute(cls, weights: str, adapter: str, device: str) -> io.NodeOutput:
        from imagine import ImaginePipeline
        from imagine.people.doctor import device_for

        chosen = device_for(device)  # raises an error for an absent device before anything is loaded
        pipe: Any = ImaginePipeline.from_pretrained(weights.strip() or None)
        if adapter.strip():
            pipe.load_adapter(adapter.strip())
        pipe.set_progress_bar_config(disable=True)
        return io.NodeOutput(pipe.to(chosen))


class ImagineEnroll(io.ComfyNode):
    """Encode the photos of one person; the crop shows the face that was used, the report how good each photo is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImagineEnroll",
            display_name="Enroll Person (Imagine)",
            category=CATEGORY,
            description="Encodes one or several photos of one person as a persona.",
            inputs=[
                PIPE.Input("pipe"),
                io.Image.Input("photos", tooltip="a batch of photos of one person"),
                io.Int.Input(
                    "face", default=-1, min=-1, max=99, tooltip="-1: the largest face; else its number from 0"
                ),
                io.Combo.Input("pooling", options=["concatenate", "mean"], default="concatenate"),
                io.Combo.Input("consent", options=[NOT_RECORDED, "self", "agreed", "invented"], default=NOT_RECORDED),
                io.String.Input("consent_note", default="", tooltip="kept in the persona, and never in a picture"),
                io.Int.Input("valid_days", default=365, min=0, max=36500, tooltip="0: without an end"),
            ],
            outputs=[
                PERSONA.Output("persona", display_name="persona"),
                io.Image.Output("crop", display_name="face crops"),
                io.String.Output("report", display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls, pipe: Any, photos: torch.Tensor, face: int, pooling: str, consent: str, consent_note: str, valid_days: int
    ) -> io.NodeOutput:
        from imagine.personas.consent import Consent

        stated = None
        if consent != NOT_RECORDED:
            stated = Consent.state(consent, consent_note, valid_days or None)
        pictures = [photo.permute(2, 0, 1) for photo in photos]
        persona = pipe.enroll(pictures, "largest" if face < 0 else face, pooling=pooling, consent=stated)
        crops = torch.stack([to_image(one.crop) for one in persona.faces])
        report = "\n".join(f"{one.reference}: {one.quality}" for one in persona.faces)
        return io.NodeOutput(persona, crops, report)


class ImagineSavePersona(io.ComfyNode):
    """Write a persona to a file, encrypted if a passphrase file is named."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImagineSavePersona",
            display_name="Save Persona (Imagine)",
            category=CATEGORY,
            description="Writes a persona file, which Load Persona and the command imagine read.",
            is_output_node=True,
            inputs=[
                PERSONA.Input("persona"),
                io.String.Input("file", default="me.safetensors"),
                io.String.Input("passphrase_file", default="", tooltip="a passphrase itself would end up in workflows"),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, persona: Any, file: str, passphrase_file: str) -> io.NodeOutput:
        from imagine.paths import writable_file

        persona.save(writable_file(Path(file), (".safetensors",)), passphrase_in(passphrase_file))
        return io.NodeOutput()


class ImagineLoadPersona(io.ComfyNode):
    """Read a persona file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImagineLoadPersona",
            display_name="Load Persona (Imagine)",
            category=CATEGORY,
            description="Reads a persona file; an expired one is refused when a picture is generated.",
            inputs=[
                io.String.Input("file", default="me.safetensors"),
                io.String.Input("passphrase_file", default=""),
            ],
            outputs=[PERSONA.Output("persona", display_name="persona")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, passphrase_file: str) -> Any:
        """Return what changes with the file, so that a changed persona is loaded again."""
        try:
            found = os.stat(file)
        except OSError:
            return float("nan")  # never equal, so that the missing file is reported again
        return found.st_mtime_ns, found.st_size

    @classmethod
    def execute(cls, file: str, passphrase_file: str) -> io.NodeOutput:
        from imagine import Persona

        return io.NodeOutput(Persona.load(file, passphrase_in(passphrase_file)))


class ImagineGenerate(io.ComfyNode):
    """Generate pictures of up to four people, who are named in the prompt as {a}, {b} ..."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImagineGenerate",
            display_name="Generate (Imagine)",
            category=CATEGORY,
            description="Draws the people as the prompt says. With several people, name them in braces: {a} hugs {b}.",
            inputs=[
                PIPE.Input("pipe"),
                io.String.Input("prompt", multiline=True, default="smiling, on a beach"),
                io.String.Input("negative_prompt", multiline=True, default=""),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True),
                io.Int.Input("pictures", default=1, min=1, max=64),
                io.Int.Input("steps", default=0, min=0, max=1000, tooltip="0: the default of the weights"),
                io.Float.Input("guidance", default=0.0, min=0.0, max=100.0, step=0.1, tooltip="0: the default"),
                io.Float.Input("identity", default=1.0, min=0.0, max=3.0, step=0.05, tooltip="strength of the people"),
                io.Int.Input("width", default=0, min=0, max=8192, tooltip="0: the default of the weights"),
                io.Int.Input("height", default=0, min=0, max=8192, tooltip="0: the default of the weights"),
                io.Combo.Input("watermark", options=["where reliable", "on", "off"], default="where reliable"),
                io.String.Input("names", default=DEFAULT_NAMES, tooltip="names of the people in the prompt, in order"),
                *(PERSONA.Input(f"person_{number}", optional=True) for number in range(1, MOST_PEOPLE + 1)),
            ],
            outputs=[
                io.Image.Output("images", display_name="images"),
                io.String.Output("settings", display_name="settings"),
                io.String.Output("report", display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls, pipe: Any, prompt: str, negative_prompt: str, seed: int, pictures: int, steps: int, guidance: float,
        identity: float, width: int, height: int, watermark: str, names: str, person_1: Any = None,
        person_2: Any = None, person_3: Any = None, person_4: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        given = {
            "negative_prompt": negative_prompt or None, "num_inference_steps": steps or None,
            "guidance_scale": guidance or None, "width": width or None, "height": height or None,
        }  # fmt: skip
        seeds = [(seed + number) % 2**63 for number in range(pictures)]
        people = references([person_1, person_2, person_3, person_4], names)
        out = pipe(
            prompt,
            reference=people,
            num_images_per_prompt=pictures,
            generator=[torch.Generator().manual_seed(each) for each in seeds],
            identity_scale=identity,
            callback_on_step_end=step_callback(steps),
            **{name: value for name, value in given.items() if value is not None},
        )
        records = getattr(out, "records", None)  # the pipelines of Stable Diffusion make none
        if not records:
            records = [node_record(pipe, prompt, people, each, steps, guidance) for each in seeds]
        images, notes, settings = marked(out, records, watermark)
        return io.NodeOutput(images, settings, "\n".join(notes))


class ImagineExtension(ComfyExtension):
    """The list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ImagineLoad, ImagineEnroll, ImagineSavePersona, ImagineLoadPersona, ImagineGenerate]


async def comfy_entrypoint() -> ImagineExtension:
    """Return the extension; ComfyUI looks for this name."""
    return ImagineExtension()


def references(people: list[Any], names: str) -> Any:
    """Return the people as a call takes them: None, one persona, or a dict from names to personas."""
    present = [person for person in people if person is not None]
    if len(present) < 2:
        return present[0] if present else None
    each = [name.strip().strip("{}") for name in names.split(",") if name.strip()]
    if len(each) < len(people) - people[::-1].index(present[-1]) or len(set(each)) < len(each):
        raise ValueError(f"names={names!r} must name every person once, as in {DEFAULT_NAMES!r}.")
    return {name: person for name, person in zip(each, people, strict=False) if person is not None}


def progress_shower() -> Callable[[int, int], None]:
    """Return a function that shows in ComfyUI how many steps are done, and how many there are.

    Some releases, 0.3.64 among them, have no `execution` on the synchronous interface; there the older ProgressBar of
    `comfy.utils` does the same.
    """
    execution: Any = getattr(ComfyAPISync(), "execution", None)
    if execution is None:
        bar: Any = importlib.import_module("comfy.utils").ProgressBar(1)
        return lambda value, total: bar.update_absolute(value, total)
    return lambda value, total: execution.set_progress(value=value, max_value=total)


def step_callback(steps: int) -> Any:
    """Return a callback that reports each step to ComfyUI, and stops where the user has interrupted it."""
    show = progress_shower()

    def report(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        management: Any = sys.modules.get("comfy.model_management")  # absent outside of ComfyUI
        if management is not None:
            management.throw_exception_if_processing_interrupted()
        show(step + 1, getattr(pipe, "num_timesteps", 0) or steps or step + 1)
        return tensors

    return report


def node_record(pipe: Any, prompt: str, people: Any, seed: int, steps: int, guidance: float) -> Any:
    """Return the record of a picture from what the node was given; names in the prompt become letters."""
    from imagine.provenance.record import PictureRecord, ShownPerson

    named = people if isinstance(people, dict) else {} if people is None else {"": people}
    for name, letter in zip(named, "abcd", strict=False):
        prompt = prompt.replace(f"{{{name}}}", f"{{{letter}}}")
    shown = tuple(ShownPerson(person.hash, person.consent_basis) for person in named.values())
    sampler = type(pipe.scheduler).__name__.removesuffix("Scheduler")
    model = type(pipe).__name__
    return PictureRecord(prompt, seed, steps or None, guidance or None, sampler, model, people=shown)


def marked(out: Any, records: Any, watermark: str) -> tuple[torch.Tensor, list[str], str]:
    """Return the pictures of a call as an IMAGE, its notes, and the settings of the first picture as text.

    ComfyUI's own nodes save the pictures, so that only the watermark can be applied here.
    """
    from imagine.provenance.marks import Marks
    from imagine.provenance.saving import watermarked

    chosen = Marks(watermark={"on": True, "off": False}.get(watermark))
    notes, images = list(getattr(out, "notes", ())), []
    for image, record in zip(out.images, records, strict=True):
        picture, more = watermarked(image, record, chosen)
        images.append(to_image(picture))
        notes += [note for note in more if note not in notes]
    flags = [flag for flag in getattr(out, "flags", ()) if flag]
    return torch.stack(images), [*notes, *flags], records[0].as_text(out.images[0].size)


def passphrase_in(file: str) -> str | None:
    """Return the passphrase in the first line of a file; None if no file is named."""
    if not file.strip():
        return None
    lines = Path(file.strip()).read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].strip():
        raise ValueError(f"{file} has no passphrase in its first line: write one there.")
    return lines[0]


def to_image(picture: Any) -> torch.Tensor:
    """Return a PIL picture as a tensor (height, width, 3), 0 to 1."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).float() / 255
