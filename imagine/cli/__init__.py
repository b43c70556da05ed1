"""The command `imagine`: every verb is a thin skin over the library.

Exit codes: 0 done, 2 the user's input is wrong (one sentence on stderr that says what to do), 1 our fault. With --json
one JSON object goes to stdout and nothing else. Files appear whole or not at all. Nothing is ever downloaded.

Heavy libraries are imported inside the verbs that need them, after everything that can be wrong with the arguments has
been checked: `imagine --help` and a mistyped path answer at once.
"""

import argparse
import json
import logging
import os
import re
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from imagine import __version__
from imagine.errors import ConfigError, ImagineError, PictureError, WeightsError
from imagine.paths import as_path, folder_to_fill, kind_of, shorten_path, writable_file, writable_folder
from imagine.request import read_requests

if TYPE_CHECKING:
    from PIL import Image

    from imagine.people.faces import FaceFinder
    from imagine.pipeline.pipeline import ImagineOutput, ImaginePipeline
    from imagine.planning.bases import Blueprint

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
BATCH = 8  # pictures drawn at once, however many are asked for: memory stays what it is
_PICTURE_NUMBER = re.compile(r"^Picture (\d+)")  # of its batch, in what a second pass could not do
_NAMED_REFERENCE = re.compile(r"([^\W\d]\w*)=(.+)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (by default the process's own) and return its exit code."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has said what it had to say
        return int(stop.code or 0)
    options.own_process = arguments is None
    run: Callable[[argparse.Namespace], dict[str, Any]] = options.run
    _silence_libraries()
    try:
        result = run(options)
    except ImagineError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except Exception as error:  # whatever it is, a traceback would help nobody who cannot change the code
        if options.own_process and "imagine.lean" in sys.modules:
            sys.modules["imagine.lean"].start_again_plainly()
        if os.environ.get("IMAGINE_DEBUG"):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"imagine failed ({reason}); set IMAGINE_DEBUG=1 to see where, and report it.", file=sys.stderr)
        return 1
    lines: list[str] = result.pop("lines")
    return _print_result(_json(result) if options.json else "\n".join(lines))


def _print_result(text: str) -> int:
    """Print what a command found and return the exit code."""
    encoding = sys.stdout.encoding or "utf-8"
    # A file's name may hold bytes that are no text, and a terminal may know few letters: both are shown as escapes.
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, flush=True)
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing may be flushed there at exit
        if isinstance(error, BrokenPipeError):  # whoever reads, such as `head`, has seen enough
            return 0
        print(f"It is done, but the result cannot be printed ({error.strerror}).", file=sys.stderr)
        return 1


