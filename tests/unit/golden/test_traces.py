from __future__ import annotations

from gpud.golden.traces import homes


def test_homes_are_those_of_people_and_of_root() -> None:
    passwd = """\
root:x:0:0:root:/root:/bin/bash
toor:x:0:0:root:/toor:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
build:x:1000:1000:,,,:/home/build:/bin/bash
odd:x:1001:1001::/home/../etc "x":/bin/sh
nothing:x:1002:1002:::/bin/sh
broken
word:x:some:1::/home/word:/bin/sh
"""

    assert homes(passwd) == ("/home/build", "/root", "/toor")


def test_a_system_without_users_still_has_root() -> None:
    assert homes("") == ("/root",)
