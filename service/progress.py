"""How far a server has come on its way to ready."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """``phase`` says in words what is being done; ``done`` of ``total`` steps of it are behind us. Written by
    the event loop, read from any thread."""

    phase: str = "loading the models"
    done: int = 0
    total: int = 0

    def enter(self, phase: str, total: int) -> None:
        self.phase, self.done, self.total = phase, 0, total

    @property
    def ratio(self) -> float:
        """0 before the first step of a phase is done, 1 after its last; 0 where a phase has no steps."""
        return min(self.done / self.total, 1.0) if self.total else 0.0
