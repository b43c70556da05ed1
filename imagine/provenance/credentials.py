"""Content credentials (C2PA): a signed manifest in the picture's file that says how the picture was made.

The manifest names this program and the digital source type `trainedAlgorithmicMedia` of the IPTC, and holds the
record of the picture. It has no thumbnail, no reference photo as an ingredient, and no time stamp of a server, since
nothing is sent anywhere. It signs the bytes of the file: any program that saves the picture again drops it.
"""

import importlib
import importlib.util
import io
import json
from collections.abc import Mapping
from typing import Any

from imagine.errors import ConfigError
from imagine.paths import VERSION
from imagine.provenance.certificate import load_credentials

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
LABEL = "org.imagine.picture"  # of the record in the manifest
MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


def is_installed() -> bool:
    """Return whether c2pa-python and cryptography are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("c2pa", "cryptography"))


def sign(data: bytes, file_format: str, record: Mapping[str, Any]) -> bytes:
    """Return the bytes of a picture file with content credentials. Raises ConfigError if they cannot be made."""
    c2pa: Any = importlib.import_module("c2pa")
    credentials = load_credentials()
    action = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE, "softwareAgent": {"name": "imagine"}}
    manifest = {
        "claim_generator_info": [{"name": "imagine", "version": VERSION}],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
            {"label": LABEL, "data": dict(record)},
        ],
    }
    signed = io.BytesIO()
    try:
        context = c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}})
        info = c2pa.C2paSignerInfo(c2pa.C2paSigningAlg.ES256, credentials.chain, credentials.key, None)
        with c2pa.Signer.from_info(info) as signer, c2pa.Builder(manifest, context) as builder:
            builder.sign(signer, MIME[file_format], io.BytesIO(data), signed)
    except c2pa.C2paError as error:
        raise ConfigError(
            f"Content credentials cannot be made ({error}): check the certificate, or switch them off."
        ) from error
    return signed.getvalue()


def read_credentials(data: bytes, file_format: str) -> dict[str, Any] | None:
    """Return what the credentials in a file say and whether they are intact; None if there are none.

    Keys: state ("Valid", "Trusted" or "Invalid", as in the C2PA specification), trusted, issuer, generator,
    ai_generated, record, and problems, a list of codes.
    """
    c2pa: Any = importlib.import_module("c2pa")
    try:
        reader = c2pa.Reader.try_create(MIME[file_format], io.BytesIO(data))
        if reader is None:
            return None
        with reader:
            state, report = str(reader.get_validation_state()), json.loads(reader.json())
    except c2pa.C2paError as error:
        return {"state": "Invalid", "trusted": False, "problems": [str(error)], "ai_generated": None, "record": None}
    manifest = report["manifests"][report["active_manifest"]]
    assertions = {each["label"]: each["data"] for each in manifest.get("assertions", ())}
    actions: list[Any] = [each for label, each in assertions.items() if label.startswith("c2pa.actions")]
    sources = [one.get("digitalSourceType", "") for each in actions for one in each.get("actions", ())]
    problems = [each["code"] for each in report.get("validation_status", ())]
    return {
        "state": state,
        "trusted": state == "Trusted",
        "issuer": manifest.get("signature_info", {}).get("issuer"),
        "generator": [each.get("name") for each in manifest.get("claim_generator_info", ())],
        "ai_generated": any(each.endswith("rainedAlgorithmicMedia") for each in sources),
        "record": assertions.get(LABEL),
        "problems": problems,
    }
