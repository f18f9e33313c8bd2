from __future__ import annotations

from collections import defaultdict
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpud.hypervisor.passthroughxml import add_functions, mmio_window_mib, start_timeout_s
from gpud.model import PciAddress

MIB = 2**20
GIB = 2**30
ADDRESSES = st.builds(
    PciAddress,
    domain=st.sampled_from([0, 1, 0x10000]),
    bus=st.integers(0, 3),
    device=st.integers(0, 2),
    function=st.integers(0, 7),
)
BAR_SIZES = st.integers(4, 18).map(lambda bits: MIB << bits)


def passed(*functions: PciAddress) -> list[tuple[PciAddress, PciAddress, bool]]:
    """Where each function is on the host, where in the guest, and whether that tells of others."""
    devices = ET.Element("devices")
    add_functions(devices, functions, rombar=False)
    found = []
    for hostdev in devices.iterfind("hostdev"):
        host, guest = hostdev.find("source/address"), hostdev.find("address")
        assert host is not None
        assert guest is not None
        more = guest.get("multifunction") == "on"
        found.append((_parse(host), _parse(guest), more))
    ports = [port.get("index") for port in devices.iterfind("controller")]
    assert ports == [str(number) for number in sorted({guest.bus for _, guest, _ in found})]
    return found


def _parse(address: ET.Element) -> PciAddress:
    parts = (address.get(part, "") for part in ("domain", "bus", "slot", "function"))
    return PciAddress(*(int(part, 16) for part in parts))


def at(text: str) -> PciAddress:
    return PciAddress.parse(text)


def test_functions_of_one_card_stay_together_under_their_numbers() -> None:
    functions = [at(f"0000:41:00.{number}") for number in (3, 0, 1)]
    assert passed(*functions) == [
        (at("0000:41:00.0"), at("0000:01:00.0"), True),
        (at("0000:41:00.1"), at("0000:01:00.1"), False),
        (at("0000:41:00.3"), at("0000:01:00.3"), False),
    ]


def test_functions_are_renumbered_where_the_first_stays_behind() -> None:
    assert passed(at("0000:41:00.2"), at("0000:41:00.5")) == [
        (at("0000:41:00.2"), at("0000:01:00.0"), True),
        (at("0000:41:00.5"), at("0000:01:00.1"), False),
    ]


def test_functions_of_another_slot_get_their_own_port() -> None:
    assert passed(at("0000:41:00.0"), at("0000:41:01.0"), at("0001:41:00.0")) == [
        (at("0000:41:00.0"), at("0000:01:00.0"), False),
        (at("0000:41:01.0"), at("0000:02:00.0"), False),
        (at("0001:41:00.0"), at("0000:03:00.0"), False),
    ]


@given(functions=st.lists(ADDRESSES, max_size=24))
def test_every_function_is_passed_once_and_can_be_found(functions: list[PciAddress]) -> None:
    found = passed(*functions)
    assert sorted(host for host, _, _ in found) == sorted(set(functions))
    assert len({guest for _, guest, _ in found}) == len(found)
    ports: dict[int, dict[int, bool]] = defaultdict(dict)
    host_slots: dict[int, set[tuple[int, int, int]]] = defaultdict(set)
    for host, guest, more in found:
        assert (guest.domain, guest.device) == (0, 0)
        ports[guest.bus][guest.function] = more
        host_slots[guest.bus].add((host.domain, host.bus, host.device))
    for bus, functions_there in ports.items():
        # PCI: a slot without function 0 is empty; only its header tells whether there are more.
        assert functions_there[0] is (len(functions_there) > 1)
        assert len(host_slots[bus]) == 1


@pytest.mark.parametrize(
    ("cards", "per_card", "window_gib"),
    [
        pytest.param(1, [256 * MIB, 32 * MIB], None, id="one 4090 with its BAR not resized"),
        pytest.param(8, [256 * MIB, 32 * MIB], None, id="eight of them"),
        pytest.param(1, [32 * GIB, 32 * MIB], 64, id="one 4090 with its BAR resized"),
        pytest.param(2, [64 * GIB, 32 * MIB], 256, id="two L40S"),
        pytest.param(1, [128 * GIB, 32 * MIB, 16 * MIB], 256, id="one H100"),
        pytest.param(8, [128 * GIB, 32 * MIB, 16 * MIB], 2048, id="eight H100"),
        pytest.param(8, [256 * GIB, 32 * MIB, 64 * MIB], 4096, id="eight H200"),
        pytest.param(1, [], None, id="one that has none"),
        pytest.param(0, [], None, id="no card"),
    ],
)
def test_window_is_sized_from_the_cards(
    cards: int, per_card: list[int], window_gib: int | None
) -> None:
    bars = {PciAddress(0, bus, 0, 0): per_card for bus in range(cards)}
    assert mmio_window_mib(bars) == (None if window_gib is None else window_gib * 1024)


def placed_end(shares: list[tuple[int, int]]) -> int:
    """Where a firmware is that has placed shares (alignment, length), one after the other."""
    end = 0
    for alignment, length in shares:
        while end % alignment:
            end += alignment - end % alignment
        end += length
    return end


@given(ports=st.lists(st.lists(BAR_SIZES, min_size=1, max_size=4), max_size=12))
def test_everything_fits_into_the_window(ports: list[list[int]]) -> None:
    bars = {PciAddress(0, bus, 0, 0): sizes for bus, sizes in enumerate(ports)}
    window = (mmio_window_mib(bars) or 32 * 1024) * MIB
    cards = [(max(sizes), sum(sizes)) for sizes in ports]
    virtio = [(window // 256, window // 256)] * 5
    assert placed_end(sorted([*cards, *virtio], reverse=True)) <= window
    assert placed_end(sorted(cards, reverse=True)) * 4 > window or window == 32 * GIB


def test_start_without_gpus_takes_no_longer_than_other_calls() -> None:
    assert start_timeout_s(30, 2_097_152, 0) == 30


def test_start_may_take_longer_the_more_is_pinned_and_reset() -> None:
    assert start_timeout_s(30, 65_536, 1) == 30 + 64 * 4 + 15
    assert start_timeout_s(30, 131_072, 8) == 30 + 128 * 4 + 8 * 15
