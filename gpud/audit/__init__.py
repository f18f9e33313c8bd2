"""Holds the record, libvirt, the kernel, the files and the daemon's own word against each other."""
