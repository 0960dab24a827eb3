"""An OVA: a tar of an OVF descriptor, a manifest and a stream-optimized VMDK (DMTF DSP0243, OVF 1.1).

Pure functions but for the writing of the tar. Does not own: the VMDK itself.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from recvirt.disk.layout import MIB

_BLOCK = 512


@dataclass(frozen=True)
class Machine:
    """What a hypervisor is told about the VM."""

    name: str
    product: str
    virtual_bytes: int
    vmdk_bytes: int
    cpus: int = 2
    memory_mib: int = 2048


_ITEM = """      <Item>
{lines}
      </Item>
"""


def _item(**fields: str | int) -> str:
    # The schema wants the elements in alphabetical order.
    lines = "\n".join(f"        <rasd:{n}>{escape(str(value))}</rasd:{n}>" for n, value in sorted(fields.items()))
    return _ITEM.format(lines=lines)


def _hardware(machine: Machine) -> str:
    return "".join(
        (
            _item(ElementName="CPUs", InstanceID=1, ResourceType=3, VirtualQuantity=machine.cpus),
            _item(
                AllocationUnits="byte * 2^20", ElementName="Memory", InstanceID=2, ResourceType=4,
                VirtualQuantity=machine.memory_mib,
            ),
            _item(
                Address=0, ElementName="SCSI controller", InstanceID=3, ResourceSubType="VirtualSCSI", ResourceType=6
            ),
            _item(
                AddressOnParent=0, ElementName="Disk", HostResource="ovf:/disk/vmdisk1", InstanceID=4, Parent=3,
                ResourceType=17,
            ),
            _item(
                AddressOnParent=7, AutomaticAllocation="true", Connection="nat", ElementName="Network",
                InstanceID=5, ResourceSubType="VmxNet3", ResourceType=10,
            ),
        )
    )  # fmt: skip


def descriptor(machine: Machine, vmdk_name: str) -> str:
    """The OVF text. ``vhv.enable`` and ``nestedHVEnabled`` turn nested virtualization on where VMware reads them."""
    name = quoteattr(machine.name)
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
    xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
    xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
    xmlns:vmw="http://www.vmware.com/schema/ovf">
  <References>
    <File ovf:href={quoteattr(vmdk_name)} ovf:id="file1" ovf:size="{machine.vmdk_bytes}"/>
  </References>
  <DiskSection>
    <Info>Virtual disks</Info>
    <Disk ovf:capacity="{machine.virtual_bytes // MIB}" ovf:capacityAllocationUnits="byte * 2^20" ovf:diskId="vmdisk1"
        ovf:fileRef="file1" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  </DiskSection>
  <NetworkSection>
    <Info>Networks</Info>
    <Network ovf:name="nat">
      <Description>any network with DHCP</Description>
    </Network>
  </NetworkSection>
  <VirtualSystem ovf:id={name}>
    <Info>A virtual machine that runs virtual machines</Info>
    <Name>{escape(machine.name)}</Name>
    <OperatingSystemSection ovf:id="96" vmw:osType="debian12_64Guest">
      <Info>The guest's operating system</Info>
      <Description>{escape(machine.product)}</Description>
    </OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>Virtual hardware</Info>
      <System>
        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>
        <vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>{escape(machine.name)}</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>vmx-14</vssd:VirtualSystemType>
      </System>
{_hardware(machine)}      <vmw:Config ovf:required="false" vmw:key="nestedHVEnabled" vmw:value="true"/>
      <vmw:ExtraConfig ovf:required="false" vmw:key="vhv.enable" vmw:value="TRUE"/>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"""


def manifest(digests: dict[str, str]) -> str:
    """The manifest: a line a file, SHA-256."""
    return "".join(f"SHA256({name})= {digest}\n" for name, digest in digests.items())


def write_ova(output: Path, stem: str, ovf: str, vmdk: Path, epoch: int) -> None:
    """Write the tar: descriptor first (DSP0243 9.1), then the manifest, then the disk."""
    vmdk_name = f"{stem}-disk1.vmdk"
    with vmdk.open("rb") as stream:
        vmdk_digest = hashlib.file_digest(stream, "sha256").hexdigest()
    digests = {f"{stem}.ovf": hashlib.sha256(ovf.encode()).hexdigest(), vmdk_name: vmdk_digest}
    with tarfile.open(output, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, text in ((f"{stem}.ovf", ovf), (f"{stem}.mf", manifest(digests))):
            archive.addfile(_info(name, len(text.encode()), epoch), io.BytesIO(text.encode()))
        with vmdk.open("rb") as stream:
            archive.addfile(_info(vmdk_name, vmdk.stat().st_size, epoch), stream)


def _info(name: str, size: int, epoch: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, epoch, 0o644
    return info
