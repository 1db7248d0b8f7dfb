"""Pages of 2 MiB for the process that decodes."""

from __future__ import annotations

import sys

import pytest

from tests.exports import Exports
from tests.served import served
from toolkit import machine
from toolkit.machine import with_huge_pages

ASKED = "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("system", "said", "found"),
    [
        ("linux", None, ASKED),
        ("linux", "", ASKED),
        ("linux", "glibc.malloc.check=0", f"glibc.malloc.check=0:{ASKED}"),
        ("linux", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("win32", None, None),
    ],
)
def test_glibc_is_asked_unless_the_user_has_said_something(
    system: str, said: str | None, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.sys, "platform", system)
    given = {"HOME": "/home/user", **({} if said is None else {"GLIBC_TUNABLES": said})}
    made = with_huge_pages(given)
    assert made.pop("GLIBC_TUNABLES", None) == found and made == {"HOME": "/home/user"}


def test_a_served_bundle_asks_for_them(exports: Exports) -> None:
    asked = {"messages": [{"role": "user", "content": "Add 1 and 2."}], "max_tokens": 1}
    with served(exports("cpu")) as running, running.client() as http:
        assert http.post("/v1/chat/completions", json=asked).status_code == 200
        assert running.child.environ().get("GLIBC_TUNABLES") == (ASKED if sys.platform == "linux" else None)
