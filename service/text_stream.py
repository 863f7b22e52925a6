"""Tokens to text as they come: never half a character, never the beginning of what may become a stop
string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


class Detokeniser:
    """Text of a growing list of tokens. A token is decoded together with a few before it, since spaces and
    byte pieces depend on their neighbours; text that ends in half a character waits for the rest of it."""

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        """First token of the window that is decoded."""
        self._read = 0
        """Tokens whose text has been given out."""

    def push(self, token_id: int) -> str:
        """New text; "" while a character is incomplete."""
        self._ids.append(token_id)
        known, text = self._window()
        if len(text) <= len(known) or text.endswith(REPLACEMENT):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def finish(self) -> str:
        """What still waited: bytes that never became a character show as U+FFFD."""
        known, text = self._window()
        self._context = self._read = len(self._ids)
        return text[len(known) :]

    def _window(self) -> tuple[str, str]:
        known = self._tokenizer.decode(self._ids[self._context : self._read])
        return known, self._tokenizer.decode(self._ids[self._context :])


class StopFinder:
    """Holds back text that could begin a stop string and cuts at the first one found."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is safe to give out."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = self._longest_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and never became a stop."""
        text, self._held = ("" if self.stopped else self._held), ""
        return text

    def _longest_beginning(self, text: str) -> int:
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
