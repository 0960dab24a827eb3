"""The disk inside an image: partitions, boot loader, filesystems and file formats.

Owns bytes and command lines; reads no profile and knows nothing of stages.
"""