def _json(result: Mapping[str, Any]) -> str:
    text = json.dumps(result, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(result, default=str)
    return text


class _Parser(argparse.ArgumentParser):
    """argparse, complaining in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="imagine", description="From one photo of a person and a sentence to a new picture of them.")
    parser.add_argument("--version", action="version", version=f"imagine {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _add_generate(verbs)
    _add_enroll(verbs)
    _add_inspect(verbs)
    _add_doctor(verbs)
    _add_evaluate(verbs)
    _add_import_ip_adapter(verbs)
    _add_export_ip_adapter(verbs)
    _add_plan(verbs)
    return parser


def _add_verb(verbs: Any, name: str, help_: str, run: Callable[[argparse.Namespace], dict[str, Any]]) -> Any:
    verb = verbs.add_parser(name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.")
    verb.set_defaults(run=run)
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    return verb


def _add_face_choice(verb: Any) -> None:
    verb.add_argument(
        "--face", type=_parse_face, default="largest", metavar="WHICH", help="largest, centre, or a number from 0"
    )
    verb.add_argument(
        "--on-no-face", choices=["error", "whole"], default="error", help="without a face: stop, or use all"
    )


def _add_weights(verb: Any) -> None:
    verb.add_argument("--weights", type=Path, metavar="DIR", help="folder of weights (default: the shipped ones)")


def _add_device(verb: Any) -> None:
    verb.add_argument(
        "--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto, a GPU if there is one"
    )


def _add_finder(verb: Any) -> None:
    verb.add_argument(
        "--finder", choices=["default", "insightface"], default="default",
        help="of faces; insightface sees turned ones too, and needs the extra `faces` and a model pack on the disk",
    )  # fmt: skip


# --- generate ---------------------------------------------------------------------------------------------------------
def _add_generate(verbs: Any) -> None:
    verb = _add_verb(verbs, "generate", "draw a person from a photo, doing what a sentence says", _generate)
    verb.add_argument(
        "--reference", action="append", required=True, metavar="PHOTO", help="photo or enrolled persona of the person; "
        "again for more photos of them, or name=PHOTO for each {name} in the prompt",
    )  # fmt: skip
    verb.add_argument("--prompt", required=True, metavar="TEXT", help='such as "smiling, on a beach"')
    verb.add_argument("--output", required=True, type=Path, metavar="FILE", help="picture to write: png, jpg or webp")
    _add_weights(verb)
    _add_device(verb)
    verb.add_argument("--seed", type=_parse_seed, metavar="N", help="repeats a picture (default: a new one each time)")
    verb.add_argument("--num-images", type=_positive, default=1, metavar="N", help="pictures, from seeds N, N+1, ...")
    verb.add_argument("--steps", type=_positive, metavar="N", help="more are slower and finer")
    verb.add_argument("--guidance-scale", type=_finite_float, metavar="X", help="how strictly the sentence is followed")
    verb.add_argument(
        "--identity-guidance-scale", type=_finite_float, metavar="X", help="the same for the person (default: as above)"
    )
    verb.add_argument("--guidance-balance", action="store_true", help="bring both to one norm before their scales")
    verb.add_argument(
        "--identity-scale", type=_finite_float, default=1.0, metavar="X", help="strength of the person; 0 is off"
    )
    verb.add_argument(
        "--identity-window", type=_parse_window, default=(0.0, 1.0), metavar="START:END",
        help="steps in which the person acts, as shares of all, such as 0:0.8",
    )  # fmt: skip
    verb.add_argument(
        "--identity-blocks", default="all", metavar="NAME", help="all, or only coarse, fine, down, mid or up blocks"
    )
    verb.add_argument(
        "--refine-faces", action=argparse.BooleanOptionalAction, help="draw small faces once more, enlarged, or not"
    )
    _add_face_choice(verb)
    _add_finder(verb)


def _generate(options: argparse.Namespace) -> dict[str, Any]:
    paths = _output_paths(writable_file(options.output, FORMATS), options.num_images)
    reference = _references(options.reference)
    read_requests(options.prompt, reference)  # refused now rather than after loading
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    pipe = _pipeline(options)
    started = time.monotonic()
    faces: list[dict[str, Any]] = []
    refined, notes = 0, list[str]()
    for first in range(0, len(paths), BATCH):
        some = paths[first : first + BATCH]
        drawn = _draw(pipe, options, reference, range(seed + first, seed + first + len(some)))
        for image, path in zip(drawn.images, some, strict=True):
            _save_atomically(image, path)
        faces = [face.as_dict() for face in drawn.faces]  # the same for every batch
        refined += drawn.refined
        notes += [_renumbered(note, first) for note in drawn.notes]
    seconds = round(time.monotonic() - started, 2)
    poor = [f"{face['reference']}: {face['quality']}" for face in faces if face["quality"] != "good"]
    refined_lines = [f"Small faces refined: {refined}."] if refined or options.refine_faces else []
    return {
        "lines": [f"{', '.join(map(str, paths))} (seed {seed}, {seconds} s)", *poor, *refined_lines, *notes],
        "images": [str(path) for path in paths],
        "prompt": options.prompt,
        "seeds": [seed + number for number in range(options.num_images)],
        "device": str(pipe.device),
        "faces": faces,
        "refined": refined,
        "notes": notes,
        "seconds": seconds,
    }


def _renumbered(note: str, first: int) -> str:
    return _PICTURE_NUMBER.sub(lambda found: f"Picture {int(found[1]) + first}", note)


def _draw(
    pipe: "ImaginePipeline", options: argparse.Namespace, reference: Any, seeds: Sequence[int]
) -> "ImagineOutput":
    """One picture for every seed. Each has noise of its own, so that batches draw what one of them all would."""
    return pipe(
        options.prompt,
        reference=reference,
        num_images_per_prompt=len(seeds),
        generator=_generators(seeds),
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        identity_guidance_scale=options.identity_guidance_scale,
        guidance_balance=options.guidance_balance,
        identity_scale=options.identity_scale,
        identity_window=options.identity_window,
        identity_blocks=options.identity_blocks,
        refine_faces=options.refine_faces,
        face=options.face,
        on_no_face=options.on_no_face,
    )


def _references(given: Sequence[str]) -> Any:
    """The references of a call: one photo, several of one person, or people by name."""
    named: dict[str, list[str]] = {}
    plain: list[str] = []
    for each in given:
        found = None if kind_of(Path(each), PictureError) != "nothing" else _NAMED_REFERENCE.fullmatch(each)
        if found is None:
            plain.append(each)
        else:
            named.setdefault(found[1], []).append(found[2])
    if named and plain:
        raise ConfigError(f"Give every reference a name, as in name={plain[0]}, or none of them.")
    _check_photos([*plain, *(path for paths in named.values() for path in paths)])
    return named or (plain if len(plain) > 1 else plain[0])


def _check_photos(paths: Sequence[str]) -> None:
    """Raise PictureError unless all are files; what is in them is seen after loading."""
    for path in paths:
        if kind_of(as_path(path), PictureError) != "file":
            raise PictureError(f"There is no file {shorten_path(path)}: check the path.")


def _generators(seeds: Sequence[int]) -> list[Any]:
    import torch

    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _output_paths(path: Path, count: int) -> list[Path]:
    """The path itself for one picture, else name-1.png, name-2.png ..."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1)]


def _save_atomically(image: "Image.Image", path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        image.save(unfinished, FORMATS[path.suffix.lower()], quality=95)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written ({error.strerror or error}): choose another --output.") from error


# --- enroll -----------------------------------------------------------------------------------------------------------
def _add_enroll(verbs: Any) -> None:
    verb = _add_verb(verbs, "enroll", "look at photos of one person once and save what was seen, for generate", _enroll)
    verb.add_argument("photos", nargs="+", metavar="PHOTO")
    verb.add_argument("--output", required=True, type=Path, metavar="FILE", help="persona to write: .safetensors")
    _add_weights(verb)
    _add_device(verb)
    _add_face_choice(verb)
    _add_finder(verb)


def _enroll(options: argparse.Namespace) -> dict[str, Any]:
    path = writable_file(options.output, (".safetensors",))
    _check_photos(options.photos)
    persona = _pipeline(options).enroll(options.photos, face=options.face, on_no_face=options.on_no_face)
    persona.save(path)
    faces = [face.as_dict() for face in persona.faces]
    return {
        "lines": [str(path), *(f"{face['reference']}: {face['quality']}" for face in faces)],
        "persona": str(path),
        "tokens": persona.tokens,
        "encoder": persona.encoder,
        "faces": faces,
    }


# --- inspect ----------------------------------------------------------------------------------------------------------
def _add_inspect(verbs: Any) -> None:
    verb = _add_verb(verbs, "inspect", "say what a file or folder of weights is", _inspect)
    verb.add_argument("path", type=Path, metavar="FILE_OR_DIR")


def _inspect(options: argparse.Namespace) -> dict[str, Any]:
    from imagine.inspection import inspect

    found = inspect(options.path)
    return {"lines": _fact_lines(found), **found}


# --- doctor -----------------------------------------------------------------------------------------------------------
def _add_doctor(verbs: Any) -> None:
    verb = _add_verb(
        verbs, "doctor", "check the installation, or say how good a photo is and what would be better", _doctor
    )
    verb.add_argument("photo", nargs="?", metavar="PHOTO")
    _add_weights(verb)
    verb.add_argument(
        "--face", type=_parse_face, default="largest", metavar="WHICH", help="largest, centre, or a number from 0"
    )
    _add_finder(verb)


def _doctor(options: argparse.Namespace) -> dict[str, Any]:
    from imagine.people.doctor import report_installation, report_photo
    from imagine.people.faces import default_finder

    try:
        folder = _weights_folder(options.weights)
    except WeightsError:
        if options.weights is not None:
            raise
        folder = None  # that there are none is what the doctor is here to say
    if options.photo is None:
        found = report_installation(folder).as_dict()
    else:
        finder = _finder(options.finder) or default_finder(None if folder is None else folder / "finder")
        found = report_photo(options.photo, finder, face=options.face).as_dict()
    advice = found["advice"] or ["All is well."]
    return {
        "lines": [*_fact_lines({name: value for name, value in found.items() if name != "advice"}), *advice],
        **found,
    }


# --- evaluate ---------------------------------------------------------------------------------------------------------
def _add_evaluate(verbs: Any) -> None:
    verb = _add_verb(
        verbs, "evaluate", "measure likeness, obedience and copying on people nothing was trained on", _evaluate
    )
    _add_weights(verb)
    _add_device(verb)
    verb.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="for report.html, report.json, pictures"
    )
    verb.add_argument("--suite", default="portraits", metavar="NAME", help="which prompts (default: portraits)")
    verb.add_argument("--identities", type=_positive, default=51, metavar="N", help="people (default: 51)")
    verb.add_argument("--prompts", type=_positive, default=13, metavar="N", help="prompts for each (default: 13)")
    verb.add_argument("--seed", type=_parse_seed, default=0, metavar="N")


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    output = folder_to_fill(options.output)
    from imagine.evaluation.evaluate import run
    from imagine.evaluation.judge import Judge

    folder = _weights_folder(options.weights)
    judge = Judge.from_pretrained(folder / "judge" if (folder / "judge").is_dir() else None)
    report = run(
        _pipeline(options, lean=False), output, options.suite, options.identities, options.prompts, options.seed, judge,
        progress=not options.json,
    )  # fmt: skip
    return {"lines": [*_fact_lines(report["metrics"]), str(output / "report.html")], **report}


# --- plan -------------------------------------------------------------------------------------------------------------
def _add_plan(verbs: Any) -> None:
    verb = _add_verb(verbs, "plan", "say how much memory, arithmetic and time drawing or training takes", _plan)
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--base", metavar="BASE", help="sdxl, sd15, portrait, a folder, or a hub id already downloaded")
    what.add_argument("--check", action="store_true", help="hold plans against small networks at work here")
    verb.add_argument("--resolution", type=_positive, metavar="PX", help="pixels a side (default: the base's own)")
    verb.add_argument("--batch", type=_positive, metavar="N", help="pictures at once, or images a step (default: 1)")
    verb.add_argument("--fit", metavar="SIZE", help="choose switches that fit into so much memory, such as 12GB; those "
                      "that are given stay")  # fmt: skip
    verb.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: bf16, and --fit keeps to it")
    verb.add_argument("--readers", metavar="NAMES", help="text encoders beside the base's: t5-xl, t5-xxl or ul2, and "
                      "byt5-small or byt5-base; none (default: t5-xl,byt5-small)")  # fmt: skip
    verb.add_argument("--projection", choices=["plus", "full"], help="of the vision branch (default: plus)")
    verb.add_argument("--lora-rank", type=_non_negative, metavar="N", help="0 for none (default: 64)")
    speed = verb.add_mutually_exclusive_group()
    speed.add_argument("--device", metavar="NAME", help="a card such as rtx4090 or a100, or here, to plan time for")
    speed.add_argument("--flops", metavar="SPEED", help="FLOP a second that the device reaches, such as 300T")
    verb.add_argument("--steps", type=_positive, metavar="N", help="of drawing (default: 30)")
    verb.add_argument("--references", type=_positive, metavar="N", help="in each picture (default: 1)")
    verb.add_argument("--no-guidance", action="store_true", help="one pass a step, as few-step models need")
    verb.add_argument("--offload", choices=["none", "model", "sequential"], help="default: none, or what --fit needs")
    verb.add_argument("--tiling", action="store_true", help="decode in tiles")
    verb.add_argument("--train", action="store_true", help="plan a step of training instead")
    verb.add_argument("--parts", metavar="NAMES", help="what trains, such as vision_branch,lora (default: all)")
    verb.add_argument("--checkpointing", action="store_true", help="compute activations anew in the backward pass")
    verb.add_argument("--optimiser", choices=["adamw", "adamw8bit"], help="default: adamw, or what --fit needs")
    verb.add_argument("--accumulation", type=_positive, metavar="N", help="pieces of a step (default: 1, or what --fit "
                      "needs)")  # fmt: skip
    verb.add_argument("--no-average", action="store_true", help="keep no average of the weights")


_MEMORY_OPTIONS = ("precision", "offload", "tiling")
_RECIPE_OPTIONS = ("precision", "checkpointing", "optimiser", "accumulation")
_BRANCH_OPTIONS = ("readers", "projection", "lora_rank")
_DRAWING_OPTIONS = ("steps", "references", "no_guidance", "offload", "tiling")
_TRAINING_OPTIONS = ("parts", "checkpointing", "optimiser", "accumulation", "no_average")
_COMMON_OPTIONS = ("train", "resolution", "batch", "fit", "precision", "device", "flops", *_BRANCH_OPTIONS)


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    from imagine.planning.cards import read_size, speeds

    _check_unused_options(options)
    limit = None if options.fit is None else read_size(options.fit)
    if options.train and options.precision == "fp16":
        raise ConfigError("Training in fp16 needs a scaled loss, which our trainer has not: take bf16 or fp32.")
    known = speeds(options.device, options.flops, options.precision != "fp32") if options.base else {}
    from imagine.planning import planning
    from imagine.planning.bases import default_resolution
    from imagine.planning.inference import DrawingOptions, DrawingWorkload
    from imagine.planning.training import Recipe, TrainingWorkload

    if options.check:
        checked = planning.check()
        return {"lines": planning.check_words(checked), **checked}
    base = _planned_base(options)
    resolution, batch = options.resolution or default_resolution(base), options.batch or 1
    if options.train:
        lesson = TrainingWorkload(resolution, batch, tuple(filter(None, (options.parts or "").split(","))))
        named = {name: getattr(options, name) for name in _given_names(options, _RECIPE_OPTIONS)}
        recipe = Recipe(**named, average=not options.no_average)
        kept = [*named, *["average"] * options.no_average]
        report = planning.plan_training(base, lesson, recipe, limit, known, kept)
    else:
        named = {name: getattr(options, name) for name in _given_names(options, ("steps", "references"))}
        picture = DrawingWorkload(resolution, batch, **named, guided=not options.no_guidance)
        choice = DrawingOptions(**{name: getattr(options, name) for name in _given_names(options, _MEMORY_OPTIONS)})
        report = planning.plan_drawing(base, picture, choice, limit, known, _given_names(options, _MEMORY_OPTIONS))
    return {"lines": planning.words(report), **report}


def _planned_base(options: argparse.Namespace) -> "Blueprint":
    from imagine.planning.bases import add_branches, read_base

    base = read_base(options.base)
    if base.adapters and (unused := _given_names(options, _BRANCH_OPTIONS)):
        raise ConfigError(f"{options.base} has adapters of its own: leave {_flag_names(unused)} out.")
    readers = (options.readers or "t5-xl,byt5-small").split(",")
    rank = 64 if options.lora_rank is None else options.lora_rank
    return add_branches(base, [n for n in readers if n and n != "none"], options.projection or "plus", rank)


def _check_unused_options(options: argparse.Namespace) -> None:
    """Raise ConfigError for arguments that say nothing of what is planned."""
    if options.check:
        if unused := _given_names(options, (*_COMMON_OPTIONS, *_DRAWING_OPTIONS, *_TRAINING_OPTIONS)):
            raise ConfigError(f"--check is always the same: leave {_flag_names(unused)} out.")
    elif options.train and (unused := _given_names(options, _DRAWING_OPTIONS)):
        raise ConfigError(f"Training does not depend on {_flag_names(unused)}: leave that out, or leave out --train.")
    elif not options.train and (unused := _given_names(options, _TRAINING_OPTIONS)):
        raise ConfigError(f"Drawing does not depend on {_flag_names(unused)}: leave that out, or add --train.")


def _given_names(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(options, name) is not None and getattr(options, name) is not False]


def _flag_names(names: Sequence[str]) -> str:
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)


