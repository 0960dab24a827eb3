"""libvirt's description of an instance. Pure: the same specification on the same host gives the same XML.

Built with ElementTree, which quotes every value. The elements are documented in libvirt's "Domain XML format"; the
choices here are those that matter inside a VM: paravirtual devices, an I/O thread, no emulated timers, polling left to
the guest, spare ports for what is attached later, and maxima above what an instance starts with.
"""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path
from xml.etree import ElementTree as ET

from recvirt.nestedcloud.addresses import HostSpec, guest_addresses
from recvirt.nestedcloud.model import PRIORITY_DEFAULT, DiskSpec, InstanceSpec, ModelError, NetworkSpec, NicSpec
from recvirt.nestedcloud.worker.host import Host

#: Where our own words stand in a domain's metadata.
NAMESPACE = "urn:recvirt:instance:1"
ET.register_namespace("recvirt", NAMESPACE)
#: PCI Express ports without a device: what can be attached while the guest runs. Its firmware and its kernel look
#: behind each at every boot, which costs L1 some 100 million instructions (benchmarks, ``launched``).
SPARE_PORTS = 4
#: Of the devices on the root bus; libvirt puts its own below and above them.
_FIRST_SLOT = 16
#: For how long a DHCP server remembers whom it gave an address: once free it may soon be another card's.
LEASE_MINUTES = 10
_KIB = 1024
#: What a domain of priority 50 gets: the kernel's own defaults (cgroups(7); Documentation/admin-guide/cgroup-v2.rst).
_SHARES = {1: 1024, 2: 100}


def domain_name(spec: InstanceSpec) -> str:
    """Unique on a host, whatever two projects call their instances; a person still recognizes it."""
    return f"{spec.name}-{spec.uuid[:8]}"


def shares(priority: int, cgroup: int) -> int:
    """The processor's share for a priority: ten more is twice as much, in both versions of control groups.

    Version 1 allows 2 to 262144, version 2 allows 1 to 10000; priorities 1 to 100 stay inside both.
    """
    return max(2, round(_SHARES[cgroup] * 2 ** ((priority - PRIORITY_DEFAULT) / 10)))


def disk_serial(disk: str) -> str:
    """What the guest sees as the disk's serial number (virtio-blk takes 20 characters)."""
    return disk.replace("-", "")[:20]


def disk_target(index: int) -> str:
    """vda, vdb, ... vdz. ModelError beyond: nothing is named vdaa here."""
    if not 0 <= index < 26:
        raise ModelError("an instance has 26 disks at most")
    return f"vd{chr(ord('a') + index)}"


