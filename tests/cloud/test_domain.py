"""libvirt's description of an instance: what it says, and that nothing a person typed can say more."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from recvirt.nestedcloud.model import GIB, MIB, DiskSpec, ModelError, NetworkSpec, NicSpec
from recvirt.nestedcloud.worker.domain import NAMESPACE, SPARE_PORTS, disk_target, domain_xml, network_xml, shares
from recvirt.nestedcloud.worker.host import DomainType, Host
from tests.cloud.support import instance

OWNER = str(uuid.uuid4())


def host(domain_type: DomainType = "kvm") -> Host:
    return Host(OWNER, domain_type, Path("/var/lib/recvirt/images"), Path("/var/lib/recvirt/blocks"))


def parsed(*, domain_type: DomainType = "kvm", **changes: object) -> ET.Element:
    return ET.fromstring(domain_xml(instance(**changes), host(domain_type), operation="op"))


def text_of(element: ET.Element, path: str) -> str:
    found = element.find(path)
    assert found is not None and found.text is not None
    return found.text


def attributes(element: ET.Element, path: str) -> dict[str, str]:
    found = element.find(path)
    assert found is not None, path
    return found.attrib


def test_maxima_stand_above_what_it_starts_with() -> None:
    domain = parsed(vcpus=2, vcpus_max=4, memory_bytes=512 * MIB, memory_max_bytes=GIB)
    assert text_of(domain, "memory") == str(GIB // 1024)
    assert text_of(domain, "currentMemory") == str(512 * MIB // 1024)
    assert text_of(domain, "vcpu") == "4" and attributes(domain, "vcpu")["current"] == "2"
    listed = [(item.get("id"), item.get("enabled"), item.get("hotpluggable")) for item in domain.findall("vcpus/vcpu")]
    assert listed == [("0", "yes", "no"), ("1", "yes", "yes"), ("2", "no", "yes"), ("3", "no", "yes")]


def test_the_domain_says_whose_it_is() -> None:
    own = parsed(generation=7).find(f"metadata/{{{NAMESPACE}}}instance")
    assert own is not None and own.attrib == {"owner": OWNER, "generation": "7", "operation": "op"}


@pytest.mark.parametrize("nest", [True, False])
def test_vmx_and_svm_reach_the_guest_only_when_asked_for(nest: bool) -> None:
    disabled = {
        item.get("name") for item in parsed(nest=nest).findall("cpu/feature") if item.get("policy") == "disable"
    }
    assert disabled == (set() if nest else {"vmx", "svm"})


def test_disks_bypass_the_page_cache_and_give_back_what_is_free() -> None:
    volume = DiskSpec(str(uuid.uuid4()), GIB, "raw", slot=1)
    domain = parsed(volumes=(volume,))
    disks = domain.findall("devices/disk")
    targets = [attributes(disk, "target")["dev"] for disk in disks]
    assert targets == ["vda", "vdb", "vdz"]
    for disk in disks[:2]:
        driver = attributes(disk, "driver")
        assert (driver["cache"], driver["io"], driver["discard"], driver["iothread"]) == (
            "none",
            "native",
            "unmap",
            "1",
        )
    assert attributes(disks[1], "source")["file"] == f"/var/lib/recvirt/blocks/{volume.uuid}.raw"
    assert text_of(disks[1], "serial") == volume.uuid.replace("-", "")[:20]
    assert disks[2].find("readonly") is not None


@pytest.mark.parametrize("keeps", [True, False])
def test_files_stay_whose_they_are_where_the_worker_is_not_root(keeps: bool) -> None:
    here = replace(host(), keeps_files=keeps)
    domain = ET.fromstring(domain_xml(instance(), here, operation="op"))
    sources = domain.findall("devices/disk/source")
    assert len(sources) == 2
    for source in sources:
        label = source.find("seclabel")
        assert (label is not None and label.attrib == {"model": "dac", "relabel": "no"}) is keeps


def test_there_are_ports_for_what_comes_later_and_for_what_may_go() -> None:
    def ports(nics: tuple[NicSpec, ...]) -> set[str | None]:
        found = parsed(nics=nics).findall("devices/controller[@model='pcie-root-port']")
        assert len({port.get("index") for port in found}) == len(found)
        return {port.get("index") for port in found}

    nics = tuple(NicSpec(str(uuid.uuid4()), f"52:54:00:00:00:0{number}") for number in range(3))
    assert len(ports(nics)) == len(ports(())) + 3 and len(ports(())) == SPARE_PORTS


def test_what_stays_has_a_place_on_the_root_bus_and_what_may_go_has_none() -> None:
    domain = parsed(nics=(NicSpec(str(uuid.uuid4()), "52:54:00:00:00:01"),))
    placed = [element for element in domain.find("devices") or () if element.find("address") is not None]
    assert sorted(element.tag for element in placed) == ["controller", "disk", "disk", "memballoon", "rng"]
    places = [{**address.attrib} for element in placed if (address := element.find("address")) is not None]
    assert {place["bus"] for place in places} == {"0"} and len({place["slot"] for place in places}) == len(places)


def test_there_is_no_usb() -> None:
    # libvirt adds a controller of its own, which every firmware and kernel looks for devices on, if nothing is said.
    assert attributes(parsed(), "devices/controller[@type='usb']") == {"type": "usb", "model": "none"}


def test_a_bandwidth_bounds_both_ways() -> None:
    nic = NicSpec(str(uuid.uuid4()), "52:54:00:00:00:01", 2048)
    domain = parsed(nics=(nic,))
    for way in ("inbound", "outbound"):
        assert attributes(domain, f"devices/interface/bandwidth/{way}") == {"average": "2048"}
    free = parsed(nics=(NicSpec(nic.network, nic.mac),))
    assert free.find("devices/interface/bandwidth") is None


def test_a_share_doubles_every_ten_and_stays_inside_the_kernels_bounds() -> None:
    assert shares(50, 2) == 100 and shares(60, 2) == 200 and shares(50, 1) == 1024
    for cgroup, low, high in ((1, 2, 262144), (2, 1, 10000)):
        values = [shares(priority, cgroup) for priority in range(1, 101)]
        assert values == sorted(values) and low <= values[0] and values[-1] <= high and len(set(values)) > 60


def test_the_same_instance_gives_the_same_words() -> None:
    spec = instance()
    assert domain_xml(spec, host()) == domain_xml(spec, host())


def test_a_disk_too_many_is_refused() -> None:
    with pytest.raises(ModelError):
        disk_target(26)


def test_a_nat_network_has_addresses_for_its_guests() -> None:
    key = str(uuid.uuid4())
    network = ET.fromstring(network_xml(NetworkSpec(key, "default", "nat", "172.30.5.0/24")))
    assert attributes(network, "forward") == {"mode": "nat"}
    assert attributes(network, "ip") == {"address": "172.30.5.1", "netmask": "255.255.255.0"}
    assert attributes(network, "ip/dhcp/range") == {"start": "172.30.5.2", "end": "172.30.5.254"}
    # An interface's name has 15 characters (netdevice(7)).
    assert len(attributes(network, "bridge")["name"]) <= 15


def test_an_isolated_network_is_forwarded_nowhere() -> None:
    network = ET.fromstring(network_xml(NetworkSpec(str(uuid.uuid4()), "lab", "isolated", "172.30.6.0/24")))
    assert network.find("forward") is None


@pytest.mark.parametrize("cidr", ["", "172.30.0.0/30", "fd00::/64", "172.30.5.1/24", "x"])
def test_a_subnet_that_is_none_is_refused(cidr: str) -> None:
    with pytest.raises(ValueError):
        network_xml(NetworkSpec(str(uuid.uuid4()), "n", "nat", cidr))