# --- import-ip-adapter, export-ip-adapter -----------------------------------------------------------------------------
def _add_import_ip_adapter(verbs: Any) -> None:
    verb = _add_verb(
        verbs, "import-ip-adapter", "make an adapter folder of a standard IP-Adapter file", _import_ip_adapter
    )
    verb.add_argument("source", metavar="SRC", help="file, folder, or hub id that was downloaded before")
    verb.add_argument("--base", required=True, metavar="BASE", help="what it was made for: sdxl, sd15, or a folder")
    verb.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    verb.add_argument("--subfolder", metavar="NAME", help="where in SRC the file lies")
    verb.add_argument("--weight-name", metavar="FILE", help="the file's name, where SRC holds several")
    verb.add_argument("--image-encoder", metavar="DIR", help="its image encoder (default: image_encoder beside it)")


def _import_ip_adapter(options: argparse.Namespace) -> dict[str, Any]:
    output = writable_folder(options.output)
    from imagine.ip_adapter.folders import import_folder

    found = import_folder(
        options.source, options.base, output, options.subfolder, options.weight_name, options.image_encoder
    )
    short = {name: value for name, value in found.items() if name not in ("used", "notes", "output")}
    return {
        "lines": [str(output), *_fact_lines({**short, "tensors used": len(found["used"])}), *found["notes"]],
        **found,
    }


