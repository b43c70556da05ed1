"""`imagine generate`: draw a person from a photo or a persona, as a prompt says."""

import argparse
import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagine.cli import arguments, base
from imagine.cli.loading import check_photos, load_pipeline, marks_of, opened, read_passphrase
from imagine.cli.pictures import FORMATS, output_paths, save_crops
from imagine.cli.progress import Display
from imagine.errors import ConfigError, PictureError
from imagine.paths import kind_of, writable_file
from imagine.request import read_requests

if TYPE_CHECKING:
    from imagine.pipeline.output import ImagineOutput
    from imagine.pipeline.pipeline import ImaginePipeline
    from imagine.provenance.marks import Marks
    from imagine.provenance.record import PictureRecord

BATCH = 8  # pictures drawn at a time by default, so that memory does not grow with --num-images
_PICTURE_NUMBER = re.compile(
    r"^((?:Warning: )?[Pp]icture )(\d+)"
)  # a note of the second pass begins with its picture's number in a batch
_NAMED = re.compile(r"([^\W\d][\w' -]*)=(.+)", re.DOTALL)


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = arguments.add_command(commands, "generate", "draw a person from a photo, as a prompt says", run)
    command.add_argument(
        "--reference", action="append", required=True, metavar="PHOTO", help="photo or persona file of the person; "
        "repeat it for more photos of the person, or give NAME=PHOTO for each {NAME} or phrase NAME in the prompt",
    )  # fmt: skip
    command.add_argument("--prompt", required=True, metavar="TEXT", help='such as "smiling, on a beach"')
    command.add_argument("--output", required=True, type=Path, metavar="FILE", help="picture to write: png, jpg, webp")
    arguments.add_weights(command)
    arguments.add_device(command)
    command.add_argument("--save-crop", type=Path, metavar="FILE", help="also write the face that was cut from the "
                         "photo, as the vision encoder sees it: png, jpg, webp")  # fmt: skip
    command.add_argument("--seed", type=arguments.seed, metavar="N", help="repeats a picture (default: a random seed)")
    command.add_argument("--num-images", type=arguments.positive, default=1, metavar="N", help="number of pictures, "
                         "with the seeds N, N+1, ... (default: 1)")  # fmt: skip
    command.add_argument("--batch", type=arguments.positive, default=BATCH, metavar="N", help="pictures drawn at once; "
                         f"fewer need less memory (default: {BATCH})")  # fmt: skip
    command.add_argument("--steps", type=arguments.positive, metavar="N", help="denoising steps; more take longer and "
                         "draw finer detail (default: the weights' own)")  # fmt: skip
    _add_controls(command)
    _add_people(command)
    arguments.add_face(command)
    arguments.add_no_face(command)
    arguments.add_finder(command)
    arguments.add_passphrase(command)
    arguments.add_marks(command)
    arguments.add_safety(command)
    base.add_base(command)
    command.set_defaults(online=base.is_online)


def _add_controls(command: Any) -> None:
    """Add the arguments that control how strongly the prompt and the person act."""
    number = arguments.finite_float
    command.add_argument("--guidance-scale", type=number, metavar="X", help="how closely the prompt is followed; 1 "
                         "turns guidance off (default: the weights' own)")  # fmt: skip
    command.add_argument("--identity-guidance-scale", type=number, metavar="X", help="how closely the "
                         "person is followed (default: the weights' own, or else --guidance-scale)")  # fmt: skip
    command.add_argument("--guidance-balance", action="store_true", help="scale both guidance terms to one norm first")
    command.add_argument("--identity-scale", type=number, default=1.0, metavar="X", help="strength of the person; 0 "
                         "turns it off (default: 1)")  # fmt: skip
    command.add_argument("--identity-window", type=arguments.window, default=(0.0, 1.0), metavar="START:END",
                         help="steps in which the person acts, as fractions of all steps (default: 0:1)")  # fmt: skip
    command.add_argument("--identity-blocks", default="all", metavar="NAME", help="blocks of the denoiser in which the "
                         "person acts: all, coarse, fine, down, mid or up; of diffusion transformers all, early, "
                         "middle, late, double or single (default: all)")  # fmt: skip
    command.add_argument("--refine-faces", action=argparse.BooleanOptionalAction, help="redraw small faces enlarged in "
                         "a second pass, or not (default: the weights' own)")  # fmt: skip


