"""A worker: one hypervisor's hands. It gets commands from the queue, acts through libvirt, and reports; no database."""
