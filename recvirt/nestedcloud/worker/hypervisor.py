"""libvirt, as far as a worker needs it: idempotent verbs on domains, and libvirt's errors in our words.

Owns the connection, which is made anew when libvirtd was restarted. Does not own: what is to be done (``actions``),
networks (``networks``) or files (``storage``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

from recvirt.nestedcloud.addresses import HostSpec
from recvirt.nestedcloud.model import MIB, DiskSpec, DomainFacts, Fault, InstanceSpec, Power
from recvirt.nestedcloud.worker.domain import (
    NAMESPACE,
    disk_element,
    disk_serial,
    disk_target,
    domain_xml,
    own_metadata,
)
from recvirt.nestedcloud.worker.errors import ActionError, UnreachableError
from recvirt.nestedcloud.worker.host import Host
from recvirt.nestedcloud.worker.networks import Networks

_KIB = 1024
_POLL_SECONDS = 0.25
_METADATA_KEY = "recvirt"
_POWERS = {
    libvirt.VIR_DOMAIN_RUNNING: Power.RUNNING, libvirt.VIR_DOMAIN_BLOCKED: Power.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: Power.SUSPENDED, libvirt.VIR_DOMAIN_PMSUSPENDED: Power.SUSPENDED,
    libvirt.VIR_DOMAIN_SHUTDOWN: Power.RUNNING, libvirt.VIR_DOMAIN_SHUTOFF: Power.STOPPED,
    libvirt.VIR_DOMAIN_CRASHED: Power.CRASHED,
}  # fmt: skip
_ABSENT = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_NETWORK, libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT)
#: What tells that the connection, not the request, is at fault (virterror.h).
_BROKEN_DOMAINS = (libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE)

# libvirt prints every error to stderr besides raising it; we report it.
libvirt.registerErrorHandler(lambda _context, _error: None, None)


def fault_of(error: libvirt.libvirtError) -> ActionError:
    """libvirt's error in our words."""
    code = error.get_error_code()
    text = str(error.get_error_message() or error)
    if is_broken(error):
        return UnreachableError(Fault.HYPERVISOR, f"libvirt: {text}")
    if code in _ABSENT:
        return ActionError(Fault.NOT_FOUND, text)
    if code in (
        libvirt.VIR_ERR_NO_SUPPORT,
        libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
        libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
    ):
        return ActionError(Fault.NOT_SUPPORTED, text)
    if "No space left on device" in text:
        return ActionError(Fault.NO_SPACE, text)
    if code in (libvirt.VIR_ERR_OPERATION_TIMEOUT, libvirt.VIR_ERR_AGENT_UNRESPONSIVE):
        return ActionError(Fault.TIMED_OUT, text)
    return ActionError(Fault.HYPERVISOR, text)


def is_broken(error: libvirt.libvirtError) -> bool:
    """The connection to libvirtd is gone: another one may work."""
    return error.get_error_domain() in _BROKEN_DOMAINS or error.get_error_code() == libvirt.VIR_ERR_INVALID_CONN


