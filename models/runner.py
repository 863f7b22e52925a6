"""A loaded network as the service sees it: ``models.contract.ServedModel`` on transformers."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from kernels.registry import UnknownBackend
from kernels.registry import load as load_backend
from models import head as head_module
from models.contract import (
    CacheUse,
    Choice,
    Flops,
    ModelInfo,
    Prompt,
    SequenceState,
    Slice,
    SliceResult,
    StepResult,
    Tokenizer,
    Want,
)
from models.errors import NonFiniteOutput, all_finite
from models.flops import predict_flops
from models.forward import LeavableForward, Ownership, offer_to_pause, was_left
from models.head import Head
from models.heap import border_for, set_border
from models.learned import missing
from models.memory import estimate_bytes, watch_step
from models.network import Network
from models.rotary import sequence_lengths
from models.seam import NAME
from models.sequence import OpenSequence, Sequences
from models.step import Member, Step, in_groups

BEGUN = "its sequence belongs to a forward that has begun"
PRICES_KEPT = 8192


class Model:
    """ServedModel on a transformers network. ``step`` from one thread only, the rest from any."""

    def __init__(self, network: Network, info: ModelInfo, tokenizer: Tokenizer | None) -> None:
        self._network = network
        self._info = info
        self._tokenizer = tokenizer
        self._sequences = Sequences(network)
        self._begun = Ownership()
        self._flops = lru_cache(PRICES_KEPT)(partial(predict_flops, network))

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, "a model under self-test has no tokenizer"
        return self._tokenizer

    def unsupported(self, choice: Choice) -> list[str]:
        """Every reason why this model cannot run this choice; [] where it can."""
        try:
            backend = load_backend(choice.backend)
        except UnknownBackend as error:
            return [str(error)]
        if not isinstance(choice.params, backend.params):
            wanted, given = backend.params.__name__, type(choice.params).__name__
            return [f"backend {choice.backend!r} takes {wanted}, got {given}"]
        kind = "causal" if self._info.causal else "bidirectional"
        reasons = list(backend.unsupported(choice.params, self._info.causal))
        if not getattr(backend.capabilities, kind):
            reasons.append(f"backend {choice.backend!r} has no {kind} form and {self._info.name!r} is {kind}")
        if self._info.causal and not backend.capabilities.decode:
            reasons.append(f"backend {choice.backend!r} has no decode step, which {self._info.name!r} needs")
        if backend.capabilities.learned and choice.backend not in self._network.learned:
            reasons.append(missing(choice.backend, self._info.name))
        return reasons + self._size_problems(choice)

    def _size_problems(self, choice: Choice) -> list[str]:
        """Params given layer by layer or head by head that are too long or too short for this network."""
        applied = [layer for layer in self._network.plan.layers if layer.window is None]
        heads = sorted({layer.shape.num_kv_heads for layer in applied})
        found = [choice.params.size_problems(len(applied), num_kv_heads) for num_kv_heads in heads]
        return list(dict.fromkeys(problem for problems in found for problem in problems))

    def with_max_tokens(self, max_tokens: int) -> Model:
        """The same network under another limit: what a longer document costs, whatever its quality."""
        return Model(self._network, replace(self._info, max_tokens=max_tokens), self._tokenizer)

    def open(self, capacity: int, prompt: Prompt | None = None) -> OpenSequence:
        """A new sequence with room for ``capacity`` tokens, beginning after what the cache holds of
        ``prompt``. ValueError beyond the model's limit."""
        if not 1 <= capacity <= self._info.max_tokens:
            raise ValueError(
                f"capacity is {capacity} tokens; {self._info.name!r} reads 1 to {self._info.max_tokens}. "
                "Shorten the input or ask for fewer new tokens"
            )
        return self._sequences.open(capacity, prompt)

    def cached_tokens(self, prompt: Prompt) -> int:
        """How many tokens ``open`` would spare now. From any thread."""
        return self._sequences.cached_tokens(prompt)

    def fork(self, sequence: SequenceState, capacity: int) -> OpenSequence:
        """A new sequence that has read what ``sequence`` has read, and goes its own way from there."""
        assert isinstance(sequence, OpenSequence), "a sequence opened by another model. This is a bug."
        if sequence in self._begun:
            raise ValueError(f"{BEGUN}: fork it when that is over")
        return self._sequences.fork(sequence, capacity)

    def limit_cached(self, max_bytes: int) -> None:
        """Keep no more than so many bytes of pages that no sequence holds (0: none)."""
        self._sequences.limit_cached(max_bytes)

    def cache_use(self) -> CacheUse:
        """From any thread."""
        return self._sequences.use()

    def close(self) -> None:
        """The model leaves service: cached pages are freed, no sequence is opened any more."""
        self._sequences.close()

    def step(self, slices: Sequence[Slice]) -> StepResult:
        """One packed forward over the next tokens of many sequences.

        Raises ValueError (a slice that cannot be run, named by its index), NonFiniteOutput, or what the
        kernels raise. On any exception no sequence has advanced.
        """
        check(slices, self._network, self._info.max_tokens, self._begun)
        self._set_border(slices)
        with torch.inference_mode():
            return _step(self._network, slices)

    def begin(self, slices: Sequence[Slice]) -> LeavableForward:
        """As ``step``, in pieces: ``advance`` runs it until it is asked to stop between layers, matrix
        products, stretches of query tiles or rows of the head.

        A layer's attention is one piece where its backend summarises all keys (selection ``prompt``, or
        ``approximates`` without a cache to go on from).

        ValueError as ``step``, at once. Its sequences belong to it until it is over.
        """
        check(slices, self._network, self._info.max_tokens, self._begun)
        over = self._begun.take([s.sequence for s in slices])
        run, resume = partial(_step, self._network, tuple(slices)), partial(self._set_border, slices)
        return LeavableForward(run, over, resume)

    def _set_border(self, slices: Sequence[Slice]) -> None:
        """A step's memory comes from where its size wants it, whatever other steps ran in between."""
        sizes = self._network.sizes
        if sizes.on_cpu:
            set_border(border_for(sizes.hidden_bytes(sum(len(s.token_ids) for s in slices))))

    def flops(self, rows: int, start: int, choice: Choice, want: Want) -> Flops:
        """Operations of a slice of ``rows`` tokens from position ``start``, predicted. From any thread."""
        return self._flops(rows, start, choice, want)

    def estimate_bytes(self, tokens: int, new_tokens: int, choice: Choice, chunk_tokens: int) -> int:
        """Peak bytes of one request without the weights: its cache, and the activations of its largest
        step under this attention."""
        return estimate_bytes(self._network.sizes, tokens, new_tokens, choice, chunk_tokens)


