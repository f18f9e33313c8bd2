#!/bin/sh
# Makes this machine ready for the files that were installed: the daemon's user and directories, its
# configuration where there is none yet, its rights on cards. Changes nothing where nothing is missing.
#
# Works in a chroot and in a container too; what needs systemd, udev or the kernel waits for the next boot there.
set -eu
lib=$(dirname -- "$(realpath -- "$0")")

systemd-sysusers "$lib/../sysusers.d/gpud.conf"

systemd-tmpfiles --create --exclude-prefix=/sys "$lib/../tmpfiles.d/gpud.conf"

# The kernel is this root's own where systemd runs, if not in a container, which may not change it.
if [ -d /run/systemd/system ]; then
  modprobe -q vfio-pci || echo "gpud: module vfio-pci cannot be loaded; gpud doctor says more" >&2
  systemd-tmpfiles --create --prefix=/sys "$lib/../tmpfiles.d/gpud.conf" || true
fi

if [ "${1-}" != --keep-config ] && [ ! -e /etc/gpud/gpud.yaml ]; then
  install -m 0640 -g gpud "$lib/minimal.yaml" /etc/gpud/gpud.yaml
fi

# Cards and drivers that are there already get what the rules give to those that come.
if [ -S /run/udev/control ]; then
  udevadm control --reload
  udevadm trigger --action=change --subsystem-match=pci
  udevadm trigger --action=change --type=subsystems --subsystem-match=drivers
  udevadm settle --timeout=30 || true
fi
[ ! -d /run/systemd/system ] || systemctl daemon-reload || true
