#!/usr/bin/env bash
# Makes this machine ready for `make demo` and `make test`: system packages, /dev/kvm, a libvirtd.
# Can be run any number of times; does nothing where nothing is missing. Arguments: further packages.
set -euo pipefail

packages=(
  # to build and run the daemon
  python3 python3-venv python3-dev gcc libc6-dev pkg-config libvirt-dev
  # to make a package of it
  dpkg-dev binutils
  # the hypervisor
  qemu-system-x86 qemu-utils ovmf libvirt-daemon-system libvirt-clients dnsmasq-base iptables
  # the guest image, and the golden one
  mmdebstrap debian-archive-keyring gpgv fakeroot uidmap grub-efi-amd64-bin grub-pc-bin grub-common mtools dosfstools fdisk e2fsprogs
  # the lab's small guest
  cpio
  # the far end of the guest's tunnel, and what the tests look with
  openssh-server openssh-client prometheus nginx caddy xorriso shellcheck git curl jq ca-certificates
  systemd man-db mandoc
  "$@"
)

say() { printf 'setup: %s\n' "$*" >&2; }

missing=()
for package in "${packages[@]}"; do
  state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
  [[ $state == installed ]] || missing+=("$package")
done

as_root=()
[[ $EUID -eq 0 ]] || as_root=(sudo -n)

if ((${#missing[@]})); then
  if [[ $EUID -ne 0 ]] && ! sudo -n true 2>/dev/null; then
    say "run this, then try again: sudo apt-get install --no-install-recommends ${missing[*]}"
    exit 1
  fi
  say "installing ${#missing[@]} packages: ${missing[*]}"
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# With another mode libvirt finds KVM unusable at each call and probes QEMU again, for minutes. udev
# sets it on an ordinary host; in a container nobody does.
if [[ -e /dev/kvm && $EUID -eq 0 && $(stat -c %a:%G /dev/kvm) != 660:kvm ]]; then
  say "/dev/kvm gets the mode udev would give it, 0660 root:kvm"
  chgrp kvm /dev/kvm
  chmod 0660 /dev/kvm
fi

answers() { virsh -q -c qemu:///session version >/dev/null 2>&1; }
if ! answers && [[ $EUID -eq 0 ]]; then
  say "starting libvirtd"
  # sshd and libvirtd expect directories that systemd would have made.
  mkdir -p /run/sshd
  pidof virtlogd >/dev/null || virtlogd -d
  libvirtd -d
  for _ in {1..50}; do
    answers && break
    sleep 0.2
  done
fi
answers || { say "libvirt does not answer: virsh -c qemu:///session version"; exit 1; }
mkdir -p /run/sshd 2>/dev/null || true
