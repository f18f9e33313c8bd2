#!/bin/bash
# Builds the guest image the tests boot: a Debian bookworm cloud image, made from Debian packages alone,
# because the tests must run where no image server can be reached.
#
# Nothing is mounted and no loop device is used, so it works in a container and as an ordinary user:
# every file system is filled in place, at its offset inside the raw disk.
set -euo pipefail

SUITE=bookworm
LABEL=gpud-guest        # root file system label: GRUB, the kernel and fstab find the disk by it
DISK_MIB=3072           # sparse; tests grow it with a larger overlay
ESP_MIB=64
GRUB_SECTOR=34          # the first behind the partition table

# What the host needs: command -> Debian/Ubuntu package.
declare -A HOST=(
  [mmdebstrap]=mmdebstrap [grub-mkimage]=grub-common [mformat]=mtools
  [sfdisk]=fdisk [mke2fs]=e2fsprogs [qemu-img]=qemu-utils
  [/usr/lib/grub/x86_64-efi/linux.mod]=grub-efi-amd64-bin [/usr/lib/grub/i386-pc/boot.img]=grub-pc-bin
  [/usr/share/keyrings/debian-archive-keyring.gpg]=debian-archive-keyring
)
# An ordinary user also needs stand-ins for what only root may do.
[[ $EUID -eq 0 ]] || HOST+=([fakeroot]=fakeroot [newuidmap]=uidmap)

# What the guest is made of. systemd-networkd rather than netplan: one Python start less at boot.
GUEST=(linux-image-cloud-amd64 initramfs-tools zstd systemd-sysv udev dbus cloud-init cloud-guest-utils fdisk
  e2fsprogs openssh-server openssh-client iproute2 systemd-resolved locales sudo pciutils)

usage() {
  cat <<USAGE
usage: ${0##*/} [--help] [--packages] OUT.qcow2
  Builds a Debian $SUITE guest (UEFI and BIOS, cloud-init, serial console) and puts it at OUT.qcow2.
  --packages  print the host packages this script needs, and exit
  TMPDIR      where scratch goes (about 2 GiB); without it, /var/tmp
USAGE
}

case ${1-} in
  --help | -h) usage; exit 0 ;;
  --packages) printf '%s\n' "${HOST[@]}" | sort -u; exit 0 ;;
  '' | -*) usage >&2; exit 2 ;;
