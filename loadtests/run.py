"""What all users of a run share: targets, documents, the random draws and the report."""

from __future__ import annotations

import argparse
import random
import time

from loadtests.documents import LengthClass, Library, length_classes, pick
from loadtests.report import Report
from loadtests.server import Server, ServerProblem, Target


class Run:
    def __init__(
        self, options: argparse.Namespace, server: Server, targets: list[Target], library: Library
    ) -> None:
        self.options = options
        self.headers = server.headers
        self.targets = targets
        self.library = library
        self.classes = {(each.endpoint, each.model): self._classes(each) for each in targets}
        self.begin()

    def begin(self) -> None:
        """Forget what was measured; the draws begin anew from the seed."""
        self.random = random.Random(self.options.load_seed)
        self.report = Report(self.options.max_unanswered)
        self._started = time.perf_counter()
        self._ended: float | None = None
        self.stopping = False

    def stop(self) -> None:
        """No further requests: locust is about to end its users."""
        self.stopping = True

    def end(self) -> None:
        self._ended = time.perf_counter()

    @property
    def duration_s(self) -> float:
        return (self._ended or time.perf_counter()) - self._started

    @property
    def endpoints(self) -> set[str]:
        return {each.endpoint for each in self.targets}

    def draw(self, endpoint: str | None) -> tuple[Target, LengthClass, str, str]:
        """A target of ``endpoint`` (any where None), a length class, a backend and a document."""
        target = self.random.choice([each for each in self.targets if endpoint in (None, each.endpoint)])
        length, tokens = pick(self.classes[target.endpoint, target.model], self.random)
        text = self.library.cut(target.num_characters(tokens), self.random)
        return target, length, self.random.choice(target.backends), text

    def _classes(self, target: Target) -> tuple[LengthClass, ...]:
        limit = target.max_tokens
        if target.endpoint == "generate":
            limit -= self.options.max_new_tokens
        try:
            return length_classes(min(limit, self.options.max_input_tokens or limit))
        except ValueError as error:
            raise ServerProblem(f"{target.endpoint} with model {target.model!r}: {error}") from error
