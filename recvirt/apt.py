"""apt's languages: source lines, its configuration, the URIs that it prints and its errors. Pure functions.

Does not own: running apt (``archive.py``).
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recvirt.errors import CommandError, ConfigError, DownloadError, RecvirtError, SpaceError, VerificationError
from recvirt.trust import INSIDE

_URI_LINE = re.compile(r"^'(?P<uri>[^']+)' (?P<file>[^\s/]+) (?P<size>\d+) SHA256:(?P<sha>[0-9a-f]{64})$")
_ONE_LINE = re.compile(r"^deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>.+)$")
#: Anything else (a space, a bracket, a file: URL) could change what the rest of a source line means.
_MIRROR = re.compile(r"^https?://[^\s\[\]'\"<>\\]+$")
_LACKS = re.compile(
    r"Unable to locate package|no installation candidate|find any package|unmet dep|' was not found|Can't find"
    r"|unable to correct problems|held broken packages",
    re.I,
)
#: Suites without -updates and -security.
_ROLLING = ("sid", "unstable", "experimental")


@dataclass(frozen=True)
class Package:
    """One binary package of an archive, pinned by its digest. ``file`` is apt's name for the cached .deb."""

    name: str
    version: str
    arch: str
    sha256: str
    size_bytes: int
    file: str
    uri: str

    @property
    def pin(self) -> str:
        """What goes into cache keys."""
        return f"{self.name}={self.version} {self.arch} {self.sha256}"


@dataclass(frozen=True)
class Source:
    """One line of sources.list(5), read."""

    uri: str
    suite: str
    options: tuple[str, ...]

    @property
    def release_url(self) -> str:
        """Where its signed release file lies."""
        return f"{self.uri.rstrip('/')}/dists/{self.suite}/InRelease"

    @property
    def release_file(self) -> str:
        """apt's name for that file in its lists folder (apt's URItoFileName)."""
        place = re.sub(r"^[a-z0-9+.-]+://(?:[^/@]*@)?", "", self.release_url)
        return re.sub(r"[\\|{}\[\]<>\"^~_=!@#$%&*]", lambda m: f"%{ord(m[0]):02x}", place).replace("/", "_")


def parse_source(line: str) -> Source | None:
    """One ``deb`` line, or None for anything else."""
    match = _ONE_LINE.match(line.strip())
    if not match:
        return None
    return Source(match["uri"], match["suite"], tuple((match["options"] or "").split()))


def sources_lines(
    default_lines: Sequence[str],
    suite: str,
    *,
    mirror: str | None = None,
    components: Sequence[str] = ("main",),
    snapshot: str | None = None,
    snapshot_mirror: str | None = None,
    keyring: Path | None = None,
) -> list[str]:
    """The one-line-style sources of ``suite`` (sources.list(5)).

    ``default_lines`` are the bootstrapper's own for a stable suite: main, -updates and -security, in any order.
    ``suite`` may be ``<name>-backports``: its base suite comes along. With ``mirror`` only that archive is used (its
    ``-updates`` and ``-security`` live in other archives, which the profile's author chose to leave out).
    """
    base = suite.removesuffix("-backports")
    options = [f"signed-by={keyring}"] if keyring else []
    wanted = " ".join(components)
    if snapshot:
        if not (snapshot_mirror or mirror):
            raise ConfigError(
                "root.snapshot is set, but no snapshot archive is known",
                hint="set root.snapshot_mirror to the base URL below which the timestamps lie",
            )
        mirror = f"{(snapshot_mirror or mirror or '').rstrip('/')}/{snapshot}"
        # A snapshot's Release file is past its Valid-Until by design; the signature is still checked.
        options.append("check-valid-until=no")
    prefix = f"deb [{' '.join(options)}] " if options else "deb "
    if mirror:
        if not _MIRROR.match(mirror):
            raise ConfigError(f"{mirror!r} is not an archive's URL", hint="root.mirror is as http://host/debian")
        suites = [base] if base == suite else [base, suite]
        return [f"{prefix}{mirror} {name} {wanted}" for name in suites]
    lines = []
    for line in default_lines:
        source = parse_source(line)
        if source is None:
            continue
        stem, dash, pocket = source.suite.partition("-")
        if base in _ROLLING and dash:
            continue
        lines.append(f"{prefix}{source.uri} {base}{dash}{pocket} {wanted}")
        if stem and not dash and base != suite:
            lines.append(f"{prefix}{source.uri} {suite} {wanted}")
    if not lines:
        raise RecvirtError("the tools root names no archive", hint="recvirt clean --tools, then build again")
    return lines


