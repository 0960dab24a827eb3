"""A Debian archive as apt sees it: which package versions there are now, verified, and how to fetch them.

Owns: an apt state of its own below the cache (never the host's), resolution and downloads. apt runs inside the tools
root; it verifies signatures, validity dates, sizes and hashes. No mirror is named here: unless a profile names one, the
lines that the bootstrapper wrote into the tools root are rewritten for the suite.
Does not own: installing anything, nor apt's languages (``apt.py``).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path

from recvirt.apt import (
    Package,
    Source,
    apt_conf,
    parse_source,
    parse_uris,
    sources_lines,
    translate_apt_error,
)
from recvirt.errors import CommandError, ConfigError, DownloadError, RecvirtError, VerificationError
from recvirt.run import is_stopping
from recvirt.sandbox import ToolsRoot
from recvirt.store import sha256_of, take_lock
from recvirt.trust import ca_bundle
from recvirt.ui import format_bytes, reporter

__all__ = ["Archive", "Package", "forget_updates", "parse_uris", "sources_lines", "translate_apt_error"]

#: A download may be this slow before it is given up (apt itself gives up on silence much earlier).
_SLOWEST_BYTES_PER_SECOND = 20_000
_ASK_TIMEOUT_SECONDS = 5.0
#: Few enough for a command line and a steady progress display, many enough for apt to keep its connections.
_DOWNLOADS_AT_ONCE = 40
#: Where a profile's keyring is seen inside the sandbox: source lines can't hold paths with spaces.
_KEYRING_INSIDE = "/tmp/recvirt-keyring"

_updated: set[Path] = set()
_update_locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


def forget_updates() -> None:
    """Ask the mirrors again: within one plan an archive is looked at once, so that all stages see the same state."""
    _updated.clear()


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
        timeout_seconds: int = 30,
        retries: int = 3,
    ) -> None:
        default = (tools.rootfs / "etc/apt/sources.list").read_text().splitlines()
        if keyring and not keyring.is_file():
            raise ConfigError(f"the keyring {keyring} does not exist", hint="correct root.keyring")
        inside = Path(_KEYRING_INSIDE + (".asc" if keyring.suffix == ".asc" else ".gpg")) if keyring else None
        self.suite = suite
        self.lines = sources_lines(
            default, suite, mirror=mirror, components=components, snapshot=snapshot,
            snapshot_mirror=snapshot_mirror, keyring=inside,
        )  # fmt: skip
        identity = "\n".join([*self.lines, sha256_of(keyring) if keyring else ""])
        self.state_dir = cache_dir / "apt" / f"{suite}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        self.debs_dir = cache_dir / "debs"
        self._conf = apt_conf(self.state_dir, timeout_seconds=timeout_seconds, retries=retries)
        self._tools = tools
        self._cover = {inside: keyring} if inside and keyring else {}
        self._offline = offline

    # -- apt ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Two builds may ask at once; apt itself would fail on its lock instead of waiting."""
        with (self.state_dir / "recvirt.lock").open("a") as lock:
            take_lock(lock.fileno(), is_stopping)
            yield

    def _prepare(self) -> None:
        for name in ("lists/partial", "cache/archives/partial"):
            (self.state_dir / name).mkdir(parents=True, exist_ok=True)
        self.debs_dir.mkdir(parents=True, exist_ok=True)
        contents = {"status": "", "sources.list": "\n".join(self.lines) + "\n", "apt.conf": self._conf}
        with self._locked():
            for name, text in contents.items():
                path = self.state_dir / name
                if not path.exists() or path.read_text() != text:
                    path.write_text(text)

    def _apt(self, *words: str, network: bool = False, cwd: Path | None = None, timeout_seconds: float = 900) -> str:
        try:
            return self._tools.run(
                words,
                writable=[self.state_dir, self.debs_dir],
                cover=self._cover,
                network=network,
                cwd=cwd,
                env={"APT_CONFIG": str(self.state_dir / "apt.conf")},
                timeout_seconds=timeout_seconds,
            ).stdout
        except CommandError as error:
            raise translate_apt_error(error, self.suite) from error

    # -- the state of the archive -------------------------------------------------------------------------------------

    def update(self) -> None:
        """Fetch the signed release files and indexes that changed. Offline: what is there must do.

        Looked at once until :func:`forget_updates`, however many ask.
        """
        with _update_locks[self.state_dir]:
            if self.state_dir in _updated:
                return
            self._prepare()
            with self._locked():
                self._update_locked()
            _updated.add(self.state_dir)

    def _update_locked(self) -> None:
        # The stamp tells a whole state from one that a killed update left.
        stamp = self.state_dir / "updated.json"
        whole = stamp.exists() and stamp.read_text() == self._picture()
        if whole:
            os.utime(stamp)  # used now: recvirt clean goes by it
        if self._offline:
            if not whole:
                raise DownloadError(
                    f"offline, and the indexes of {self.suite} were never fetched whole",
                    hint="build once without --offline",
                )
            return
        if whole and self._is_current():
            return
        self._apt("apt-get", "-qq", "-o", "APT::Update::Error-Mode=any", "update", network=True)
        if stamp.exists():
            # What was worked out from an earlier state is of no more use.
            for memory in self.state_dir.glob("resolved-*.json"):
                memory.unlink(missing_ok=True)
        _write_whole(stamp, self._picture())

    def _picture(self) -> str:
        """What the lists folder looks like after a whole update, and which programs and keys verified it."""
        lists = sorted((self.state_dir / "lists").iterdir())
        facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in lists if p.is_file() and p.name != "lock"]
        return json.dumps([facts, self._tools.version_of("apt", "sqv", "gpgv", "debian-archive-keyring")])

    def _is_current(self) -> bool:
        """Whether every signed release file is still the one that apt verified: then an update would change nothing."""
        sources = [source for source in map(parse_source, self.lines) if source]
        try:
            opener = _opener(tls=any(source.uri.startswith("https:") for source in sources))
        except OSError:
            return False
        with ThreadPoolExecutor(max(1, len(sources))) as pool:
            return all(pool.map(lambda source: self._is_unchanged(source, opener), sources))

    def _is_unchanged(self, source: Source, opener: urllib.request.OpenerDirector) -> bool:
        path = self.state_dir / "lists" / source.release_file
        if not path.exists() or ("check-valid-until=no" not in source.options and _is_expired(path)):
            return False
        since = formatdate(path.stat().st_mtime, usegmt=True)
        request = urllib.request.Request(  # noqa: S310 - the same URL that apt asks
            source.release_url,
            headers={"If-Modified-Since": since, "User-Agent": "recvirt", "Cache-Control": "max-age=0"},
        )
        try:
            with opener.open(request, timeout=_ASK_TIMEOUT_SECONDS) as answer:
                ours = path.read_bytes()
                return bool(answer.read(len(ours) + 1) == ours)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 304
        except (OSError, ValueError, http.client.HTTPException):
            # Whatever it is: apt will say it better.
            return False

    def release_digest(self) -> str:
        """A digest of the signed release files: it changes when the archive does."""
        self.update()
        digest = hashlib.sha256()
        for path in sorted((self.state_dir / "lists").glob("*Release")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()

    # -- packages -----------------------------------------------------------------------------------------------------

    def _remembered(self, request: list[object], work_out: Callable[[], str]) -> tuple[Package, ...]:
        """What apt answered to the same request in the same archive state, else what it answers now."""
        text = json.dumps([self.release_digest(), *request])
        memory = self.state_dir / f"resolved-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        try:
            return tuple(Package(**item) for item in json.loads(memory.read_text()))
        except FileNotFoundError:
            pass
        with self._locked():
            packages = parse_uris(work_out())
        _write_whole(memory, json.dumps([asdict(package) for package in packages]))
        return packages

    def resolve(self, names: Sequence[str], *, essential: bool = False) -> tuple[Package, ...]:
        """Every package that installing ``names`` (no recommends) into an empty system brings, sorted by name.

        ``essential`` adds the Essential set, as a bootstrapper does. Raises ConfigError for a name that the suite
        lacks or that can't be installed. Remembered per archive state and request.
        """
        wanted = ["?essential", *names] if essential else list(names)
        if not wanted:
            return ()
        argv = ("apt-get", "-qq", "-y", "--no-install-recommends", "--print-uris", "install", *wanted)
        return self._remembered(["install", *wanted], lambda: self._apt(*argv))

    def find(self, name: str) -> Package:
        """The one package ``name`` itself, in the version that apt would choose, without its dependencies."""
        target = f"{name}/{self.suite}" if self.suite.endswith("-backports") else name
        argv = ("apt-get", "-qq", "--print-uris", "download", target)
        found = self._remembered(["download", target], lambda: self._apt(*argv))
        if not found:
            raise ConfigError(f"{self.suite} has no package {name}", hint="apt-cache search tells what there is")
        return found[0]

    def download(self, package: Package) -> Path:
        """The verified .deb in the cache, fetched if it is not there. Written whole or not at all."""
        return self.download_all([package])[0]

    def download_all(self, packages: Sequence[Package]) -> list[Path]:
        """The verified .debs in the cache, in the order asked; those that are not there are fetched in one go.

        What was fetched whole stays, also when another one fails: the next run carries on from there.
        """
        targets = [self.debs_dir / package.file for package in packages]
        lacking = [p for p, target in zip(packages, targets, strict=True) if not _is_whole(target, p)]
        if not lacking:
            return targets
        if self._offline:
            names = ", ".join(package.file for package in lacking[:3]) + (" ..." if len(lacking) > 3 else "")
            raise DownloadError(f"offline, and not in the cache: {names}", hint="build once without --offline")
        self.update()
        partial = self.debs_dir / "partial"
        partial.mkdir(exist_ok=True)
        with _folder_lock(partial):
            # Another recvirt may have fetched them while this one waited.
            lacking = [p for p in lacking if not _is_whole(self.debs_dir / p.file, p)]
            carries_on = any(partial.iterdir())
            try:
                self._fetch(lacking, partial)
            except VerificationError:
                if not carries_on:
                    raise
                # What an interrupted run left may not have been the beginning of this.
                self._fetch(lacking, partial)
        return targets

    def _fetch(self, packages: Sequence[Package], partial: Path) -> None:
        packages = self._keep_whole(packages, partial)
        if not packages:
            return
        total = sum(package.size_bytes for package in packages)
        wanted = [f"{package.name}={package.version}" for package in packages]
        name = f"fetch {packages[0].name if len(packages) == 1 else f'{len(packages)} packages'}"
        try:
            with _shown(name, partial, total):
                self._apt(
                    "apt-get", "-qq", "download", *wanted, network=True, cwd=partial,
                    timeout_seconds=300 + total / _SLOWEST_BYTES_PER_SECOND,
                )  # fmt: skip
            if left := self._keep_whole(packages, partial):
                raise VerificationError(f"{left[0].file} is not what the archive's index promised", hint="try again")
        except VerificationError:
            self._keep_whole(packages, partial)
            _empty(partial)
            raise
        except RecvirtError:
            # apt carries on where it stopped.
            self._keep_whole(packages, partial)
            raise
        _empty(partial)

    def _keep_whole(self, packages: Sequence[Package], partial: Path) -> list[Package]:
        """Move what came whole into the cache; returns the others."""
        left = []
        for package in packages:
            if _is_whole(partial / package.file, package):
                (partial / package.file).replace(self.debs_dir / package.file)
            else:
                left.append(package)
        return left


def _opener(*, tls: bool) -> urllib.request.OpenerDirector:
    """Opens URLs through the proxy that the environment names. Reading certificates takes time: only for ``tls``."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor,
    ):  # fmt: skip
        opener.add_handler(handler())
    if tls:
        context = ssl.create_default_context(cafile=str(ca_bundle() or "") or None)
        opener.add_handler(urllib.request.HTTPSHandler(context=context))
    return opener


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        take_lock(descriptor, is_stopping)
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _is_whole(path: Path, package: Package) -> bool:
    try:
        if path.stat().st_size != package.size_bytes or sha256_of(path) != package.sha256:
            return False
        os.utime(path)  # used now: recvirt clean goes by it
    except FileNotFoundError:
        return False
    except PermissionError:
        pass
    return True


def _is_expired(release: Path) -> bool:
    """Whether a release file is past its Valid-Until (or has none that can be read)."""
    for line in release.read_text(errors="replace").splitlines():
        if line.startswith("Valid-Until:"):
            try:
                return parsedate_to_datetime(line.partition(":")[2].strip()).timestamp() < time.time()
            except ValueError:
                return True
    return False


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_text(text)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _shown(name: str, partial: Path, total_bytes: int) -> Iterator[None]:
    """Show how many bytes have come, while apt says nothing."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            try:
                done = sum(path.stat().st_size for path in partial.iterdir())
            except FileNotFoundError:
                continue
            reporter.progress(name, done, total_bytes, "bytes")

    watcher = threading.Thread(target=watch, daemon=True)
    reporter.detail(f"{name} ({format_bytes(total_bytes)})")
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
