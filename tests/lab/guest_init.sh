#!/bin/busybox sh
# shellcheck shell=dash
# PID 1 of the lab's small guest: what cloud-init does in a real one, in a second. It fetches the order's
# startup script from the seed, runs it, and reports its start to the host, again and again.
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec </dev/console >/dev/console 2>&1
for module in virtio_pci virtio_blk virtio_console isofs nvme; do
  modprobe "$module"
done

report() {
  for name in /sys/class/virtio-ports/*/name; do
    if [ "$(cat "$name")" = ai.gpu.gpud.0 ]; then
      node=${name%/name}
      echo "gpud1 started $(cat /proc/sys/kernel/random/boot_id)" >"/dev/${node##*/}"
    fi
  done
}

mkdir /seed
mount -t iso9660 -o ro /dev/vdb /seed
echo "small guest: up after $(cut -d ' ' -f 1 /proc/uptime) s"
while true; do
  report
  sleep 20
done &
sh /seed/startup-script
echo "small guest: script ended with $?"
while true; do
  sleep 3600
done
