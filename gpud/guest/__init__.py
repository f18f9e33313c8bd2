"""What a guest is made of: base images, disks, and the cloud-init seed."""
