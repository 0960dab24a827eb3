"""Release tarballs: fetching by URL, checking digest and signature, unpacking.

A signature stands over the *uncompressed* tar, as kernel releases are signed. Does not own: the unpacked cache.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from recvirt import __version__
from recvirt.errors import CommandError, ConfigError, DownloadError, VerificationError
from recvirt.sandbox import ToolsRoot
from recvirt.store import sha256_of
from recvirt.trust import ca_bundle
from recvirt.ui import reporter

_TIMEOUT_SECONDS = 60
_TRIES = 3
_CHUNK = 1 << 20
#: First bytes of a compressed file, and the program that undoes it.
_MAGIC = ((b"\xfd7zXZ\0", "xz"), (b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"))
_ARMOR = re.compile(rb"-----BEGIN PGP [A-Z ]+-----.*?\r?\n\r?\n(.*?)-----END PGP [A-Z ]+-----", re.S)


def fetch(url: str, sha256: str, folder: Path, *, offline: bool = False) -> Path:
    """The file of this digest, from ``folder`` or from ``url``. Raises DownloadError, VerificationError."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / sha256
    if target.exists() and sha256_of(target) == sha256:
        os.utime(target)  # used now: recvirt clean goes by it
        return target
    if offline:
        raise DownloadError(f"offline, and {url} is not in the cache", hint="build once without --offline")
    partial = folder / f"{sha256}.part"
    found = _download(url, partial)
    if found != sha256:
        partial.unlink()
        raise VerificationError(
            f"{url} is not what the profile pins\n  wanted sha256 {sha256}\n  got    sha256 {found}",
            hint="compare kernel.tarball.sha256 with the publisher's list; a mirror may lie",
        )
    partial.replace(target)
    return target


def fetch_signature(url: str, folder: Path, *, offline: bool = False) -> Path:
    """A detached signature. It has no digest of its own to pin it: the keyring vouches for it."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()}.sig"
    if offline and target.exists():
        return target
    if offline:
        raise DownloadError(f"offline, and {url} is not in the cache", hint="build once without --offline")
    partial = target.with_suffix(".part")
    _download(url, partial)
    partial.replace(target)
    return target


def _download(url: str, target: Path) -> str:
    """Fetch into ``target``; returns its SHA-256. requests honours proxies."""
    import requests  # not wanted, and not imported, for any other source

    if not url.startswith(("https://", "http://")):
        raise ConfigError(f"{url} is neither an https nor an http address", hint="kernel.tarball.url")
    problem = ""
    for _ in range(_TRIES):
        try:
            return _download_once(url, target)
        except requests.HTTPError as error:
            problem = f"the server answered {error.response.status_code} {error.response.reason}"
            if error.response.status_code < 500:
                break
        except requests.RequestException as error:
            problem = str(error)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            problem = str(error)
    target.unlink(missing_ok=True)
    raise DownloadError(f"{url} could not be fetched: {problem}", hint="check the URL, the network and http(s)_proxy")


def _download_once(url: str, target: Path) -> str:
    import requests
    import urllib3

    headers = {"User-Agent": f"recvirt/{__version__}", "Accept-Encoding": "identity"}
    digest = hashlib.sha256()
    with (
        requests.get(url, headers=headers, timeout=_TIMEOUT_SECONDS, stream=True, verify=_trusted()) as answer,
        target.open("wb") as stream,
    ):
        answer.raise_for_status()
        length = answer.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else None
        done = 0
        answer.raw.enforce_content_length = False  # an end too soon is told below, in our words
        # The bytes as they were sent: what the digest is of, whatever the server says of their encoding.
        while chunk := _read(answer.raw, urllib3.exceptions.HTTPError):
            stream.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            reporter.progress("kernel source", done, total, "bytes")
    if total is not None and done != total:
        raise OSError(f"the connection ended after {done} of {total} bytes")
    return digest.hexdigest()


def _read(raw: Any, broken: type[Exception]) -> bytes:
    try:
        return bytes(raw.read(_CHUNK, decode_content=False))
    except broken as error:
        raise OSError(f"the connection broke: {error}") from None


def _trusted() -> str | bool:
    """The host's certificate authorities; requests' own list where it has none."""
    bundle = ca_bundle()
    return str(bundle) if bundle else True


def decompressor(path: Path) -> list[str]:
    """The program that writes the uncompressed file to stdout, by the file's first bytes."""
    with path.open("rb") as stream:
        head = stream.read(8)
    for magic, program in _MAGIC:
        if head.startswith(magic):
            return [program, "-dc"]
    return ["cat"]


def dearmored(data: bytes) -> bytes:
    """A keyring or signature as binary packets (RFC 4880, 6.2); gpgv reads no armored keyring. ValueError if
    damaged."""
    parts = _ARMOR.findall(data)
    if not parts:
        return data
    out = b""
    for part in parts:
        lines = [line for line in part.split() if line and not line.startswith(b"=")]
        try:
            out += base64.b64decode(b"".join(lines), validate=True)
        except binascii.Error as error:
            raise ValueError(str(error)) from error
    return out


def verify_signature(tools: ToolsRoot, path: Path, signature: Path, keyring: Path, scratch: Path) -> None:
    """Check a detached signature over the uncompressed tar with gpgv(1). Raises VerificationError, ConfigError."""
    binary = scratch / "keyring.gpg"
    try:
        binary.write_bytes(dearmored(keyring.read_bytes()))
    except ValueError as error:
        raise ConfigError(f"{keyring} is no OpenPGP keyring: {error}", hint="kernel.tarball.keyring") from error
    script = 'set -o pipefail; "${@:4}" "$1" | gpgv --homedir /tmp --keyring "$2" "$3" -'
    argv = ["bash", "-c", script, "bash", str(path), str(binary), str(signature), *decompressor(path)]
    try:
        tools.run(argv, readable=[path, signature, binary])
    except CommandError as error:
        said = "\n".join(f"  | {line}" for line in error.last_lines)
        raise VerificationError(
            f"the signature of the kernel's tarball does not hold\n{said}",
            hint="kernel.tarball: signature_url must sign the uncompressed tar, with a key of keyring",
        ) from error
    finally:
        binary.unlink()


def unpack(tools: ToolsRoot, path: Path, tree: Path, log: Path) -> None:
    """Unpack a tar with one folder at its top into ``tree``."""
    script = 'set -o pipefail; "${@:3}" "$1" | tar -x --strip-components=1 --no-same-owner -C "$2" -f -'
    argv = ["bash", "-c", script, "bash", str(path), str(tree), *decompressor(path)]
    tools.run(argv, readable=[path], writable=[tree], log_path=log)
