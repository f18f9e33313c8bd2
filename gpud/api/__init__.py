"""The HTTP side of gpud: who calls, what they may ask, and what they are told."""
