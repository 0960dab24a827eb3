"""A Debian archive as apt sees it: which package versions there are now, verified, and how to fetch them.

Owns: an apt state of its own below the cache (never the host's), resolution and downloads. apt runs inside the tools
root; it verifies signatures, validity dates, sizes and hashes. No mirror is named here: unless a profile names one, the
lines that the bootstrapper wrote into the tools root are rewritten for the suite.
Does not own: installing anything, nor apt's languages (``apt.py``).
"""

from __future__ import annotations

import fcntl
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
from recvirt.errors import CommandError, ConfigError, DownloadError, VerificationError
from recvirt.sandbox import ToolsRoot
from recvirt.store import remove_tree, sha256_of
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
            fcntl.flock(lock, fcntl.LOCK_EX)
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
            context = ssl.create_default_context(cafile=str(ca_bundle() or "") or None)
        except OSError:
            return False
        opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
        with ThreadPoolExecutor(max(1, len(sources))) as pool:
            return all(pool.map(lambda source: self._is_unchanged(source, opener), sources))

    def _is_unchanged(self, source: Source, opener: urllib.request.OpenerDirector) -> bool:
        path = self.state_dir / "lists" / source.release_file
        if not path.exists() or ("check-valid-until=no" not in source.options and _is_expired(path)):
            return False
        since = formatdate(path.stat().st_mtime, usegmt=True)
        request = urllib.request.Request(
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
        target = self.debs_dir / package.file
        if _is_whole(target, package):
            return target
        if self._offline:
            raise DownloadError(f"offline, and {package.file} is not in the cache", hint="build once without --offline")
        self.update()
        partial = self.debs_dir / "partial" / package.sha256
        while True:
            partial.mkdir(parents=True, exist_ok=True)
            folder = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # The folder is its own lock; another recvirt that fetched the same removed it.
                fcntl.flock(folder, fcntl.LOCK_EX)
                if _is_whole(target, package):
                    return target
                if partial.exists() and os.path.samestat(os.fstat(folder), partial.stat()):
                    self._fetch(package, partial, target)
                    return target
            finally:
                os.close(folder)

    def download_all(self, packages: Sequence[Package]) -> list[Path]:
        """The verified .debs of ``packages``, in order; what is missing is fetched, many at a time.

        What a stopped run fetched is kept. Raises DownloadError when the archive no longer has a version.
        """
        missing = [package for package in packages if not _is_whole(self.debs_dir / package.file, package)]
        if missing and self._offline:
            raise DownloadError(
                f"offline, and {len(missing)} packages are not in the cache ({missing[0].file} ...)",
                hint="build once without --offline",
            )
        if missing:
            self.update()
            folder = self.debs_dir / "partial" / self.state_dir.name
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._fetch_many([p for p in missing if not _is_whole(self.debs_dir / p.file, p)], folder)
        return [self.debs_dir / package.file for package in packages]

    def _fetch_many(self, packages: Sequence[Package], folder: Path) -> None:
        total, done = sum(package.size_bytes for package in packages), 0
        for start in range(0, len(packages), _DOWNLOADS_AT_ONCE):
            chunk = packages[start : start + _DOWNLOADS_AT_ONCE]
            reporter.progress("fetch packages", done, total, "bytes")
            size = sum(package.size_bytes for package in chunk)
            words = ["apt-get", "-qq", "download", *(f"{package.name}={package.version}" for package in chunk)]
            try:
                self._apt(*words, network=True, cwd=folder, timeout_seconds=300 + size / _SLOWEST_BYTES_PER_SECOND)
            except ConfigError as error:
                raise DownloadError(f"the archive changed meanwhile: {error.message}", hint="build again") from error
            for package in chunk:
                fetched = folder / package.file
                if not _is_whole(fetched, package):
                    fetched.unlink(missing_ok=True)
                    raise VerificationError(f"{package.file} is not what the archive's index promised", hint="try again")
                fetched.replace(self.debs_dir / package.file)
            done += size

    def _fetch(self, package: Package, partial: Path, target: Path) -> None:
        limit = 300 + package.size_bytes / _SLOWEST_BYTES_PER_SECOND
        try:
            with _shown(package, partial):
                self._apt(
                    "apt-get", "-qq", "download", f"{package.name}={package.version}", network=True, cwd=partial,
                    timeout_seconds=limit,
                )  # fmt: skip
            fetched = next(partial.glob("*.deb"), None)
            if fetched is None or sha256_of(fetched) != package.sha256:
                raise VerificationError(f"{package.file} is not what the archive's index promised", hint="try again")
        except VerificationError:
            # Nothing of it may be carried on from. After any other failure apt carries on where it stopped.
            remove_tree(partial)
            raise
        fetched.replace(target)
        remove_tree(partial)


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
def _shown(package: Package, partial: Path) -> Iterator[None]:
    """Show how many bytes have come, while apt says nothing."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            try:
                done = sum(path.stat().st_size for path in partial.iterdir())
            except FileNotFoundError:
                continue
            reporter.progress(f"fetch {package.name}", done, package.size_bytes, "bytes")

    watcher = threading.Thread(target=watch, daemon=True)
    reporter.detail(f"fetch {package.file} ({format_bytes(package.size_bytes)})")
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