esac
[[ $# -eq 1 ]] || { usage >&2; exit 2; }
PATH=$PATH:/usr/sbin:/sbin     # an ordinary user's PATH lacks mke2fs and sfdisk

step() { printf 'guest image: %s/5 %s (%d s)\n' "$1" "$2" "$SECONDS" >&2; }

step 1 'host tools'
missing=()
for need in "${!HOST[@]}"; do
  [[ -e $need ]] || command -v "$need" >/dev/null || missing+=("${HOST[$need]}")
done
if ((${#missing[@]})); then
  echo "guest image: missing packages: $(printf '%s\n' "${missing[@]}" | sort -u | xargs)" >&2
  exit 1
fi

out=$(realpath -m -- "$1")
mkdir -p -- "${out%/*}"
part=$out.part.$$              # same directory as OUT, so that the last step is a rename
# Not next to OUT: mmdebstrap's unshared user has another uid, which a home directory does not let in.
work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" guest-build.XXXXXX)
trap 'rm -rf -- "$work" "$part"' EXIT
trap 'exit 1' HUP INT TERM
chmod 0755 "$work"

# The mirror apt already uses here, if it is a Debian one; else mmdebstrap's own default.
# shellcheck disable=SC2016  # apt's fields, not the shell's
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Label: Debian' \
  'Created-By: Packages' 2>/dev/null | head -n 1 || true)

step 2 "packages from ${mirror:-the default mirror}"
# The initramfs names its drivers because it is built where the guest's hardware cannot be seen.
cat >"$work/early" <<'HOOK'
set -eu
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
echo "LABEL=$LABEL / ext4 defaults 0 0" >"$1/etc/fstab"   # 0 0: the initramfs checks it once already
printf 'MODULES=list\nFSTYPE=ext4\nCOMPRESS=zstd\nCOMPRESSLEVEL=3\n' >"$1/etc/initramfs-tools/conf.d/guest"
printf '%s\n' virtio_pci virtio_blk virtio_scsi ahci sd_mod ext4 crc32c >"$1/usr/share/initramfs-tools/modules.d/guest"
HOOK
# A sealed image has no identity, no secrets and nothing that wakes up by itself.
cat >"$work/seal" <<'HOOK'
set -eu
cd "$1"
echo localhost >etc/hostname
ln -sf ../run/systemd/resolve/stub-resolv.conf etc/resolv.conf
echo 'datasource_list: [NoCloud, None]' >etc/cloud/cloud.cfg.d/90_guest.cfg
chroot . systemctl --quiet enable systemd-networkd systemd-resolved
chroot . systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
  e2scrub_all.timer e2scrub_reap.service fstrim.timer systemd-binfmt.service systemd-pstore.service
chroot . passwd --quiet --lock root
: >etc/machine-id
rm -rf etc/ssh/ssh_host_* var/lib/cloud/* var/lib/dbus/machine-id var/lib/systemd/random-seed var/log/*.log
HOOK
LABEL=$LABEL mmdebstrap --quiet --mode=auto --variant=minbase --format=tar \
  --include="${GUEST[*]}" --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' \
  --essential-hook="sh '$work/early' \"\$1\"" --customize-hook="sh '$work/seal' \"\$1\"" \
  "$SUITE" "$work/root.tar" ${mirror:+"$mirror"} >&2

step 3 'root file system'
disk=$work/disk.raw
truncate -s "${DISK_MIB}M" "$disk"
# The root partition is the last one, so that growpart can grow it.
sfdisk --quiet "$disk" <<TABLE
label: gpt
start=1MiB, size=${ESP_MIB}MiB, type=uefi, name=esp
start=$((ESP_MIB + 1))MiB, size=$((DISK_MIB - ESP_MIB - 2))MiB, type=linux, name=root
TABLE
mkdir "$work/root"
as_root=()
[[ $EUID -eq 0 ]] || as_root=(fakeroot)
# Features a newer mke2fs turns on and the GRUB of an older host cannot read are left out. Tables are written
# now (as holes) rather than by a kernel thread in the guest's first minutes.
# shellcheck disable=SC2016  # expanded by the inner shell
"${as_root[@]}" sh -euc 'tar -xf "$1/root.tar" --numeric-owner -C "$1/root" && rm "$1/root.tar"
  exec mke2fs -q -F -t ext4 -L "$2" -m 1 -O ^metadata_csum_seed,^orphan_file \
    -E "offset=$3,lazy_itable_init=0,lazy_journal_init=0" -d "$1/root" "$1/disk.raw" "$4"' \
  sh "$work" "$LABEL" $(((ESP_MIB + 1) * 1048576)) $((DISK_MIB - ESP_MIB - 2))M

step 4 'boot loader'
# One GRUB image with its few commands built in. It is at the removable-media path, so no NVRAM entry is needed.
cat >"$work/grub.cfg" <<GRUB
search --no-floppy --label --set=root $LABEL
linux /vmlinuz root=LABEL=$LABEL ro console=tty0 console=ttyS0,115200 quiet
initrd /initrd.img
boot
GRUB
grub-mkimage -O x86_64-efi -c "$work/grub.cfg" -p /boot/grub -o "$work/BOOTX64.EFI" \
  part_gpt ext2 search search_label linux boot
mformat -i "$disk@@1M" -T $((ESP_MIB * 2048)) -h 64 -s 32 -v ESP ::
mmd -i "$disk@@1M" ::/EFI ::/EFI/BOOT
mcopy -i "$disk@@1M" "$work/BOOTX64.EFI" ::/EFI/BOOT/
# For BIOS the same in the gap before the first partition. The first sector of each part of GRUB says where
# the next part lies, as a little-endian number.
grub-mkimage -O i386-pc -c "$work/grub.cfg" -p /boot/grub -o "$work/core.img" \
  biosdisk part_gpt ext2 search search_label linux boot
put() { dd of="$disk" bs="$1" seek="$2" conv=notrunc status=none; }
sector() { printf '%b' "$(printf '\\x%02x' $(($1 & 255)) $(($1 >> 8)))"; }
head -c 440 /usr/lib/grub/i386-pc/boot.img | put 1 0
put 512 $GRUB_SECTOR <"$work/core.img"
sector $GRUB_SECTOR | put 1 $((0x5c))
sector $((GRUB_SECTOR + 1)) | put 1 $((GRUB_SECTOR * 512 + 0x1f4))

step 5 'qcow2'
qemu-img convert -O qcow2 "$disk" "$part"
chmod 0644 "$part"
mv -f -- "$part" "$out"
printf 'guest image: %s, %d MiB (%d s)\n' "$out" $(($(stat -c %s "$out") >> 20)) "$SECONDS" >&2