def _state(s: Slice) -> OpenSequence:
    assert isinstance(s.sequence, OpenSequence), "a sequence opened by another model. This is a bug."
    return s.sequence


def check(
    slices: Sequence[Slice], network: Network, max_tokens: int, begun: Container[SequenceState] = ()
) -> None:
    """Refuse what cannot be run before anything is touched. ValueError naming the slice and the limit."""
    if len({id(s.sequence) for s in slices}) < len(slices):
        raise ValueError("a sequence may appear once in a step")
    for index, s in enumerate(slices):
        reason = BEGUN if s.sequence in begun else _refusal(s, _state(s), network, max_tokens)
        if reason:
            raise ValueError(f"slice {index}: {reason}")


def _refusal(s: Slice, state: OpenSequence, network: Network, max_tokens: int) -> str | None:
    n, stop = len(s.token_ids), state.length + len(s.token_ids)
    if state.closed:
        return "its sequence is closed"
    if n == 0:
        return "token_ids is empty"
    if stop > state.capacity or stop > max_tokens:
        return (
            f"{stop} tokens exceed the sequence's capacity of {state.capacity} (the model reads {max_tokens})"
        )
    if not network.plan.causal and (state.length or n != s.total):
        return f"a bidirectional model reads a sequence in one step: {n} of {s.total} tokens given"
    if s.want in ("logits", "scores") and network.head is None:
        return f"want={s.want!r} needs a causal language model, this one has no language-model head"
    if not 0 <= min(s.token_ids) <= max(s.token_ids) < network.vocab_size:
        return f"token_ids must lie in 0 .. {network.vocab_size - 1}"
    if s.want == "scores" and len(s.targets) != n:
        return f"targets has {len(s.targets)} entries for {n} token_ids"
    if s.want == "scores" and not 0 <= min(s.targets) <= max(s.targets) < network.sizes.vocab_size:
        return f"targets must lie in 0 .. {network.sizes.vocab_size - 1}"
    return None


def _step(network: Network, slices: Sequence[Slice]) -> StepResult:
    """One checked step, in inference mode: its results, and its sequences advanced when it has them all."""
    if not slices:
        return StepResult((), None)
    peak = watch_step(network.device, sum(len(s.token_ids) for s in slices))
    results = run(network, slices)
    if any(_state(s).closed for s in slices):
        raise RuntimeError("a sequence was closed while its forward had begun: others may have its pages")
    for s in slices:
        _state(s).read(s.token_ids, s.choice)
    return StepResult(results, None if was_left() else peak())


