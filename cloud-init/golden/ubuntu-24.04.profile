# shellcheck shell=bash disable=SC2034
# Ubuntu 24.04 with NVIDIA's open kernel modules, Docker and the NVIDIA container toolkit.
IMAGE_URL=https://cloud-images.ubuntu.com/releases/noble/release/ubuntu-24.04-server-cloudimg-amd64.img
SUMS_URL=https://cloud-images.ubuntu.com/releases/noble/release/SHA256SUMS
SUMS_PROGRAM=sha256sum
# The list of checksums is signed; apt install ubuntu-cloudimage-keyring has the key. Empty: not signed.
SUMS_SIGNATURE_URL=$SUMS_URL.gpg
SUMS_KEYRING=/usr/share/keyrings/ubuntu-cloudimage-keyring.gpg

NVIDIA_REPOSITORY=https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2404/x86_64/
NVIDIA_PACKAGES="nvidia-open"
# Those of the kernel that the image has; the first ones keep up with its updates.
KERNEL_HEADERS="linux-headers-virtual"
PACKAGES="docker.io"
