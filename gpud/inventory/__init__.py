"""What this host has for sale: its GPUs, and the cores, memory, disk and addresses beside them."""

from gpud.inventory.card import Card, CardState, Reason, Why
from gpud.inventory.inventory import Inventory

__all__ = ["Card", "CardState", "Inventory", "Reason", "Why"]