def run(network: Network, slices: Sequence[Slice]) -> tuple[SliceResult, ...]:
    """The packed forward of one step, in inference mode: slices in, results in the same order; sequences are
    not advanced."""
    order = in_groups([s.choice for s in slices])
    packed = [slices[i] for i in order]
    members = _members(packed)
    step = Step(network.plan.layers, members, network.learned)
    hidden = _forward(network, packed, members, step)
    step.finish()
    if not all_finite(hidden):  # one look at all rows; only then, whose they are
        for index, member in zip(order, members, strict=True):
            _finite(index, "hidden states", hidden[member.rows])
    logits = _last_row_logits(network, order, packed, members, hidden)
    results = {
        index: _result(network, index, s, member, hidden[member.rows], logits.get(index))
        for index, s, member in zip(order, packed, members, strict=True)
    }
    return tuple(results[i] for i in range(len(slices)))


def _members(packed: Sequence[Slice]) -> list[Member]:
    members, row = [], 0
    for s in packed:
        state = _state(s)
        members.append(Member(slice(row, row + len(s.token_ids)), state.length, s.choice, state.cache))
        row += len(s.token_ids)
    return members


def _forward(network: Network, packed: Sequence[Slice], members: Sequence[Member], step: Step) -> Tensor:
    """Final hidden states [T, E] of the packed stream."""
    device = network.device
    token_ids = torch.tensor([t for s in packed for t in s.token_ids], dtype=torch.int64, device=device)
    positions = torch.cat([torch.arange(m.start, m.stop, device=device) for m in members])
    totals = torch.tensor([s.total for s in packed for _ in s.token_ids], dtype=torch.int64, device=device)
    lengths = torch.maximum(totals, positions + 1)
    with sequence_lengths(lengths[None]):
        output = network.body(
            input_ids=token_ids[None],
            position_ids=positions[None] + network.plan.position_offset,
            **{NAME: step},
            **network.arguments,
        )
    hidden: Tensor = output[0]
    return hidden[0]


def _last_row_logits(
    network: Network, order: Sequence[int], packed: Sequence[Slice], members: Sequence[Member], hidden: Tensor
) -> dict[int, Tensor]:
    """Logits [V], finite, of the last row of every slice that wants them, by slice index; the head runs once
    for all."""
    wanting = [
        (i, m.rows.stop - 1) for i, s, m in zip(order, packed, members, strict=True) if s.want == "logits"
    ]
    if not wanting or network.head is None:
        return {}
    rows = torch.tensor([row for _, row in wanting], device=hidden.device)
    logits = network.head(hidden[rows])
    found = {index: row for (index, _), row in zip(wanting, logits, strict=True)}
    if not all_finite(logits):
        for index, row in found.items():
            _finite(index, "logits", row)
    return found


def _result(
    network: Network, index: int, s: Slice, member: Member, hidden: Tensor, logits: Tensor | None
) -> SliceResult:
    """hidden [n, E] of one slice, and the logits of its last row if it wants them -> its result."""
    work = member.work
    rows_of_logits = {"logits": 1, "scores": len(s.token_ids)}.get(s.want, 0)
    linear = 2.0 * (network.linear_params * len(s.token_ids) + network.head_params * rows_of_logits)
    work.flops += linear
    work.flops_exact += linear
    if s.want == "hidden":
        return SliceResult(work, hidden=hidden.float())
    if logits is not None:
        return SliceResult(work, logits=logits)
    if s.want == "scores" and network.head is not None:
        return SliceResult(work, scores=_finite(index, "scores", _scores(network.head, hidden, s.targets)))
    return SliceResult(work)


def _scores(head: Head, hidden: Tensor, targets: Sequence[int]) -> Tensor:
    """Log-likelihood [n] of ``targets``, some rows of the head at a time."""
    told = torch.tensor(list(targets), dtype=torch.int64, device=hidden.device)
    parts = []
    for begin in range(0, len(told), head_module.ROWS_AT_ONCE):
        offer_to_pause()
        rows = slice(begin, begin + head_module.ROWS_AT_ONCE)
        parts.append(head.scores(hidden[rows], told[rows]))
    return torch.cat(parts)


def _finite(index: int, what: str, values: Tensor) -> Tensor:
    if not all_finite(values):
        raise NonFiniteOutput(index, what)
    return values
