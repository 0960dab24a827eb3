"""A person at a guest's serial console, with everything in between real: libvirtd, QEMU without KVM, the worker's
process, the API under uvicorn, and the command line on a terminal.

The guest is one boot sector, which sends back what it gets on its serial port.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest
from django.conf import settings as django_settings

from recvirt.nestedcloud.central.models import Event, Instance, InstanceState
from recvirt.nestedcloud.client.api import VARIABLE, Access, Api, ApiError, save_access
from recvirt.nestedcloud.model import MIB, Command, DiskSpec, InstanceSpec, Kind, Phase, Report
from recvirt.nestedcloud.provision import toml
from recvirt.nestedcloud.worker.agent import Agent
from recvirt.nestedcloud.worker.host import Host
from recvirt.nestedcloud.worker.hypervisor import Hypervisor
from recvirt.nestedcloud.worker.storage import QemuStorage, run_tool
from tests.cloud.conftest import make_worker
from tests.cloud.support import instance
from tests.cloud.terminal import PATIENCE, Terminal
from tests.cloud.test_console import make_instance
from tests.cloud.test_stream import Server, server

__all__ = ["server"]

os.environ["PATH"] += ":/usr/sbin:/sbin"
_TOOLS = ("libvirtd", "virtlogd", "qemu-system-x86_64", "qemu-img", "qemu-io", "unshare")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="a system's libvirtd wants root"),
    pytest.mark.skipif(any(shutil.which(tool) is None for tool in _TOOLS), reason=f"wants {', '.join(_TOOLS)}"),
]
#: 16-bit code for a PC: greet on the first serial port (0x3f8), then send back each byte; EOT powers off (ACPI's PM1a
#: control at 0x604, as SeaBIOS sets it up on q35).
_CODE = bytes.fromhex(
    "fa"  #             cli
    "31c0 8ed8"  #      xor ax, ax; mov ds, ax
    "be3a7c"  #         mov si, greeting
    "baf803"  #         mov dx, 0x3f8
    "ac 84c0 7403"  #   greet: lodsb; test al, al; jz echo
    "ee ebf8"  #        out dx, al; jmp greet
    "bafd03"  #         echo: mov dx, 0x3fd
    "ec a801 74fb"  #   here: in al, dx; test al, 1; jz here
    "b2f8 ec"  #        mov dl, 0xf8; in al, dx
    "88c3"  #           mov bl, al
    "3c04 740e"  #      cmp al, 4; je off
    "b2fd"  #           mov dl, 0xfd
    "ec a820 74fb"  #   full: in al, dx; test al, 0x20; jz full
    "b2f8 88d8 ee"  #   mov dl, 0xf8; mov al, bl; out dx, al
    "ebe1"  #           jmp echo
    "ba0406 b80020"  #  off: mov dx, 0x604; mov ax, 0x2000
    "ef f4"  #          out dx, ax; hlt
)  # fmt: skip
_GREETING = b"guest is there\r\n\0"


#: A guest that says something and reads nothing: greet, then halt for ever.
_DEAF = _CODE[:0x13] + bytes.fromhex("f4 ebfd")


def boot_sector(code: bytes) -> bytes:
    assert len(_CODE) == 0x3A
    body = code + bytes(len(_CODE) - len(code)) + _GREETING
    return body + bytes(510 - len(body)) + b"\x55\xaa"


@contextlib.contextmanager
def private_libvirtd(folder: Path) -> Iterator[str]:
    """The URI of a libvirtd, with a virtlogd, that has folders of its own, beside whatever the machine runs."""
    config, sock = folder / "libvirtd.conf", folder / "sock"
    sock.mkdir()
    config.write_text(f'unix_sock_dir = "{sock}"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\n')
    places = "/run/libvirt /var/lib/libvirt /etc/libvirt /var/log/libvirt /var/cache/libvirt"
    script = (
        f"for place in {places}; do mkdir -p $place; mount -t tmpfs -o mode=755 tmpfs $place; done; "
        "mkdir /var/log/libvirt/qemu; "
        # libvirtd asks QEMU about KVM too, and where nested KVM hangs, that takes minutes.
        "[ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm; "
        f"virtlogd --pid-file {folder}/virtlogd.pid & "
        f"libvirtd --config {config} --pid-file {folder}/libvirtd.pid & wait"
    )
    # A space of processes of its own: with this one, whatever ends it, everything ends that libvirtd has started.
    words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
    with (folder / "libvirtd.log").open("w") as log:
        process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *words], stdout=log, stderr=log)
    uri = f"qemu+unix:///system?socket={sock}/libvirt-sock"
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                libvirt.open(uri).close()
                break
            except libvirt.libvirtError:
                assert time.monotonic() < deadline and process.poll() is None, (folder / "libvirtd.log").read_text()
                time.sleep(0.2)
        yield uri
    finally:
        process.kill()
        process.wait(60)


def own_libvirtd() -> int:
    """The process, below this one, of the libvirtd that a test has started."""
    seen = [os.getpid()]
    while seen:
        found = seen.pop()
        if Path(f"/proc/{found}/comm").read_text().strip() == "libvirtd":
            return found
        for path in Path(f"/proc/{found}/task").glob("*/children"):
            seen += map(int, path.read_text().split())
    raise AssertionError("there is none")


class Bench:
    """A running guest, its worker's console process, and an access file."""

    def __init__(self, server: Server, folder: Path, uri: str) -> None:
        self.server, self.folder, self.uri = server, folder, uri
        self.host = Host(str(uuid.uuid4()), "qemu", folder / "images", folder / "blocks")
        for path in (self.host.images_dir, self.host.blocks_dir):
            path.mkdir()
        self.hypervisor = Hypervisor(uri, self.host)
        worker = make_worker(features={"console": True})
        self.agent = Agent(
            str(worker.pk), "w1", self.hypervisor, QemuStorage(self.host), folder / "run", "boot-1", {}
        )  # fmt: skip
        self.worker = worker
        self.spec = self.add("web", _CODE)
        self.config = folder / "worker.toml"
        self.config.write_text(toml({
            "uuid": str(worker.pk), "name": "w1", "cloud": self.host.owner, "broker": django_settings.CONFIG.broker,
            "libvirt": uri, "domain_type": "qemu", "images_dir": str(self.host.images_dir),
            "blocks_dir": str(self.host.blocks_dir), "run_dir": str(folder / "run"), "api": server.url, "api_ca": "",
        }))  # fmt: skip
        self.access = Access(server.url, server.token, "lab")
        save_access(self.access, folder / "client.toml")
        self.env = {**os.environ, VARIABLE: str(folder / "client.toml")}
        self.process: subprocess.Popen[bytes] | None = None

    def add(self, name: str, code: bytes) -> InstanceSpec:
        """An instance that boots a code."""
        base, key = str(uuid.uuid4()), str(uuid.uuid4())
        image = self.host.image_path(base)
        (self.folder / "boot").write_bytes(boot_sector(code))
        run_tool(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "16M"])
        run_tool(["qemu-io", "-c", f"write -q -s {self.folder / 'boot'} 0 512", str(image)])
        sizes = {"memory_bytes": 64 * MIB, "memory_max_bytes": 64 * MIB, "vcpus_max": 1}
        make_instance(self.server.project, self.worker, name, uuid=key)
        return instance(uuid=key, name=name, root=DiskSpec(key, 16 * MIB, image=base), **sizes)

    def start_consoles(self) -> None:
        words = [sys.executable, "-m", "recvirt.nestedcloud", "worker", "consoles", "--config", str(self.config)]
        with (self.folder / "consoles.log").open("ab") as log:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        # It answers, so no test waits for its start.
        done = self.run("logs", "web")
        assert done.returncode == 0, done.stderr

    def do(self, kind: Kind, spec: InstanceSpec | None = None, **args: Any) -> Report:
        command = Command(str(uuid.uuid4()), 1, kind, 1, spec or self.spec, args=args)
        last = self.agent.execute(command, lambda _report: None)
        assert last.phase is Phase.SUCCEEDED, last.message
        return last

    def words(self, *more: str) -> list[str]:
        return [sys.executable, "-m", "recvirt.nestedcloud", *more]

    def run(self, *more: str, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.words(*more), env=self.env, input=text, capture_output=True, check=False)

    def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)
        for facts in self.hypervisor.all_facts():
            self.hypervisor.remove(self.hypervisor.get(facts.uuid))


