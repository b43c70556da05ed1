"""`imagine enroll`: encode photos of one person into a persona file, which `imagine generate` takes as a reference."""

import argparse
from pathlib import Path
from typing import Any

from imagine.cli.arguments import add_command, add_device, add_face, add_finder, add_no_face, add_weights
from imagine.cli.loading import check_photos, load_pipeline
from imagine.cli.pictures import FORMATS, save_crops
from imagine.cli.progress import Display
from imagine.paths import writable_file


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(commands, "enroll", "encode photos of one person once, into a file for generate", run)
    command.add_argument("photos", nargs="+", metavar="PHOTO", help="photo of the person; several show the same person")
    command.add_argument("--output", required=True, type=Path, metavar="FILE", help="persona to write: .safetensors")
    add_weights(command)
    add_device(command)
    add_face(command)
    add_no_face(command)
    add_finder(command)
    command.add_argument("--no-identity-check", action="store_true", help="combine the photos even if one seems to "
                         "show another person")  # fmt: skip
    command.add_argument("--save-crop", type=Path, metavar="FILE", help="also write the faces that were cut from the "
                         "photos: png, jpg, webp")  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write the persona and return what was found in the photos."""
    path = writable_file(options.output, (".safetensors",))
    crop_path = None if options.save_crop is None else writable_file(options.save_crop, FORMATS)
    check_photos(options.photos)
    with Display(options) as display:
        pipe = load_pipeline(options, display)
        display.report("encoding the photos" if len(options.photos) > 1 else "encoding the photo")
        persona = pipe.enroll(
            options.photos, options.face, options.on_no_face, check_identity=not options.no_identity_check
        )
    persona.save(path)
    crops = [] if crop_path is None else save_crops(persona.faces, crop_path)
    faces = [face.as_dict() for face in persona.faces]
    return {
        "lines": [str(path), *(f"{face['reference']}: {face['quality']}" for face in faces)],
        "persona": str(path),
        "tokens": persona.tokens,
        "encoder": persona.encoder,
        "faces": faces,
        **({} if crop_path is None else {"crops": [str(path) for path in crops]}),
    }