def _add_export_ip_adapter(verbs: Any) -> None:
    verb = _add_verb(verbs, "export-ip-adapter", "write an adapter as a standard IP-Adapter file", _export_ip_adapter)
    verb.add_argument("folder", type=Path, metavar="DIR", help="folder of weights, or of an imported IP-Adapter")
    verb.add_argument("--output", required=True, type=Path, metavar="FILE", help="file to write: .safetensors; the "
                      "image encoder and LoRA go beside it")  # fmt: skip
    verb.add_argument(
        "--base", metavar="BASE", help="what it was made for, where DIR does not say: sdxl, sd15, a folder"
    )


def _export_ip_adapter(options: argparse.Namespace) -> dict[str, Any]:
    file = writable_file(options.output, (".safetensors",))
    from imagine.ip_adapter.folders import export_folder

    found = export_folder(as_path(options.folder), file, options.base).as_dict()
    short = {name: value for name, value in found.items() if name != "not_carried"}
    return {"lines": [*_fact_lines(short), *found["not_carried"]], **found}


# --- what the verbs share ---------------------------------------------------------------------------------------------
def _weights_folder(given: Path | None) -> Path:
    from imagine.networks.weights import PIPELINE, default_folder, read_index
    from imagine.pipeline.families import class_names

    if given is None:
        return default_folder()
    folder = as_path(given)
    if kind_of(folder, WeightsError) != "folder":
        raise WeightsError(
            f"There is no folder {shorten_path(given)}: name one that holds weights, or leave --weights out."
        )
    if (kind := read_index(folder, class_names())["_class_name"]) != PIPELINE:
        raise WeightsError(
            f"{given} holds a {kind}, and this command takes imagine's own weights only: draw with it from Python, by "
            f"ImaginePipeline.from_pretrained({os.fspath(given)!r}) as docs/backbones.md says."
        )
    return folder


