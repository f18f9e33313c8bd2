"""The daemon's configuration as a tree of types; ``config/gpud.yaml`` documents every key.

Read through :mod:`gpud.configfile`.
"""

from gpud.config.auth import Auth, Introspection, SecretSource
from gpud.config.changes import RELOADED, Change, changes
from gpud.config.guest import IMAGE_NAME, Deadlines, Guest
from gpud.config.listeners import Limits, Metrics, Server, Tls
from gpud.config.machine import Gpus, Libvirt, Network, StandIns
from gpud.config.section import Section
from gpud.config.selling import HostReserve, Offer, PerGpu, Site, Stock
from gpud.config.whole import Config, History, Log

__all__ = [
    "IMAGE_NAME",
    "RELOADED",
    "Auth",
    "Change",
    "Config",
    "Deadlines",
    "Gpus",
    "Guest",
    "History",
    "HostReserve",
    "Introspection",
    "Libvirt",
    "Limits",
    "Log",
    "Metrics",
    "Network",
    "Offer",
    "PerGpu",
    "SecretSource",
    "Section",
    "Server",
    "Site",
    "StandIns",
    "Stock",
    "Tls",
    "changes",
]
