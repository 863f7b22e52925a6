"""Notices a step that no longer gives signs of life. A thread cannot be ended from outside, so what waits
for it is answered and new work refused until it comes back."""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback

from service.engine import Engine

log = logging.getLogger("longreach.watchdog")
MAX_FRAMES = 32


async def watch(engine: Engine, interval_s: float) -> None:
    """Look every so many seconds, until cancelled."""
    while True:
        await asyncio.sleep(interval_s)
        look(engine)


def look(engine: Engine) -> None:
    """Give the engine up where it has stalled; take it back where it goes on."""
    if engine.stalled and not engine.given_up:
        age_s = round(engine.heartbeat_age(), 1)
        fields = {"silent_s": age_s, "stack": stack_of(engine.thread_id)}
        log.error("the engine has stalled: every request is answered 503", extra={"fields": fields})
        engine.give_up()
    elif engine.given_up and not engine.stalled:
        log.warning("the engine goes on and takes work again")
        engine.take_back()


def stack_of(thread_id: int | None) -> list[str]:
    """Where a thread is, innermost last: files, lines and functions, no values."""
    frame = sys._current_frames().get(thread_id or 0)
    if frame is None:
        return []
    places = traceback.extract_stack(frame)[-MAX_FRAMES:]
    return [f"{place.filename}:{place.lineno} {place.name}" for place in places]
