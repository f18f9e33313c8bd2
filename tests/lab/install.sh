#!/bin/bash
# Installs gpud in the lab's server, as root, the way an operator would: the package, the configuration, the guest
# images. Argument: the directory with all of it.
set -euo pipefail
here=$1

# libvirt looks at QEMU once, for 20 s here: meanwhile.
virsh domcapabilities --virttype kvm >/dev/null &

# The lab's cards are not NVIDIA's: what an operator with other cards would add.
install -m 0644 "$here/70-gpud-local.rules" /etc/udev/rules.d/
# NVIDIA's driver is not here; its library is, in the shape of a stand-in that tells what a file says.
install -m 0644 "$here/nvml/libnvidia-ml.so.1" /usr/lib/x86_64-linux-gnu/
install -m 0644 "$here/fake-nvml.txt" /etc/

DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends "$here/gpud.deb"
install -m 0640 -g gpud "$here/gpud.yaml" "$here/issuer.jwks" /etc/gpud/
gpud config check
systemctl restart gpud

# The images go to where the daemon keeps them, as the daemon's user; both at once, which takes half as long.
# Unsealed: emulated, it would take another minute to look into them, and the small one is no whole system.
add_image() { setpriv --reuid gpud --regid gpud --init-groups gpud image add "$1" --name "$2" --unsealed; }
add_image "$here/whole.qcow2" whole &
whole=$!
add_image "$here/small.raw" small
wait $whole
