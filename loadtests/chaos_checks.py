"""What a server must look like once everything was answered or left."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from loadtests.chaos_requests import World
from loadtests.metrics import Samples, read_metrics, sum_of

IDLE_SECONDS = 60.0
RESIDENT = "longreach_process_resident_memory_bytes"
KEPT = {
    "cached pages": ("longreach_kv_cache_bytes", {"state": "cached"}),
    "draws": ("longreach_kernel_cache_bytes", {"cache": "draws"}),
    "plans": ("longreach_kernel_cache_bytes", {"cache": "plans"}),
    "masks": ("longreach_kernel_cache_bytes", {"cache": "masks"}),
}
"""What is kept on purpose, each up to a bound -> the metric that tells it."""
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


@dataclass(frozen=True)
class Reading:
    """The server's numbers after so many requests, once it was idle."""

    requests: int
    samples: Samples


async def settle(host: str, api_key: str, quiet_s: float) -> Samples:
    """The server's numbers once it has held nothing for ``quiet_s``, or after a minute in which it went on
    holding something."""
    for _ in range(int(IDLE_SECONDS / 0.2)):
        samples = await asyncio.to_thread(read_metrics, host, api_key)
        if not any(sum_of(samples, name, **labels) for name, labels in EMPTY.values()):
            await asyncio.sleep(quiet_s)
            return await asyncio.to_thread(read_metrics, host, api_key)
        await asyncio.sleep(0.2)
    return samples


def memory_table(readings: Sequence[Reading]) -> list[list[str]]:
    """Megabytes after so many requests: the process, and of it what is kept on purpose."""
    columns = {"resident MB": (RESIDENT, {}), **{f"{name} MB": metric for name, metric in KEPT.items()}}
    rows = [
        [str(each.requests), *(_megabytes(sum_of(each.samples, name, **at)) for name, at in columns.values())]
        for each in readings
    ]
    return [["after requests", *columns], *rows]


def _megabytes(value: float | None) -> str:
    return "not told" if value is None else f"{value / 1e6:.0f}"


def checks(readings: Sequence[Reading], max_growth: float) -> list[Check]:
    """Idle, empty, no server errors, and no larger by more than ``max_growth`` (a share) than at the second
    reading (of two, the first)."""
    after = readings[-1].samples
    found = [_zero(name, sum_of(after, metric, **labels)) for name, (metric, labels) in EMPTY.items()]
    errors = sum_of(after, "longreach_requests_total", code="500")
    return [*found, _zero("answers with 500", errors), _growth(readings, max_growth)]


def _zero(name: str, value: float | None) -> Check:
    return Check(name, "not told" if value is None else f"{value:g}", value == 0)


def _growth(readings: Sequence[Reading], max_growth: float) -> Check:
    resident = [sum_of(each.samples, RESIDENT) for each in readings]
    begin = min(1, len(readings) - 2)
    since = [
        f"{resident[-1] / first - 1:+.1%} since request {reading.requests}"
        for first, reading in zip(resident, readings[: begin + 1], strict=False)
        if first and resident[-1]
    ]
    first, last = resident[begin], resident[-1]
    passed = bool(first and last and last <= (1 + max_growth) * first)
    return Check("resident memory", ", ".join(since[::-1]) or "not told", passed)


def drain_body(world: World) -> dict[str, object]:
    """A request that takes a while, so that it is in flight when the server is told to stop."""
    for name, card in world.cards.items():
        if "generate" in card["tasks"]:
            prompt = {"token_ids": world.pools[name][:64]}
            return {"model": name, "prompt": prompt, "max_new_tokens": 100, "stream": True}
    name, card = next(iter(world.cards.items()))
    tokens = (world.pools[name] * 4)[: min(card["max_tokens"], 4000)]
    return {"model": name, "input": {"token_ids": tokens}}
