"""What a domain's serial console has said: the file that libvirt's virtlogd keeps, and nobody but root may read.

It is read through libvirt, as a volume of a pool over the folder, so that a worker needs no right beyond the one that
it has. Owns that pool.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

from recvirt.nestedcloud.worker.hypervisor import fault_of

POOL = "recvirt-console-logs"
#: virtlogd begins a new file after 2 MiB (max_size in virtlogd.conf).
LOG_BYTES_MAX = 8 * 1024**2
_READ_BYTES = 256 * 1024
_GONE = (libvirt.VIR_ERR_NO_STORAGE_VOL, libvirt.VIR_ERR_NO_STORAGE_POOL)


def _pool(connection: Any, folder: Path) -> Any:
    try:
        pool = connection.storagePoolLookupByName(POOL)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
            raise
        element = ET.Element("pool", type="dir")
        ET.SubElement(element, "name").text = POOL
        ET.SubElement(ET.SubElement(element, "target"), "path").text = str(folder)
        try:
            return connection.storagePoolCreateXML(ET.tostring(element, encoding="unicode"))
        except libvirt.libvirtError:
            # Somebody else has just made it, or it can't be made; then this says so.
            pool = connection.storagePoolLookupByName(POOL)
    return pool


def read_log(connection: Any, path: Path, offset: int) -> tuple[bytes, int]:
    """What stands in the file from ``offset`` on, and the offset behind it; from the start when it was begun anew.

    May wait for libvirtd. ActionError when it can't be read; a file that is not there is empty.
    """
    try:
        pool = _pool(connection, path.parent)
        try:
            volume = pool.storageVolLookupByName(path.name)
        except libvirt.libvirtError as error:
            if error.get_error_code() not in _GONE:
                raise
            pool.refresh()
            volume = pool.storageVolLookupByName(path.name)
        # Looks at the file anew.
        size = int(volume.info()[1])
        if size < offset:
            offset = 0
        count = min(size - offset, LOG_BYTES_MAX)
        if count == 0:
            return b"", offset
        stream = connection.newStream()
        volume.download(stream, offset, count)
        data = _drain(stream)
        stream.finish()
    except libvirt.libvirtError as error:
        if error.get_error_code() in _GONE:
            return b"", 0
        raise fault_of(error) from None
    return data, offset + len(data)


def _drain(stream: Any) -> bytes:
    parts: list[bytes] = []
    while data := stream.recv(_READ_BYTES):
        parts.append(data)
    return b"".join(parts)
