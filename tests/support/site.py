"""The real ``recvirt`` in a process of its own, with a cache and a build folder of its own, to be killed at will."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recvirt.sandbox import ToolsRoot
from recvirt.store import MANIFEST, key_of, sha256_of
from recvirt.toolsroot import REVISION, tools_inputs

ROOT = Path(__file__).resolve().parents[2]
#: A small root: the stage in full, in a third of the default profile's time.
SMALL = (
    "minimal", "--set", "root.package_lists=[base]", "--set", "root.packages=[]", "--set",
    "root.cloud_init.enabled=false", "--until", "root",
)  # fmt: skip


#: A shell's background jobs, and what they start, ignore Ctrl-C; a test's process heeds it all the same (env(1)).
HEEDING = ("env", "--default-signal=INT")


def kill_after(process: subprocess.Popen[str], seconds: float) -> None:
    """Kill a program that has not ended by itself within ``seconds``."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        print(f"killed after {seconds:.2f} s")


@dataclass
class Site:
    """Where one recvirt lives. ``token`` is part of every path of it, and of no other."""

    base: Path
    token: str
    prefix: Sequence[str] = ()  # a command that runs a command, as nsenter(1)
    name: str = ""  # tells two that share a place apart
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        """A name that has to be quoted everywhere."""
        return self.base / f"cache ä {self.token}"

    @property
    def build_dir(self) -> Path:
        return self.base / f"build ü {self.token}"

    @property
    def temp(self) -> Path:
        return self.base / f"tmp-{self.token}"

    def start(self, *words: str, options: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start recvirt with these words; its stderr goes to :attr:`said`."""
        self.temp.mkdir(exist_ok=True)
        argv = [
            *HEEDING, *self.prefix, sys.executable, "-m", "recvirt", "--cache-dir", str(self.cache),
            "--build-dir", str(self.build_dir), "--progress", "plain", *options, *words,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temp)}
        self.said.write_text("")
        with self.said.open("w") as said:
            process = subprocess.Popen(
                argv, env=environment, cwd=self.base, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said,
                text=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    @property
    def said(self) -> Path:
        return self.base / f"stderr-{self.token}{self.name}"

    def run(self, *words: str, timeout: float = 900, options: Sequence[str] = ()) -> tuple[int, str, str]:
        """Run recvirt to its end: its status, stdout and stderr."""
        process = self.start(*words, options=options)
        out, _ = process.communicate(timeout=timeout)
        return process.returncode, out, self.said.read_text()

    def built(self) -> list[str]:
        """Build the small root to its end; returns the stages that were not reused."""
        status, out, said = self.run("build", *SMALL, "--json")
        assert status == 0, said
        return [item["stage"] for item in json.loads(out)["stages"] if item["action"] == "build"]

    def log(self, stage: str = "root") -> str:
        path = self.build_dir / "minimal" / "logs" / f"{stage}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def root_digest(self) -> dict[str, str]:
        """The digest of the one root.tar that the cache holds, under its key."""
        (tar,) = (self.cache / "objects" / "root").glob("*/root.tar")
        facts = json.loads((tar.parent / MANIFEST).read_text())["outputs"]["root.tar"]
        assert sha256_of(tar) == facts["sha256"]
        return {tar.parent.name: str(facts["sha256"])}

    def work_folders(self) -> list[str]:
        work = self.cache / "work"
        return sorted(path.name for path in work.iterdir()) if work.exists() else []

    def wait_until(self, process: subprocess.Popen[str], reached: Callable[[], bool], seconds: float = 600) -> None:
        """Wait until a build has come to a point. It must not end before."""
        end = time.monotonic() + seconds
        while not reached():
            assert process.poll() is None, f"ended with {process.returncode} before:\n{self.said.read_text()}"
            assert time.monotonic() < end, f"not reached:\n{self.said.read_text()}"
            time.sleep(0.02)

    # -- what is alive -------------------------------------------------------------------------------------------------

    def holders(self) -> dict[int, str]:
        """Processes that have to do with this place: by their words, folder or mounts (of any namespace)."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                text = words + (entry / "mountinfo").read_text() + str((entry / "cwd").readlink())
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if self.token in text and state != "Z":
                found[int(entry.name)] = words
        return found

    def children(self, name: str) -> list[int]:
        """Programs of this name among the holders."""
        found = []
        for pid in self.holders():
            try:
                if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                    found.append(pid)
            except OSError:
                continue
        return found

    def assert_quiet(self, seconds: float = 10) -> None:
        """No process and no mount of ours is left."""
        end = time.monotonic() + seconds
        while holders := self.holders():
            assert time.monotonic() < end, f"still alive: {holders}"
            time.sleep(0.1)
        assert self.token not in Path("/proc/self/mountinfo").read_text()

    def assert_clean(self) -> None:
        """Quiet, and nothing temporary is left either."""
        self.assert_quiet()
        assert self.work_folders() == []
        assert list(self.temp.iterdir()) == []
        partial = self.cache / "debs" / "partial"
        assert not partial.exists() or list(partial.iterdir()) == []

    def end(self) -> None:
        """End what a failed test left."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()
        for pid in self.holders():
            os.kill(pid, signal.SIGKILL)


def adopt_tools(cache: Path, tools: ToolsRoot) -> None:
    """Make a cache believe that it bootstrapped ``tools`` itself."""
    folder = cache / "objects" / "tools" / key_of("tools", REVISION, tools_inputs())
    folder.mkdir(parents=True)
    (folder / "rootfs").symlink_to(tools.rootfs)
    shutil.copy(tools.directory / "packages.json", folder)
    (folder / MANIFEST).write_text(json.dumps({"label": "main", "inputs": {}, "outputs": {}}))


def adopt_downloads(cache: Path, other: Path) -> None:
    """Take over verified packages (and apt's state with ``apt``) from another cache, without fetching them again."""
    for source in (other / "debs").glob("*.deb"):
        target = cache / "debs" / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
