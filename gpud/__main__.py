"""Runs the command: ``python -m gpud``."""

from gpud.cli import main

main()