def apt_conf(state_dir: Path, *, timeout_seconds: int = 30, retries: int = 3) -> str:
    """An apt.conf(5) that keeps everything below ``state_dir`` and never runs as another user.

    ``timeout_seconds`` is how long a connection may stay silent.
    """
    return "\n".join(
        [
            f'Dir::State "{state_dir}";',
            f'Dir::State::Lists "{state_dir}/lists";',
            f'Dir::State::status "{state_dir}/status";',
            f'Dir::Cache "{state_dir}/cache";',
            f'Dir::Etc::SourceList "{state_dir}/sources.list";',
            'Dir::Etc::SourceParts "/dev/null";',
            'APT::Sandbox::User "root";',
            'APT::Architecture "amd64";',
            'Acquire::Languages "none";',
            'Acquire::ForceHash "SHA256";',
            f'Acquire::Retries "{retries}";',
            f'Acquire::http::Timeout "{timeout_seconds}";',
            f'Acquire::https::Timeout "{timeout_seconds}";',
            f'Acquire::https::CaInfo "{INSIDE}";',
            "",
        ]
    )


def parse_uris(text: str) -> tuple[Package, ...]:
    """``apt-get --print-uris`` lines as packages, sorted by name."""
    found = []
    for line in text.splitlines():
        match = _URI_LINE.match(line.strip())
        if not match:
            continue
        stem = match["file"].removesuffix(".deb")
        name, version, arch = stem.split("_", 2)
        found.append(
            Package(
                name, urllib.parse.unquote(version), arch, match["sha"], int(match["size"]), match["file"], match["uri"]
            )
        )
    return tuple(sorted(found, key=lambda p: (p.name, p.arch)))


def translate_apt_error(error: CommandError, suite: str) -> RecvirtError:
    """apt's words as one of our errors, with a next step."""
    text = "\n".join(error.last_lines)
    # Indented lines tell which dependency can't be met.
    lines = [line for line in error.last_lines if line.startswith(("E:", "W:", "   "))] or list(error.last_lines)[-3:]
    said = "\n".join(f"  | {line}" for line in lines)
    if "No space left on device" in text:
        return SpaceError(f"the disk is full while fetching {suite}\n{said}", hint="free room or set --cache-dir")
    # Names of packages come first: what they are called must not decide about anything.
    if _LACKS.search(text):
        return ConfigError(
            f"{suite} can't provide what was asked for\n{said}", hint="check the package lists for this suite"
        )
    if re.search(r"is expired \(|is not valid yet|past its valid until", text, re.I):
        return VerificationError(
            f"the release file of {suite} is out of date\n{said}",
            hint="check this machine's clock; if it is right, the mirror is stale: choose another (root.mirror)",
        )
    if re.search(r"Hash Sum mismatch|has unexpected size|Size mismatch", text, re.I):
        return VerificationError(
            f"the archive of {suite} sent something else than it signed\n{said}",
            hint="the mirror is broken or in the middle of an update: try again later or choose another (root.mirror)",
        )
    if re.search(r"SSL connection failed|certificate verif|Could not handshake", text, re.I):
        return DownloadError(
            f"the server of {suite} could not prove who it is\n{said}",
            hint="behind a proxy or with a company's own CA: name its PEM file in SSL_CERT_FILE",
        )
    if re.search(r"is not signed|no longer signed|NO_PUBKEY|verify signature|signature verification|GPG error", text):
        return VerificationError(
            f"the archive of {suite} has no valid signature\n{said}",
            hint="name the keyring that signs it: root.keyring",
        )
    if re.search(r"(does not have|no longer has) a Release file", text):
        return DownloadError(
            f"there is no suite {suite} at this archive\n{said}",
            hint="check root.mirror and root.suite: below the URL there must be dists/<suite>/InRelease",
        )
    return DownloadError(
        f"the archive of {suite} could not be read\n{said}",
        hint="check the network (and http_proxy), choose another mirror (root.mirror), or build with --offline",
    )
