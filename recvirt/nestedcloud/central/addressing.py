"""Which card has which address. A network's subnet is chosen here, so its addresses are too: unique in a network, for
as long as the card is there.

Called in the transaction that makes the card, with its project's row locked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from ipaddress import IPv4Network
from pathlib import Path

from recvirt.nestedcloud.addresses import HostSpec, guest_addresses
from recvirt.nestedcloud.central import specs
from recvirt.nestedcloud.central.models import Instance, InstanceState, Network, NetworkKind, Nic, Worker
from recvirt.nestedcloud.central.problems import NetworkFull, NoCapacity, Refused
from recvirt.nestedcloud.model import ModelError

_SUBNETS = IPv4Network("172.30.0.0/16")
_ROUTES = Path("/proc/net/route")

def routed(path: Path = _ROUTES) -> list[IPv4Network]:
    """What this machine reaches by itself: inside another cloud's instance that is such a subnet as well.

    Not through our own bridges, whose subnets are in the database, nor through the default route.
    """
    try:
        lines = path.read_text().splitlines()[1:]
    except OSError:
        return []
    found = []
    for line in lines:
        name, target, _, _, _, _, _, mask = line.split()[:8]
        if not name.startswith("rv") and int(mask, 16):
            # In the order of the processor's bytes (proc_net(5)).
            address, netmask = (int(text, 16).to_bytes(4, sys.byteorder) for text in (target, mask))
            found.append(IPv4Network((address, int.from_bytes(netmask, "big").bit_count())))
    return found


def free_cidr() -> str:
    """A network of 256 addresses that no other one of the cloud has. NoCapacity when there is none."""
    taken = set(Network.objects.exclude(cidr="").values_list("cidr", flat=True))
    there = routed()
    for block in _SUBNETS.subnets(new_prefix=24):
        if str(block) not in taken and not any(block.overlaps(other) for other in there):
            return str(block)
    raise NoCapacity(f"no subnet of {_SUBNETS} is left")


def free_address(network: Network) -> str:
    """An address that no card has; empty on a bridge, where others hand them out. NetworkFull when all are taken.

    Those after the one that was given last come first: DHCP servers remember for a while whom an address was leased to.
    """
    if network.kind == NetworkKind.BRIDGE:
        return ""
    try:
        addresses = guest_addresses(network.cidr)
    except ModelError as error:
        raise Refused(f"the network {network.name}: {error}") from None
    taken = set(network.nics.exclude(address="").values_list("address", flat=True))
    last = Network.objects.values_list("last_address", flat=True).get(pk=network.pk)
    start = addresses.index(last) + 1 if last in addresses else 0
    found = next((address for address in addresses[start:] + addresses[:start] if address not in taken), None)
    if found is None:
        raise NetworkFull(
            f"the network {network.name} is full: all {len(addresses)} addresses of {network.cidr} are taken",
            network=network.name,
        )
    Network.objects.filter(pk=network.pk).update(last_address=found)
    return found


def add_nic(instance: Instance, network: Network, position: int, bandwidth_kib: int = 0) -> Nic:
    """A card with an address. NetworkFull when there is none."""
    return Nic.objects.create(
        instance=instance, network=network, position=position, mac=specs.new_mac(), bandwidth_kib=bandwidth_kib,
        address=free_address(network),
    )  # fmt: skip


def complete(instance: Instance) -> None:
    """Give addresses to the cards that an older version made without."""
    for nic in instance.nics.filter(address="").exclude(network__kind=NetworkKind.BRIDGE).select_related("network"):
        nic.address = free_address(nic.network)
        nic.save(update_fields=["address"])


def release(instance: Instance) -> None:
    """Its cards are gone: others may have their addresses."""
    instance.nics.update(address="", seen_address="")


def seen(worker: Worker, found: Iterable[HostSpec]) -> None:
    """What a worker saw on cards in networks where others hand out addresses."""
    told = {host.mac: host.address for host in found}
    cards = Nic.objects.filter(instance__worker=worker, network__kind=NetworkKind.BRIDGE)
    for nic in cards.exclude(instance__state=InstanceState.DELETED):
        if nic.mac in told and nic.seen_address != told[nic.mac]:
            nic.seen_address = told[nic.mac]
            nic.save(update_fields=["seen_address"])
