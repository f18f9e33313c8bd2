# shellcheck shell=bash disable=SC2034
# Debian 12 with NVIDIA's open kernel modules, Docker and the NVIDIA container toolkit. The generic image,
# since the cloud kernel of "genericcloud" leaves out what NVIDIA's modules for displays are built on.
IMAGE_URL=https://cloud.debian.org/images/cloud/bookworm/latest/debian-12-generic-amd64.qcow2
SUMS_URL=https://cloud.debian.org/images/cloud/bookworm/latest/SHA512SUMS
SUMS_PROGRAM=sha512sum
SUMS_SIGNATURE_URL=
SUMS_KEYRING=

NVIDIA_REPOSITORY=https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/
NVIDIA_PACKAGES="nvidia-driver-cuda nvidia-kernel-open-dkms"
KERNEL_HEADERS="linux-headers-amd64"
PACKAGES="docker.io"
