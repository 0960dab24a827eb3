"""What a worker on another machine shows to get in, and what is kept of it. Standard library only.

An invitation is ``rvj_SECRET.FINGERPRINT``: a secret of 256 bits, and the SHA-256 of the TLS certificate that the API
has, so that one which nobody else vouches for is known from the first connection on.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import ssl
from dataclasses import dataclass, field

PREFIX = "rvj_"
#: A salt of four bytes and a SHA-256 digest.
_HASH_BYTES, _SALT_BYTES = 36, 4
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_SECRET = re.compile(r"[A-Za-z0-9_-]{20,128}")
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True)
class Token:
    """An invitation. Without a fingerprint the certificate is one that the system's authorities vouch for."""

    secret: str = field(repr=False)
    fingerprint: str = ""

    def __str__(self) -> str:
        return f"{PREFIX}{self.secret}" + (f".{self.fingerprint}" if self.fingerprint else "")


def new_token(fingerprint: str) -> Token:
    """A new invitation."""
    return Token(secrets.token_urlsafe(32), fingerprint)


def parse_token(text: str) -> Token:
    """ValueError, which does not repeat it, when it is none."""
    secret, _, fingerprint = text.strip().removeprefix(PREFIX).partition(".")
    if not text.strip().startswith(PREFIX) or not _SECRET.fullmatch(secret):
        raise ValueError("that is no invitation: it begins with rvj_ (recvirt-cloud worker invite makes one)")
    return Token(secret, parse_fingerprint(fingerprint) if fingerprint else "")


def parse_fingerprint(text: str) -> str:
    """As ``openssl x509 -fingerprint -sha256`` or ``sha256sum`` writes it. ValueError otherwise."""
    plain = text.strip().rpartition("=")[2].replace(":", "").lower()
    if not _FINGERPRINT.fullmatch(plain):
        raise ValueError("a certificate's SHA-256 has 64 hexadecimal digits")
    return plain


def digest_of(secret: str) -> str:
    """What is kept of an invitation's secret; 256 random bits need no salt and no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


def fingerprint_of(pem: str) -> str:
    """The SHA-256 of the first certificate in a file, as its bytes are. ValueError when there is none."""
    found = _CERTIFICATE.search(pem)
    if found is None:
        raise ValueError("no certificate is in it")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(found[0])).hexdigest()


def is_password_hash(text: str) -> bool:
    """Whether it is what RabbitMQ keeps of a password: 36 bytes in base64, in the one way of writing them."""
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError):
        return False
    return len(raw) == _HASH_BYTES and base64.b64encode(raw).decode() == text


def opens(password: str, password_hash: str) -> bool:
    """Whether it is the password with this hash, in a time that tells nothing of it."""
    raw = base64.b64decode(password_hash) if is_password_hash(password_hash) else bytes(_HASH_BYTES)
    digest = hashlib.sha256(raw[:_SALT_BYTES] + password.encode()).digest()
    return hmac.compare_digest(digest, raw[_SALT_BYTES:])
