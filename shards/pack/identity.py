"""Pseudonyms: keyed hashes in place of the archive's identifiers, and the split of a patient."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from shards.errors import ShardError
from shards.files import name_bytes

KEY_BYTES = 32
HASH_DIGITS = 16  # 64 bits: two of a million studies collide with probability 3e-8


def load_key(path: Path) -> bytes:
    """The user's secret key, created with mode 600 if the file does not exist.

    Without it nobody can find the samples of a patient from the patient's number. If it is lost the shards stay
    readable, but studies packed later get other hashes. Raises `ShardError` if others can read the file, or if it
    does not hold a key.
    """
    if not path.exists():
        _create_key(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ShardError(f"pack.key_file: {path} can be read by others; run `chmod 600 {path}`")
    try:
        key = bytes.fromhex(path.read_text().strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ShardError(
            f"pack.key_file: {path} does not hold {2 * KEY_BYTES} hexadecimal digits; name a new file to create one"
        )
    return key


def _create_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(KEY_BYTES) + "\n")
    try:
        os.link(temporary, path)  # unlike a rename, this never replaces a key that another process has just created
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def keyed_hash(key: bytes, *parts: str) -> str:
    """HMAC-SHA256 (RFC 2104) of the parts, as `HASH_DIGITS` hexadecimal digits."""
    return hmac.new(key, name_bytes("\0".join(parts)), hashlib.sha256).hexdigest()[:HASH_DIGITS]


def patient_key(key: bytes, source: str, patient_id: str) -> str:
    """The keyed hash that stands for a patient in shards, plan and messages."""
    return keyed_hash(key, "patient", source, patient_id)


def split_of(source: str, patient_id: str) -> str:
    """The split of a patient: train (70 %), val (10 %) or test (20 %), by a hash of source and patient.

    The hash uses no secret key: a patient is in the same split in every laboratory, however many patients are added.
    """
    digest = hashlib.sha256(name_bytes(f"{source}\0{patient_id}")).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < 0.7:
        return "train"
    return "val" if position < 0.8 else "test"
