"""The certificate and key that sign content credentials: this installation's own, or the operator's.

Without the operator's files a certificate is made at the first use, in the user's data folder. It says only that
pictures come from one installation: its issuer is on no trust list, and readers report it as valid and untrusted. The
key of the issuing certificate is thrown away.
"""

import importlib
import os
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from imagine.errors import ConfigError
from imagine.paths import data_folder

ENVIRONMENT = "IMAGINE_CREDENTIALS"  # names the operator's folder
CHAIN, KEY = "certificate.pem", "private_key.pem"
YEARS = 10
ORGANISATION, SUBJECT, ISSUER = "Imagine, a local installation", "Imagine pictures", "Imagine local root"


@dataclass(frozen=True)
class Credentials:
    """A chain of certificates, the signer's first, and its private key (ES256), both PEM."""

    chain: bytes
    key: bytes = field(repr=False)


def load_credentials() -> Credentials:
    """Return the credentials of IMAGINE_CREDENTIALS, or this installation's own, which are made if there are none.

    Raises ConfigError if they cannot be read or written.
    """
    given = os.environ.get(ENVIRONMENT)
    folder = Path(given) if given else data_folder() / "credentials"
    try:
        if not (folder / CHAIN).is_file() and not given:
            _write(folder, make_credentials())
        return Credentials((folder / CHAIN).read_bytes(), (folder / KEY).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"The signing certificate in {folder} cannot be used ({error.strerror or error}): put {CHAIN} and {KEY} "
            f"there, name another folder with {ENVIRONMENT}, or switch content credentials off."
        ) from error


def make_credentials() -> Credentials:
    """Return a new certificate with its issuer's, as the C2PA specification 2.2 (section 14.5) asks for."""
    x509: Any = importlib.import_module("cryptography.x509")
    ec: Any = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ec")
    forms: Any = importlib.import_module("cryptography.hazmat.primitives.serialization")
    issuer_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = _certificate(x509, ISSUER, ISSUER, issuer_key.public_key(), issuer_key, is_issuer=True)
    signer = _certificate(x509, SUBJECT, ISSUER, key.public_key(), issuer_key, is_issuer=False)
    chain = b"".join(each.public_bytes(forms.Encoding.PEM) for each in (signer, issuer))
    private = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    return Credentials(chain, private)


def _certificate(x509: Any, subject: str, issuer: str, public_key: Any, signing_key: Any, is_issuer: bool) -> Any:
    """Return one certificate, signed with `signing_key`."""
    hashes: Any = importlib.import_module("cryptography.hazmat.primitives.hashes")
    now = datetime.now(timezone.utc) - timedelta(minutes=5)  # clocks differ
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    allowed = {"key_cert_sign", "crl_sign"} if is_issuer else {"digital_signature"}
    builder = (
        x509.CertificateBuilder(_name(x509, issuer), _name(x509, subject), public_key, x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=365 * YEARS))
        .add_extension(x509.BasicConstraints(is_issuer, 0 if is_issuer else None), critical=True)
        .add_extension(x509.KeyUsage(**{name: name in allowed for name in names}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )
    if not is_issuer:
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key())
        purpose = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(identifier, critical=False).add_extension(purpose, critical=False)
    return builder.sign(signing_key, hashes.SHA256())


def _name(x509: Any, common: str) -> Any:
    oid = x509.oid.NameOID
    return x509.Name(
        [x509.NameAttribute(oid.ORGANIZATION_NAME, ORGANISATION), x509.NameAttribute(oid.COMMON_NAME, common)]
    )


def _write(folder: Path, made: Credentials) -> None:
    """Write the files so that only this user reads the key; the certificate comes last, since it marks a whole pair."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in ((KEY, made.key), (CHAIN, made.chain)):
        unfinished = folder / f".{name}.{os.getpid()}.partial"
        unfinished.touch(mode=0o600)
        unfinished.write_bytes(data)
        unfinished.replace(folder / name)
