"""Gives free memory back to the system while nothing runs. The C library keeps what was freed for what comes
next, one store per thread; under requests of every length a share of it is never used again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kernels.peak import give_back_free_memory
from service.runtime import Runtime

IDLE_S = 2.0
LOOK_S = 0.5


class Idle:
    """Once for every time that the engine has had no work for ``IDLE_S``."""

    def __init__(self, runtime: Runtime, give_back: Callable[[], None] = give_back_free_memory) -> None:
        self._runtime = runtime
        self._give_back = give_back
        self._given_back_after: float | None = None

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Give back where work has ended since the last time, and none has come for a while."""
        runtime, last = self._runtime, self._runtime.last_step_s
        if last is None or last == self._given_back_after or runtime.in_flight:
            return
        if runtime.clock() - last >= IDLE_S:
            self._given_back_after = last
            await asyncio.to_thread(self._give_back)
