"""Reads an image file: what is in it, and how two of them differ. An image is hostile input and is never written to.

Owns: file formats, reading files out of filesystems without mounting, the findings. Programs of the tools root do the
reading, in a sandbox without network. Does not own: how images are made (:mod:`recvirt.disk`).
"""
