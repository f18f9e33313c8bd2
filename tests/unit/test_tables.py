"""Lists for people and for programs."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest
from rich.console import Console, RenderableType

from gpud import tables

INSTANCE: dict[str, Any] = {
    "upstream_id": "i-0123456789abcdef",
    "instance_id": "gpuai-1",
    "status": "error",
    "step": "stop_domain",
    "gpu_type": "h100_sxm",
    "gpus": ["ffffffff:00:00.0", "ffffffff:01:00.0"],
    "address": None,
    "uptime_seconds": 7265,
    "cost_per_hour": 6.98,
    "failure": "[red]the guest[/red] did not boot",
}
OFFER: dict[str, Any] = {
    "gpu_type": "h100_sxm",
    "gpu_count": 2,
    "tier": "spot",
    "cpu_cores": 8,
    "ram_gb": 32,
    "storage_gb": 200,
    "price_per_hour": 3.98,
    "stock_status": "Low",
    "available_count": 1,
}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def shown(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    lines = capsys.readouterr().out.splitlines()
    return [line.split() for line in lines]


def test_instances_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    fine = {**INSTANCE, "address": "10.0.0.2", "uptime_seconds": 61, "failure": None}
    tables.show([INSTANCE, fine], tables.INSTANCES, "none", as_json=False)
    heading, first, second = shown(capsys)
    assert heading[:4] == ["ID", "INSTANCE", "STATUS", "STEP"]
    assert first[:7] == ["i-0123456789abcdef", "gpuai-1", "error", "stop_domain", "h100_sxm",
                         "x2", "-"]  # fmt: skip
    assert " ".join(first[7:]) == "2 h 01 min 6.98 [red]the guest[/red] did not boot"
    assert " ".join(second[6:]) == "10.0.0.2 1 min 01 s 6.98"


def test_offers_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show([OFFER, {**OFFER, "available_count": 0}], tables.OFFERS, "", as_json=False)
    _, first, second = shown(capsys)
    assert first == ["h100_sxm", "2", "spot", "8", "32", "200", "3.98", "Low", "1"]
    assert second[-3:] == ["sold", "out", "0"]


def test_images_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    image = {
        "name": "base",
        "digest": "sha256:0123456789abcdef",
        "size_bytes": 2**29,
        "virtual_size_bytes": 3 * 2**30,
        "sealed": True,
        "in_use_by": 2,
    }
    tables.show([image], tables.IMAGES, "", as_json=False)
    assert shown(capsys)[1][2:] == ["0.5", "GiB", "3.0", "GiB", "yes", "2"]


def test_an_empty_list_is_said_to_be_empty(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show([], tables.OFFERS, "nothing is on offer", as_json=False)
    assert capsys.readouterr().out == "nothing is on offer\n"


@pytest.mark.parametrize("rows", [[], [INSTANCE], [{**INSTANCE, "failure": "ü" * 300}]])
def test_programs_get_json(capsys: pytest.CaptureFixture[str], rows: list[Any]) -> None:
    tables.show(rows, tables.INSTANCES, "none", as_json=True)
    assert json.loads(capsys.readouterr().out) == rows


def test_progress_stays_off_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with tables.progress("adding base") as update:
        update(1, 2)
        update(2, 2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"upstream_id": "i-1", "gpu": None, "was": "a/b", "became": "c/d", "why": "so"},
         "i-1  a/b → c/d  so"),
        ({"upstream_id": "i-1", "gpu": "0000:41:00.0", "was": "", "became": "bad", "why": "silent"},
         "i-1 0000:41:00.0  bad  silent"),
        ({"upstream_id": "", "gpu": None, "was": "", "became": "", "why": "[red]so"}, "-  [red]so"),
    ],
)  # fmt: skip
def test_an_event_is_a_line_in_local_time(
    event: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC-02:00")
    time.tzset()
    try:
        assert tables.event_line({**event, "at": 1_800_000_000.9}) == f"2027-01-15 10:00:00  {line}"
    finally:
        monkeypatch.undo()
        time.tzset()


# -- what fits a screen ----------------------------------------------------------------------------


def listed(listing: RenderableType, width: int) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(listing)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_narrow_screen_shows_what_is_needed_most_and_says_what_is_missing() -> None:
    row = {**INSTANCE, "instance_id": "gpuai-0123456789abcdef", "address": "10.0.0.2"}
    wide = listed(tables.Listing([row], tables.INSTANCES, ""), 160)
    assert "too narrow" not in wide[-1]
    narrow = listed(tables.Listing([row], tables.INSTANCES, ""), 80)
    assert max(map(len, narrow)) <= 80
    assert narrow[0].split() == ["ID", "STATUS", "GPUS", "UPTIME", "NOTE"]
    assert narrow[1].startswith("i-0123456789abcdef  error   h100_sxm x2  2 h 01 min")
    assert narrow[-1] == "too narrow for: INSTANCE, STEP, ADDRESS, USD/H"


def test_what_a_row_is_known_by_is_never_left_out() -> None:
    columns = [("ADDRESS", lambda row: row["a"]), ("STEP", lambda row: row["a"])]
    lines = listed(tables.Listing([{"a": "x" * 30}], columns, ""), 20)
    assert lines[0] == "ADDRESS"
    assert lines[-1] == "too narrow for: STEP"


def test_offers_fit_an_ordinary_terminal_whole() -> None:
    offers = [{**OFFER, "gpu_type": "a100_80gb", "price_per_hour": 27.92, "tier": "on_demand"}]
    lines = listed(tables.Listing(offers, tables.OFFERS, ""), 80)
    assert len(lines) == 2


@pytest.mark.parametrize("rows", [[], [INSTANCE]])
def test_colours_are_for_terminals(rows: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    tables.show(rows, tables.INSTANCES, "none", as_json=False)
    assert "\x1b" not in capsys.readouterr().out


def test_a_state_has_its_colour() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200, color_system="standard")
    console.print(tables.Listing([INSTANCE], tables.INSTANCES, ""))
    assert "\x1b[31merror" in screen.getvalue()


def test_each_reason_is_told_once_below_what_it_holds_for() -> None:
    offers = [
        {**OFFER, "why_not": "no GPU"},
        {**OFFER, "tier": "on_demand", "why_not": "no GPU"},
        {**OFFER, "gpu_count": 4, "why_not": "no GPU"},
        {**OFFER, "gpu_count": 8, "why_not": "[red]no memory[/red]"},
        {**OFFER, "gpu_count": 1, "why_not": None},
    ]
    reasons = tables.offer_reasons(offers)
    assert reasons is not None
    assert listed(reasons, 20) == ["", "h100_sxm x2,", "h100_sxm x4", "  no GPU", "", "h100_sxm x8",
                     "  [red]no", "  memory[/red]"]  # fmt: skip
    assert tables.offer_reasons([{**OFFER, "why_not": None}]) is None


def test_a_place_without_a_card_is_said_to_have_none(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_gpu(None, "41:00.0")
    assert capsys.readouterr().out == "no GPU is at 41:00.0 now\n"
