#!/bin/bash
# Installs gpud in the lab's server, as root, the way an operator would: the package, its user, its files for
# systemd and udev, the configuration, the guest images. Argument: the directory with all of it.
set -euo pipefail
here=$1

# libvirt looks at QEMU once, for 20 s here: meanwhile.
virsh domcapabilities --virttype kvm >/dev/null &

/opt/gpud/bin/pip -qq --disable-pip-version-check install --no-index --no-deps "$here"/gpud-*.whl
ln -sf /opt/gpud/bin/gpud /usr/bin/gpud

cd "$here/systemd"
install -m 0644 gpud.service /etc/systemd/system/
install -m 0644 gpud.sysusers.conf /usr/lib/sysusers.d/gpud.conf
install -m 0644 gpud.tmpfiles.conf /usr/lib/tmpfiles.d/gpud.conf
install -m 0644 gpud.modules-load.conf /usr/lib/modules-load.d/gpud.conf
install -m 0644 71-gpud.rules /usr/lib/udev/rules.d/
# The lab's cards are not NVIDIA's: what an operator with other cards would add.
install -m 0644 "$here/70-gpud-local.rules" /etc/udev/rules.d/

systemd-sysusers
systemd-tmpfiles --create gpud.conf
systemctl restart systemd-modules-load
udevadm control --reload
udevadm trigger --type=subsystems --action=add
udevadm trigger --action=add
udevadm settle
systemctl daemon-reload

# NVIDIA's driver is not here; its library is, in the shape of a stand-in that tells what a file says.
install -m 0644 "$here/nvml/libnvidia-ml.so.1" /usr/lib/x86_64-linux-gnu/
install -m 0644 "$here/fake-nvml.txt" /etc/

install -m 0640 -g gpud "$here/gpud.yaml" "$here/issuer.jwks" /etc/gpud/
gpud config check /etc/gpud/gpud.yaml
systemctl enable --quiet --now gpud

# The images go to where the daemon keeps them, as the daemon's user; both at once, which takes half as long.
# Unsealed: emulated, it would take another minute to look into them, and the small one is no whole system.
add_image() { setpriv --reuid gpud --regid gpud --init-groups gpud image add "$1" --name "$2" --unsealed; }
add_image "$here/whole.qcow2" whole &
whole=$!
add_image "$here/small.raw" small
wait $whole