@contextmanager
def in_our_words() -> Iterator[None]:
    """libvirt's errors become ActionErrors."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise fault_of(error) from None


class Hypervisor:
    """One libvirt URI."""

    def __init__(
        self, uri: str, host: Host, *, shared: Any = None, keep_alive: tuple[int, int] = (5, 3)
    ) -> None:  # fmt: skip
        """``shared`` is an open connection to use instead (libvirt's test driver lives and dies with one).

        ``keep_alive`` is after how many seconds, and how often, a libvirtd is asked whether it is there.
        """
        self.uri = uri
        self.host = host
        self._shared = shared
        self._keep_alive = keep_alive
        self._connection: Any = shared

    @property
    def connection(self) -> Any:
        """An open connection, made anew when libvirtd was restarted. ActionError when there is none."""
        if self._connection is not None and self._shared is None:
            try:
                alive = self._connection.isAlive()
            except libvirt.libvirtError:
                alive = False
            if not alive:
                self._connection = None
        if self._connection is None:
            try:
                self._connection = libvirt.open(self.uri)
                # A libvirtd that hangs is as good as none.
                self._connection.setKeepAlive(*self._keep_alive)
            except libvirt.libvirtError as error:
                if self._connection is None:
                    text = f"libvirt at {self.uri}: {error.get_error_message()}"
                    raise UnreachableError(Fault.HYPERVISOR, text) from None
        return self._connection

    def close(self) -> None:
        """Give the connection back. May wait for libvirtd."""
        connection, self._connection = self._connection, self._shared
        if connection is not None and connection is not self._shared:
            try:
                connection.close()
            except libvirt.libvirtError:
                # It was gone.
                pass

    def find(self, uuid: str) -> Any | None:
        """The domain with this UUID, or None. ActionError when it is there and not ours."""
        try:
            domain = self.connection.lookupByUUIDString(uuid)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise fault_of(error) from None
        with in_our_words():
            own = self._own(domain)
        if own is None:
            raise ActionError(Fault.CONFLICT, f"the domain {uuid} belongs to somebody else")
        return domain

    def get(self, uuid: str) -> Any:
        """The domain with this UUID. ActionError when there is none."""
        domain = self.find(uuid)
        if domain is None:
            raise ActionError(Fault.NOT_FOUND, f"there is no domain {uuid} on this host")
        return domain

    def is_active(self, uuid: str) -> bool:
        """Whether there is such a domain, and it runs or is suspended."""
        domain = self.find(uuid)
        return domain is not None and bool(self._call(domain.isActive))

    def _own(self, domain: Any) -> ET.Element | None:
        try:
            text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                return None
            raise
        element = ET.fromstring(text)  # noqa: S314 - libvirt wrote it
        return element if element.get("owner") == self.host.owner else None

    def generation(self, domain: Any) -> int:
        """The state of the specification that the domain was given."""
        own = self._own(domain)
        return int(own.get("generation", "0")) if own is not None else 0

    def last_operation(self, domain: Any) -> str:
        """The operation that changed the domain last."""
        own = self._own(domain)
        return own.get("operation", "") if own is not None else ""

    def power(self, domain: Any) -> Power:
        """What the hypervisor says."""
        return _POWERS.get(domain.state()[0], Power.UNKNOWN)

    def facts(self, domain: Any) -> DomainFacts:
        """What a report says of a domain."""
        _, _, memory_kib, vcpus, _ = domain.info()
        return DomainFacts(domain.UUIDString(), self.power(domain), self.generation(domain), vcpus, memory_kib * _KIB)

    def all_facts(self) -> tuple[DomainFacts, ...]:
        """Every domain of this cloud on the host; others are none of our business."""
        try:
            found = []
            for domain in self.connection.listAllDomains():
                try:
                    if self._own(domain) is not None:
                        found.append(self.facts(domain))
                except libvirt.libvirtError as error:
                    # Deleted since it was listed.
                    if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                        raise
            return tuple(sorted(found, key=lambda facts: facts.uuid))
        except libvirt.libvirtError as error:
            raise fault_of(error) from None

    def define(self, spec: InstanceSpec, operation: str) -> Any:
        """Make the domain, or give it a new description."""
        return self._call(self.connection.defineXML, domain_xml(spec, self.host, operation=operation))

    def note(self, domain: Any, spec: InstanceSpec, operation: str) -> None:
        """Write generation and operation into the domain, running or not."""
        # libvirt puts the namespace in itself, and refuses an element that has one.
        element = ET.Element("instance", own_metadata(spec.generation, self.host.owner, operation).attrib)
        text = ET.tostring(element, encoding="unicode")
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
        if domain.isActive():
            flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
        kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
        self._call(domain.setMetadata, kind, text, _METADATA_KEY, NAMESPACE, flags)

    def start(self, domain: Any) -> None:
        """Run it, unless it does."""
        power = self.power(domain)
        if power is Power.SUSPENDED:
            self._call(domain.resume)
        elif power is not Power.RUNNING:
            self._call(domain.create)

    def stop(self, domain: Any, graceful_seconds: float, progress: Callable[[str], None]) -> bool:
        """Ask the guest to power off; after ``graceful_seconds`` take the power away. True when the guest did it."""
        if self.power(domain) in (Power.STOPPED, Power.CRASHED):
            return True
        if self.power(domain) is Power.SUSPENDED:
            self._call(domain.resume)
        if graceful_seconds > 0:
            progress("asked the guest to power off")
            self._call(domain.shutdown)
            deadline = time.monotonic() + graceful_seconds
            while time.monotonic() < deadline:
                if self.power(domain) is Power.STOPPED:
                    return True
                time.sleep(_POLL_SECONDS)
        progress("took the power away")
        if domain.isActive():
            self._call(domain.destroy)
        return False

    def reboot(self, domain: Any) -> None:
        """Restart a running guest: its own way where it listens, else by the reset button."""
        if self.power(domain) is not Power.RUNNING:
            raise ActionError(Fault.CONFLICT, "it does not run")
        self._call(domain.reboot)

    def suspend(self, domain: Any) -> None:
        """Stop its processors, unless they stand still."""
        power = self.power(domain)
        if power is Power.SUSPENDED:
            return
        if power is not Power.RUNNING:
            raise ActionError(Fault.CONFLICT, "it does not run")
        self._call(domain.suspend)

    def resume(self, domain: Any) -> None:
        """Let its processors go on, unless they do."""
        power = self.power(domain)
        if power is Power.RUNNING:
            return
        if power is not Power.SUSPENDED:
            raise ActionError(Fault.CONFLICT, "it is not suspended")
        self._call(domain.resume)

    def remove(self, domain: Any) -> None:
        """Take the power away and forget the domain with its snapshots."""
        if domain.isActive():
            self._call(domain.destroy)
        flags = libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        if self.host.domain_type != "test":
            flags |= libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
        self._call(domain.undefineFlags, flags)

    def set_vcpus(self, domain: Any, count: int) -> None:
        """Give a running guest more processors."""
        self._call(domain.setVcpusFlags, count, libvirt.VIR_DOMAIN_AFFECT_LIVE)

    def set_memory(self, domain: Any, memory_bytes: int) -> None:
        """Blow up or let down a running guest's balloon."""
        self._call(domain.setMemoryFlags, memory_bytes // _KIB, libvirt.VIR_DOMAIN_AFFECT_LIVE)

    def set_shares(self, domain: Any, value: int) -> None:
        """A running guest's part of the processors."""
        self._call(domain.setSchedulerParametersFlags, {"cpu_shares": value}, libvirt.VIR_DOMAIN_AFFECT_LIVE)

    def maxima(self, domain: Any) -> tuple[int, int]:
        """vCPUs and bytes of memory that a running guest can grow to."""
        vcpus = domain.vcpusFlags(libvirt.VIR_DOMAIN_VCPU_MAXIMUM | libvirt.VIR_DOMAIN_AFFECT_CURRENT)
        return int(vcpus), int(domain.maxMemory()) * _KIB

    def snapshot(self, domain: Any, name: str) -> None:
        """Disks, and memory of a running guest. A snapshot of this name that is there is left as it is."""
        if name in self.snapshots(domain):
            return
        element = ET.Element("domainsnapshot")
        ET.SubElement(element, "name").text = name
        self._call(domain.snapshotCreateXML, ET.tostring(element, encoding="unicode"))

    def snapshots(self, domain: Any) -> list[str]:
        """Their names."""
        return sorted(item.getName() for item in self._call(domain.listAllSnapshots))

    def revert(self, domain: Any, name: str) -> None:
        """Back to a snapshot, running or not as it was then."""
        self._call(domain.revertToSnapshot, self._call(domain.snapshotLookupByName, name))

    def remove_snapshot(self, domain: Any, name: str) -> None:
        """Forget one, unless it is gone."""
        if name in self.snapshots(domain):
            self._call(self._call(domain.snapshotLookupByName, name).delete)

    def is_plugged(self, domain: Any, disk: DiskSpec) -> bool:
        """Whether a running guest has the disk."""
        # Only what runs: without a flag libvirt describes that.
        description = ET.fromstring(self._call(domain.XMLDesc))  # noqa: S314 - libvirt wrote it
        serials = [element.text for element in description.iterfind("devices/disk/serial")]
        return disk_serial(disk.uuid) in serials

    def plug(self, domain: Any, disk: DiskSpec) -> None:
        """Give a running guest a disk, unless it has it."""
        if not self.is_plugged(domain, disk):
            text = ET.tostring(disk_element(disk, self.host), encoding="unicode")
            self._call(domain.attachDeviceFlags, text, libvirt.VIR_DOMAIN_AFFECT_LIVE)

    def unplug(self, domain: Any, disk: DiskSpec, seconds: float) -> None:
        """Take a disk from a running guest, unless it is gone. ActionError when the guest does not let go in time."""
        if not self.is_plugged(domain, disk):
            return
        text = ET.tostring(disk_element(disk, self.host), encoding="unicode")
        try:
            domain.detachDeviceFlags(text, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        except libvirt.libvirtError as error:
            # Asked before, and the guest has not answered yet: QEMU says it so, and there is no code for it.
            if "in the process of unplug" not in str(error):
                raise fault_of(error) from None
        deadline = time.monotonic() + seconds
        while self.is_plugged(domain, disk):
            if time.monotonic() > deadline:
                raise ActionError(
                    Fault.TIMED_OUT,
                    f"the guest did not let go of {disk_target(disk.slot)} in {seconds:.0f} s: "
                    "unmount it there and ask again, or stop the instance first",
                )
            time.sleep(_POLL_SECONDS)

    def resize_disk(self, domain: Any, disk: DiskSpec) -> None:
        """Make a running guest's disk larger; the guest sees it at once."""
        flag = libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES
        self._call(domain.blockResize, disk_target(disk.slot), disk.size_bytes, flag)

    @property
    def networks(self) -> Networks:
        """libvirt's networks."""
        return Networks(self.connection, self._call, lasting=self.host.domain_type != "test")

    def seen_addresses(self) -> tuple[HostSpec, ...]:
        """What is seen on cards of this cloud's running domains where others hand out addresses."""
        with in_our_words():
            domains = self.connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            return self.networks.seen(domain for domain in domains if self._own(domain) is not None)

    def capacity(self) -> tuple[int, int]:
        """vCPUs and bytes of memory of the host."""
        info = self._call(self.connection.getInfo)
        return int(info[2]), int(info[1]) * MIB

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except libvirt.libvirtError as error:
            raise fault_of(error) from None
