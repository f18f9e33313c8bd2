#!/bin/bash
# Builds the emulated GPU server that the lab boots: Debian bookworm with libvirt, QEMU and gpud's Python
# dependencies, everything an operator would install before gpud itself. gpud comes later, at each run, so
# that a change of it costs no new image.
#
# Nothing is mounted and no loop device is used; an ordinary user can run it.
set -euo pipefail

SUITE=bookworm
DISK_MIB=20480          # sparse

# systemd-networkd rather than ifupdown or netplan: nothing to configure but one file.
SERVER=(linux-image-amd64 initramfs-tools zstd systemd-sysv udev dbus dbus-user-session
  libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients qemu-system-x86 qemu-utils ovmf dnsmasq-base
  iptables nftables openssh-server iproute2 pciutils psmisc python3-venv e2fsprogs busybox-static cpio)
# Drivers of the small guest that guest.sh makes: its disk, its reports, its seed and its cards.
GUEST_MODULES=(virtio_pci virtio_blk virtio_console isofs nvme)

usage() {
  cat <<USAGE
usage: ${0##*/} [--help] REQUIREMENTS OUT
  Builds the lab's server and puts it into the directory OUT: root.qcow2, vmlinuz, initrd.img, and
  guest-tools.cpio, what a small guest is made of.
  REQUIREMENTS  what pip installs into /opt/gpud of the server, one requirement a line
  TMPDIR        where scratch goes (about 4 GiB); without it, /var/tmp
USAGE
}

case ${1-} in
  --help | -h) usage; exit 0 ;;
  '' | -*) usage >&2; exit 2 ;;
esac
[[ $# -eq 2 ]] || { usage >&2; exit 2; }
PATH=$PATH:/usr/sbin:/sbin     # an ordinary user's PATH lacks mke2fs

step() { printf 'lab server: %s/4 %s (%d s)\n' "$1" "$2" "$SECONDS" >&2; }

requirements=$(realpath -- "$1")
out=$(realpath -m -- "$2")
part=$out.part.$$              # beside OUT, so that the last step is a rename
work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" lab-build.XXXXXX)
trap 'rm -rf -- "$work" "$part"' EXIT
trap 'exit 1' HUP INT TERM
chmod 0755 "$work"
mkdir -p -- "$part"

step 1 'wheels'
# Debian's own Python, because the server's is the same: a wheel with C code fits one Python only.
/usr/bin/python3 -m venv "$work/venv"
"$work/venv/bin/pip" -qq --disable-pip-version-check install --upgrade 'pip>=25.1'
"$work/venv/bin/pip" -qq --disable-pip-version-check wheel --prefer-binary \
  --requirement "$requirements" --wheel-dir "$work/wheels"
cp -- "$requirements" "$work/wheels/requirements.txt"

# The mirror apt already uses here, if it is a Debian one; else mmdebstrap's own default.
# shellcheck disable=SC2016  # apt's fields, not the shell's
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Label: Debian' \
  'Created-By: Packages' 2>/dev/null | head -n 1 || true)

step 2 "packages from ${mirror:-the default mirror}"
# The initramfs names its drivers because it is built where the server's hardware cannot be seen.
cat >"$work/early" <<'HOOK'
set -eu
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
echo '/dev/vda / ext4 defaults 0 0' >"$1/etc/fstab"
printf 'MODULES=list\nFSTYPE=ext4\nCOMPRESS=zstd\nCOMPRESSLEVEL=3\n' >"$1/etc/initramfs-tools/conf.d/server"
printf '%s\n' virtio_pci virtio_blk ext4 crc32c >"$1/usr/share/initramfs-tools/modules.d/server"
HOOK
# What an administrator would set up before gpud comes. Services that only cost time here are left out.
cat >"$work/customize" <<'HOOK'
set -eu
wheels=$2
cd "$1"
echo gpu-server >etc/hostname
printf '127.0.0.1 localhost gpu-server\n' >etc/hosts
printf '[Match]\nDriver=virtio_net\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\n' >etc/systemd/network/10-uplink.network
printf '%s\n' vfio-pci kvm_amd vhost_net >etc/modules-load.d/server.conf
printf 'PermitRootLogin prohibit-password\nUseDNS no\nUsePAM no\n' >etc/ssh/sshd_config.d/lab.conf
chroot . systemctl --quiet enable systemd-networkd
chroot . systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
  e2scrub_reap.service fstrim.timer systemd-binfmt.service systemd-pstore.service libvirt-guests.service \
  systemd-networkd-wait-online.service nftables.service
chroot . libvirtd --version
cp -r "$wheels" root/wheels
chroot . python3 -m venv /opt/gpud
chroot . /opt/gpud/bin/pip -qq --disable-pip-version-check install --no-index --find-links /root/wheels \
  --requirement /root/wheels/requirements.txt
rm -rf root/wheels var/log/*.log
cp -L vmlinuz initrd.img "$3/"
# The small guest's tools: busybox, and modules of the server's kernel with what they depend on.
kernel=$(ls lib/modules)
mkdir -p tmp/guest/bin tmp/guest/dev tmp/guest/proc tmp/guest/sys
cp bin/busybox tmp/guest/bin/
for module in $GUEST_MODULES; do
  chroot . modprobe --set-version "$kernel" --show-depends "$module"
done | sed -n 's/^insmod \/\([^ ]*\).*/\1/p' | sort -u | cpio --quiet -pd tmp/guest
cp lib/modules/*/modules.order lib/modules/*/modules.builtin "tmp/guest/lib/modules/$kernel/"
chroot . depmod --basedir /tmp/guest "$kernel"
(cd tmp/guest && find . | cpio --quiet -o -H newc) >"$3/guest-tools.cpio"
rm -rf tmp/guest
HOOK
GUEST_MODULES=${GUEST_MODULES[*]} mmdebstrap --quiet --mode=auto --variant=minbase --format=tar \
  --include="${SERVER[*]}" --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' \
  --essential-hook="sh '$work/early' \"\$1\"" \
  --customize-hook="sh '$work/customize' \"\$1\" '$work/wheels' '$part'" \
  "$SUITE" "$work/root.tar" ${mirror:+"$mirror"} >&2

step 3 'root file system'
mkdir "$work/root"
as_root=()
[[ $EUID -eq 0 ]] || as_root=(fakeroot)
# shellcheck disable=SC2016  # expanded by the inner shell
"${as_root[@]}" sh -euc 'tar -xf "$1/root.tar" --numeric-owner -C "$1/root" && rm "$1/root.tar"
  exec mke2fs -q -F -t ext4 -m 0 -E lazy_itable_init=0,lazy_journal_init=0 -d "$1/root" "$1/disk.raw" "$2"' \
  sh "$work" "${DISK_MIB}M"

step 4 'qcow2'
qemu-img convert -O qcow2 "$work/disk.raw" "$part/root.qcow2"
chmod 0644 "$part"/*
rm -rf -- "$out"
mv -- "$part" "$out"
printf 'lab server: %s, %d MiB (%d s)\n' "$out" $(($(stat -c %s "$out/root.qcow2") >> 20)) "$SECONDS" >&2
