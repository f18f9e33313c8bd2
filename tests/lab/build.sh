#!/bin/bash
# Builds the emulated GPU server that the lab boots: Debian bookworm, and what gpud's package depends on, since
# apt has no network in there. gpud itself comes later, at each run, so that a change of it costs no new image.
#
# Nothing is mounted and no loop device is used; an ordinary user can run it.
set -euo pipefail

SUITE=bookworm
DISK_MIB=20480          # sparse

# systemd-networkd rather than ifupdown or netplan: nothing to configure but one file.
SERVER=(linux-image-amd64 initramfs-tools zstd systemd-sysv udev dbus dbus-user-session
  libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients qemu-system-x86 qemu-utils ovmf dnsmasq-base
  iptables nftables openssh-server iproute2 pciutils psmisc python3 e2fsprogs fdisk mtools ca-certificates
  grub2-common busybox-static cpio)
# Drivers of the small guest that guest.sh makes: its disk, its reports, its seed and its cards.
GUEST_MODULES=(virtio_pci virtio_blk virtio_console isofs nvme)
# On the server's kernel command line anyway. Without nested paging: with it, as QEMU 7.2 emulates it, now and then
# a guest hung in its boot loader or the server's kernel panicked, presumably over guests in real mode. Without
# it, boots take longer.
CONSOLE='console=ttyS0 mitigations=off kvm_amd.npt=0'

usage() {
  cat <<USAGE
usage: ${0##*/} [--help] OUT
  Builds the lab's server and puts it into the directory OUT: root.qcow2, vmlinuz, initrd.img,
  grub.cfg, and guest-tools.cpio, what a small guest is made of.
  TMPDIR  where scratch goes (about 4 GiB); without it, /var/tmp
USAGE
}

case ${1-} in
  --help | -h) usage; exit 0 ;;
  '' | -*) usage >&2; exit 2 ;;
esac
[[ $# -eq 1 ]] || { usage >&2; exit 2; }
PATH=$PATH:/usr/sbin:/sbin     # an ordinary user's PATH lacks mke2fs

step() { printf 'lab server: %s/3 %s (%d s)\n' "$1" "$2" "$SECONDS" >&2; }

out=$(realpath -m -- "$1")
part=$out.part.$$              # beside OUT, so that the last step is a rename
work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" lab-build.XXXXXX)
trap 'rm -rf -- "$work" "$part"' EXIT
trap 'exit 1' HUP INT TERM
chmod 0755 "$work"
mkdir -p -- "$part"

# The mirror apt already uses here, if it is a Debian one; else mmdebstrap's own default.
# shellcheck disable=SC2016  # apt's fields, not the shell's
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Label: Debian' \
  'Created-By: Packages' 2>/dev/null | head -n 1 || true)

step 1 "packages from ${mirror:-the default mirror}"
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
cd "$1"
echo gpu-server >etc/hostname
printf '127.0.0.1 localhost gpu-server\n' >etc/hosts
printf '[Match]\nDriver=virtio_net\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\n' >etc/systemd/network/10-uplink.network
printf 'PermitRootLogin prohibit-password\nUseDNS no\nUsePAM no\n' >etc/ssh/sshd_config.d/lab.conf
chroot . systemctl --quiet enable systemd-networkd
chroot . systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
  e2scrub_reap.service fstrim.timer systemd-binfmt.service systemd-pstore.service libvirt-guests.service \
  systemd-networkd-wait-online.service nftables.service
chroot . libvirtd --version
# As Debian's installer leaves GRUB, which is asked what the kernel is started with; QEMU starts it.
mkdir -p boot/grub
printf 'GRUB_DISTRIBUTOR=Debian\nGRUB_CMDLINE_LINUX_DEFAULT=quiet\nGRUB_CMDLINE_LINUX="%s"\n' "$CONSOLE" >etc/default/grub
printf 'linux /vmlinuz root=/dev/vda ro %s quiet\n' "$CONSOLE" >boot/grub/grub.cfg
rm -rf var/log/*.log
cp -L vmlinuz initrd.img boot/grub/grub.cfg "$2/"
# The small guest's tools: busybox, and modules of the server's kernel with what they depend on.
kernel=$(ls lib/modules)
mkdir -p tmp/guest/bin tmp/guest/dev tmp/guest/proc tmp/guest/sys
cp bin/busybox tmp/guest/bin/
for module in $GUEST_MODULES; do
  chroot . modprobe --set-version "$kernel" --show-depends "$module"
done | sed -n 's/^insmod \/\([^ ]*\).*/\1/p' | sort -u | cpio --quiet -pd tmp/guest
cp lib/modules/*/modules.order lib/modules/*/modules.builtin "tmp/guest/lib/modules/$kernel/"
chroot . depmod --basedir /tmp/guest "$kernel"
(cd tmp/guest && find . | cpio --quiet -o -H newc) >"$2/guest-tools.cpio"
rm -rf tmp/guest
HOOK
GUEST_MODULES=${GUEST_MODULES[*]} CONSOLE=$CONSOLE mmdebstrap --quiet --mode=auto --variant=minbase --format=tar \
  --include="${SERVER[*]}" --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' \
  --essential-hook="sh '$work/early' \"\$1\"" \
  --customize-hook="sh '$work/customize' \"\$1\" '$part'" \
  "$SUITE" "$work/root.tar" ${mirror:+"$mirror"} >&2

step 2 'root file system'
mkdir "$work/root"
as_root=()
[[ $EUID -eq 0 ]] || as_root=(fakeroot)
# shellcheck disable=SC2016  # expanded by the inner shell
"${as_root[@]}" sh -euc 'tar -xf "$1/root.tar" --numeric-owner -C "$1/root" && rm "$1/root.tar"
  exec mke2fs -q -F -t ext4 -m 0 -E lazy_itable_init=0,lazy_journal_init=0 -d "$1/root" "$1/disk.raw" "$2"' \
  sh "$work" "${DISK_MIB}M"

step 3 'qcow2'
qemu-img convert -O qcow2 "$work/disk.raw" "$part/root.qcow2"
chmod 0644 "$part"/*
rm -rf -- "$out"
mv -- "$part" "$out"
printf 'lab server: %s, %d MiB (%d s)\n' "$out" $(($(stat -c %s "$out/root.qcow2") >> 20)) "$SECONDS" >&2
