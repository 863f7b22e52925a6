"""One token per UTF-8 byte, and a few special ones."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from models.contract import Encoding, ModelError

NUM_BYTES = 256
BOS, EOS, CLS, SEP = 256, 257, 258, 259
VOCAB = 260


class ByteTokenizer:
    """One token per UTF-8 byte; special tokens around the text as the kind of model wants them."""

    def __init__(self, before: tuple[int, ...] = (), after: tuple[int, ...] = (), chat: bool = True) -> None:
        self._before, self._after, self._chat = before, after, chat
        self.threads: set[str] = set()

    @property
    def vocab_size(self) -> int:
        return VOCAB

    def encode(self, text: str, *, special_tokens: bool = True) -> Encoding:
        self.threads.add(threading.current_thread().name)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for i, char in enumerate(text):
            for byte in char.encode("utf-8"):
                ids.append(byte)
                spans.append((i, i + 1))
        if special_tokens:
            ids = [*self._before, *ids, *self._after]
            spans = [*[(0, 0)] * len(self._before), *spans, *[(0, 0)] * len(self._after)]
        return Encoding(ids, spans)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token for token in token_ids if token < NUM_BYTES).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return bytes([token_id]).decode("utf-8", "replace") if token_id < NUM_BYTES else f"<{token_id}>"

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        if not self._chat:
            raise ModelError("it has no chat template")
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant: "
