"""Sparsity patterns as directed graphs: the three conditions of Yun et al. that can be checked.

    self loops         k in A_k^l for all k, l
    Hamiltonian path   a permutation g with g(i) in the union over l of A_{g(i+1)}^l
    reachability       S_k^1 = A_k^1,   S_k^t = union of S_j^{t-1} over j in A_k^l, l = ((t-1) mod p) + 1
                       s = min{t : S_k^t = [N] for all k}

Yun et al., "O(n) connections are expressive enough" (arXiv 2006.04862), assumption 1. A pattern A^l is a
boolean matrix [N, N]: row k holds the keys that query k sees. Sets of tokens are bits: of 64-bit words where
all rows move together, of one integer where a path grows vertex by vertex. Nothing is ever summed, so
nothing overflows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Pattern = NDArray[np.bool_]
Words = NDArray[np.uint64]
PathAnswer = Literal["true", "false", "unknown"]

_GATHER_BYTES = 1 << 23
SEARCH_STEPS = 20_000


def has_self_loops(patterns: Sequence[Pattern]) -> bool:
    """Whether every token sees itself in every pattern."""
    return all(bool(pattern.diagonal().all()) for pattern in patterns)


def layers_to_cover(patterns: Sequence[Pattern], target: Pattern) -> int | None:
    """The smallest t >= 1 at which S_k^t contains row k of ``target`` for every k; None: there is none.

    With ``target`` all ones this is s. Steps are taken one by one, each costs nnz N / 64 operations. They end
    where S is again what it was some whole turns through the patterns before: from there on everything
    repeats (Brent's way to find it: the state to compare with is renewed at every power of two).
    """
    wanted = _packed(target)
    edges = [_edges(pattern) for pattern in patterns]
    reached, turn = _packed(patterns[0]), len(patterns)
    earlier = np.zeros_like(reached)
    for t in count(1):
        if not (wanted & ~reached).any():
            return t
        if t % turn == 0:
            if t > turn and np.array_equal(reached, earlier):
                return None
            turns = t // turn
            earlier = reached if turns & (turns - 1) == 0 else earlier
        reached = _step(*edges[t % turn], reached)
    return None


def _packed(pattern: Pattern) -> Words:
    """Rows as 64-bit words [N, ceil(N / 64)]."""
    bits = np.packbits(pattern, axis=1)
    return np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8))).view(np.uint64)


def _edges(pattern: Pattern) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Compressed rows: where each row's keys begin [N + 1], and the keys."""
    keys = np.nonzero(pattern)[1]
    return np.concatenate(([0], np.cumsum(pattern.sum(1)))), keys


def _step(begin: NDArray[np.intp], keys: NDArray[np.intp], reached: Words) -> Words:
    """Row k of the answer: the union of ``reached`` over the keys of row k. Rows without keys stay empty."""
    out = np.zeros_like(reached)
    rows = np.flatnonzero(np.diff(begin))
    longest = int(np.diff(begin).max(initial=1))
    per_call = max(1, _GATHER_BYTES // (longest * reached.shape[1] * 8))
    for first in range(0, len(rows), per_call):
        part = rows[first : first + per_call]
        lo, hi = begin[part[0]], begin[part[-1] + 1]
        out[part] = np.bitwise_or.reduceat(reached[keys[lo:hi]], begin[part] - lo, axis=0)
    return out


def hamiltonian_path(patterns: Sequence[Pattern], max_steps: int = SEARCH_STEPS) -> PathAnswer:
    """Whether the union of the patterns has a path through all tokens, each seen by the next one.

    Certified by the order 0 .. N-1 or its reverse; decided exactly where all edges point one way (causal);
    refused where of two tokens neither depends on the other at any depth; otherwise searched, at most
    ``max_steps`` tokens tried: "unknown" where they do not suffice.
    """
    union = np.logical_or.reduce(list(patterns))
    if bool(union.diagonal(-1).all()) or bool(union.diagonal(1).all()):
        return "true"
    sees = union & ~np.eye(len(union), dtype=bool)
    if not np.triu(sees).any() or not np.tril(sees).any() or _has_no_path(sees):
        return "false"
    return _search(sees, max_steps)


def _has_no_path(sees: Pattern) -> bool:
    """Along a path every token depends, through those between, on every earlier one: of any two tokens one
    must depend on the other. So two parts apart, or two tokens that see no other, leave no path."""
    itself = sees | np.eye(len(sees), dtype=bool)
    depends, (begin, keys) = _packed(itself), _edges(itself)
    while not np.array_equal(depends, further := _step(begin, keys, depends)):
        depends = further
    either = np.unpackbits(depends.view(np.uint8), axis=1, count=len(sees)).astype(bool)
    return not bool((either | either.T).all())


def _search(sees: Pattern, max_steps: int) -> PathAnswer:
    """Depth-first with backtracking. The next token is the one with the fewest ways left into it, then with
    the fewest ways on: what is left alone now could hardly be met later."""
    into, onto = _as_integers(sees), _as_integers(sees.T)
    everything = (1 << len(into)) - 1
    sources = [k for k, ways in enumerate(into) if not ways]
    starts = sources or sorted(range(len(into)), key=lambda k: into[k].bit_count())
    left = everything
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(starts))]
    path: list[int] = []
    for _ in range(max_steps):
        token = next(stack[-1][1], None)
        while token is None:
            stack.pop()
            if not stack:
                return "false"
            left |= 1 << path.pop()
            token = next(stack[-1][1], None)
        left ^= 1 << token
        path.append(token)
        if not left:
            return "true"
        stack.append((token, iter(_next_tokens(token, left, into, onto))))
    return "unknown"


def _next_tokens(token: int, left: int, into: Sequence[int], onto: Sequence[int]) -> list[int]:
    """Tokens of ``left`` that may follow, the most urgent first; none where ``left`` cannot be finished."""
    here = left | 1 << token
    stranded = ends = 0
    for k in _members(left):
        stranded += not into[k] & here
        ends += not onto[k] & left
    if stranded or ends > 1:
        return []
    near = list(_members(onto[token] & left))
    return sorted(near, key=lambda k: ((into[k] & left).bit_count(), (onto[k] & left).bit_count()))


def _members(tokens: int) -> Iterator[int]:
    while tokens:
        lowest = tokens & -tokens
        yield lowest.bit_length() - 1
        tokens ^= lowest


def _as_integers(matrix: Pattern) -> list[int]:
    """Row k as an integer whose bit j is matrix[k, j]."""
    packed = np.packbits(matrix, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]
