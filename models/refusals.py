"""What a step refuses before anything is touched: slices that cannot be run."""

from __future__ import annotations

from collections.abc import Container, Sequence

from models.contract import SequenceState, Slice
from models.meter import SequenceMeter
from models.network import Network
from models.planned import Planned
from models.sequence import OpenSequence

BEGUN = "its sequence belongs to a forward that has begun"


def state_of(s: Slice) -> OpenSequence:
    assert isinstance(s.sequence, OpenSequence), "a sequence opened by another model. This is a bug."
    return s.sequence


def meter_of(s: Slice) -> SequenceMeter | None:
    assert s.meter is None or isinstance(s.meter, SequenceMeter), "another model's meter. This is a bug."
    return s.meter


def check(
    slices: Sequence[Slice], network: Network, max_tokens: int, begun: Container[SequenceState] = ()
) -> None:
    """Refuse what cannot be run before anything is touched. ValueError naming the slice and the limit."""
    if len({id(s.sequence) for s in slices}) < len(slices):
        raise ValueError("a sequence may appear once in a step")
    meters = [id(s.meter) for s in slices if s.meter is not None]
    if len(set(meters)) < len(meters):
        raise ValueError("a meter may appear once in a step: it measures one sequence")
    for index, s in enumerate(slices):
        reason = BEGUN if s.sequence in begun else _refusal(s, state_of(s), network, max_tokens)
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
    if not 0 <= min(s.token_ids) <= max(s.token_ids) < network.vocab_size:
        return f"token_ids must lie in 0 .. {network.vocab_size - 1}"
    if reason := _plan_refusal(s, state, n):
        return reason
    meter = meter_of(s)
    if meter is not None and (reason := meter.refusal(s.choice, state.length, n, s.total)):
        return reason
    return _logits_refusal(s, n, network)


def _plan_refusal(s: Slice, state: OpenSequence, n: int) -> str | None:
    """Of a prompt that a guard watches: it reads it whole, in whole strata, under one plan."""
    if not isinstance(s.choice, Planned) or not s.choice.guarded:
        return None
    stop, stratum = state.length + n, s.choice.params.chunk_multiple()
    if stop > s.total:
        return "a guarded plan reads the prompt alone: generated tokens need another choice"
    if state.length % stratum or (stop % stratum and stop < s.total):
        return f"a guarded plan reads whole strata of {stratum} rows: {state.length} .. {stop} was asked for"
    if state.guard is None and state.length:
        return f"a guarded plan reads the prompt whole: {state.length} tokens were read without its guard"
    if state.guard is not None and (state.guard.choice != s.choice or state.guard.total != s.total):
        return "its prompt is being read under another plan"
    return None


def _logits_refusal(s: Slice, n: int, network: Network) -> str | None:
    """Of what only a language-model head can give."""
    if network.head is None:
        asked = f"want={s.want!r}" if s.want in ("logits", "scores") else "logit_rows" if s.logit_rows else ""
        reason = "needs a causal language model, this one has no language-model head"
        return f"{asked} {reason}" if asked else None
    if s.want == "scores" and len(s.targets) != n:
        return f"targets has {len(s.targets)} entries for {n} token_ids"
    if s.want == "scores" and not 0 <= min(s.targets) <= max(s.targets) < network.sizes.vocab_size:
        return f"targets must lie in 0 .. {network.sizes.vocab_size - 1}"
    if s.logit_rows and not 0 <= min(s.logit_rows) <= max(s.logit_rows) < n:
        return f"logit_rows must lie in 0 .. {n - 1}, the rows of the slice"
    return None