def _pipeline(options: argparse.Namespace, lean: bool = True) -> "ImaginePipeline":
    """The pipeline of --weights on --device, its imports lean where this process does nothing else."""
    folder = _weights_folder(options.weights)
    finder = _finder(getattr(options, "finder", "default"))
    if lean and options.own_process and finder is None:
        from imagine.lean import import_pipeline_lean

        import_pipeline_lean()
    from imagine.people.doctor import device_for
    from imagine.pipeline.pipeline import ImaginePipeline

    device = device_for(options.device)  # one that is absent is told before anything is loaded
    pipe = ImaginePipeline.from_pretrained(folder, finder=finder)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _finder(name: str) -> "FaceFinder | None":
    """What --finder means; None is the default."""
    if name == "default":
        return None
    from imagine.people.faces import InsightFaceFinder

    return InsightFaceFinder()


def _fact_lines(found: Mapping[str, Any], indent: str = "") -> list[str]:
    """Nested facts as lines of "name: value", for people."""
    lines = []
    for name, value in found.items():
        words = name.replace("_", " ")
        if isinstance(value, Mapping):
            short = ", ".join(
                f"{key} {_format_value(each)}" for key, each in value.items() if not isinstance(each, Mapping)
            )
            deep = any(isinstance(each, Mapping) for each in value.values())
            lines += (
                [f"{indent}{words}:", *_fact_lines(value, indent + "  ")] if deep else [f"{indent}{words}: {short}"]
            )
        elif value not in (None, [], ()):
            lines.append(f"{indent}{words}: {_format_value(value)}")
    return lines


