"""Proxmox VE as its sources describe it: uploads, VMs, templates, tasks. Stricter than it where it is lax."""

from __future__ import annotations

import hashlib
import re
from email.parser import BytesParser
from typing import Any
from urllib.parse import parse_qsl, unquote

from tests.publish.fakes import Answer

TOKEN = "recvirt@pve!ci=01234567-89ab-cdef-0123-456789abcdef"
#: What POST nodes/NODE/qemu takes, of that which we may want to say: anything else is refused there too.
_VM_KEYS = {
    "vmid": r"[1-9]\d{2,8}", "name": r"[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?", "memory": r"\d+", "cores": r"\d+",
    "cpu": r"host", "machine": r"q35", "ostype": r"l26", "scsihw": r"virtio-scsi-single", "agent": r"enabled=1",
    "serial0": r"socket", "ide2": r"[a-z-]+:cloudinit", "net0": r"virtio,bridge=\w+", "boot": r"order=scsi0",
    "scsi0": r"[a-z-]+:0,import-from=(?P<volume>[a-z-]+:import/[A-Za-z0-9._+=-]+\.(qcow2|raw)),discard=on,iothread=1",
    "description": r"[^\r\n]{1,8192}", "pool": r"\w+",
}  # fmt: skip
_TAG = re.compile(r"^[a-z0-9_][a-z0-9_+.-]*$")


def _told(message: str, status: int = 500) -> Answer:
    return status, {"data": None, "message": f"{message}\n"}


class Proxmox:
    """One node, ``pve``, with the storages ``local`` (import) and ``local-lvm``."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.machines: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, list[str]] = {}
        self.taken: set[str] = set()
        self.in_use: set[str] = set()
        self.uploads = 0
        self.exit_status = "OK"
        self.lost_answers = 0

    def _task(self) -> Answer:
        upid = f"UPID:pve:0000{len(self.tasks):04X}:0:65000000:x:0:recvirt@pve!ci:"
        # A look finds it running before it has ended.
        self.tasks[upid] = ["running", "stopped"]
        return 200, {"data": upid}

    def respond(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        if query["authorization"] != [f"PVEAPIToken={TOKEN}"]:
            return _told("authentication failure", 401)
        path = path.removeprefix("/api2/json/")
        if path == "cluster/nextid":
            known = {*self.machines, *({"100"} if "100" in self.taken else set())}
            return 200, {"data": str(next(n for n in range(100, 999) if str(n) not in known - self.taken))}
        if path == "cluster/resources":
            assert query["type"] == ["vm"]
            listed = [
                {"vmid": int(number), "type": "qemu", "node": "pve", "name": vm["name"], "status": "stopped",
                 "template": vm.get("template", 0), **({"tags": vm["tags"]} if "tags" in vm else {})}
                for number, vm in self.machines.items()
            ]  # fmt: skip
            return 200, {"data": [*listed, {"vmid": 99, "type": "lxc", "node": "pve", "name": "c"}]}
        where, _, rest = path.removeprefix("nodes/pve/").partition("/")
        if where == "tasks":
            states = self.tasks[unquote(rest.removesuffix("/status"))]
            state = states.pop(0) if len(states) > 1 else states[0]
            return 200, {"data": {"status": state, **({"exitstatus": self.exit_status} if state == "stopped" else {})}}
        if where == "storage":
            return self._storage(method, rest, query, body)
        words = dict(parse_qsl(body.decode())) if body else {}
        return self._make(words) if not rest else self._machine(method, *rest.partition("/")[::2], words)

    def _storage(self, method: str, rest: str, query: dict[str, list[str]], body: Any) -> Answer:
        storage, _, what = rest.partition("/")
        if storage != "local":
            return _told(f"storage '{storage}' does not exist")
        if method == "GET":
            assert query["content"] == ["import"]
            return 200, {"data": [{"volid": v, "size": len(d), "content": "import"} for v, d in self.files.items()]}
        if method == "DELETE":
            self.files.pop(unquote(what.removeprefix("content/")), None)
            return self._task()
        self.uploads += 1
        kind = b"Content-Type: multipart/form-data; boundary=" + body[2 : body.index(b"\r\n")] + b"\r\n\r\n"
        parts = list(BytesParser().parsebytes(kind + body).walk())[1:]
        said = {str(p.get_param("name", header="content-disposition")): p.get_payload(decode=True) for p in parts}
        assert list(said) == ["content", "checksum-algorithm", "checksum", "filename"]  # the file is the last
        assert (said["content"], said["checksum-algorithm"]) == (b"import", b"sha256")
        name, data = parts[-1].get_filename() or "", said["filename"]
        assert isinstance(data, bytes)
        if not re.fullmatch(r"[a-zA-Z0-9.+=_-]+\.(ova|qcow2|raw|vmdk)", name):
            return _told("Parameter verification failed.", 400)
        task = self._task()
        if hashlib.sha256(data).hexdigest().encode() != said["checksum"]:
            self.exit_status = "checksum mismatch"
        elif self.exit_status == "OK":
            self.files[f"local:import/{name}"] = data
        return task

    def _make(self, words: dict[str, str]) -> Answer:
        number = words["vmid"]
        if number in self.taken or number in self.machines:
            self.taken.discard(number)
            self.machines.setdefault(number, {"name": "somebodys"})
            return _told(f"unable to create VM {number} - VM {number} already exists on node 'pve'")
        for key, value in words.items():
            if key not in _VM_KEYS or not re.fullmatch(_VM_KEYS[key], value):
                return _told(f"Parameter verification failed: {key}={value}", 400)
        match = re.fullmatch(_VM_KEYS["scsi0"], words["scsi0"])
        if match is None or match["volume"] not in self.files:
            return _told("import source is not there")
        meta = f"creation-qemu=10.0.2,ctime={1_795_000_000 + len(self.machines)}"
        self.machines[number] = {**words, "meta": meta, "data": self.files[match["volume"]]}
        return self._task()

    def _machine(self, method: str, number: str, what: str, words: dict[str, str]) -> Answer:
        vm = self.machines.get(number)
        if vm is None:
            return _told(f"Configuration file 'nodes/pve/qemu-server/{number}.conf' does not exist")
        if what == "config" and method == "PUT":
            assert all(_TAG.match(tag) for tag in words["tags"].split(";"))
            vm.update(words)
            return 200, {"data": None}
        if what == "config":
            return 200, {"data": {key: value for key, value in vm.items() if key != "data"}}
        if what == "template":
            if vm.get("template"):
                return _told("you can't convert a template to a template")
            vm["template"] = 1
            if self.lost_answers:
                self.lost_answers -= 1
                return _told("trying to acquire lock... got timeout")
            return self._task()
        assert (method, what) == ("DELETE", "")
        if number in self.in_use:
            return _told(f"base volume 'local-lvm:base-{number}-disk-0' is still in use by linked cloned")
        del self.machines[number]
        return self._task()
