"""A ``ServedModel`` without weights: a byte tokenizer, and outputs that are a hash of everything they may
depend on.

The output of position i depends on the tokens read so far, one by one, and on the choice (backend, params,
seed) under which each was read. Mixing up requests, choices, chunks or positions therefore changes the
numbers, while chunking and batching as such do not.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.contract import Params
from models.contract import (
    Choice,
    Encoding,
    ModelError,
    ModelInfo,
    Slice,
    SliceResult,
    StepResult,
    Work,
)
from models.errors import NonFiniteOutput

WIDTH = 16
NUM_BYTES = 256
BOS, EOS, CLS, SEP = 256, 257, 258, 259
VOCAB = 260
BYTES_PER_TOKEN = 1000
WORKSPACE_PER_TOKEN = 50
MASK = (1 << 64) - 1


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


@dataclass
class FakeState:
    """History as one running hash."""

    capacity: int
    owner: FakeModel
    length: int = 0
    digest: int = 0x243F6A8885A308D3
    closed: bool = False

    @property
    def held_bytes(self) -> int:
        """An encoder keeps nothing between steps."""
        return self.length * BYTES_PER_TOKEN if self.owner.info.causal and not self.closed else 0

    def close(self) -> None:
        assert threading.current_thread() is self.owner.step_thread or self.owner.step_thread is None, (
            "a sequence was closed by another thread than the one that steps"
        )
        if not self.closed:
            self.closed = True
            self.owner.open_states.discard(id(self))


def _mix(*values: int) -> int:
    x = 0x9E3779B97F4A7C15
    for value in values:
        x = (x ^ (value & MASK)) * 0xBF58476D1CE4E5B9 & MASK
        x ^= x >> 29
    return x


def choice_digest(choice: Choice) -> int:
    told = f"{choice.backend}|{choice.params.model_dump_json()}|{choice.seed}"
    return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=8).digest(), "big")


def numbers(digest: int, count: int) -> Tensor:
    """``count`` values in [-1, 1), a function of ``digest`` alone."""
    base = torch.arange(1, count + 1, dtype=torch.int64) * 0x9E3779B1 + (digest & 0x7FFFFFFF)
    mixed = ((base ^ (base >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return (mixed.double() / 2**31 - 1).float()


@dataclass
class FakeModel:
    """Hooks: ``on_step`` sees every step (and may sleep, block or raise); ``poison`` is a token whose
    presence makes the step raise ``poison_error``; ``script`` makes generation say a fixed text.
    """

    info: ModelInfo
    tokenizer: ByteTokenizer
    on_step: Callable[[Sequence[Slice]], None] | None = None
    poison: int | None = None
    poison_error: Callable[[int], Exception] = field(default=lambda index: RuntimeError("secret prompt text"))
    script: bytes | None = None
    peak_bytes: int | None = 5000
    steps: list[list[tuple[int, int]]] = field(default_factory=list)
    """For each step, (tokens, absolute start) of its slices."""
    open_states: set[int] = field(default_factory=set)
    step_thread: threading.Thread | None = None
    busy: bool = False

    def unsupported(self, choice: Choice) -> list[str]:
        if choice.backend == "strided" and not self.info.causal:
            return ["this fake encoder does not do strided", "for no reason"]
        return []

    def open(self, capacity: int) -> FakeState:
        state = FakeState(capacity, self)
        self.open_states.add(id(state))
        return state

    def step(self, slices: Sequence[Slice]) -> StepResult:
        thread = threading.current_thread()
        assert self.step_thread in (None, thread), "step was called from two threads"
        assert not self.busy and slices, "step must not be called concurrently or without slices"
        self.step_thread, self.busy = thread, True
        try:
            return self._step(slices)
        finally:
            self.busy = False

    def _step(self, slices: Sequence[Slice]) -> StepResult:
        self.steps.append([(len(part.token_ids), part.sequence.length) for part in slices])
        if self.on_step is not None:
            self.on_step(slices)
        for i, part in enumerate(slices):
            if self.poison is not None and self.poison in part.token_ids:
                raise self.poison_error(i)
        return StepResult(tuple(self._advance(part) for part in slices), self.peak_bytes)

    def _advance(self, part: Slice) -> SliceResult:
        state = part.sequence
        assert isinstance(state, FakeState) and not state.closed, "a closed sequence was stepped"
        assert state.length + len(part.token_ids) <= state.capacity, "a sequence outgrew its capacity"
        assert part.token_ids, "an empty slice"
        if not self.info.causal:
            assert state.length == 0 and len(part.token_ids) == part.total, "an encoder input was chunked"
        key = choice_digest(part.choice)
        digests = []
        for token in part.token_ids:
            state.digest = _mix(state.digest, token, key)
            digests.append(state.digest)
        state.length += len(part.token_ids)
        work = self._work(part, state.length)
        if part.want == "hidden":
            # A bidirectional row sees the whole input.
            whole = digests[-1] if not self.info.causal else 0
            return SliceResult(work, hidden=torch.stack([numbers(_mix(d, whole), WIDTH) for d in digests]))
        if part.want == "logits":
            return SliceResult(work, logits=self._logits(state))
        if part.want == "scores":
            assert len(part.targets) == len(part.token_ids)
            rows = torch.stack([numbers(d, VOCAB) for d in digests]).log_softmax(-1)
            return SliceResult(
                work, scores=rows.gather(1, torch.tensor(part.targets).unsqueeze(1)).squeeze(1)
            )
        return SliceResult(work)

    def _logits(self, state: FakeState) -> Tensor:
        logits = numbers(state.digest, VOCAB) * 4
        logits[NUM_BYTES:] = -10.0
        logits[128:NUM_BYTES] = -9.0
        if self.script is not None:
            place = state.length - self._script_start(state)
            token = self.script[place] if place < len(self.script) else EOS
            logits[token] = 50.0
        return logits

    def _script_start(self, state: FakeState) -> int:
        starts = self.__dict__.setdefault("_starts", {})
        return int(starts.setdefault(id(state), state.length))

    def _work(self, part: Slice, length: int) -> Work:
        n = len(part.token_ids)
        seen = range(length - n + 1, length + 1) if self.info.causal else [length] * n
        exact = sum(seen)
        kept = exact if part.choice.backend == "exact" else sum((row + 1) // 2 for row in seen)
        return Work(
            pairs_kept=kept,
            pairs_exact=exact,
            pairs_computed=kept + n,
            flops=float(kept),
            flops_exact=float(exact),
            selection_ms=0.1,
            attention_ms=0.2,
            impl="fake",
        )

    def estimate_bytes(self, tokens: int, new_tokens: int, choice: Choice, chunk_tokens: int) -> int:
        """What the real model's is made of: a cache, and a workspace that depends on the backend."""
        workspace = 0 if choice.backend == "exact" else min(tokens, chunk_tokens) * WORKSPACE_PER_TOKEN
        return (tokens + new_tokens) * BYTES_PER_TOKEN + workspace


