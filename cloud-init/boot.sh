#!/bin/sh
# Runs at each boot, before the network is up. Arguments: the units to start.
dir=/usr/local/lib/gpud

fetch() {
    seed=$(mktemp -d)
    mount -o ro LABEL=cidata "$seed" && {
        [ ! -e "$seed/startup-script" ] || install -m 0700 "$seed/startup-script" "$dir/script"
        touch "$dir/fetched"
        umount "$seed"
    }
    rmdir "$seed"
}

# Grows the root file system where it is ext4 on a plain partition, beside what cloud-init does
# meanwhile; its own modules for that come later, and do the rest.
grow() {
    root=$(findmnt --noheadings --nofsroot --output SOURCE /)
    read -r number <"/sys/class/block/${root##*/}/partition" || return
    disk=$(readlink -f "/sys/class/block/${root##*/}/..")
    growpart "/dev/${disk##*/}" "$number" && resize2fs "$root"
}

if [ ! -e "$dir/fetched" ]; then
    fetch
    # Without a reload: systemd reads units that it has not seen yet when they are started.
    systemctl enable --no-reload "$@"
fi
# The units wait for the network, which comes up when cloud-init has ended this stage: by then the file
# system has usually grown.
systemctl start --no-block "$@"
grow >/dev/null 2>&1 &