@pytest.fixture
def bench(server: Server, settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    from recvirt.nestedcloud.central import relay

    monkeypatch.setattr(relay, "JOIN_SECONDS", PATIENCE)
    # Nobody sends heartbeats here.
    settings.WORKER_LOST_SECONDS = 3600.0
    # Not below pytest's own folder: QEMU runs as a user who can't look into that.
    folder = Path(tempfile.mkdtemp(prefix="recvirt-console-", dir="/var/tmp"))
    folder.chmod(0o755)
    try:
        with private_libvirtd(folder) as uri:
            made = Bench(server, folder, uri)
            try:
                made.do(Kind.LAUNCH)
                made.start_consoles()
                yield made
            except BaseException:
                log = folder / "consoles.log"
                print(log.read_text() if log.exists() else "no log")
                raise
            finally:
                made.close()
    finally:
        shutil.rmtree(folder)


def wait_for_event(kind: str, count: int = 1) -> None:
    deadline = time.monotonic() + PATIENCE
    while Event.objects.filter(kind=kind).count() < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_person_types_and_the_guest_answers_until_it_stops(bench: Bench) -> None:
    terminal = Terminal(bench.words("console", "web"), bench.env)
    terminal.until(b"connected to web")
    assert terminal.said.startswith(b"Ctrl-] ends the console.")
    assert terminal.modes() != terminal.before
    # Every byte, also those that a terminal would take for itself: interrupt, suspend, end, flow control.
    for text in (b"hello guest", b"a\x03b\x1ac\x1c\x11\x13d"):
        terminal.type(text)
        terminal.until(text)
    # A second person is refused, and told who has it.
    other = bench.run("console", "web")
    assert other.returncode == 3 and b"ada has the console" in other.stderr
    # The escape ends it, the guest goes on, and the next one finds it free.
    terminal.type(b"\x1d")
    assert terminal.end() == 0
    wait_for_event("console.closed")

    terminal = Terminal(bench.words("console", "web"), bench.env)
    terminal.until(b"connected to web")
    terminal.type(b"again")
    terminal.until(b"again")
    # An operation does not wait for the console to be closed; and the console says that the instance has stopped.
    bench.do(Kind.STOP, graceful_seconds=0)
    assert terminal.end() == 0
    assert b"the instance has stopped" in terminal.said
    wait_for_event("console.closed", 2)
    assert Event.objects.filter(kind="console.closed").last().data["why"] == "the instance has stopped"  # type: ignore[union-attr]
    # The database may not know yet that it does not run.
    late = bench.run("console", "web")
    assert late.returncode == 3 and b"does not run" in late.stderr, late.stderr
    # What it has said is in its log, also now.
    Instance.objects.update(state=InstanceState.OFF)
    said = bench.run("logs", "web")
    assert said.returncode == 0, said.stderr
    assert b"guest is there\r\n" in said.stdout and b"hello guest" in said.stdout and b"again" in said.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_killed_console_leaves_the_terminal_as_it_was(bench: Bench, number: int) -> None:
    terminal = Terminal(bench.words("console", "web"), bench.env)
    terminal.until(b"connected to web")
    assert terminal.modes() != terminal.before
    terminal.process.send_signal(number)
    assert terminal.end() == 128 + number
    wait_for_event("console.closed")


def test_scripts_pipe_and_a_log_is_followed(bench: Bench) -> None:
    follower = subprocess.Popen(
        bench.words("logs", "web", "--follow"), env=bench.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    try:
        # More than any buffer on the way holds, each byte in its place; ^] is a byte like others here.
        text = b"".join(b"line %05d \x1d\n" % number for number in range(4000))
        done = bench.run("console", "web", "--linger", "20", text=text)
        assert done.returncode == 0, done.stderr
        assert done.stdout == text
        assert follower.stdout is not None
        said = b""
        while b"line 03999 \x1d\n" not in said:
            said += os.read(follower.stdout.fileno(), 65536)
        assert said.startswith(b"guest is there") or b"guest is there" in said
        assert text in said
    finally:
        follower.terminate()
        follower.wait(60)


def test_a_guest_that_reads_nothing_is_told_of_and_holds_nobody_else_up(bench: Bench) -> None:
    terminal = Terminal(bench.words("console", "web"), bench.env)
    terminal.until(b"connected to web")
    deaf = bench.add("deaf", _DEAF)
    bench.do(Kind.LAUNCH, deaf)
    writer = subprocess.Popen(
        bench.words("console", "deaf"), env=bench.env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    feeder = threading.Thread(target=lambda: writer.communicate(bytes(1024 * 1024)), daemon=True)
    feeder.start()
    number = 0
    while feeder.is_alive():
        number += 1
        terminal.type(b"still here %d." % number)
        terminal.until(b"still here %d." % number)
    assert writer.returncode == 3 and number > 2
    terminal.type(b"\x1d")
    assert terminal.end() == 0
    # Not by a query: what a JSON value holds is asked for in another way by each database.
    closed = [str(event.data["why"]) for event in Event.objects.filter(kind="console.closed")]
    assert sum("does not read its serial" in why for why in closed) == 1, closed


def test_a_guest_that_powers_off_by_itself_closes_it(bench: Bench) -> None:
    done = bench.run("console", "web", "--linger", str(PATIENCE), text=b"bye\x04")
    assert done.returncode == 0 and b"the instance has stopped" in done.stderr, done.stderr
    assert done.stdout == b"bye"


def test_the_console_process_may_be_killed_and_comes_back(bench: Bench) -> None:
    terminal = Terminal(bench.words("console", "web"), bench.env)
    terminal.until(b"connected to web")
    assert bench.process is not None
    bench.process.kill()
    bench.process.wait()
    assert terminal.end() == 3
    assert b"the worker has gone away" in terminal.said
    bench.start_consoles()
    terminal = Terminal(bench.words("console", "web"), bench.env)
    terminal.until(b"connected to web")
    terminal.type(b"back")
    terminal.until(b"back")
    terminal.type(b"\x1d")
    assert terminal.end() == 0


def test_a_libvirtd_that_dies_is_told(bench: Bench) -> None:
    terminal = Terminal(bench.words("console", "web"), bench.env)
    terminal.until(b"connected to web")
    pid = own_libvirtd()
    os.kill(pid, signal.SIGSTOP)
    try:
        # It hangs: the connection's keep-alive finds out, and the command line is told by name.
        assert terminal.end() == 3
        assert b"libvirt" in terminal.said
    finally:
        os.kill(pid, signal.SIGCONT)


def test_somebody_at_the_host_s_own_console_is_not_put_out_unasked(bench: Bench) -> None:
    api = Api(bench.access)
    here = libvirt.open(bench.uri)
    stream = here.newStream()
    here.lookupByUUIDString(bench.spec.uuid).openConsole(None, stream, 0)
    refused = bench.run("console", "web")
    assert refused.returncode == 3 and b"on the host itself" in refused.stderr and b"--force" in refused.stderr
    taken = bench.run("console", "web", "--force", text=b"mine now")
    assert taken.returncode == 0 and taken.stdout == b"mine now", taken.stderr
    with pytest.raises(ApiError):
        api.call("POST", api.below("instances/absent/console"), {})
    here.close()
