"""One packed forward: slices in, results in the same order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.contract import Slice, SliceResult, StepResult
from models.forward import was_left
from models.guard import Reading, guard_of
from models.members import Member, in_groups
from models.memory import watch_step
from models.network import Network
from models.planned import Planned
from models.refusals import meter_of, state_of
from models.results import results
from models.rotary import sequence_lengths
from models.seam import NAME
from models.step import Step
from models.watch import watching


def step(network: Network, slices: Sequence[Slice]) -> StepResult:
    """One checked step, in inference mode: its results, and its sequences and meters advanced when it has
    them all."""
    if not slices:
        return StepResult((), None)
    peak = watch_step(network.device, sum(len(s.token_ids) for s in slices))
    order = in_groups([s.choice for s in slices])
    packed = [slices[i] for i in order]
    members = _members(network, packed)
    found = _run(network, order, packed, members)
    if any(state_of(s).closed for s in slices):
        raise RuntimeError("a sequence was closed while its forward had begun: others may have its pages")
    for s, member in zip(packed, members, strict=True):
        _advance(s, member)
    return StepResult(found, None if was_left() else peak())


def _run(
    network: Network, order: Sequence[int], packed: Sequence[Slice], members: Sequence[Member]
) -> tuple[SliceResult, ...]:
    forward = Step(network.plan.layers, members, network.learned)
    with watching(forward, members):
        hidden = _forward(network, packed, members, forward)
        forward.finish()
    return results(network, order, packed, members, hidden)


def _advance(s: Slice, member: Member) -> None:
    state_of(s).read(s.token_ids, s.choice)
    meter = meter_of(s)
    if meter is not None and member.reading is not None:
        meter.commit(member.reading)
    if member.guard is not None:
        state_of(s).guard = member.guard.commit()


def _members(network: Network, packed: Sequence[Slice]) -> list[Member]:
    members, row = [], 0
    for s in packed:
        state, meter = state_of(s), meter_of(s)
        rows = slice(row, row + len(s.token_ids))
        reading = meter.begin() if meter is not None else None
        guard = _guard(network, s)
        members.append(Member(rows, state.length, s.choice, state.cache, reading=reading, guard=guard))
        row = rows.stop
    return members


def _guard(network: Network, s: Slice) -> Reading | None:
    """What the guard of a sequence is told by this step, where its choice has one: made at its first, and
    the sequence's own once that has succeeded."""
    if not isinstance(s.choice, Planned) or not s.choice.guarded:
        return None
    guard = state_of(s).guard or guard_of(s.choice, s.total, network.plan, network.places)
    return guard.begin()


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
