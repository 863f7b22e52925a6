"""What a server must look like once everything was answered or left."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from loadtests.chaos_requests import World
from loadtests.metrics import Samples, read_metrics, sum_of

IDLE_SECONDS = 60.0
RESIDENT = "longreach_process_resident_memory_bytes"
EMPTY = {
    "waiting requests": ("longreach_queue_depth", {}),
    "running requests": ("longreach_running_requests", {}),
    "reserved bytes": ("longreach_memory_reserved_bytes", {}),
    "cache bytes held": ("longreach_kv_cache_bytes", {"state": "held"}),
}
"""What must be 0 -> the metric that tells it."""


@dataclass(frozen=True)
class Check:
    name: str
    told: str
    passed: bool


async def settle(host: str, api_key: str) -> Samples:
    """The server's numbers once it holds nothing, or after a minute in which it went on holding something."""
    for _ in range(int(IDLE_SECONDS / 0.2)):
        samples = await asyncio.to_thread(read_metrics, host, api_key)
        if not any(sum_of(samples, name, **labels) for name, labels in EMPTY.values()):
            break
        await asyncio.sleep(0.2)
    return samples


def checks(before: Samples, after: Samples, max_growth: float) -> list[Check]:
    """Idle, empty, no server errors, and no larger than before by more than ``max_growth`` (a share)."""
    found = [_zero(name, sum_of(after, metric, **labels)) for name, (metric, labels) in EMPTY.items()]
    errors = sum_of(after, "longreach_requests_total", code="500")
    return [*found, _zero("answers with 500", errors), _growth(before, after, max_growth)]


def _zero(name: str, value: float | None) -> Check:
    return Check(name, "not told" if value is None else f"{value:g}", value == 0)


def _growth(before: Samples, after: Samples, max_growth: float) -> Check:
    first, last = sum_of(before, RESIDENT), sum_of(after, RESIDENT)
    if not first or not last:
        return Check("resident memory", "not told", False)
    cached = [sum_of(each, "longreach_kv_cache_bytes", state="cached") or 0.0 for each in (before, after)]
    told = (
        f"{first / 1e6:.0f} -> {last / 1e6:.0f} MB ({last / first - 1:+.1%}), "
        f"of it cached pages {cached[0] / 1e6:.0f} -> {cached[1] / 1e6:.0f} MB"
    )
    return Check("resident memory", told, last <= (1 + max_growth) * first)


def drain_body(world: World) -> dict[str, object]:
    """A request that takes a while, so that it is in flight when the server is told to stop."""
    for name, card in world.cards.items():
        if "generate" in card["tasks"]:
            prompt = {"token_ids": world.pools[name][:64]}
            return {"model": name, "prompt": prompt, "max_new_tokens": 100, "stream": True}
    name, card = next(iter(world.cards.items()))
    tokens = (world.pools[name] * 4)[: min(card["max_tokens"], 4000)]
    return {"model": name, "input": {"token_ids": tokens}}
