"""Access for whoever is root on the central node itself: waits for the first set-up, and then for its services."""

from __future__ import annotations

import os
import pwd
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from recvirt.nestedcloud.client.api import Access, Api, ApiError
from recvirt.nestedcloud.machine import CENTRAL, WORKER, Machine, ProvisionError, toml
from recvirt.nestedcloud.provision import CENTRAL_USER, own_name

SETUP_UNIT = "recvirt-cloud-setup.service"
#: The set-up begins late in a boot, and takes minutes under emulation.
_BEGIN_SECONDS, _SETUP_SECONDS = 300.0, 1800.0
_READY_SECONDS = 300.0
_PAUSE_SECONDS = 2.0

Sleep = Callable[[float], object]


def login_here(machine: Machine) -> tuple[Path, Access]:
    """Write an access file with an administrator's token for the user behind sudo; its path, and what is in it."""
    if CENTRAL not in machine.roles:
        raise ProvisionError("this machine is no central node; log in there, or from anywhere: recvirt-cloud login URL")
    name = os.environ.get("SUDO_USER") or "root"
    program = shutil.which("recvirt-cloud") or "recvirt-cloud"
    token = machine.run([program, "central", "token", "--name", f"{name} on {own_name()}"], "", CENTRAL_USER).strip()
    person = pwd.getpwnam(name)
    path = Path(person.pw_dir) / ".config/recvirt-cloud/client.toml"
    # As the user: a home may hold links to anywhere.
    code = (
        "import sys, tomllib; from pathlib import Path; from recvirt.nestedcloud.client.api import Access, save_access;"
        " save_access(Access(**tomllib.loads(sys.stdin.read())), Path(sys.argv[1]))"
    )
    access = Access("https://127.0.0.1", token, ca=str(machine.etc / "tls/cert.pem"))
    machine.run(["python3", "-c", code, str(path)], toml(vars(access)), name)
    return path, access


def wait_for_setup(machine: Machine, sleep: Sleep = time.sleep) -> None:
    """Until this boot's set-up is through. ProvisionError when it failed, or does not begin."""
    told, begun, waited = False, False, 0.0
    while True:
        asked = ["systemctl", "show", "--property=ActiveState", "--value", SETUP_UNIT]
        state = machine.run(asked, "", None).strip()
        if state == "active":
            return
        begun = begun or state not in ("inactive", "")
        if state == "failed" or waited > (_SETUP_SECONDS if begun else _BEGIN_SECONDS):
            words = "failed" if state == "failed" else "has not ended" if begun else "has not begun"
            raise ProvisionError(f"the cloud's set-up {words}; journalctl -u {SETUP_UNIT} says more")
        if not told:
            machine.tell("the cloud's set-up is not through yet: waiting for it")
            told = True
        sleep(_PAUSE_SECONDS)
        waited += _PAUSE_SECONDS


def wait_until_ready(machine: Machine, api: Api, sleep: Sleep = time.sleep) -> bool:
    """Until its services are up, and the worker here where there is one; False when that takes too long."""
    # A central node alone has no worker before another machine joins.
    allowed: set[str] = set() if WORKER in machine.roles else {"workers"}
    end, told = time.monotonic() + _READY_SECONDS, False
    while True:
        try:
            health = api.call("GET", "status")["health"]
            if {part for part, state in health.items() if state != "ok"} <= allowed:
                return True
        except ApiError as error:
            if error.kind != "unreachable":
                raise
        if time.monotonic() > end:
            return False
        if not told:
            machine.tell("waiting until all of its services are up")
            told = True
        sleep(_PAUSE_SECONDS)