def _format_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_format_value, value))
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name} {_format_value(each)}" for name, each in value.items()) + ")"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _positive(text: str) -> int:
    return _parse_value(text, int, lambda value: value >= 1, "a whole number from 1 on")


def _non_negative(text: str) -> int:
    return _parse_value(text, int, lambda value: value >= 0, "a whole number from 0 on")


def _parse_seed(text: str) -> int:
    return _parse_value(text, int, lambda value: 0 <= value < 2**63, "a whole number from 0 on")


def _finite_float(text: str) -> float:
    return _parse_value(text, float, lambda value: abs(value) < float("inf"), "a number")


def _parse_face(text: str) -> "str | int":
    return (
        text
        if text in ("largest", "centre")
        else _parse_value(text, int, lambda value: value >= 0, "largest, centre or 0, 1, ...")
    )


def _parse_window(text: str) -> Any:
    wanted = "START:END, two shares of the steps such as 0:0.8"
    shares = [_parse_value(share, float, lambda value: 0 <= value <= 1, wanted) for share in text.split(":")]
    if len(shares) != 2 or shares[0] > shares[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return tuple(shares)


def _parse_value(text: str, kind: Callable[[str], Any], fits: Callable[[Any], bool], wanted: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def _silence_libraries() -> None:
    """Keep the libraries below from talking to the user, and from looking for the network."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "NO_ALBUMENTATIONS_UPDATE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what a Mac's GPU lacks, its CPU does
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, of which `plan --check` reads memory
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    logging.getLogger("xformers").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())
