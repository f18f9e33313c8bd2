#!/bin/sh
# Runs the startup script, and tells the host when it was started and when it ended.
dir=/usr/local/lib/gpud
port=ai.gpu.gpud.0
read -r boot </proc/sys/kernel/random/boot_id
read -r runs <"$dir/runs"

# True once there is a default route, which every network renderer sets last.
online() {
    while read -r _ destination _; do
        [ "$destination" = 00000000 ] && return 0
    done </proc/net/route
    return 1
}

# The port's device node. udev's link in /dev/virtio-ports may come later, or never.
find_port() {
    for file in /sys/class/virtio-ports/*/name; do
        if read -r name <"$file" && [ "$name" = "$port" ]; then
            file=${file%/name}
            echo "/dev/${file##*/}"
            return 0
        fi
    done
    return 1
} 2>/dev/null

# Writing blocks until the host opens its end, so this stands beside the script. It reads on whatever
# happens, since a broken pipe would kill whoever writes to it.
report() {
    while read -r line; do
        tries=0
        until node=$(find_port) && (echo "$line" >"$node") 2>/dev/null; do
            tries=$((tries + 1))
            [ "$tries" -lt 100 ] || break
            sleep 0.2
        done
    done
}

run_script() {
    echo "gpud1 started $boot"
    [ -e "$dir/script" ] || return 0
    if [ "$runs" = once ]; then
        [ ! -e "$dir/ran" ] || return 0
        touch "$dir/ran"
    fi
    # Nothing of the reporting is open in the script: 4 is its input, 3 where its output goes.
    "$dir/script" <&4 >&3 2>&3 3>&- 4<&-
    echo "gpud1 exited $boot $?"
}

tries=0
until online || [ "$tries" -ge 300 ]; do
    tries=$((tries + 1))
    sleep 0.2
done
exec 3>&1
run_script 4</dev/null | report 3>&-
