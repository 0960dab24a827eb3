"""Inside the L1: boots one disk as an L2 again and again, as the cloud launches it and as a person would by hand.

Reads ``job.json`` beside it, prints lines of JSON on standard output when it lets an L2 run, when that is at its
prompt, and how many exits it had; whoever reads them counts what the L1 executes between the first two. Started as
root, with nothing else to do on the machine. Standard library only.
"""

import json
import shutil
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
#: What the bundled guest's init says last (BusyBox's askfirst).
PROMPT = b"Please press Enter to activate this console."
LIMIT_SECONDS = 600
ATTEMPTS = 4
#: For what was started just before to come to rest.
SETTLE_SECONDS = 5
VIRSH = ("virsh", "-q", "-c", "qemu:///system")
QUERY = {"execute": "query-stats", "arguments": {"target": "vcpu"}}


class LostError(Exception):
    """A boot that came to no end: an emulated processor now and then loses an interrupt."""


def tell(how: str, at: str, **facts: int) -> None:
    """A line for whoever counts."""
    print(json.dumps({"how": how, "at": at, **facts}), flush=True)
    # Whoever counts does it when the line comes, so it has to have left.
    if sys.stdout.isatty():
        termios.tcdrain(sys.stdout)


def exits_of(answer: dict[str, Any]) -> int:
    """Exits of all virtual processors, in QMP's answer to query-stats."""
    return sum(
        item["value"]
        for provider in answer["return"]
        if provider["provider"] == "kvm"
        for item in provider["stats"]
        if item["name"] == "exits"
    )


def wait_for_prompt(log: Path) -> None:
    """Until the L2's console is offered; LostError when that takes many times what a boot does."""
    end = time.monotonic() + LIMIT_SECONDS
    while not (log.exists() and PROMPT in log.read_bytes()):
        if time.monotonic() > end:
            raise LostError(f"no prompt in {log}: {log.read_bytes()[-400:] if log.exists() else 'it is not there'!r}")
        time.sleep(0.2)


def virsh(*words: str) -> str:
    """What virsh prints."""
    return subprocess.run([*VIRSH, *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def launched(job: dict[str, Any]) -> None:
    """The domain, through libvirt."""
    log = Path(job["log"])
    log.unlink(missing_ok=True)
    virsh("create", "--paused", str(HERE / "domain.xml"))
    try:
        # Connected before it counts: a program's start is not the domain's.
        with subprocess.Popen(VIRSH, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as connected:
            assert connected.stdin is not None
            connected.stdin.write("nodeinfo\n")
            connected.stdin.flush()
            time.sleep(SETTLE_SECONDS)
            tell("launched", "begin")
            connected.stdin.write(f"resume {job['domain']}\n")
            connected.stdin.flush()
            wait_for_prompt(log)
            tell("launched", "end")
        exits = exits_of(json.loads(virsh("qemu-monitor-command", job["domain"], json.dumps(QUERY))))
        tell("launched", "known", exits=exits)
    finally:
        virsh("destroy", job["domain"])


class Monitor:
    """QMP, as far as it is needed here (QEMU Machine Protocol Specification)."""

    def __init__(self, path: Path) -> None:
        while not path.exists():
            time.sleep(0.1)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self.do({"execute": "qmp_capabilities"})

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """A command's answer; events in between are passed over."""
        self._file.write(json.dumps(command) + "\n")
        self._file.flush()
        while True:
            answer: dict[str, Any] = json.loads(self._file.readline())
            if "return" in answer or "error" in answer:
                return answer


def by_hand(job: dict[str, Any]) -> None:
    """QEMU, without libvirt."""
    log, monitor = HERE / "hand.log", HERE / "hand.qmp"
    for path in (log, monitor):
        path.unlink(missing_ok=True)
    process = subprocess.Popen(job["hand"], cwd=HERE)
    try:
        qmp = Monitor(monitor)
        time.sleep(SETTLE_SECONDS)
        tell("by-hand", "begin")
        qmp.do({"execute": "cont"})
        wait_for_prompt(log)
        tell("by-hand", "end")
        tell("by-hand", "known", exits=exits_of(qmp.do(QUERY)))
    finally:
        process.kill()
        process.wait()


def boot(job: dict[str, Any], how: Callable[[dict[str, Any]], None]) -> None:
    """One boot that came to its end."""
    for _ in range(ATTEMPTS):
        # Each boot from the disk as it came: the first one of a disk does more.
        shutil.copyfile(HERE / "disk.qcow2", job["disk"])
        try:
            return how(job)
        except LostError as error:
            print(f"# {error}", flush=True)
    sys.exit(f"{ATTEMPTS} boots in a row came to no end")


def main() -> None:
    """Boot in turn, so that what changes with time hits both."""
    job = json.loads((HERE / "job.json").read_text())
    virsh("net-create", str(HERE / "network.xml"))
    tap = job["tap"]
    for words in (["tuntap", "add", tap, "mode", "tap"], ["link", "set", tap, "master", job["bridge"], "up"]):
        subprocess.run(["ip", *words], check=True)
    for name, path in job["files"].items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE / name, path)
    for _ in range(job["boots"]):
        for how in (launched, by_hand):
            boot(job, how)


if __name__ == "__main__":
    main()