def encoder(name: str = "enc", **changes: object) -> FakeModel:
    info = ModelInfo(
        name=name,
        source="fake/encoder",
        revision=None,
        architecture="FakeEncoder",
        tasks=("encode",),
        max_tokens=512,
        dtype="float32",
        device="cpu",
        causal=False,
        num_layers=2,
        applied_layers=(0, 1),
        local_layers={},
        embedding_dim=WIDTH,
        num_parameters=1,
        pooling="mean",
        prompts={"query": "q: ", "document": "d: "},
        special_token_ids=(CLS, SEP),
    )
    return _changed(FakeModel(info, ByteTokenizer((CLS,), (SEP,))), changes)


def decoder(name: str = "dec", **changes: object) -> FakeModel:
    info = ModelInfo(
        name=name,
        source="fake/decoder",
        revision=None,
        architecture="FakeDecoder",
        tasks=("generate", "score"),
        max_tokens=1024,
        dtype="float32",
        device="cpu",
        causal=True,
        num_layers=2,
        applied_layers=(0, 1),
        local_layers={},
        embedding_dim=WIDTH,
        num_parameters=1,
        special_token_ids=(BOS, EOS),
        eos_token_ids=(EOS,),
    )
    return _changed(FakeModel(info, ByteTokenizer((BOS,))), changes)


def _changed(model: FakeModel, changes: dict[str, object]) -> FakeModel:
    from dataclasses import fields, replace

    of_info = {name: value for name, value in changes.items() if name in {f.name for f in fields(ModelInfo)}}
    model.info = replace(model.info, **of_info)  # type: ignore[arg-type]
    for name in changes.keys() - of_info.keys():
        setattr(model, name, changes[name])
    return model


def slow(seconds: float) -> Callable[[Sequence[Slice]], None]:
    return lambda slices: time.sleep(seconds)


def non_finite(index: int) -> Exception:
    return NonFiniteOutput(index, "logits")


def params(**values: object) -> Params:
    from kernels.registry import load

    return load("window").params.model_validate(values)
