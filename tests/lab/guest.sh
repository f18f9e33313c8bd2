#!/bin/bash
# Builds the lab's small guest: a BIOS-bootable disk with a kernel, busybox and guest_init.sh, up within
# seconds where a whole distribution takes minutes. The parts come from the server's image.
set -euo pipefail

usage() {
  cat <<USAGE
usage: ${0##*/} [--help] SERVER OUT.raw
  SERVER  the directory that build.sh has made
USAGE
}

case ${1-} in
  --help | -h) usage; exit 0 ;;
  '' | -*) usage >&2; exit 2 ;;
esac
[[ $# -eq 2 ]] || { usage >&2; exit 2; }
server=$1 out=$2
here=$(dirname -- "$(realpath -- "$0")")
grub=/usr/lib/grub/i386-pc
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT

# Archives of an initramfs may follow each other: the second adds the first program to the tools.
install -D -m 0755 "$here/guest_init.sh" "$work/root/init"
cp -- "$server/guest-tools.cpio" "$work/initrd"
(cd "$work/root" && echo init | cpio --quiet -o -H newc) >>"$work/initrd"

# No file system: GRUB is told the sectors. Its first sector loads the second, that the rest of GRUB.
sectors() { echo $((($(stat -c %s "$1") + 511) / 512)); }
kernel_at=2048
initrd_at=$((kernel_at + $(sectors "$server/vmlinuz")))
end=$((initrd_at + $(sectors "$work/initrd")))
cat >"$work/grub.cfg" <<GRUB
linux (hd0)$kernel_at+$(sectors "$server/vmlinuz") console=ttyS0,115200 quiet panic=5 mitigations=off
initrd (hd0)$initrd_at+$(sectors "$work/initrd")
boot
GRUB
grub-mkimage -O i386-pc -d "$grub" -c "$work/grub.cfg" -p / -o "$work/core.img" biosdisk linux boot
cat "$grub/boot.img" "$work/core.img" >"$out"
dd if="$server/vmlinuz" of="$out" bs=512 seek=$kernel_at conv=notrunc status=none
dd if="$work/initrd" of="$out" bs=512 seek=$initrd_at conv=notrunc status=none
truncate -s $((end * 512)) "$out"
