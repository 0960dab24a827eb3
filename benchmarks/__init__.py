"""What recvirt is measured by; see README.md here. Not a part of the package ``recvirt``."""
