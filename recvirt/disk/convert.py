"""Makes the wanted file formats from the raw disk, side by side."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from recvirt.disk import formats, ova
from recvirt.disk.layout import Layout, derived_uuid
from recvirt.disk.sparse import copy_sparse
from recvirt.sandbox import ToolsRoot


@dataclass(frozen=True)
class Converter:
    """What converting needs. ``name`` is what a hypervisor calls the VM of an OVA."""

    disk: Path
    layout: Layout
    out: Path
    scratch: Path
    tools: ToolsRoot
    log: Path
    name: str
    product: str
    epoch: int

    def write(self, wanted: tuple[str, ...]) -> list[Path]:
        """Write every format in ``wanted``; the paths, in the same order."""
        steps: dict[str, Callable[[], Path]] = {
            "qcow2": self._qcow2, "raw": self._raw, "vhd": self._vhd, "vmdk": self._vmdk,
        }  # fmt: skip
        with ThreadPoolExecutor() as pool:
            running = {name: pool.submit(step) for name, step in steps.items() if name in wanted}
            if "ova" in wanted:
                # Without a VMDK of its own among the formats, the OVA's is made beside them.
                source = running.get("vmdk") or pool.submit(self._vmdk, self.scratch)
                running["ova"] = pool.submit(lambda: self._ova(source.result()))
            return [running[name].result() for name in wanted]

    def _output(self, name: str, folder: Path | None = None) -> Path:
        return (folder or self.out) / formats.FILE_NAMES[name]

    def _run(self, argv: list[str]) -> None:
        self.tools.run(argv, writable=[self.scratch, self.out], readable=[self.disk], log_path=self.log)

    def _qcow2(self) -> Path:
        self._run(formats.qcow2_argv(self.disk, self._output("qcow2")))
        return self._output("qcow2")

    def _raw(self) -> Path:
        copy_sparse(self.disk, self._output("raw"))
        return self._output("raw")

    def _vhd(self) -> Path:
        output = self._output("vhd")
        copy_sparse(self.disk, output)
        with output.open("ab") as stream:
            stream.write(formats.vhd_footer(self.layout.size_bytes, derived_uuid(self.layout.seed, "vhd"), self.epoch))
        return output

    def _vmdk(self, folder: Path | None = None) -> Path:
        output = self._output("vmdk", folder)
        self._run(formats.vmdk_argv(self.disk, output))
        with output.open("r+b") as stream:
            formats.patch_vmdk(stream, derived_uuid(self.layout.seed, "vmdk"))
        return output

    def _ova(self, vmdk: Path) -> Path:
        machine = ova.Machine(self.name, self.product, self.layout.size_bytes, vmdk.stat().st_size)
        text = ova.descriptor(machine, f"{self.name}-disk1.vmdk")
        ova.write_ova(self._output("ova"), self.name, text, vmdk, self.epoch)
        return self._output("ova")
