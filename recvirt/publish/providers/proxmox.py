"""``proxmox``: a template in Proxmox VE (8.4 and later), by its API; without a ``url`` only the recipe.

The file goes to a storage with the content ``import``; Proxmox compares its SHA-256 before it keeps it. A VM is made of
it, tagged, turned into a template, and the file goes away. What a killed run left is found by the VM's name.
"""

from __future__ import annotations

import os
import re
import time
import urllib.parse
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from pydantic import Field

from recvirt.errors import ConfigError, PublishError
from recvirt.publish.errors import DeniedError, TransientError
from recvirt.publish.http import Http, refusal
from recvirt.publish.plan import Step
from recvirt.publish.provider import TAG, Provider, Published, Remote, TargetConfig, WebAddress, Word
from recvirt.publish.transfer import Form, Progress
from recvirt.ui import reporter

_VARIABLE = "RECVIRT_PROXMOX_TOKEN"
_TOKEN = re.compile(r"^[^\s:/!=]+@[A-Za-z0-9._-]+![A-Za-z0-9._-]+=[0-9A-Fa-f-]{36}$")
_DIGEST, _PROFILE = f"{TAG}-digest-", f"{TAG}-profile-"
_TASK_SECONDS = 7200.0
_RECIPE_VM_ID = 9000
_TRIES = 5


class ProxmoxConfig(TargetConfig):
    """Which node and storages. The token comes from RECVIRT_PROXMOX_TOKEN."""

    url: WebAddress | None = Field(default=None, description="the API, as https://pve.example:8006; unset: recipe only")
    node: Word | None = Field(default=None, description="the node that makes the template; wanted with `url`")
    storage: Word = Field(default="local-lvm", description="the storage that gets the disk")
    import_storage: Word = Field(default="local", description="a storage with the content `import`, for the upload")
    vm_id: int | None = Field(default=None, ge=100, le=999_999_999, description="the VM's number; unset: the next free")
    pool: Word | None = Field(default=None, description="the resource pool that gets the template")
    bridge: Word = Field(default="vmbr0", description="the network")
    ca: str | None = Field(default=None, description="the cluster's CA (/etc/pve/pve-root-ca.pem), a PEM file")


