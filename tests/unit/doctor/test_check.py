from __future__ import annotations

import pytest

from gpud.doctor.check import Check, Group, Level, Verdict, exit_status
from gpud.errors import Code, GpudError, Problem

CHECK = Check(Group.TOKENS, "keys")


@pytest.mark.parametrize(
    ("levels", "status"),
    [
        ([], 0),
        ([Level.OK, Level.NOTE], 0),
        ([Level.WARNING, Level.OK], 1),
        ([Level.FAULT, Level.WARNING, Level.NOTE], 2),
    ],
)
def test_the_worst_verdict_makes_the_exit_status(levels: list[Level], status: int) -> None:
    assert exit_status([CHECK.at(one, "x") for one in levels]) == status


def test_an_error_is_told_with_each_of_its_problems_and_its_hint() -> None:
    error = GpudError(
        Code.CONFIG_INVALID, "keys unusable", hint="see there", problems=[Problem("/k", "damaged")]
    )
    assert CHECK.failed(error) == Verdict(
        Group.TOKENS, "keys", Level.FAULT, "keys unusable; /k: damaged", "see there"
    )
    assert CHECK.failed(error, "do this").mend == "do this"