def _add_people(command: Any) -> None:
    """Add the arguments for pictures of several people."""
    command.add_argument("--layout", action="append", metavar="PLACE", help='where the people are: "left to right", in '
                         "the order of the references, or NAME=LEFT,TOP,RIGHT,BOTTOM for each name, as shares of the "
                         "picture such as a=0,0,.5,1")  # fmt: skip
    command.add_argument("--attempts", type=arguments.positive, default=1, metavar="N", help="draw a picture up to N "
                         "times until it shows its people, and keep the best one (default: 1)")  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Draw and save the pictures; return where they are and which faces were used."""
    paths = output_paths(writable_file(options.output, FORMATS), options.num_images)
    crop_path = None if options.save_crop is None else writable_file(options.save_crop, FORMATS)
    base.check_base(options)
    reference = _references(options.reference, read_passphrase(options.passphrase_file))
    read_requests(options.prompt, reference)  # reports a mistake before anything is loaded
    layout = _layout(options.layout)
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    with Display(options) as display:
        pipe = load_pipeline(options, display) if options.base is None else base.open_pipeline(options, display)
        started = time.monotonic()
        drawn = _draw_all(pipe, options, reference, layout, seed, paths, display)
        seconds = round(time.monotonic() - started, 2)
    crops = [] if crop_path is None else save_crops(drawn.faces, crop_path)
    faces = [face.as_dict() for face in drawn.faces]
    poor = [f"{face['reference']}: {face['quality']}" for face in faces if face["quality"] != "good"]
    refined_lines = [f"Small faces redrawn: {drawn.refined}."] if drawn.refined or options.refine_faces else []
    people = [[person.as_dict() for person in each] for each in drawn.people]
    seeds = [seed + number for number in range(options.num_images)]
    saved = [path for path, flag in zip(paths, drawn.flags or [""] * len(paths), strict=True) if not flag]
    redrawn = drawn.seeds or [None] * len(seeds)
    return {
        "lines": [
            f"{', '.join(map(str, saved)) or 'No picture was saved'} (seed {seed}, {seconds} s)",
            *poor, *_people_lines(people), *refined_lines, *drawn.notes,
        ],
        "images": [str(path) for path in saved],
        "prompt": options.prompt,
        **base.facts(options),
        "seeds": [own if other is None else other for own, other in zip(seeds, redrawn, strict=True)],
        "device": str(getattr(pipe, "_execution_device", pipe.device) if options.offload else pipe.device),
        "faces": faces,
        **({} if crop_path is None else {"crops": [str(path) for path in crops]}),
        **({"people_found": drawn.people_found} if drawn.people_found else {}),
        **({"people": people, "attempts": drawn.attempts} if people else {}),
        **({"flags": drawn.flags} if drawn.flags else {}),
        "refined": drawn.refined,
        "notes": drawn.notes,
        "seconds": seconds,
    }  # fmt: skip


def _people_lines(people: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """Return one line per person of each picture, such as "Picture 1: ann found, similarity 0.61, matched."."""
    lines = []
    for number, persons in enumerate(people, 1):
        for person in persons:
            words = ["found" if person["found"] else "not found"]
            if person["similarity"] is not None:
                words.append(f"similarity {person['similarity']:.2f}")
            if person["found"]:
                words.append({True: "matched", False: "not matched", None: "cannot be compared"}[person["matched"]])
            lines.append(f"Picture {number}: {person['name'] or 'the person'} {', '.join(words)}.")
    return lines


def _draw_all(
    pipe: "ImaginePipeline", options: argparse.Namespace, reference: Any, layout: Any, seed: int,
    paths: Sequence[Path], display: Display,
) -> "ImagineOutput":  # fmt: skip
    """Draw and save one picture per path, a batch at a time. Return what is known of all pictures, without these."""
    from imagine.pipeline.output import ImagineOutput

    whole = ImagineOutput(images=(), faces=[])
    for first in range(0, len(paths), options.batch):
        batch = paths[first : first + options.batch]
        drawn = _draw(pipe, options, reference, layout, range(seed + first, seed + first + len(batch)), display)
        display.report("saving")
        records = drawn.records if options.base is None else base.with_files(options, drawn.records)
        marking = _save(drawn, batch, records, marks_of(options))
        whole.faces = getattr(drawn, "faces", [])  # the same in every batch
        whole.refined += getattr(drawn, "refined", 0)
        notes = (_renumbered(each, first) for each in (*getattr(drawn, "notes", ()), *marking))
        whole.notes += [note for note in notes if note not in whole.notes]
        whole.records += records
        for name in ("people_found", "people", "attempts", "seeds", "flags"):
            getattr(whole, name).extend(getattr(drawn, name, ()))
    return whole


def _save(drawn: Any, paths: Sequence[Path], records: "Sequence[PictureRecord]", marks: "Marks") -> list[str]:
    """Save pictures with their marks and return notes; a flagged picture is not written, and the note says why."""
    from imagine.provenance.saving import save_picture

    flags, notes = getattr(drawn, "flags", None) or [""] * len(paths), list[str]()
    for number, (image, path, record) in enumerate(zip(drawn.images, paths, records, strict=True)):
        if flags[number]:
            notes.append(f"Picture {number + 1} was not saved. {flags[number]}")
            continue
        made = save_picture(image, path, record, marks)
        notes += [note for note in made.notes if note not in notes]
    return notes


def _renumbered(note: str, first: int) -> str:
    return _PICTURE_NUMBER.sub(lambda found: f"{found[1]}{int(found[2]) + first}", note)


def _draw(
    pipe: "ImaginePipeline", options: argparse.Namespace, reference: Any, layout: Any, seeds: Sequence[int],
    display: Display,
) -> "ImagineOutput":  # fmt: skip
    """Draw one picture per seed. Each has noise of its own, so that the size of a batch does not change a picture."""
    import torch

    display.report("encoding the reference and the prompt")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if options.base is not None:
        return pipe(prompt=options.prompt, **base.call_arguments(options, reference, layout, generators, display))
    return pipe(
        options.prompt,
        reference=reference,
        num_images_per_prompt=len(seeds),
        generator=generators,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        identity_guidance_scale=options.identity_guidance_scale,
        guidance_balance=options.guidance_balance,
        identity_scale=options.identity_scale,
        identity_window=options.identity_window,
        identity_blocks=options.identity_blocks,
        refine_faces=options.refine_faces,
        layout=layout,
        attempts=options.attempts,
        face=options.face,
        on_no_face=options.on_no_face,
        progress=display.report,
    )


def _references(given: Sequence[str], passphrase: str | None) -> Any:
    """Return the references of a call: one photo, a list of photos of one person, or a dict of people by name."""
    named: dict[str, list[str]] = {}
    plain: list[str] = []
    for each in given:
        found = None if kind_of(Path(each), PictureError) != "nothing" else _NAMED.fullmatch(each)
        if found is None:
            plain.append(each)
        else:
            named.setdefault(found[1], []).append(found[2])
    if named and plain:
        raise ConfigError(f"Give every reference a name, as in name={plain[0]}, or none of them.")
    check_photos([*plain, *(path for paths in named.values() for path in paths)])
    people = {name: [opened(path, passphrase) for path in paths] for name, paths in named.items()}
    photos = [opened(path, passphrase) for path in plain]
    return people or (photos if len(photos) > 1 else photos[0])


def _layout(given: Sequence[str] | None) -> Any:
    """Return the layout of a call: None, one word for all people, or a dict from names to boxes."""
    if given is None:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    boxes: dict[str, list[float]] = {}
    for each in given:
        name, _, numbers = each.partition("=")
        try:
            boxes[name] = [float(number) for number in numbers.split(",")]
        except ValueError:
            boxes[name] = []
        if len(boxes[name]) != 4:
            raise ConfigError(
                f"--layout {each} is not NAME=LEFT,TOP,RIGHT,BOTTOM: give four shares of the picture, such as "
                'a=0,0,.5,1, or "left to right" alone.'
            )
    return boxes