class Proxmox(Provider[ProxmoxConfig]):
    """One node."""

    name = "proxmox"
    config_model = ProxmoxConfig

    def check(self) -> None:
        """What Proxmox would refuse."""
        if self.job.image.format not in ("qcow2", "raw"):
            raise ConfigError(
                f"{self.job.target}: Proxmox takes qcow2 or raw, this is {self.job.image.format}",
                hint="recvirt build --set image.formats+=qcow2",
            )
        if self.config.url is not None and self.config.node is None:
            raise ConfigError(f"{self.job.target}: with a url, a node is wanted", hint="--set proxmox.node=NAME")

    # --- requests

    @cached_property
    def http(self) -> Http:
        """A session that trusts the cluster's own CA, if there is one."""
        ca = self.config.path_to(self.config.ca) if self.config.ca else None
        return Http(self.job.budget, timeout=self.config.timeout, workers=self.job.workers, ca=ca)

    def _call(self, what: str, method: str, path: str, words: dict[str, Any] | None = None, **more: Any) -> Any:
        token = os.environ.get(_VARIABLE, "")
        if not _TOKEN.match(token):
            raise DeniedError(
                f"{what}: there is no token of an API user",
                hint=f"set {_VARIABLE} to USER@REALM!NAME=SECRET (docs/policies/README.md)",
            )
        headers = {"Authorization": f"PVEAPIToken={token}", **more.pop("headers", {})}
        if words is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            more["body"] = urllib.parse.urlencode(words).encode()

        def attempt() -> Any:
            url = f"{self.config.url}/api2/json/{path}"
            answer = self.http.call(what, method, url, ok=(200, 500), headers=headers, once=True, **more)
            if answer.status_code == 200:
                return answer.json().get("data")
            # Proxmox says 500 to whatever can't be done; only a lock that somebody holds passes.
            error = refusal(what, answer)
            if "got timeout" in error.message:
                raise error
            raise PublishError(f"{what}: {error.message}")

        return self.job.budget.call(what, attempt)

    def _node(self, path: str) -> str:
        return f"nodes/{self.config.node}/{path}"

    def _wait(self, what: str, upid: Any) -> None:
        """Until a task has ended. PublishError with its own words when it failed."""
        if not upid:
            return
        path = self._node(f"tasks/{urllib.parse.quote(str(upid), safe='')}/status")
        deadline, pause = time.monotonic() + _TASK_SECONDS, 0.2
        while (now := self._call(f"{what}: look at the task", "GET", path))["status"] != "stopped":
            if time.monotonic() > deadline:
                raise PublishError(f"{what}: still running after {_TASK_SECONDS:.0f} s", hint="publish it again")
            time.sleep(pause)
            pause = min(pause * 1.5, 5.0)
        # "WARNINGS: 1" is what a task says that did its work and has something to tell.
        if now.get("exitstatus") != "OK" and not str(now.get("exitstatus")).startswith("WARNINGS"):
            raise PublishError(f"{what}: {now.get('exitstatus')}", hint="the task's log at the node tells more")

    # --- what is there

    def _machines(self) -> list[dict[str, Any]]:
        found = self._call("list VMs", "GET", "cluster/resources", params={"type": "vm"})
        return [vm for vm in found if vm.get("type") == "qemu"]

    def _ours(self) -> list[dict[str, Any]]:
        """The VMs of this image at the node, the lowest number first."""
        name = self.job.image.name
        found = [vm for vm in self._machines() if vm.get("name") == name and vm.get("node") == self.config.node]
        return sorted(found, key=lambda vm: int(vm["vmid"]))

    def _settings(self, vm_id: Any) -> dict[str, Any]:
        return dict(self._call("look at the VM", "GET", self._node(f"qemu/{vm_id}/config")))

    @property
    def _file(self) -> str:
        return f"{self.job.image.name}.{self.job.image.format}"

    @property
    def _volume(self) -> str:
        return f"{self.config.import_storage}:import/{self._file}"

    def _is_uploaded(self) -> bool:
        path = self._node(f"storage/{self.config.import_storage}/content")
        listed = self._call("list uploads", "GET", path, params={"content": "import"})
        return any(v["volid"] == self._volume and int(v["size"]) == self.job.image.file_bytes for v in listed)

    # --- publishing

    def plan(self) -> tuple[Step, ...]:
        """See :class:`Provider`."""
        if self.config.url is None:
            return (Step("print", "the commands for proxmox", note="nothing is sent: there is no url"),)
        image, ours = self.job.image, self._ours()
        if any(vm.get("template") for vm in ours):
            return (Step("exists", f"template {ours[0]['vmid']} at {self.config.node}"),)
        create = Step("create", f"template {image.name} at {self.config.node}, disk in {self.config.storage}")
        if ours or self._is_uploaded():
            return (create,)
        return (Step("upload", self._volume, image.file_bytes, note="as it is"), create)

    def publish(self) -> Published:
        """See :class:`Provider`."""
        if self.config.url is None:
            return Published(ids={}, checked="nothing was sent")
        sent, ours = 0, self._ours()
        templates = [str(vm["vmid"]) for vm in ours if vm.get("template")]
        if not templates:
            whole = [str(vm["vmid"]) for vm in ours if self._has_disk(str(vm["vmid"]))]
            if not whole:
                if not self._is_uploaded():
                    sent = self._upload()
                whole = [self._create()]
            self._settle(whole[0])
            templates = [self._without_twin(whole[0])]
        if self._is_uploaded():
            self._wait("delete the upload", self._call("delete the upload", "DELETE", self._content(self._volume)))
        return Published(
            ids={"template": templates[0], "node": str(self.config.node), "storage": self.config.storage},
            checked="Proxmox compared the SHA-256 of what it was sent", locations=(self.config.url,), sent_bytes=sent,
        )  # fmt: skip

    def _content(self, volume: str) -> str:
        return self._node(f"storage/{self.config.import_storage}/content/{urllib.parse.quote(volume, safe='')}")

    def _upload(self) -> int:
        image = self.job.image
        words = {"content": "import", "checksum-algorithm": "sha256", "checksum": image.sha256}
        progress = Progress(f"send {self._file}", image.file_bytes)
        path = self._node(f"storage/{self.config.import_storage}/upload")
        form = Form(words, "filename", self._file, image.path)
        upid = self._call(
            "send the file", "POST", path, body=lambda: form.opened(progress), headers={"Content-Type": form.kind}
        )
        self._wait("send the file", upid)
        return image.file_bytes

    def vm_body(self, vm_id: str) -> dict[str, Any]:
        """The request for the VM. No tags: a token with rights in a pool alone may set them only afterwards."""
        config, image = self.config, self.job.image
        body = {
            "vmid": vm_id, "name": image.name, "memory": 8192, "cores": 4, "cpu": "host", "machine": "q35",
            "ostype": "l26", "scsihw": "virtio-scsi-single", "agent": "enabled=1", "serial0": "socket",
            "scsi0": f"{config.storage}:0,import-from={self._volume},discard=on,iothread=1",
            "ide2": f"{config.storage}:cloudinit", "net0": f"virtio,bridge={config.bridge}", "boot": "order=scsi0",
            "description": f"recvirt {image.profile}, kernel {image.kernel}, sha256 {image.sha256}",
        }  # fmt: skip
        return {**body, **({"pool": config.pool} if config.pool else {})}

    def _create(self) -> str:
        """Make the VM. The next free number may be somebody else's by then: another one is asked for."""
        for left in reversed(range(_TRIES)):
            vm_id = str(self.config.vm_id or self._call("ask for a number", "GET", "cluster/nextid"))
            try:
                upid = self._call("make the VM", "POST", self._node("qemu"), self.vm_body(vm_id))
            except PublishError as error:
                mine = any(str(vm["vmid"]) == vm_id for vm in self._ours())
                if not mine and (self.config.vm_id or not left or "already exists" not in error.message):
                    raise
                if mine and self._has_disk(vm_id):
                    return vm_id  # the answer to an earlier try was lost
            else:
                self._wait("make the VM", upid)
                return vm_id
        raise AssertionError("the last try returns or raises")

    def _has_disk(self, vm_id: str) -> bool:
        """Whether a VM of ours is whole, once nobody works on it; one without its disk goes."""
        deadline = time.monotonic() + _TASK_SECONDS
        while "lock" in (settings := self._settings(vm_id)):
            if time.monotonic() > deadline:
                raise PublishError(f"VM {vm_id} is locked: {settings['lock']}", hint=f"qm unlock {vm_id}")
            time.sleep(1.0)
        if "scsi0" in settings:
            return True
        self._delete(vm_id)
        return False

    def tags(self) -> str:
        """Its tags: lower case, digits and -, _, +, . only."""
        image = self.job.image
        profile = re.sub(r"[^a-z0-9_+.-]", "-", image.profile.lower())
        return ";".join((TAG, f"{_DIGEST}{image.sha256}", f"{_PROFILE}{profile}"))

    def _settle(self, vm_id: str) -> None:
        self._call("tag the VM", "PUT", self._node(f"qemu/{vm_id}/config"), {"tags": self.tags()})
        what = "make a template"
        try:
            self._wait(what, self._call(what, "POST", self._node(f"qemu/{vm_id}/template"), {}))
        except PublishError:
            # The answer to an earlier try was lost, or another publisher has just done it.
            if not self._settings(vm_id).get("template"):
                raise

    def _without_twin(self, mine: str) -> str:
        """Two publishers at once on two machines made two: the lower number stays, once it is a template."""
        first = next((str(vm["vmid"]) for vm in self._ours() if vm.get("template")), mine)
        if first != mine:
            reporter.warn(f"another publisher was quicker: template {first} stays, {mine} goes")
            self._delete(mine)
        return first

    # --- pruning

    def remotes(self) -> list[Remote]:
        """See :class:`Provider`."""
        if self.config.url is None:
            raise ConfigError(f"{self.job.target}: recvirt sends nothing there without a url, and can delete nothing")
        found = []
        for vm in self._machines():
            tags = re.split(r"[;, ]", vm.get("tags") or "")
            digest = next((tag.removeprefix(_DIGEST) for tag in tags if tag.startswith(_DIGEST)), "")
            if not (digest and vm.get("template") and vm.get("node") == self.config.node):
                continue
            made = re.search(r"ctime=(\d+)", str(self._settings(vm["vmid"]).get("meta", "")))
            profile = next((tag.removeprefix(_PROFILE) for tag in tags if tag.startswith(_PROFILE)), "")
            when = datetime.fromtimestamp(int(made[1]) if made else time.time(), UTC)
            found.append(Remote(str(vm["vmid"]), f"{vm['name']} ({vm['vmid']})", digest, profile, when))
        return found

    def delete(self, remote: Remote) -> None:
        """See :class:`Provider`. One that linked clones hang on stays."""
        try:
            self._delete(remote.identity)
        except PublishError as error:
            if "still in use" not in error.message and "linked clone" not in error.message:
                raise
            reporter.warn(f"{remote.name} has linked clones, and stays")

    def _delete(self, vm_id: str) -> None:
        try:
            self._wait("delete the VM", self._call("delete the VM", "DELETE", self._node(f"qemu/{vm_id}?purge=1")))
        except TransientError:
            raise
        except PublishError as error:
            if "does not exist" not in error.message:
                raise

    def recipe(self, published: Published) -> dict[str, Any]:
        """See :class:`Provider`."""
        config = self.config
        return {
            "template": published.ids.get("template", ""), "node": config.node or "NODE", "storage": config.storage,
            "vm_id": config.vm_id or _RECIPE_VM_ID, "bridge": config.bridge,
        }  # fmt: skip


PROVIDER = Proxmox
