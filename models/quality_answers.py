"""Questions about planted facts, answered by a model that has read the document.

Questions go to a fork of the sequence, which is rewound after each, and are read with exact attention over
the cached keys, whatever read the document. An answer is *chosen* where its log-likelihood is above that of
every other candidate,

    log p(c) = sum_j log p(c_j | question, c_1 .. c_{j-1})

and *generated* where each of its tokens is the likeliest one. A candidate that shares its first tokens with
the answer has them scored by the answer's own forward, and its next token too; that sum is above log p(c), so
that most candidates need no forward of their own.

Two attentions are compared over the same questions: McNemar's exact test on the questions that only one of
them answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.contract import SequenceState, Slice, SliceResult
from models.planned import exact
from models.quality_facts import Document, Fact
from models.runner import Model
from models.sequence import OpenSequence


@dataclass(frozen=True)
class Answers:
    """By fact, in order of depth."""

    chosen: list[bool]
    generated: list[bool]


@dataclass(frozen=True)
class Paired:
    """Two attentions over the same questions: shares answered, and of the questions that only one answers,
    how many this one lost and won. ``p``: of a difference at least so large, were both alike."""

    questions: int
    share: float
    exact_share: float
    lost: int
    won: int
    p: float

    @property
    def points(self) -> float:
        return 100 * (self.share - self.exact_share)


def ask(model: Model, sequence: SequenceState, document: Document) -> Answers:
    """``sequence`` has read the document's prompt and stays as it is."""
    facts = document.facts
    longest = max((len(fact.question) + len(fact.answer) for fact in facts), default=0)
    asked = model.fork(sequence, sequence.length + longest)
    try:
        found = [_ask(model, asked, fact, document.prompt_tokens) for fact in facts]
    finally:
        asked.close()
    return Answers([chosen for chosen, _ in found], [generated for _, generated in found])


def _ask(model: Model, asked: OpenSequence, fact: Fact, total: int) -> tuple[bool, bool]:
    """``asked`` has read the document, and goes back to it."""
    begin = asked.length
    model.step([Slice(asked, fact.question[:-1], exact(), "nothing", total)])
    answer = _follow(model, asked, fact, fact.answer, total)
    assert answer.row_logits is not None
    generated = answer.row_logits.argmax(-1).tolist() == fact.answer
    likelihoods, mine = answer.row_logits.double().log_softmax(-1), _sum(answer)
    rivals = [each for each in fact.candidates[1:] if _bound(likelihoods, fact.answer, each) >= mine]
    beaten = any(_sum(_follow(model, asked, fact, each, total)) >= mine for each in rivals)
    asked.rewind(begin)
    return not beaten, generated


def _bound(likelihoods: Tensor, answer: Sequence[int], other: Sequence[int]) -> float:
    """The most that log p(other) can be, from the answer's log-likelihoods [n, V]."""
    shared = next((j for j, (a, b) in enumerate(zip(answer, other, strict=True)) if a != b), len(answer) - 1)
    return sum(float(likelihoods[j, other[j]]) for j in range(shared + 1))


def _follow(model: Model, asked: OpenSequence, fact: Fact, answer: Sequence[int], total: int) -> SliceResult:
    """``answer`` behind the question, whose last token ``asked`` has not read yet: log-likelihood [n] of its
    tokens, and the logits [n, V] there."""
    given, begin, rows = [fact.question[-1], *answer[:-1]], asked.length, range(len(answer))
    step = model.step([Slice(asked, given, exact(), "scores", total, answer, logit_rows=rows)])
    asked.rewind(begin)
    return step.results[0]


def _sum(its: SliceResult) -> float:
    assert its.scores is not None
    return float(its.scores.double().sum())


def paired(right: Sequence[bool], exact_right: Sequence[bool]) -> Paired | None:
    """None where nothing was asked."""
    if not right:
        return None
    pairs = list(zip(right, exact_right, strict=True))
    lost, won = pairs.count((False, True)), pairs.count((True, False))
    n = len(pairs)
    return Paired(n, sum(right) / n, sum(exact_right) / n, lost, won, mcnemar(lost, won))


def mcnemar(lost: int, won: int) -> float:
    """Two-sided p of the exact test: lost ~ Binomial(lost + won, 1/2)."""
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1))
    return min(1.0, float(2 * tail / 2**n))
