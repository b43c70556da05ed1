"""`imagine try`: draw one person with five prompts, side by side on one HTML page that needs no other file."""

import argparse
import base64
import html
import io
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from imagine.cli import arguments
from imagine.cli.loading import check_photos, load_pipeline, marks_of, opened, read_passphrase
from imagine.cli.progress import Display
from imagine.errors import ConfigError
from imagine.paths import as_path, folder_to_fill, writable_file
from imagine.request import read_requests

if TYPE_CHECKING:
    from PIL import Image

    from imagine.pipeline.output import ImagineOutput

PROMPTS = (
    "smiling, on a beach",
    "a pencil sketch, looking to the side",
    "wearing a red hat, in a forest",
    "a watercolour painting, in front of a mountain",
    "laughing, in a city at night",
)
DEFAULT = Path("out/try.html")
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Imagine: $title</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem; padding: 0 1rem; }
ul { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); }
ul { list-style: none; padding: 0; }
img { border-radius: .5rem; image-rendering: auto; width: 100%; }
figure { margin: 0; }
code { overflow-wrap: anywhere; }
pre { overflow-x: auto; white-space: pre-wrap; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$quality</p>
<ul>
$figures
</ul>
$notes
<h2>Draw one of them again</h2>
<pre><code>$command</code></pre>
<p>These pictures were generated. Their marks stay in the file if you save one from here.</p>
</body>
</html>
""")
_FIGURE = Template('<li><figure><img src="$source" alt="$alt"><figcaption>$caption</figcaption></figure></li>')


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = arguments.add_command(commands, "try", "draw a person with five prompts, on one HTML page", run)
    command.add_argument("photo", metavar="PHOTO", help="photo or persona file of the person")
    command.add_argument("--output", type=Path, default=DEFAULT, metavar="FILE", help=f"page to write (default: "
                         f"{DEFAULT})")  # fmt: skip
    command.add_argument("--prompt", action="append", metavar="TEXT", help="prompt to draw instead of the five; repeat "
                         "it for more")  # fmt: skip
    command.add_argument("--seed", type=arguments.seed, metavar="N", help="repeats the page (default: a random seed)")
    command.add_argument("--steps", type=arguments.positive, metavar="N", help="denoising steps (default: the weights' "
                         "own)")  # fmt: skip
    arguments.add_weights(command)
    arguments.add_device(command)
    arguments.add_face(command)
    arguments.add_no_face(command)
    arguments.add_finder(command)
    arguments.add_passphrase(command)
    arguments.add_marks(command)
    arguments.add_safety(command)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Draw the pictures and write the page; return where it is."""
    if options.output == DEFAULT:
        folder_to_fill(DEFAULT.parent).mkdir(parents=True, exist_ok=True)
    path = writable_file(options.output, (".html",))
    prompts = options.prompt or list(PROMPTS)
    check_photos([options.photo])
    reference = opened(options.photo, read_passphrase(options.passphrase_file))
    read_requests(prompts, [reference] * len(prompts))  # reports a mistake before anything is loaded
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    with Display(options) as display:
        pipe = load_pipeline(options, display)
        display.report("encoding the photo")
        persona = pipe.enroll([reference], options.face, options.on_no_face)
        drawn = _draw(pipe, persona, prompts, seed, options, display)
        pictures, notes = _pictures(drawn, marks_of(options))
    faces = [face.as_dict() for face in persona.faces]
    command = _command(options, prompts[0], seed)
    _write(path, _page(persona.faces, prompts, pictures, drawn.flags, [*drawn.notes, *notes], seed, command))
    return {
        "lines": [f"Open {path.resolve()}", *(f"{each['reference']}: {each['quality']}" for each in faces),
                  *drawn.notes, *notes],
        "page": str(path),
        "prompts": prompts,
        "seed": seed,
        "faces": faces,
        "flags": drawn.flags,
        "command": command,
        "notes": [*drawn.notes, *notes],
    }  # fmt: skip


def _draw(
    pipe: Any, persona: Any, prompts: Sequence[str], seed: int, options: argparse.Namespace, display: Display
) -> "ImagineOutput":
    """Draw one picture per prompt, each with the same noise, so that only the sentence differs."""
    import torch

    drawn: ImagineOutput = pipe(
        prompts,
        reference=[persona] * len(prompts),
        generator=[torch.Generator().manual_seed(seed) for _ in prompts],
        num_inference_steps=options.steps,
        progress=display.report,
    )
    return drawn


def _pictures(drawn: "ImagineOutput", marks: Any) -> tuple[list[str], list[str]]:
    """Return each picture with its marks as the address of an <img>, "" for a flagged one, and notes on the marks."""
    from imagine.provenance.saving import encode_picture

    sources, notes = list[str](), list[str]()
    flags = drawn.flags or [""] * len(drawn.images)
    for image, record, flag in zip(drawn.images, drawn.records, flags, strict=True):
        if flag:
            sources.append("")
            continue
        made = encode_picture(image, "PNG", record, marks)
        sources.append(_address(made.data))
        notes += [note for note in made.notes if note not in notes]
    return sources, notes


def _page(
    faces: Sequence[Any], prompts: Sequence[str], pictures: Sequence[str], flags: Sequence[str], notes: Sequence[str],
    seed: int, command: str,
) -> str:  # fmt: skip
    figures = []
    for face in faces:
        if face.crop is not None:
            caption = "The face that was used"
            figures.append(_FIGURE.substitute(source=_address(_png(face.crop)), alt=caption, caption=caption))
    for number, (prompt, source) in enumerate(zip(prompts, pictures, strict=True)):
        text = html.escape(prompt)
        if source:
            figures.append(_FIGURE.substitute(source=source, alt=f"Generated: {text}", caption=text))
        else:
            figures.append(f"<li><p>{text}: this picture is not shown. {html.escape(flags[number])}</p></li>")
    quality = " ".join(f"The photo: {face.quality}" for face in faces)
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return _PAGE.substitute(
        title=f"one person, {len(prompts)} prompts (seed {seed})", quality=html.escape(quality),
        figures="\n".join(figures), notes=f"<ul>{listed}</ul>" if listed else "", command=html.escape(command),
    )  # fmt: skip


def _png(image: "Image.Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _address(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _command(options: argparse.Namespace, prompt: str, seed: int) -> str:
    """Return a command that draws the first picture again; it names no photo, since the page may be passed on."""
    words = ["imagine", "generate", "--reference", "PHOTO", "--prompt", prompt, "--seed", str(seed)]
    words += ["--steps", str(options.steps)] if options.steps else []
    words += ["--weights", "DIR"] if options.weights else []
    return shlex.join([*words, "--output", "picture.png"])


def _write(path: Path, page: str) -> None:
    """Write the page, whole or not at all. Raises ConfigError if it cannot be written."""
    unfinished = as_path(path).with_name(f".{path.name}.partial")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written ({error.strerror or error}): choose another --output.") from error
