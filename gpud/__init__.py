"""gpud: the Supplier API daemon for one GPU server."""

__version__ = "0.1.0"
