"""First-boot data of an instance: a NoCloud seed (cloud-init's manual, "NoCloud") as an ISO 9660 image.

User data are the owner's own bytes and go in as they are; what the cloud adds stands in vendor data, so that the two
never have to be merged as text. JSON is YAML: every value is quoted by construction.
"""

from __future__ import annotations

import io
import json

from recvirt.nestedcloud.model import InstanceSpec

#: user-data, meta-data and vendor-data, by their names on the disk.
Files = dict[str, bytes]


def seed_files(spec: InstanceSpec) -> Files:
    """The three documents. The instance's identity never changes, so cloud-init runs once, not at each start."""
    meta = {"instance-id": spec.uuid, "local-hostname": spec.name, "public-keys": list(spec.ssh_keys)}
    vendor = {"ssh_pwauth": False, "growpart": {"mode": "auto", "devices": ["/"]}}
    return {
        "meta-data": (json.dumps(meta, indent=1) + "\n").encode(),
        "user-data": (spec.user_data or "#cloud-config\n{}\n").encode(),
        "vendor-data": ("#cloud-config\n" + json.dumps(vendor, indent=1) + "\n").encode(),
    }


def seed_image(spec: InstanceSpec) -> bytes:
    """The disk's bytes."""
    import pycdlib

    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, vol_ident="cidata", joliet=3, rock_ridge="1.09")
    for name, data in seed_files(spec).items():
        iso_name = "/" + name.upper().replace("-", "_") + ".;1"
        iso.add_fp(io.BytesIO(data), len(data), iso_name, rr_name=name, joliet_path=f"/{name}")
    target = io.BytesIO()
    iso.write_fp(target)
    iso.close()
    return target.getvalue()
