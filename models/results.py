"""From the final hidden states of a packed step to what each slice wanted of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from models import head as head_module
from models.contract import Slice, SliceResult
from models.errors import NonFiniteOutput, all_finite
from models.forward import offer_to_pause
from models.head import Head
from models.members import Member
from models.network import Network


def results(
    network: Network, order: Sequence[int], packed: Sequence[Slice], members: Sequence[Member], hidden: Tensor
) -> tuple[SliceResult, ...]:
    """hidden [T, E] -> the results of all slices by index; ``packed`` has them in ``order``, ``members``
    their rows. NonFiniteOutput naming the first slice whose numbers are not finite."""
    if not all_finite(hidden):  # one look at all rows; only then, whose they are
        for index, member in zip(order, members, strict=True):
            _finite(index, "hidden states", hidden[member.rows])
    logits = _last_row_logits(network, order, packed, members, hidden)
    found = {
        index: _result(network, index, s, member, hidden[member.rows], logits.get(index))
        for index, s, member in zip(order, packed, members, strict=True)
    }
    return tuple(found[i] for i in range(len(packed)))


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
    rows_of_logits = {"logits": 1, "scores": len(s.token_ids)}.get(s.want, 0) + len(s.logit_rows)
    linear = 2.0 * (network.linear_params * len(s.token_ids) + network.head_params * rows_of_logits)
    work.flops += linear
    work.flops_exact += linear
    head, scores, row_logits = network.head, None, None
    if s.want == "scores" and head is not None:
        scores = _finite(index, "scores", _scores(head, hidden, s.targets))
    if s.logit_rows and head is not None:
        row_logits = _finite(index, "logits", _logits(head, hidden, s.logit_rows))
    wanted = hidden.float() if s.want == "hidden" else None
    return SliceResult(work, logits=logits, scores=scores, hidden=wanted, row_logits=row_logits)


def _scores(head: Head, hidden: Tensor, targets: Sequence[int]) -> Tensor:
    """Log-likelihood [n] of ``targets``, some rows of the head at a time."""
    told = torch.tensor(list(targets), dtype=torch.int64, device=hidden.device)
    return _in_turns(len(told), lambda rows: head.scores(hidden[rows], told[rows]))


def _logits(head: Head, hidden: Tensor, rows: Sequence[int]) -> Tensor:
    """[len(rows), V] of the rows named, some at a time."""
    named = torch.tensor(list(rows), dtype=torch.int64, device=hidden.device)
    return _in_turns(len(named), lambda some: head(hidden[named[some]]))


def _in_turns(num_rows: int, run: Callable[[slice], Tensor]) -> Tensor:
    return torch.cat([run(rows) for rows in _stretches(num_rows)])


def _stretches(num_rows: int) -> Iterator[slice]:
    """Rows of the head that run at once, with a yield point before each."""
    for begin in range(0, num_rows, head_module.ROWS_AT_ONCE):
        offer_to_pause()
        yield slice(begin, begin + head_module.ROWS_AT_ONCE)


def _finite(index: int, what: str, values: Tensor) -> Tensor:
    if not all_finite(values):
        raise NonFiniteOutput(index, what)
    return values
