"""Just enough OpenPGP (RFC 4880) to sign a test archive: throwaway RSA keys, certificates and cleartext signatures.

Written out here so that the tests need no gpg and no keyring of the person who runs them. Never for anything real.
"""

from __future__ import annotations

import base64
import hashlib
import math
import random
import time
from dataclasses import dataclass

_SHA512 = 10
_RSA = 1
#: DER prefix of a SHA-512 DigestInfo (RFC 8017, 9.2).
_DIGEST_INFO = bytes.fromhex("3051300d060960864801650304020305000440")


def _is_prime(number: int, rounds: int = 12) -> bool:
    """Miller-Rabin."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(rounds):
        x = pow(random.randrange(2, number - 1), odd, number)
        if x in (1, number - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % number
            if x == number - 1:
                break
        else:
            return False
    return True


_SMALL = [n for n in range(3, 2000, 2) if all(n % d for d in range(3, int(n**0.5) + 1, 2))]


def _prime(bits: int) -> int:
    while True:
        number = random.getrandbits(bits) | (3 << (bits - 2)) | 1
        if all(number % small for small in _SMALL) and _is_prime(number):
            return number


def _mpi(number: int) -> bytes:
    return number.bit_length().to_bytes(2, "big") + number.to_bytes((number.bit_length() + 7) // 8, "big")


def _packet(tag: int, body: bytes) -> bytes:
    return bytes([0xC0 | tag, 0xFF]) + len(body).to_bytes(4, "big") + body


def _subpacket(kind: int, body: bytes) -> bytes:
    return bytes([len(body) + 1, kind]) + body


def _crc24(data: bytes) -> int:
    crc = 0xB704CE
    for byte in data:
        crc ^= byte << 16
        for _ in range(8):
            crc <<= 1
            if crc & 0x1000000:
                crc ^= 0x1864CFB
    return crc


def _armor(kind: str, data: bytes) -> str:
    text = base64.b64encode(data).decode()
    lines = [text[i : i + 64] for i in range(0, len(text), 64)]
    check = base64.b64encode(_crc24(data).to_bytes(3, "big")).decode()
    return "\n".join([f"-----BEGIN PGP {kind}-----", "", *lines, f"={check}", f"-----END PGP {kind}-----", ""])


@dataclass(frozen=True)
class Key:
    """An RSA signing key with one user id."""

    modulus: int
    exponent: int
    secret: int
    created: int
    user: str

    @classmethod
    def generate(cls, user: str, bits: int = 2048) -> Key:
        """A new key; takes about a second."""
        while True:
            p, q = _prime(bits // 2), _prime(bits // 2)
            order = math.lcm(p - 1, q - 1)
            if p != q and math.gcd(65537, order) == 1:
                created = int(time.time()) - 86400
                return cls(p * q, 65537, pow(65537, -1, order), created, user)

    def _body(self) -> bytes:
        return b"\x04" + self.created.to_bytes(4, "big") + bytes([_RSA]) + _mpi(self.modulus) + _mpi(self.exponent)

    @property
    def fingerprint(self) -> bytes:
        """The V4 fingerprint, 20 bytes."""
        body = self._body()
        return hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body).digest()

    def _signature(self, kind: int, when: int, signed: bytes, extra: bytes = b"") -> bytes:
        """A V4 signature packet over ``signed``, made at ``when``; ``extra`` are more hashed subpackets."""
        hashed = _subpacket(2, when.to_bytes(4, "big")) + _subpacket(33, b"\x04" + self.fingerprint) + extra
        head = bytes([4, kind, _RSA, _SHA512]) + len(hashed).to_bytes(2, "big") + hashed
        digest = hashlib.sha512(signed + head + b"\x04\xff" + len(head).to_bytes(4, "big")).digest()
        size = (self.modulus.bit_length() + 7) // 8
        info = _DIGEST_INFO + digest
        padded = b"\x00\x01" + b"\xff" * (size - len(info) - 3) + b"\x00" + info
        value = pow(int.from_bytes(padded, "big"), self.secret, self.modulus)
        unhashed = _subpacket(16, self.fingerprint[-8:])
        return _packet(2, head + len(unhashed).to_bytes(2, "big") + unhashed + digest[:2] + _mpi(value))

    def public(self) -> bytes:
        """The certificate: what a keyring file (``.gpg``) holds."""
        body, user = self._body(), self.user.encode()
        signed = b"\x99" + len(body).to_bytes(2, "big") + body + b"\xb4" + len(user).to_bytes(4, "big") + user
        binding = self._signature(0x13, self.created, signed, _subpacket(27, b"\x03"))
        return _packet(6, body) + _packet(13, user) + binding

    def clearsign(self, text: str) -> str:
        """``text`` in the cleartext signature framework, as an InRelease file is."""
        lines = [line.rstrip(" \t") for line in text.rstrip("\n").split("\n")]
        signature = self._signature(0x01, int(time.time()) - 1, "\r\n".join(lines).encode())
        escaped = [f"- {line}" if line.startswith("-") else line for line in lines]
        head = ["-----BEGIN PGP SIGNED MESSAGE-----", "Hash: SHA512", ""]
        return "\n".join([*head, *escaped, ""]) + _armor("SIGNATURE", signature)

    def detached(self, data: bytes) -> bytes:
        """A binary detached signature over ``data``, armored, as kernel releases have them."""
        return _armor("SIGNATURE", self._signature(0x00, int(time.time()) - 1, data)).encode()
