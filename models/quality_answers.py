"""Questions about planted facts, answered by a model that has read the document.

Each question goes to a fork of the sequence and is read with exact attention over the cached keys, whatever
read the document. An answer is *chosen* where its log-likelihood is above that of every other candidate,

    log p(c) = sum_j log p(c_j | question, c_1 .. c_{j-1})

and *generated* where each of its tokens is the likeliest one. A candidate that shares its first tokens with
the answer has them scored by the answer's own forward, and its next token too; that sum is above log p(c), so
that most candidates need no forward of their own. Those that do are read in one step.

Two attentions are compared over the same questions: McNemar's exact test on the questions that only one of
them answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.contract import SequenceState, ServedModel, Slice, SliceResult
from models.planned import exact
from models.quality_facts import Document, Fact


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


def ask(model: ServedModel, sequence: SequenceState, document: Document) -> Answers:
    """``sequence`` has read the document's prompt and stays as it is."""
    found = [_ask(model, sequence, fact, document.prompt_tokens) for fact in document.facts]
    return Answers([chosen for chosen, _ in found], [generated for _, generated in found])


def _ask(model: ServedModel, sequence: SequenceState, fact: Fact, total: int) -> tuple[bool, bool]:
    asked = model.fork(sequence, sequence.length + len(fact.question) + len(fact.answer))
    try:
        model.step([Slice(asked, fact.question[:-1], exact(), "nothing", total)])
        (answer,) = _follow(model, asked, fact, [fact.answer], total)
        assert answer.row_logits is not None
        generated = answer.row_logits.argmax(-1).tolist() == fact.answer
        likelihoods = answer.row_logits.double().log_softmax(-1)
        mine = _sum(answer)
        rivals = [each for each in fact.candidates[1:] if _bound(likelihoods, fact.answer, each) >= mine]
        beaten = any(_sum(each) >= mine for each in _follow(model, asked, fact, rivals, total))
        return not beaten, generated
    finally:
        asked.close()


def _bound(likelihoods: Tensor, answer: Sequence[int], other: Sequence[int]) -> float:
    """The most that log p(other) can be, from the answer's log-likelihoods [n, V]."""
    shared = next((j for j, (a, b) in enumerate(zip(answer, other, strict=True)) if a != b), len(answer) - 1)
    return sum(float(likelihoods[j, other[j]]) for j in range(shared + 1))


def _follow(
    model: ServedModel, asked: SequenceState, fact: Fact, answers: Sequence[Sequence[int]], total: int
) -> Sequence[SliceResult]:
    """Each of ``answers`` behind the question, whose last token ``asked`` has not read yet: log-likelihood
    [n] of its tokens, and the logits [n, V] there. In one step, each in a fork of its own."""
    forks = [model.fork(asked, asked.length + len(answer)) for answer in answers]
    try:
        slices = [
            Slice(
                fork,
                [fact.question[-1], *answer[:-1]],
                exact(),
                "scores",
                total,
                answer,
                logit_rows=range(len(answer)),
            )
            for fork, answer in zip(forks, answers, strict=True)
        ]
        return model.step(slices).results if slices else ()
    finally:
        for fork in forks:
            fork.close()


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
