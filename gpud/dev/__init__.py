"""Stand-ins for GPU.ai's side, for development and demonstrations. Never part of a production host."""
