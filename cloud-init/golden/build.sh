#!/usr/bin/env bash
# Builds a golden image: takes a distribution's cloud image, boots it once, lets it install what provision.sh
# says, and seals what comes out. Needs no root and nothing that a gpud server lacks; with KVM it takes some
# ten minutes, without it hours.
set -euo pipefail
here=$(dirname -- "$(realpath -- "$0")")

usage() {
  cat <<USAGE
usage: ${0##*/} PROFILE OUT.qcow2
  PROFILE     one of: $(cd "$here" && printf '%s ' *.profile | sed 's/\.profile//g')
              or a file of that kind
environment:
  IMAGE       a cloud image that is here already, instead of the profile's download
  DRIVER      NVIDIA driver version, to the last digit; default $default_driver
  EXTRA       further Debian packages, such as nvidia-fabricmanager for guests that get NVSwitches
  DISK_GIB    size of the image's disk, which no offer's storage may be below; default 16
  CPUS, MEMORY_MIB, TIMEOUT_S   of the machine that it is built in; default 4, 4096, 5400
  GPUD        the gpud command; default gpud
  TMPDIR      where scratch goes (up to twice what the image holds); default /var/tmp
USAGE
}

default_driver=580.95.05
case ${1-} in
  --help | -h) usage; exit 0 ;;
esac
[[ $# -eq 2 ]] || { usage >&2; exit 2; }

say() { printf 'golden: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

profile=$1
[[ -f $profile ]] || profile=$here/$1.profile
[[ -f $profile ]] || die "there is no profile $1; see --help"
# shellcheck source=/dev/null
. "$profile"
out=$(realpath -m -- "$2")
DRIVER=${DRIVER-$default_driver}
EXTRA=${EXTRA-}
gpud=${GPUD:-gpud}
timeout_s=${TIMEOUT_S:-5400}
# Both go into a script that root runs, and into apt's settings.
[[ $DRIVER =~ ^[0-9.]+$ ]] || die "DRIVER=$DRIVER is no version"
[[ $EXTRA =~ ^[a-z0-9.+\ =~:-]*$ ]] || die "EXTRA=$EXTRA is no list of packages"

missing=()
needs=(qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils mformat:mtools)
[[ -n ${IMAGE-} ]] || needs+=(curl:curl gpgv:gpgv)
for need in "${needs[@]}"; do
  command -v "${need%:*}" >/dev/null || missing+=("${need#*:}")
done
((${#missing[@]} == 0)) || die "missing: apt install ${missing[*]}"
# shellcheck disable=SC2086  # it may be a command with arguments
$gpud image seal --help >/dev/null || die "the gpud command does not work: GPUD=$gpud"

work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" golden.XXXXXX)
qemu=
finish() {
  [[ -z $qemu ]] || kill "$qemu" 2>/dev/null || true
  rm -rf -- "$work"
}
trap finish EXIT
trap 'exit 1' HUP INT TERM

fetch() { curl --fail --silent --show-error --location --retry 5 --output "$2" "$1"; }

# The cloud image, once its checksum, and where there is one the signature over it, is right.
download() {
  local name=${IMAGE_URL##*/}
  say "fetching $IMAGE_URL"
  fetch "$SUMS_URL" "$work/sums"
  if [[ -n $SUMS_SIGNATURE_URL ]]; then
    [[ -f $SUMS_KEYRING ]] || die "missing: $SUMS_KEYRING (apt install ubuntu-cloudimage-keyring)"
    fetch "$SUMS_SIGNATURE_URL" "$work/sums.sig"
    gpgv --quiet --keyring "$SUMS_KEYRING" "$work/sums.sig" "$work/sums" || die "$SUMS_URL: bad signature"
  fi
  fetch "$IMAGE_URL" "$work/$name"
  awk -v name="$name" '$2 == name || $2 == "*" name' "$work/sums" >"$work/sum"
  [[ -s $work/sum ]] || die "$SUMS_URL does not know $name"
  (cd "$work" && "$SUMS_PROGRAM" --check --quiet sum) >&2 || die "$name: wrong checksum"
  IMAGE=$work/$name
}

[[ -n ${IMAGE-} ]] || download
[[ -f $IMAGE ]] || die "there is no file $IMAGE"
format=raw
[[ $(head -c 3 -- "$IMAGE") != QFI ]] || format=qcow2
disk=$work/disk.qcow2
qemu-img convert -f "$format" -O qcow2 "$IMAGE" "$disk"
[[ $IMAGE != "$work"/* ]] || rm -- "$IMAGE"
qemu-img resize -q "$disk" "${DISK_GIB:-16}G" || die "DISK_GIB=${DISK_GIB:-16} is less than the image has"

# A seed as cloud-init's NoCloud takes it: the user-data is the script itself.
{
  echo '#!/bin/bash'
  for name in DRIVER EXTRA PACKAGES NVIDIA_REPOSITORY NVIDIA_PACKAGES KERNEL_HEADERS; do
    printf '%s=%q\n' "$name" "${!name}"
  done
  cat -- "$here/provision.sh"
} >"$work/user-data"
printf 'instance-id: golden-%s\nlocal-hostname: golden\n' "$(date +%s)" >"$work/meta-data"
truncate -s 2M "$work/seed.img"
mformat -i "$work/seed.img" -v cidata ::
# No user of the distribution's, and its package sources as they are: the image is to be what its guests are.
printf '%s\n' '#cloud-config' 'users: []' 'apt: {preserve_sources_list: true}' >"$work/vendor-data"
mcopy -i "$work/seed.img" "$work/user-data" "$work/meta-data" "$work/vendor-data" ::

accel=tcg cpu=max
if grep -qE '^flags\s*:.* (vmx|svm)( |$)' /proc/cpuinfo && [[ -w /dev/kvm ]]; then
  accel=kvm cpu=host
fi
say "booting it with ${accel^^}"
log=$work/console.log
qemu-system-x86_64 -machine "q35,accel=$accel" -cpu "$cpu" -smp "${CPUS:-4}" -m "${MEMORY_MIB:-4096}" \
  -nodefaults -display none -no-reboot -serial "file:$log" \
  -drive "file=$disk,if=virtio,format=qcow2,discard=unmap,detect-zeroes=unmap,cache=unsafe" \
  -drive "file=$work/seed.img,if=virtio,format=raw,read-only=on" \
  -netdev user,id=net -device virtio-net-pci,netdev=net -device virtio-rng-pci </dev/null &
qemu=$!
shown=0
while kill -0 "$qemu" 2>/dev/null; do
  ((SECONDS < timeout_s)) || { tail -n 20 -- "$log" >&2; die "not done within $timeout_s s"; }
  sleep 1
  # A step at a time; what apt says is in the log alone.
  lines=$(grep -ac 'golden: ' -- "$log" 2>/dev/null || true)
  if ((${lines:-0} > shown)); then
    grep -ao 'golden: .*' -- "$log" | tail -n +$((shown + 1)) | tr -d '\r' >&2
    shown=$lines
  fi
done
wait "$qemu" || die "QEMU ended with status $?"
qemu=
if ! grep -aq 'golden: done' -- "$log"; then
  tail -n 40 -- "$log" >&2
  die "it was not set up; the lines above are the end of its console"
fi

say 'sealing it'
mkdir -p -- "${out%/*}"
# shellcheck disable=SC2086
$gpud image seal "$disk" --output "$out" >&2
say "$out is built in $SECONDS s. What sells it:"
printf 'gpud image add %q --name %s --sha256 %s\n' "$out" "$(basename -- "$profile" .profile)" \
  "$(sha256sum -- "$out" | cut -d' ' -f1)"
