"""recvirt: from a YAML profile to a proved, bootable Debian image that is itself a hypervisor."""

__version__ = "0.1.0"
