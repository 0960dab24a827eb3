"""A Debian archive as apt sees it: which package versions there are now, verified, and how to fetch them.

Owns: an apt state of its own below the cache (never the host's), the sources of a suite, resolution and downloads.
apt runs inside the tools root; it verifies signatures, validity dates, sizes and hashes. No mirror is named here: unless
a profile names one, the lines that the bootstrapper wrote into the tools root are rewritten for the suite.
Does not own: installing anything.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from recvirt.errors import CommandError, ConfigError, DownloadError, RecvirtError, SpaceError, VerificationError
from recvirt.sandbox import ToolsRoot
from recvirt.store import sha256_of

_URI_LINE = re.compile(r"^'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+) SHA256:(?P<sha>[0-9a-f]{64})$")
_ONE_LINE = re.compile(r"^deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>.+)$")
_LACKS = re.compile(
    r"Unable to locate package|no installation candidate|find any package|unmet dep|' was not found|Can't find", re.I
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
        suites = [base] if base == suite else [base, suite]
        return [f"{prefix}{mirror} {name} {wanted}" for name in suites]
    lines = []
    for line in default_lines:
        match = _ONE_LINE.match(line.strip())
        if not match:
            continue
        stem, dash, pocket = match["suite"].partition("-")
        if base in _ROLLING and dash:
            continue
        lines.append(f"{prefix}{match['uri']} {base}{dash}{pocket} {wanted}")
        if not dash and base != suite:
            lines.append(f"{prefix}{match['uri']} {suite} {wanted}")
    if not lines:
        raise RecvirtError("the tools root names no archive", hint="recvirt clean --tools, then build again")
    return lines


class Archive:
    """One suite of one archive, as it is now (or, offline, as it was last seen)."""

    def __init__(
        self,
        tools: ToolsRoot,
        cache_dir: Path,
        *,
        suite: str,
        mirror: str | None = None,
        components: Sequence[str] = ("main",),
        snapshot: str | None = None,
        snapshot_mirror: str | None = None,
        keyring: Path | None = None,
        offline: bool = False,
    ) -> None:
        default = (tools.rootfs / "etc/apt/sources.list").read_text().splitlines()
        self.suite = suite
        self.lines = sources_lines(
            default, suite, mirror=mirror, components=components, snapshot=snapshot,
            snapshot_mirror=snapshot_mirror, keyring=keyring,
        )  # fmt: skip
        identity = "\n".join([*self.lines, sha256_of(keyring) if keyring else ""])
        self.state_dir = cache_dir / "apt" / f"{suite}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        self.debs_dir = cache_dir / "debs"
        self._tools = tools
        self._keyring = keyring
        self._offline = offline
        self._fresh = False

    # -- apt ------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        for name in ("lists/partial", "cache/archives/partial"):
            (self.state_dir / name).mkdir(parents=True, exist_ok=True)
        self.debs_dir.mkdir(parents=True, exist_ok=True)
        (self.state_dir / "status").touch()
        (self.state_dir / "sources.list").write_text("\n".join(self.lines) + "\n")
        (self.state_dir / "apt.conf").write_text(apt_conf(self.state_dir))

    def _apt(self, *words: str, network: bool = False, cwd: Path | None = None) -> str:
        readable = [self._keyring] if self._keyring else []
        # Two builds may ask at once; apt itself would fail on its lock instead of waiting.
        with (self.state_dir / "recvirt.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                return self._tools.run(
                    words,
                    writable=[self.state_dir, self.debs_dir],
                    readable=readable,
                    network=network,
                    cwd=cwd,
                    env={"APT_CONFIG": str(self.state_dir / "apt.conf")},
                    timeout_seconds=900,
                ).stdout
            except CommandError as error:
                raise translate_apt_error(error, self.suite) from error

    def update(self) -> None:
        """Fetch the signed release files and indexes that changed (once a process). Offline: what is there must do."""
        if self._fresh:
            return
        self._prepare()
        if not self._offline:
            self._apt("apt-get", "-qq", "-o", "APT::Update::Error-Mode=any", "update", network=True)
        elif not list((self.state_dir / "lists").glob("*Release")):
            raise DownloadError(
                f"offline, and the indexes of {self.suite} were never fetched", hint="build once without --offline"
            )
        self._fresh = True

    def release_digest(self) -> str:
        """A digest of the signed release files: it changes when the archive does."""
        self.update()
        digest = hashlib.sha256()
        for path in sorted((self.state_dir / "lists").glob("*Release")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()

    def resolve(self, names: Sequence[str], *, essential: bool = False) -> tuple[Package, ...]:
        """Every package that installing ``names`` (no recommends) into an empty system brings, sorted by name.

        ``essential`` adds the Essential set, as a bootstrapper does. Raises ConfigError for a name that the suite
        lacks or that can't be installed. Remembered per archive state and request.
        """
        request = json.dumps([self.release_digest(), list(names), essential])
        memory = self.state_dir / f"resolved-{hashlib.sha256(request.encode()).hexdigest()[:24]}.json"
        if memory.exists():
            return tuple(Package(**item) for item in json.loads(memory.read_text()))
        wanted = ["?essential", *names] if essential else list(names)
        out = self._apt("apt-get", "-qq", "-y", "--no-install-recommends", "--print-uris", "install", *wanted)
        packages = parse_uris(out)
        partial = memory.with_suffix(".part")
        partial.write_text(json.dumps([asdict(p) for p in packages]))
        partial.replace(memory)
        return packages

    def find(self, name: str) -> Package:
        """The one package ``name`` itself, in the version that apt would choose, without its dependencies."""
        self.update()
        target = f"{name}/{self.suite}" if self.suite.endswith("-backports") else name
        found = parse_uris(self._apt("apt-get", "-qq", "--print-uris", "download", target))
        if not found:
            raise ConfigError(f"{self.suite} has no package {name}", hint="apt-cache search tells what there is")
        return found[0]

    def download(self, package: Package) -> Path:
        """The verified .deb in the cache, fetched if it is not there. Written whole or not at all."""
        target = self.debs_dir / package.file
        if target.exists() and target.stat().st_size == package.size_bytes and sha256_of(target) == package.sha256:
            return target
        if self._offline:
            raise DownloadError(f"offline, and {package.file} is not in the cache", hint="build once without --offline")
        partial = self.debs_dir / "partial" / package.sha256
        partial.mkdir(parents=True, exist_ok=True)
        self._apt("apt-get", "-qq", "download", f"{package.name}={package.version}", network=True, cwd=partial)
        fetched = partial / package.file
        if not fetched.exists():
            fetched = next(partial.glob("*.deb"))
        if sha256_of(fetched) != package.sha256:
            fetched.unlink()
            raise VerificationError(f"{package.file} is not what the archive's index promised", hint="try again")
        fetched.replace(target)
        return target


def apt_conf(state_dir: Path) -> str:
    """An apt.conf(5) that keeps everything below ``state_dir`` and never runs as another user."""
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
            'Acquire::Retries "3";',
            'Acquire::http::Timeout "30";',
            'Acquire::https::Timeout "30";',
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
    lines = [line for line in error.last_lines if line.startswith(("E:", "W:"))] or list(error.last_lines)[-3:]
    said = "\n".join(f"  | {line}" for line in lines)
    if "No space left on device" in text:
        return SpaceError(f"the disk is full while fetching {suite}\n{said}", hint="free room or set --cache-dir")
    if re.search(r"is expired|not valid yet|valid until", text, re.I):
        return VerificationError(
            f"the release file of {suite} is out of date\n{said}",
            hint="check this machine's clock; if it is right, the mirror is stale: choose another (root.mirror)",
        )
    if re.search(r"Hash Sum mismatch|unexpected size|Hashes of", text, re.I):
        return VerificationError(
            f"the archive of {suite} sent something else than it signed\n{said}",
            hint="the mirror is broken or in the middle of an update: try again later or choose another (root.mirror)",
        )
    if re.search(r"is not signed|NO_PUBKEY|signature|OpenPGP|GPG", text):
        return VerificationError(
            f"the archive of {suite} has no valid signature\n{said}",
            hint="name the keyring that signs it: root.keyring",
        )
    if _LACKS.search(text):
        return ConfigError(
            f"{suite} can't provide what was asked for\n{said}", hint="check the package lists for this suite"
        )
    return DownloadError(
        f"the archive of {suite} could not be read\n{said}",
        hint="check the network (and http_proxy), choose another mirror (root.mirror), or --offline with a filled cache",
    )
