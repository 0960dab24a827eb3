"""libvirt's networks: there, running, and with the addresses that are kept for cards.

Owns the reservations in a network's DHCP. Does not own the connection or how errors are told (``hypervisor``).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

from recvirt.nestedcloud.addresses import HostSpec
from recvirt.nestedcloud.model import InstanceSpec, ModelError, NetworkSpec
from recvirt.nestedcloud.worker.domain import host_element, network_name, network_xml

_SECTION = libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST
_ADD, _DELETE = libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST, libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE
#: What a network is now, and what it will be when it is started again: each has reservations of its own.
_CONFIG, _LIVE = libvirt.VIR_NETWORK_UPDATE_AFFECT_CONFIG, libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE

#: In which order they are believed.
_SOURCES = (libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_AGENT, libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_ARP)
_AGENT_SECONDS = 1

#: Calls libvirt; its errors become ActionErrors.
Call = Callable[..., Any]


class Networks:
    """Those of one connection. ``lasting``: they are more than what runs now; in libvirt's test driver they are not."""

    def __init__(self, connection: Any, call: Call, *, lasting: bool = True) -> None:
        self._connection = connection
        self._call = call
        self._lasting = lasting

    def find(self, uuid: str) -> Any | None:
        """libvirt's network, or None."""
        return self._call(self._look, uuid)

    def _look(self, uuid: str) -> Any | None:
        try:
            return self._connection.networkLookupByName(network_name(uuid))
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
                return None
            raise

    def ensure(self, spec: NetworkSpec, instance: InstanceSpec | None = None) -> None:
        """Define and start a network, have it come back with libvirtd, and keep its addresses for its cards.

        What is kept for others is only added to: the message may be an old one. The cards of ``instance`` come first.
        """
        network = self.find(spec.uuid)
        if network is None:
            network = self._call(self._connection.networkDefineXML, network_xml(spec))
        if not network.isActive():
            try:
                network.create()
            except libvirt.libvirtError:
                # The first two instances of a network may come at once, each to a process of its own.
                if not network.isActive():
                    self._call(network.create)
        self._call(network.setAutostart, 1)
        if spec.kind == "bridge":
            return
        self._keep(network, own_hosts(instance, spec.uuid), instead=True)
        self._keep(network, spec.hosts, instead=False)

    def remove(self, uuid: str) -> None:
        """Stop and forget a network, unless it is gone."""
        network = self.find(uuid)
        if network is None:
            return
        if network.isActive():
            self._call(network.destroy)
        self._call(network.undefine)

    def let_go(self, instance: InstanceSpec) -> None:
        """Keep the addresses of an instance's cards no more."""
        for uuid in sorted({nic.network for nic in instance.nics}):
            network = self.find(uuid)
            if network is None:
                continue
            macs = {nic.mac for nic in instance.nics}
            for flag in self._flags(network):
                for host in _kept(network, flag):
                    if host.mac in macs:
                        self._update(network, _DELETE, host, flag)

    def seen(self, domains: Iterable[Any]) -> tuple[HostSpec, ...]:
        """Addresses on running domains' cards in bridged networks, as far as guests' agents or the host's neighbours
        tell. A guest that does not answer is passed over.
        """
        bridged = {network.name() for network in self._call(self._connection.listAllNetworks) if _is_bridged(network)}
        if not bridged:
            return ()
        found: dict[str, HostSpec] = {}
        for domain in domains:
            try:
                macs = _macs_in(domain, bridged)
                for source in _SOURCES if macs else ():
                    for host in _addresses(domain, source):
                        if host.mac in macs:
                            found.setdefault(host.mac, host)
            except libvirt.libvirtError:
                # It has just gone, or is being stopped.
                continue
        return tuple(found[mac] for mac in sorted(found))

    def _keep(self, network: Any, hosts: Iterable[HostSpec], *, instead: bool) -> None:
        """Have reservations; ``instead`` of others with the same card or address, else only beside them."""
        for flag in self._flags(network):
            there = _kept(network, flag)
            for host in hosts:
                others = [other for other in there if other.mac == host.mac or other.address == host.address]
                if host in others or (others and not instead):
                    continue
                for other in others:
                    self._update(network, _DELETE, other, flag)
                    there.remove(other)
                self._update(network, _ADD, host, flag)
                there.append(host)

    def _flags(self, network: Any) -> list[int]:
        if not self._lasting:
            return [_LIVE]
        return [_CONFIG, _LIVE] if network.isActive() else [_CONFIG]

    def _update(self, network: Any, command: int, host: HostSpec, flag: int) -> None:
        text = ET.tostring(host_element(host), encoding="unicode")
        try:
            network.update(command, _SECTION, -1, text, flag)
        except libvirt.libvirtError:
            # Another process may have done it meanwhile.
            if (host in _kept(network, flag)) is (command == _DELETE):
                self._call(network.update, command, _SECTION, -1, text, flag)


def own_hosts(instance: InstanceSpec | None, network: str) -> list[HostSpec]:
    """The addresses of an instance's cards in a network."""
    nics = instance.nics if instance is not None else ()
    return [HostSpec(nic.mac, nic.address) for nic in nics if nic.network == network and nic.address]


def _kept(network: Any, flag: int) -> list[HostSpec]:
    """The reservations in a network's DHCP."""
    text = network.XMLDesc(libvirt.VIR_NETWORK_XML_INACTIVE if flag == _CONFIG else 0)
    found = ET.fromstring(text).iterfind("ip/dhcp/host")  # noqa: S314 - libvirt wrote it
    return [HostSpec(item.get("mac", ""), item.get("ip", "")) for item in found]


def _is_bridged(network: Any) -> bool:
    """Whether it is one of ours where others hand out the addresses."""
    if not network.name().startswith("recvirt-"):
        return False
    forward = ET.fromstring(network.XMLDesc()).find("forward")  # noqa: S314 - libvirt wrote it
    return forward is not None and forward.get("mode") == "bridge"


def _macs_in(domain: Any, networks: Container[str]) -> set[str]:
    """The domain's cards in some networks."""
    cards = ET.fromstring(domain.XMLDesc()).iterfind("devices/interface")  # noqa: S314 - libvirt wrote it
    return {
        card.find("mac").get("address", "")  # type: ignore[union-attr]
        for card in cards
        if (source := card.find("source")) is not None and source.get("network") in networks
    }


def _addresses(domain: Any, source: int) -> Iterator[HostSpec]:
    """What one source tells. A guest may say anything: what is no address of a card is left out."""
    try:
        if source == libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_AGENT:
            domain.agentSetResponseTimeout(_AGENT_SECONDS)
        links = domain.interfaceAddresses(source)
    except libvirt.libvirtError:
        # No agent, mostly.
        return
    for link in links.values():
        for address in link["addrs"] or ():
            try:
                yield HostSpec(str(link["hwaddr"]), str(address["addr"]))
            except ModelError:
                continue
