"""The Intel side: the image's own kernel on a processor with VMX that Bochs emulates."""

from __future__ import annotations

from recvirt.accept.bochs import run_vmx_check
from recvirt.accept.context import Acceptance
from recvirt.accept.registry import check
from recvirt.accept.results import Failed

#: On a quiet machine the whole takes about four minutes; Bochs interprets, whatever accelerator there is.
_SECONDS = 600.0


@check("vmx-on-bochs", "vmx")
def vmx_on_bochs(acceptance: Acceptance) -> str:
    """On an emulated Intel processor the kernel loads kvm_intel with nesting and EPT, and runs an L2"""
    missing = [name for name in ("kernel", "nested-check") if name not in acceptance.debs]
    tools = acceptance.extra_tools.get("bochs")
    if missing or tools is None:
        raise Failed(f"not at hand: {', '.join(missing) or 'Bochs'}; recvirt build {acceptance.profile.name} makes it")
    result = run_vmx_check(
        tools, acceptance.debs["kernel"], acceptance.debs["nested-check"], acceptance.work_dir / "vmx",
        timeout_seconds=acceptance.patience(_SECONDS),
    )  # fmt: skip
    if not result.ok:
        raise Failed("; ".join(result.problems) + "\n" + "\n".join(result.lines[-15:]))
    acceptance.measure("vmx", dict(result.report))
    return f"{result.kernel_release}: proved in {result.seconds:.0f} s"
