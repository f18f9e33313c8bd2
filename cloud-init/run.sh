#!/bin/sh
# Runs the startup script, and tells the host that it was started and how it ended.
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

# Says the arguments to the host, a line each, again and again: whoever listened there may have been
# restarted before it could write down what it heard. A write blocks while nobody listens.
tell() {
    while :; do
        if node=$(find_port) && printf '%s\n' "$@" >"$node"; then
            sleep 20
        else
            sleep 0.2
        fi
    done
} 2>/dev/null

tries=0
until online || [ "$tries" -ge 300 ]; do
    tries=$((tries + 1))
    sleep 0.2
done

if [ ! -e "$dir/script" ] || { [ "$runs" = once ] && [ -e "$dir/ran" ]; }; then
    tell "gpud1 started $boot"
fi
touch "$dir/ran"
tell "gpud1 started $boot" &
teller=$!
"$dir/script" </dev/null
code=$?
kill "$teller"
tell "gpud1 started $boot" "gpud1 exited $boot $code"
