"""The one judge of what must be true at any time. Pure.

1. Every accepted order is running, has ended, or moves within its deadline (``orders``).
2. What exists on the host is what live instances have, no more and no less (``things``, ``leftovers``).
3. Nothing is claimed twice, or by nobody alive (``claims``).
4. What the daemon says is what libvirt and the kernel say (``orders``, ``cards``).

What belongs to somebody else is never mentioned.
"""

from __future__ import annotations

from gpud.audit.cards import cards
from gpud.audit.claims import claims
from gpud.audit.facts import Facts, Finding, Record
from gpud.audit.leftovers import leftovers
from gpud.audit.orders import orders
from gpud.audit.things import things


def judge(facts: Facts) -> list[Finding]:
    """Everything that is not as it has to be."""
    found = (orders(facts), things(facts), leftovers(facts), claims(facts), cards(facts))
    return [finding for part in found for finding in part]


def standing(first: Facts, second: Facts) -> list[Finding]:
    """What two looks find alike, less what is about an instance that moved on in between.

    A server in motion shows things half done; those do not last.
    """
    before = set(judge(first))
    moved = _moved(first.record, second.record)
    return [
        finding
        for finding in judge(second)
        if finding in before and not any(one in finding.subject for one in moved)
    ]


def _moved(first: Record, second: Record) -> set[str]:
    places = [
        {(key, one.step, one.step_since) for key, one in record.live.items()}
        for record in (first, second)
    ]
    return {key for key, *_ in places[0] ^ places[1]}
