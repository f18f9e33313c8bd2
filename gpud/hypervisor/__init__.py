"""libvirt behind one door: what a guest and its network look like, and the daemon that runs them."""