def _sub(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element


def domain_xml(spec: InstanceSpec, host: Host, *, operation: str = "") -> str:
    """The whole domain, as ``virDomainDefineXML`` takes it."""
    domain = ET.Element("domain", type=host.domain_type)
    _sub(domain, "name", domain_name(spec))
    _sub(domain, "uuid", spec.uuid)
    domain.append(_metadata(spec, host, operation))
    _sub(domain, "memory", str(spec.memory_max_bytes // _KIB), unit="KiB")
    _sub(domain, "currentMemory", str(spec.memory_bytes // _KIB), unit="KiB")
    _add_vcpus(domain, spec)
    if host.domain_type != "test":
        _sub(domain, "iothreads", "1")
        _sub(_sub(domain, "cputune"), "shares", str(shares(spec.priority, host.cgroup)))
    system = _sub(domain, "os")
    _sub(system, "type", "hvm", arch="x86_64", machine="q35")
    _sub(system, "boot", dev="hd")
    _add_cpu(domain, spec, host)
    _add_clock(domain)
    for event, action in (("on_poweroff", "destroy"), ("on_reboot", "restart"), ("on_crash", "destroy")):
        _sub(domain, event, action)
    domain.append(_devices(spec, host))
    return ET.tostring(domain, encoding="unicode")


def _metadata(spec: InstanceSpec, host: Host, operation: str) -> ET.Element:
    metadata = ET.Element("metadata")
    metadata.append(own_metadata(spec.generation, host.owner, operation))
    return metadata


def own_metadata(generation: int, owner: str, operation: str) -> ET.Element:
    """Our element: whose domain it is, and which state of the specification it was given."""
    words = {"owner": owner, "generation": str(generation), "operation": operation}
    return ET.Element(f"{{{NAMESPACE}}}instance", words)


def _add_vcpus(domain: ET.Element, spec: InstanceSpec) -> None:
    _sub(domain, "vcpu", str(spec.vcpus_max), placement="static", current=str(spec.vcpus))
    if spec.vcpus_max == 1:
        return
    listed = _sub(domain, "vcpus")
    for number in range(spec.vcpus_max):
        # The first one can't be taken away; the others can be added while the guest runs.
        words = {"id": str(number), "hotpluggable": "no" if number == 0 else "yes"}
        words["enabled"] = "yes" if number < spec.vcpus else "no"
        if number < spec.vcpus:
            words["order"] = str(number + 1)
        ET.SubElement(listed, "vcpu", words)


def _add_cpu(domain: ET.Element, spec: InstanceSpec, host: Host) -> None:
    features = _sub(domain, "features")
    _sub(features, "acpi")
    _sub(features, "apic")
    if host.domain_type == "test":
        return
    if host.domain_type == "kvm":
        # The guest polls before it halts, so that its hypervisor need not be entered for a short wait.
        _sub(_sub(features, "kvm"), "poll-control", state="on")
        cpu = _sub(domain, "cpu", mode="host-passthrough", check="none", migratable="on")
    else:
        cpu = _sub(domain, "cpu", mode="maximum", check="none")
    for name in ("vmx", "svm"):
        if not spec.nest:
            _sub(cpu, "feature", policy="disable", name=name)


def _add_clock(domain: ET.Element) -> None:
    clock = _sub(domain, "clock", offset="utc")
    _sub(clock, "timer", name="rtc", tickpolicy="catchup")
    _sub(clock, "timer", name="pit", tickpolicy="delay")
    _sub(clock, "timer", name="hpet", present="no")


def _devices(spec: InstanceSpec, host: Host) -> ET.Element:
    devices = ET.Element("devices")
    root, seed = disk_element(spec.root, host), _seed_element(spec, host)
    devices.append(root)
    for disk in spec.volumes:
        devices.append(disk_element(disk, host))
    devices.append(seed)
    for nic in spec.nics:
        devices.append(nic_element(nic))
    console = _sub(devices, "serial", type="pty")
    if host.domain_type != "test":
        _sub(console, "log", file=str(host.console_log_path(spec.uuid)), append="off")
        _sub(console, "target", type="isa-serial", port="0")
        # Without a screen nobody has a keyboard or a tablet for it.
        _sub(devices, "controller", type="usb", model="none")
        _sub(devices, "controller", type="pci", index="0", model="pcie-root")
        # What may be taken away while the guest runs is plugged into a port, and there are some more.
        for number in range(1, 1 + SPARE_PORTS + len(spec.nics) + len(spec.volumes)):
            _sub(devices, "controller", type="pci", index=str(number), model="pcie-root-port")
        serial = _sub(devices, "controller", type="virtio-serial", index="0")
        agent = _sub(devices, "channel", type="unix")
        _sub(agent, "target", type="virtio", name="org.qemu.guest_agent.0")
        rng = _sub(devices, "rng", model="virtio")
        _sub(rng, "backend", "/dev/urandom", model="random")
        balloon = _sub(devices, "memballoon", model="virtio", autodeflate="on", freePageReporting="on")
        _sub(balloon, "stats", period="10")
        # What stays needs no port.
        for slot, element in enumerate((root, seed, serial, rng, balloon), _FIRST_SLOT):
            _sub(element, "address", type="pci", domain="0", bus="0", slot=str(slot), function="0")
    return devices


def disk_element(disk: DiskSpec, host: Host) -> ET.Element:
    """A disk, for the domain or to be attached by itself."""
    element = ET.Element("disk", type="file", device="disk")
    # The page cache of L1 would hold what L2's own cache holds already.
    words = {"name": "qemu", "type": disk.format, "cache": "none", "io": "native", "discard": "unmap"}
    if host.domain_type != "test":
        words["iothread"] = "1"
    ET.SubElement(element, "driver", words)
    _add_source(element, host.disk_path(disk.uuid, disk.format), host)
    _sub(element, "target", dev=disk_target(disk.slot), bus="virtio")
    _sub(element, "serial", disk_serial(disk.uuid))
    return element


def _add_source(element: ET.Element, path: Path, host: Host) -> None:
    source = _sub(element, "source", file=str(path))
    if host.keeps_files:
        _sub(source, "seclabel", model="dac", relabel="no")


def _seed_element(spec: InstanceSpec, host: Host) -> ET.Element:
    element = ET.Element("disk", type="file", device="disk")
    _sub(element, "driver", name="qemu", type="raw")
    _add_source(element, host.seed_path(spec.uuid), host)
    _sub(element, "target", dev=disk_target(25), bus="virtio")
    _sub(element, "readonly")
    return element


def network_name(network: str) -> str:
    """libvirt's name of a network."""
    return f"recvirt-{network[:8]}"


def nic_element(nic: NicSpec) -> ET.Element:
    """A card, for the domain or to be attached by itself."""
    element = ET.Element("interface", type="network")
    _sub(element, "mac", address=nic.mac)
    _sub(element, "source", network=network_name(nic.network))
    _sub(element, "model", type="virtio")
    if nic.bandwidth_kib:
        bandwidth = _sub(element, "bandwidth")
        for direction in ("inbound", "outbound"):
            _sub(bandwidth, direction, average=str(nic.bandwidth_kib))
    return element


def network_bridge(network: str) -> str:
    """The name of a network's bridge on its host (15 characters are an interface's bound)."""
    return f"rv{network[:8]}"


def host_element(host: HostSpec) -> ET.Element:
    """An address that is kept for a card."""
    return ET.Element("host", mac=host.mac, ip=host.address)


def network_xml(network: NetworkSpec) -> str:
    """libvirt's description of a network; addresses are handed out by its own dnsmasq."""
    element = ET.Element("network")
    _sub(element, "name", network_name(network.uuid))
    _sub(element, "uuid", network.uuid)
    if network.kind == "bridge":
        _sub(element, "forward", mode="bridge")
        _sub(element, "bridge", name=network.bridge)
        return ET.tostring(element, encoding="unicode")
    if network.kind == "nat":
        _sub(element, "forward", mode="nat")
    _sub(element, "bridge", name=network_bridge(network.uuid), stp="off", delay="0")
    addresses = guest_addresses(network.cidr)
    block = IPv4Network(network.cidr)
    own = _sub(element, "ip", address=str(block[1]), netmask=str(block.netmask))
    served = _sub(own, "dhcp")
    handed_out = _sub(served, "range", start=addresses[0], end=addresses[-1])
    _sub(handed_out, "lease", expiry=str(LEASE_MINUTES), unit="minutes")
    for host in network.hosts:
        served.append(host_element(host))
    return ET.tostring(element, encoding="unicode")
