"""A server that answers a thousand requests holds no more memory than after its first hundreds."""

from __future__ import annotations

from pathlib import Path

import psutil

from tests.graphs import export_bundle
from tests.served import Served, one_thread, served
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.recipe import load_recipe

REQUESTS, SETTLED = 1000, 200
# What an allocator's arenas may still grow by; 800 answers that each left their 40 tokens would be more.
ALLOWED = 4 << 20


def _sizes(server: Served) -> tuple[int, int]:
    """The memory of the server's own process and of the bundle's."""
    return psutil.Process(server.process.pid).memory_info().rss, server.child.memory_info().rss


def test_a_thousand_requests_leave_memory_flat(tiny_r1: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tiny-r1-cpu", ["quality=fast", "bits_per_weight=0"])
    bundle = one_thread(export_bundle(recipe, open_checkpoint(tiny_r1), tmp_path / "tiny-r1-cpu", "int4"))
    with served(bundle) as server, server.client() as client:
        for k in range(REQUESTS):
            if k == SETTLED:
                settled = _sizes(server)
            asked = {
                "messages": [{"role": "user", "content": f"Add {k % 90} and 5."}],
                "max_tokens": 40,
                "stream": True,
            }
            answer = client.post("/v1/chat/completions", json=asked)
            assert '"finish_reason": "' in answer.text, answer.text
        grown = [after - before for before, after in zip(settled, _sizes(server), strict=True)]
    assert max(grown) < ALLOWED, grown
