"""Encrypt bytes with a passphrase: a key from scrypt (RFC 7914), then AES-256-GCM, both of `cryptography`.

The parameters stand in plain text beside the ciphertext and are authenticated with it. A changed file and a wrong
passphrase cannot be told apart, and both are refused. The packages come with `pip install -e '.[personas]'`.
"""

import importlib
import importlib.util
import json
import os
from typing import Any

from imagine.errors import ConfigError, WeightsError

LOG_COST, BLOCK_SIZE, PARALLEL = 17, 8, 1  # scrypt's N = 2^17, r, p: 128 MiB and about 0.4 s for a guess
_HIGHEST_COST = 20  # a file may not ask for more than a gibibyte of memory
_SALT, _NONCE, _KEY = 16, 12, 32  # bytes
SHORTEST = 8  # characters of a passphrase


def is_installed() -> bool:
    """Return whether `cryptography` is installed."""
    return importlib.util.find_spec("cryptography") is not None


def check_passphrase(passphrase: str) -> None:
    """Raise ConfigError if the passphrase is short, or if `cryptography` is not installed."""
    if len(passphrase) < SHORTEST:
        raise ConfigError(f"The passphrase has {len(passphrase)} characters: give at least {SHORTEST}.")
    if not is_installed():
        raise ConfigError("Encrypted personas need the package cryptography: pip install -e '.[personas]'.")


def seal(plain: bytes, passphrase: str, log_cost: int = LOG_COST) -> tuple[bytes, str]:
    """Return the ciphertext of `plain` and the parameters, as JSON, that `unseal` needs beside the passphrase.

    Raises ConfigError for a short passphrase, or without `cryptography`.
    """
    check_passphrase(passphrase)
    parameters = {
        "cipher": "scrypt, AES-256-GCM", "log_cost": log_cost, "block_size": BLOCK_SIZE, "parallel": PARALLEL,
        "salt": os.urandom(_SALT).hex(), "nonce": os.urandom(_NONCE).hex(),
    }  # fmt: skip
    text = json.dumps(parameters, sort_keys=True)
    cipher = _cipher(parameters, passphrase)
    return cipher.encrypt(bytes.fromhex(str(parameters["nonce"])), plain, text.encode()), text


def unseal(sealed: bytes, text: str, passphrase: str, what: str) -> bytes:
    """Return the plain bytes; `text` holds the parameters, and `what` names the file in messages.

    Raises WeightsError for a wrong passphrase or a changed file.
    """
    try:
        parameters = json.loads(text)
        nonce = bytes.fromhex(parameters["nonce"])
        is_possible = 1 <= parameters["log_cost"] <= _HIGHEST_COST and parameters["block_size"] <= BLOCK_SIZE
        if not is_possible or parameters["parallel"] != PARALLEL:
            raise ValueError(text)
        cipher = _cipher(parameters, passphrase)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise WeightsError(f"{what} does not describe its encryption properly; enroll the person again.") from error
    try:
        plain: bytes = cipher.decrypt(nonce, sealed, text.encode())
    except importlib.import_module("cryptography.exceptions").InvalidTag as error:
        raise WeightsError(
            f"{what} cannot be decrypted: the passphrase is wrong, or the file was changed; check the passphrase."
        ) from error
    return plain


def _cipher(parameters: Any, passphrase: str) -> Any:
    """Return the cipher of a passphrase. Raises ConfigError without `cryptography`."""
    if not is_installed():
        raise ConfigError("Encrypted personas need the package cryptography: pip install -e '.[personas]'.")
    aead = importlib.import_module("cryptography.hazmat.primitives.ciphers.aead")
    kdf = importlib.import_module("cryptography.hazmat.primitives.kdf.scrypt")
    scrypt = kdf.Scrypt(
        salt=bytes.fromhex(parameters["salt"]), length=_KEY, n=2 ** int(parameters["log_cost"]),
        r=int(parameters["block_size"]), p=int(parameters["parallel"]),
    )  # fmt: skip
    return aead.AESGCM(scrypt.derive(passphrase.encode()))
