"""Stands in for QEMU in unit tests: answers QMP on the socket named on its command line and writes a console.

Environment: ``FAKE_CONSOLE`` is written to console.log at once; ``FAKE_DIE`` is a status to end with after a moment,
``FAKE_STATUS`` what query-status answers, ``FAKE_ISR`` the vectors that processor 0 has in service.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, TextIO

MONITOR = {
    "info usernet": "  TCP[HOST_FORWARD]  11  127.0.0.1 39995  10.0.2.15  22  0  0\r\n",
    "info registers -a": "CPU#0\r\nRFL=00000202 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=1\r\n"
    "CPU#1\r\nRFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=0\r\n",
    "info lapic 0": f"SPIV\t 0x000001ff\r\nISR\t {os.environ.get('FAKE_ISR', '(none)')} \r\nIRR\t 33 236 \r\n",
    "info lapic 1": "ISR\t 236 \r\nIRR\t (none)\r\n",
}


def answer(stream: TextIO, request: dict[str, object]) -> None:
    command = request["execute"]
    value: Any = {}
    if command == "human-monitor-command":
        value = MONITOR.get(request["arguments"]["command-line"], "")  # type: ignore[index]
    if command == "query-status":
        value = {"status": os.environ.get("FAKE_STATUS", "running")}
        if value["status"] == "io-error":
            event = {"event": "BLOCK_IO_ERROR", "data": {"nospace": True, "reason": "No space left on device"}}
            stream.write(json.dumps(event) + "\n")
    if command == "query-blockstats":
        value = [{"stats": {"wr_bytes": 10}}, {"stats": {"wr_bytes": 32}}]
    stream.write(json.dumps({"return": value}) + "\n")
    stream.flush()
    if command in ("quit", "system_powerdown"):
        sys.exit(0)
    if command == "system_reset":
        with Path("console.log").open("a") as console:
            console.write("second boot\n")


def main() -> None:
    Path("console.log").write_text(os.environ.get("FAKE_CONSOLE", ""))
    if "FAKE_DIE" in os.environ:
        print("qemu-system-x86_64: it broke", file=sys.stderr, flush=True)
        sys.exit(int(os.environ["FAKE_DIE"]))
    name = next(word for word in sys.argv if word.startswith("unix:")).removeprefix("unix:").split(",")[0]
    server = socket.socket(socket.AF_UNIX)
    server.bind(name)
    server.listen()
    stream = server.accept()[0].makefile("rw")
    stream.write(
        json.dumps({"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": ""}}}) + "\n"
    )
    stream.flush()
    for line in stream:
        answer(stream, json.loads(line))
    time.sleep(60)


main()
