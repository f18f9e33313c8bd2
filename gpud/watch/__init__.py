"""What those who watch the daemon are told: Prometheus' page, and whether it is alive and ready."""
