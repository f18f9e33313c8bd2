# shellcheck shell=bash disable=SC2034
# Debian 12 with nothing of NVIDIA's, for customers who bring their own driver, and for trying this out.
IMAGE_URL=https://cloud.debian.org/images/cloud/bookworm/latest/debian-12-genericcloud-amd64.qcow2
SUMS_URL=https://cloud.debian.org/images/cloud/bookworm/latest/SHA512SUMS
SUMS_PROGRAM=sha512sum
SUMS_SIGNATURE_URL=
SUMS_KEYRING=

NVIDIA_REPOSITORY=
NVIDIA_PACKAGES=
KERNEL_HEADERS=
PACKAGES=
