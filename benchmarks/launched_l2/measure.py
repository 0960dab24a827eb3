"""Inside the L1: boots one disk as an L2 again and again, as the cloud launches it and as a person would by hand.

Reads ``job.json`` beside it, prints one line of JSON a boot on standard output. Started as root, with nothing else to
do on the machine. Standard library only. The clock counts instructions (QEMU's ``-icount``), and time spent idle is
taken off, so a figure is what the L1 executed between letting the L2 run and its login prompt.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
#: USER_HZ is 100 on x86 (proc_stat(5)).
TICK_NS = 10_000_000
PROMPT = b"login:"
LIMIT_SECONDS = 1800
QUERY = {"execute": "query-stats", "arguments": {"target": "vcpu"}}


def busy_ns() -> int:
    """What the L1's one processor has executed so far: the clock less its idle time."""
    words = Path("/proc/stat").read_text().splitlines()[0].split()
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - (int(words[4]) + int(words[5])) * TICK_NS


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
    """Until the L2's console asks for a login."""
    end = time.monotonic() + LIMIT_SECONDS
    while not (log.exists() and PROMPT in log.read_bytes()):
        if time.monotonic() > end:
            sys.exit(f"no login prompt in {log}: {log.read_bytes()[-400:] if log.exists() else 'it is not there'!r}")
        time.sleep(0.2)


def virsh(*words: str) -> str:
    """What virsh prints."""
    return subprocess.run(
        ["virsh", "-q", "-c", "qemu:///system", *words], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def launched(job: dict[str, Any]) -> dict[str, Any]:
    """The domain, through libvirt."""
    log = Path(job["log"])
    log.unlink(missing_ok=True)
    virsh("create", "--paused", str(HERE / "domain.xml"))
    before = busy_ns()
    virsh("resume", job["domain"])
    wait_for_prompt(log)
    spent = busy_ns() - before
    exits = exits_of(json.loads(virsh("qemu-monitor-command", job["domain"], json.dumps(QUERY))))
    virsh("destroy", job["domain"])
    return {"instructions": spent, "exits": exits}


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


def by_hand(job: dict[str, Any]) -> dict[str, Any]:
    """QEMU, without libvirt."""
    log, monitor = HERE / "hand.log", HERE / "hand.qmp"
    for path in (log, monitor):
        path.unlink(missing_ok=True)
    process = subprocess.Popen(job["hand"], cwd=HERE)
    qmp = Monitor(monitor)
    before = busy_ns()
    qmp.do({"execute": "cont"})
    wait_for_prompt(log)
    spent = busy_ns() - before
    exits = exits_of(qmp.do(QUERY))
    process.kill()
    process.wait()
    return {"instructions": spent, "exits": exits}


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
    for number in range(job["boots"]):
        for how, boot in (("launched", launched), ("by-hand", by_hand)):
            # Each boot from the disk as it came: the first one of a disk does more.
            shutil.copyfile(HERE / "disk.qcow2", job["disk"])
            print(json.dumps({"how": how, "boot": number, **boot(job)}), flush=True)


if __name__ == "__main__":
    main()
