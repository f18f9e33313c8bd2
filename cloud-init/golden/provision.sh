# shellcheck shell=bash
# Runs once inside the machine that becomes the image, as root, from cloud-init's last stage; build.sh puts
# the profile's variables before it. What it prints goes to the serial console, where build.sh reads the
# last line.
set -euo pipefail
exec </dev/null >/dev/ttyS0 2>&1

finish() {
  status=$?
  trap - EXIT
  if ((status == 0)); then echo "golden: done"; else echo "golden: failed with status $status"; fi
  sync
  systemctl poweroff --force
}
trap finish EXIT
step() { echo "golden: $*"; }

export DEBIAN_FRONTEND=noninteractive
# The image's own updates may have begun at boot.
apt() { apt-get --option DPkg::Lock::Timeout=900 --option Acquire::Retries=5 --yes "$@"; }
add() { apt install --no-install-recommends "$@"; }

# add_repository NAME URL KEY_URL FINGERPRINT: its packages are believed only with that very key.
add_repository() {
  local key fingerprints keyring=/usr/share/keyrings/$1.gpg
  key=$(mktemp)
  curl --fail --silent --show-error --location --retry 5 --output "$key" "$3"
  fingerprints=$(gpg --batch --quiet --show-keys --with-colons "$key" | awk -F: '$1 == "fpr" { print $10 }')
  if ! grep -qxF "$4" <<<"$fingerprints"; then
    echo "golden: the key at $3 is not $4" >&2
    return 1
  fi
  gpg --batch --yes --dearmor --output "$keyring" "$key"
  rm "$key"
  printf '%s\n' 'Types: deb' "URIs: $2" 'Suites: /' "Signed-By: $keyring" >"/etc/apt/sources.list.d/$1.sources"
}

install_nvidia() {
  step "NVIDIA driver $DRIVER, open kernel modules"
  add curl gnupg ca-certificates
  add_repository nvidia-driver "$NVIDIA_REPOSITORY" "${NVIDIA_REPOSITORY}3bf863cc.pub" \
    EB693B3035CD5710E231E123A4B469963BF863CC
  add_repository nvidia-container-toolkit https://nvidia.github.io/libnvidia-container/stable/deb/amd64 \
    https://nvidia.github.io/libnvidia-container/gpgkey C95B321B61E88C1809C4F759DDCAE044F796ECB0
  # Every part of the driver must be of one version, and stay so when a customer updates.
  printf '%s\n' 'Package: *nvidia* cuda-drivers* libcuda* libnv*' "Pin: version $DRIVER*" \
    'Pin-Priority: 1001' >/etc/apt/preferences.d/nvidia-driver
  apt update
  # shellcheck disable=SC2086  # lists
  add dkms "linux-headers-$(uname -r)" $KERNEL_HEADERS
  # shellcheck disable=SC2086
  add $NVIDIA_PACKAGES nvidia-container-toolkit
  dpkg-query -W -f '${Package} ${Version}\n' | awk -v v="$DRIVER" 'index($2, v) == 1 { print $1 }' |
    xargs --no-run-if-empty apt-mark hold

  # There is no card here: that the modules were built, as which version and from which source is what can
  # be seen.
  [[ $(modinfo -F version nvidia) == "$DRIVER" ]]
  [[ $(modinfo -F license nvidia) == *MIT* ]]

  # Persistence: the driver keeps a card that nobody uses in shape, so a container's start does not wait for
  # it. Ubuntu's unit switches it off.
  local unit
  unit=$(systemctl show --property FragmentPath --value nvidia-persistenced.service)
  sed 's/--no-persistence-mode/--persistence-mode/' "$unit" >/etc/systemd/system/nvidia-persistenced.service
  systemctl add-wants multi-user.target nvidia-persistenced.service
}

step 'updates'
systemctl stop --no-block apt-daily.timer apt-daily-upgrade.timer || true
apt update
apt upgrade     # never a new kernel: the modules are built for the one that runs

if [[ -n $PACKAGES$EXTRA ]]; then
  step "packages:${PACKAGES:+ $PACKAGES}${EXTRA:+ $EXTRA}"
  # shellcheck disable=SC2086
  add $PACKAGES $EXTRA
fi
if [[ -n $NVIDIA_REPOSITORY ]]; then
  install_nvidia
  nvidia-ctk runtime configure --runtime=docker
  systemctl enable docker.service
fi

# gpud's seed is a disk; asking around for others costs seconds at each boot.
echo 'datasource_list: [NoCloud, None]' >/etc/cloud/cloud.cfg.d/99-gpud.cfg
apt autoremove --purge
apt clean
fstrim --all || true
