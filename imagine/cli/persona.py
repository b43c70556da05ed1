"""`imagine persona list | show | delete`: the persona files that `imagine enroll` writes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagine.cli.arguments import add_command, add_passphrase, add_weights
from imagine.cli.inspect import face_table
from imagine.cli.loading import read_passphrase
from imagine.cli.printing import fact_lines, size, table_lines

if TYPE_CHECKING:
    from imagine.personas.files import PersonaFacts

_ENCRYPTED = "The file is encrypted: give --passphrase-file to see more."


def add_commands(commands: Any) -> None:
    """Add the command and its three verbs to the parser."""
    persona = commands.add_parser("persona", help="list, show or delete personas", description="List, show or delete "
                                  "the persona files that imagine enroll writes.")  # fmt: skip
    verbs = persona.add_subparsers(
        metavar="VERB", required=True, parser_class=type(persona), help="what to do: list, show or delete"
    )
    listing = add_command(verbs, "list", "list the personas in a folder", run_list)
    listing.add_argument("folder", nargs="?", type=Path, default=Path(), metavar="DIR", help="folder (default: the "
                         "current one)")  # fmt: skip
    showing = add_command(verbs, "show", "show what a persona records", run_show)
    showing.add_argument("file", type=Path, metavar="FILE", help="persona file")
    add_passphrase(showing)
    add_weights(showing)
    deleting = add_command(verbs, "delete", "delete personas from the disk, without a way back", run_delete)
    deleting.add_argument("files", nargs="+", type=Path, metavar="FILE", help="persona file")


def run_list(options: argparse.Namespace) -> dict[str, Any]:
    """Return the personas of a folder."""
    from imagine.personas.files import list_personas

    found, notes = list_personas(options.folder)
    rows = [[each.path.name, each.references, _basis(each), _expiry(each), each.state()] for each in found]
    table = table_lines(["file", "photos", "consent", "expires", "state"], rows) if found else []
    return {
        "lines": [*(table or [f"There is no persona in {options.folder}."]), *notes],
        "personas": [each.as_dict() for each in found],
        "notes": notes,
    }


def run_show(options: argparse.Namespace) -> dict[str, Any]:
    """Return what one persona records, and whether it fits the weights."""
    from imagine.personas.files import read_persona_facts

    facts, notes = read_persona_facts(options.file), []
    passphrase = read_passphrase(options.passphrase_file)
    if facts.encrypted and passphrase is not None:
        facts = _opened(facts, passphrase)
    elif facts.encrypted:
        notes.append(_ENCRYPTED)
    fits = None if not facts.encoder else _fits(facts.encoder, options.weights)
    if fits is False:
        notes.append("These weights have another vision encoder: enroll the person again with them.")
    shown = {
        "file": str(facts.path), "state": facts.state(), "encoder": facts.encoder_name or None,
        "encoder_hash": facts.encoder or None, "fits_the_weights": fits, "photos": facts.references or None,
        "pooling": facts.pooling or None, "tokens": facts.tokens or None, "created": facts.created or None,
        "consent": _basis(facts) or None, "note": None if facts.consent is None else facts.consent.note,
        "expires": _expiry(facts) or None, "size": size(facts.bytes),
    }  # fmt: skip
    faces = [
        {**face, "quality": f"{face.get('quality')} (weight {weight})"} if isinstance(face, dict) else face
        for face, weight in zip(facts.faces, facts.photo_weights or ["unknown"] * len(facts.faces), strict=False)
    ]
    table = ["", *face_table(faces)] if faces else []
    return {
        "lines": [*fact_lines(shown), *table, *notes],
        **facts.as_dict(),
        "fits_the_weights": fits,
        "notes": notes,
    }


def run_delete(options: argparse.Namespace) -> dict[str, Any]:
    """Delete the persona files and return what was deleted. All files are checked before the first one is deleted."""
    from imagine.personas.files import delete_persona, read_persona_facts

    for file in options.files:
        read_persona_facts(file)
    lines, gone, notes = list[str](), list[str](), list[str]()
    for file in dict.fromkeys(options.files):
        deleted = delete_persona(file)
        facts = deleted.facts
        what = "an encrypted persona" if facts.encrypted else f"a persona from {facts.references} photo(s)"
        lines += [f"Deleted {each}: {what}, {size(facts.bytes)}." for each in deleted.files[:1]]
        lines += [f"Deleted {each} beside it." for each in deleted.files[1:]]
        gone += map(str, deleted.files)
        notes += deleted.notes
    return {"lines": [*lines, *notes], "deleted": gone, "notes": notes}


def _opened(facts: "PersonaFacts", passphrase: str) -> "PersonaFacts":
    """Return the facts of an encrypted persona from its decrypted content."""
    from dataclasses import replace

    from imagine.people.persona import Persona

    persona = Persona.load(facts.path, passphrase)
    return replace(
        facts, encrypted=False, encoder=persona.encoder, encoder_name=persona.encoder_name,
        references=len(persona.faces), tokens=persona.tokens, pooling=persona.pooling, created=persona.created,
        consent=persona.consent, photo_weights=persona.photo_weights,
        faces=tuple(face.as_dict() for face in persona.faces),
    )  # fmt: skip


def _fits(encoder: str, weights: Path | None) -> bool | None:
    """Return whether the weights have this vision encoder, by what their adapter records; None if it does not say."""
    from safetensors import SafetensorError, safe_open

    from imagine.cli.loading import weights_folder
    from imagine.networks.weights import same_encoder

    file = weights_folder(weights) / "adapter" / "adapter.safetensors"
    try:
        with safe_open(file, framework="np") as opened:
            trained = (opened.metadata() or {}).get("encoder_fingerprint")
    except (OSError, SafetensorError):
        return None
    return None if trained is None else same_encoder(encoder, trained)


def _basis(facts: "PersonaFacts") -> str:
    from imagine.personas.consent import UNRECORDED

    return "" if facts.encrypted else UNRECORDED if facts.consent is None else facts.consent.basis


def _expiry(facts: "PersonaFacts") -> str:
    if facts.consent is None:
        return ""
    return "never" if facts.consent.expires is None else facts.consent.expires.isoformat()
