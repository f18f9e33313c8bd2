"""Files that ship inside the package: links to ``cloud-init/`` and ``config/`` of the repository."""
