"""A ``ServedModel`` without weights: a byte tokenizer, and outputs that are a hash of everything they may
depend on.

The output of position i depends on the tokens read so far, one by one, and on the choice (backend, params,
seed) under which each was read. Mixing up requests, choices, chunks or positions therefore changes the
numbers, while chunking and batching as such do not. What a cache is spared to read gives the same numbers as
what is read.

It notes every misuse of the contract in ``misuse``: a sequence that is stepped, forked or closed while it
belongs to a begun forward, a second thread, a forward that is neither finished nor closed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels.contract import Params
from models.contract import (
    CacheUse,
    Choice,
    Flops,
    Kept,
    ModelInfo,
    Prompt,
    SequenceState,
    Slice,
    SliceResult,
    StepResult,
    Verify,
    Want,
    WarmUp,
    Work,
)
from models.errors import NonFiniteOutput
from models.planned import STRATUM, Planned
from tests.service.fake_meter import FakeMeter
from tests.service.fake_pages import START, FakePages, mix, numbers
from tests.service.fake_tokenizer import BOS, CLS, EOS, NUM_BYTES, SEP, VOCAB, ByteTokenizer

__all__ = ["BOS", "CLS", "EOS", "SEP", "WIDTH", "ByteTokenizer", "FakeModel", "decoder", "encoder", "slow"]

WIDTH = 16
BYTES_PER_TOKEN = 1000
WORKSPACE_PER_TOKEN = 50


@dataclass
class FakeState:
    """History as one running hash."""

    capacity: int
    owner: FakeModel
    length: int = 0
    digest: int = START
    closed: bool = False
    salt: str | None = None
    """None: what it reads is not remembered."""
    choice: Choice | None = None
    forward: FakeForward | None = None
    """The begun one that it belongs to."""
    kept: tuple[Kept, ...] = ()
    guarded_by: Planned | None = None

    @property
    def held_bytes(self) -> int:
        """An encoder keeps nothing between steps."""
        return self.length * BYTES_PER_TOKEN if self.owner.info.causal and not self.closed else 0

    def close(self) -> None:
        self.owner.check_thread("a sequence was closed")
        self.owner.check(self.forward is None, "a sequence was closed before its forward")
        if not self.closed:
            self.closed = True
            self.owner.open_states.discard(id(self))


class FakeForward:
    """A forward in ``model.pieces`` pieces, asking before each but the first whether to stop. The first one
    runs ``on_step``, each runs ``on_piece`` with its number, the last does the work."""

    def __init__(self, model: FakeModel, slices: Sequence[Slice]) -> None:
        self.model, self.slices = model, slices
        self.piece = 0
        self.left = False
        self.over = False
        model.open_forwards.add(self)
        for part in slices:
            _state(part).forward = self

    def advance(self, pause: Callable[[], bool]) -> StepResult | None:
        model = self.model
        model.check(not self.over, "a forward that is over was gone on with")
        model.check_thread("a forward was advanced")
        try:
            while self.piece < model.pieces:
                if self.piece and pause():
                    self.left = True
                    return None
                self._run_piece()
        except BaseException:
            self._end()
            raise
        self._end()
        result = model.result(self.slices)
        return StepResult(result.results, None) if self.left else result

    def close(self) -> None:
        self.model.check_thread("a forward was closed")
        self._end()

    def _run_piece(self) -> None:
        if self.piece == 0:
            self.model.note_step(self.slices)
        self.model.on_piece(self.piece)
        self.piece += 1

    def _end(self) -> None:
        self.over = True
        self.model.open_forwards.discard(self)
        for part in self.slices:
            if _state(part).forward is self:
                _state(part).forward = None


def _state(part: Slice) -> FakeState:
    assert isinstance(part.sequence, FakeState)
    return part.sequence


def _row_logits(part: Slice, digests: Sequence[int]) -> Tensor | None:
    """The logits that ``scores`` is made of, of the rows asked for."""
    if not part.logit_rows:
        return None
    return torch.stack([numbers(digests[row], VOCAB) for row in part.logit_rows])


@dataclass
class FakeModel:
    """Hooks: ``on_step`` sees every step (and may sleep, block or raise); ``on_piece`` every piece of a long
    one; ``poison`` is a token whose presence makes the step raise ``poison_error``, ``nan`` one that makes
    the results of its own slice NaN; ``script`` makes generation say a fixed text.
    """

    info: ModelInfo
    tokenizer: ByteTokenizer
    on_step: Callable[[Sequence[Slice]], None] | None = None
    on_piece: Callable[[int], None] = field(default=lambda piece: None)
    pieces: int = 1
    poison: int | None = None
    poison_error: Callable[[int], Exception] = field(default=lambda index: RuntimeError("secret prompt text"))
    nan: int | None = None
    script: bytes | None = None
    peak_bytes: int | None = 5000
    flops_per_token: float = 1e3
    steps: list[list[tuple[int, int]]] = field(default_factory=list)
    """For each step, (tokens, absolute start) of its slices."""
    open_states: set[int] = field(default_factory=set)
    open_forwards: set[FakeForward] = field(default_factory=set)
    num_forks: int = 0
    misuse: list[str] = field(default_factory=list)
    step_thread: threading.Thread | None = None
    busy: bool = False
    closed: bool = False
    pages: FakePages = field(default_factory=FakePages)
    max_cached_bytes: int = 0
    meters: list[FakeMeter] = field(default_factory=list)
    """Every one that was made."""
    to_warm: Sequence[WarmUp] = ()
    guard: Callable[[Planned, int], tuple[Kept, ...]] | None = None
    """What a guard sees of a prompt of so many tokens, and repairs: half of the budget is spent, and nothing
    repaired, where there is none."""

    def check(self, fine: bool, otherwise: str) -> None:
        if not fine:
            self.misuse.append(otherwise)
            raise AssertionError(otherwise)

    def check_thread(self, what: str) -> None:
        thread = threading.current_thread()
        self.check(self.step_thread in (None, thread), f"{what} by another thread than the one that steps")

    def check_idle(self) -> None:
        """Nothing is open and nothing was misused."""
        assert not self.misuse, self.misuse
        assert not self.open_states, f"{len(self.open_states)} sequences were never closed"
        assert not self.open_forwards, f"{len(self.open_forwards)} forwards were neither finished nor closed"

    def warm_ups(self) -> Sequence[WarmUp]:
        return self.to_warm

    def unsupported(self, choice: Choice) -> list[str]:
        if choice.backend == "strided" and not self.info.causal:
            return ["this fake encoder does not do strided", "for no reason"]
        return [reason for part in choice.parts if part is not choice for reason in self.unsupported(part)]

    def open(self, capacity: int, prompt: Prompt | None = None) -> FakeState:
        self.check(not self.closed, "a model that has left service opened a sequence")
        state = FakeState(capacity, self)
        if prompt is not None and self.info.causal:
            guarded = isinstance(prompt.choice, Planned) and prompt.choice.guarded
            self.check(not guarded, "the cache was asked for a guarded prompt")
            state.salt, state.choice = prompt.salt, prompt.choice
            state.length, state.digest = self.pages.take(prompt)
        self.open_states.add(id(state))
        return state

    def cached_tokens(self, prompt: Prompt) -> int:
        return self.pages.find(prompt)[0] if self.info.causal else 0

    def fork(self, sequence: SequenceState, capacity: int) -> FakeState:
        assert isinstance(sequence, FakeState)
        self.check_thread("a sequence was forked")
        self.check(sequence.forward is None, "a sequence was forked inside its forward")
        self.check(not sequence.closed, "a closed sequence was forked")
        state = FakeState(capacity, self, sequence.length, sequence.digest)
        starts = self.__dict__.setdefault("_starts", {})
        if id(sequence) in starts:
            starts[id(state)] = starts[id(sequence)]
        self.num_forks += 1
        self.open_states.add(id(state))
        return state

    def remember(self, prompt: Prompt) -> None:
        """As if a sequence had read it."""
        self.pages.read(prompt.salt, START, 0, prompt.token_ids, prompt.choice)

    def meter(self, verify: Verify, choice: Choice, total: int, *, decode: bool = False) -> FakeMeter:
        applied = self.info.applied_layers
        layers = applied if verify.layers is None else tuple(sorted(set(verify.layers)))
        unknown = sorted(set(layers) - set(applied))
        if unknown or not layers:
            raise ValueError(f"layers: {unknown} are not among the layers {list(applied)}")
        self.meters.append(FakeMeter(self, verify, choice, total, decode, layers))
        return self.meters[-1]

    def limit_cached(self, max_bytes: int) -> None:
        self.max_cached_bytes = max_bytes
        self.pages.limit(max_bytes // BYTES_PER_TOKEN)

    def cache_use(self) -> CacheUse:
        pages = self.pages
        return CacheUse(
            cached_bytes=pages.num_tokens * BYTES_PER_TOKEN,
            looked_up_tokens=pages.looked_up_tokens,
            found_tokens=pages.found_tokens,
            evicted_pages=pages.num_evicted,
        )

    def flops(self, rows: int, start: int, choice: Choice, want: Want) -> Flops:
        """``flops_per_token`` for each row, and as many pairs as ``exact`` has."""
        seen = start + (rows + 1) / 2 if self.info.causal else rows
        return Flops(self.flops_per_token * rows, rows * seen)

    def close(self) -> None:
        self.check(not self.open_states, "a model left service with open sequences")
        self.closed = True
        self.limit_cached(0)

    def step(self, slices: Sequence[Slice]) -> StepResult:
        thread = threading.current_thread()
        self.check_thread("step was called")
        assert not self.busy and slices, "step must not be called concurrently or without slices"
        self.step_thread, self.busy = thread, True
        try:
            self._check_free(slices)
            self.note_step(slices)
            return self.result(slices)
        finally:
            self.busy = False

    def begin(self, slices: Sequence[Slice]) -> FakeForward:
        assert slices, "a forward needs slices"
        self.check_thread("begin was called")
        self.step_thread = threading.current_thread()
        self._check_free(slices)
        return FakeForward(self, slices)

    def _check_free(self, slices: Sequence[Slice]) -> None:
        self.check(not self.closed, "a model that has left service was stepped")
        states = [_state(part) for part in slices]
        self.check(len({id(state) for state in states}) == len(states), "a sequence appears twice in a step")
        self.check(
            all(state.forward is None for state in states), "a sequence of a begun forward was stepped"
        )

    def note_step(self, slices: Sequence[Slice]) -> None:
        self.steps.append([(len(part.token_ids), part.sequence.length) for part in slices])
        if self.on_step is not None:
            self.on_step(slices)
        for i, part in enumerate(slices):
            if self.poison is not None and self.poison in part.token_ids:
                raise self.poison_error(i)

    def result(self, slices: Sequence[Slice]) -> StepResult:
        return StepResult(tuple(self._advance(part) for part in slices), self.peak_bytes)

    def _advance(self, part: Slice) -> SliceResult:
        result = self._read(part)
        if self.nan in part.token_ids:
            for values in (result.logits, result.scores, result.hidden, result.row_logits):
                if values is not None:
                    values.fill_(float("nan"))
        return result

    def _read(self, part: Slice) -> SliceResult:
        state = _state(part)
        self.check(not state.closed, "a closed sequence was stepped")
        self.check(state.length + len(part.token_ids) <= state.capacity, "a sequence outgrew its capacity")
        self.check(len(part.token_ids) > 0, "an empty slice")
        if not self.info.causal:
            assert state.length == 0 and len(part.token_ids) == part.total, "an encoder input was chunked"
        salt = state.salt if part.choice == state.choice else None
        repairs = self._watch(part, state)
        digests = self.pages.read(salt, state.digest, state.length, part.token_ids, part.choice, repairs)
        if part.meter is not None:
            assert isinstance(part.meter, FakeMeter) and part.meter.model is self
            part.meter.add(part, state.length)
        state.digest = digests[-1]
        state.length += len(digests)
        return replace(self._wanted(part, state, digests), row_logits=_row_logits(part, digests))

    def _watch(self, part: Slice, state: FakeState) -> dict[int, int]:
        """Rows from which on layers of a guarded prompt run exactly, by ordinal."""
        choice = part.choice
        if not isinstance(choice, Planned) or not choice.guarded:
            return {}
        end = state.length + len(part.token_ids)
        whole = state.length % STRATUM == 0 and (end % STRATUM == 0 or end == part.total)
        self.check(whole and end <= part.total, f"a guarded prompt was read {state.length} .. {end}")
        self.check(state.guarded_by in (None, choice), "a guarded prompt was read under two plans")
        state.guarded_by, state.kept = choice, (self.guard or self._half_spent)(choice, part.total)
        ordinals = {layer: i for i, layer in enumerate(self.info.applied_layers)}
        return {ordinals[each.layer]: each.exact_from for each in state.kept if each.exact_from is not None}

    def _half_spent(self, choice: Planned, total: int) -> tuple[Kept, ...]:
        spent, rows = choice.params.model_dump()["max_error"] / 2, -(-total // 64)
        return tuple(
            Kept(layer, 0.0, 0, None) if each.backend == "exact" else Kept(layer, spent, rows, None)
            for layer, each in zip(self.info.applied_layers, choice.layers, strict=True)
        )

    def _wanted(self, part: Slice, state: FakeState, digests: Sequence[int]) -> SliceResult:
        work = self._work(part, state.length)
        if part.want == "hidden":
            # A bidirectional row sees the whole input.
            whole = digests[-1] if not self.info.causal else 0
            return SliceResult(work, hidden=torch.stack([numbers(mix(d, whole), WIDTH) for d in digests]))
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
            impl="torch",
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
    from dataclasses import fields

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
