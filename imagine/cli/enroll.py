"""`imagine enroll`: encode photos of one person into a persona file, which `imagine generate` takes as a reference."""

import argparse
from pathlib import Path
from typing import Any

from imagine.cli import arguments
from imagine.cli.arguments import add_command, add_device, add_face, add_finder, add_no_face, add_weights
from imagine.cli.loading import check_photos, load_pipeline, opened, read_passphrase
from imagine.cli.pictures import FORMATS, save_crops
from imagine.cli.progress import Display
from imagine.errors import ConfigError
from imagine.paths import writable_file
from imagine.personas.consent import BASES, DAYS, Consent
from imagine.personas.sealing import check_passphrase

_NO_CONSENT = "No consent is recorded: --consent self, agreed or invented records one."


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
    command.add_argument("--pooling", choices=["concatenate", "mean"], default="concatenate", help="how several photos "
                         "are combined: all their tokens, or their mean weighted by quality (default: concatenate)",
                         )  # fmt: skip
    _add_consent(command)
    arguments.add_passphrase(command)
    command.add_argument("--save-crop", type=Path, metavar="FILE", help="also write the faces that were cut from the "
                         "photos: png, jpg, webp")  # fmt: skip


def _add_consent(command: Any) -> None:
    """Add what the persona records of the person's consent."""
    command.add_argument("--consent", choices=list(BASES), help="record on which basis: self (you are the person), "
                         "agreed (the person agreed), invented (there is no such person)")  # fmt: skip
    command.add_argument("--consent-note", default="", metavar="TEXT", help="note on the consent, kept in the persona "
                         "and never in a picture")  # fmt: skip
    command.add_argument("--expires-after", type=arguments.days, default=DAYS, metavar="DAYS", help="days after which "
                         f"the persona is refused, or never (default: {DAYS}; needs --consent)")  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write the persona and return what was found in the photos."""
    path = writable_file(options.output, (".safetensors",))
    crop_path = None if options.save_crop is None else writable_file(options.save_crop, FORMATS)
    check_photos(options.photos)
    if options.consent is None and (options.consent_note or options.expires_after != DAYS):
        raise ConfigError("--consent-note and --expires-after describe a consent: give --consent as well.")
    consent = None
    if options.consent is not None:
        consent = Consent.state(options.consent, options.consent_note, options.expires_after)
    passphrase = read_passphrase(options.passphrase_file)
    if passphrase is not None:
        check_passphrase(passphrase)
    with Display(options) as display:
        pipe = load_pipeline(options, display)
        display.report("encoding the photos" if len(options.photos) > 1 else "encoding the photo")
        persona = pipe.enroll(
            [opened(photo, passphrase) for photo in options.photos], options.face, options.on_no_face,
            check_identity=not options.no_identity_check, pooling=options.pooling, consent=consent,
        )  # fmt: skip
    persona.save(path, passphrase)
    crops = [] if crop_path is None else save_crops(persona.faces, crop_path)
    faces = [face.as_dict() for face in persona.faces]
    notes = [] if persona.consent is not None else [_NO_CONSENT]
    return {
        "lines": [str(path), *(f"{face['reference']}: {face['quality']}" for face in faces), *notes],
        "persona": str(path),
        "tokens": persona.tokens,
        "encoder": persona.encoder,
        "encoder_name": persona.encoder_name,
        "references": len(faces),
        "pooling": persona.pooling,
        "photo_weights": list(persona.photo_weights),
        "consent": None if persona.consent is None else persona.consent.as_dict(),
        "encrypted": passphrase is not None,
        "faces": faces,
        "notes": notes,
        **({} if crop_path is None else {"crops": [str(path) for path in crops]}),
    }
