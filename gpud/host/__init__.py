"""What the host is and has, read from and written to its kernel."""
