"""Memberships of keys summed over positions: how a point of a cluster finds its key.

    P_v(j) = sum_{j' < j} k^_j'v,      b_v(i) = P_v(number of keys that row i sees)
    a point y in [0, b_v) belongs to the key j with P_v(j) <= y < P_v(j + 1)

A key is found with a probability in proportion to its membership; what later keys bring moves nothing. Sums
are fp64, sequential inside blocks of 64 keys and then over blocks: the same numbers whoever asks, a chunk, a
whole prompt or a decode step. v = 0 .. C - 1; with exploration one more cluster, of which every key is a full
member, follows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock

import torch
from torch import Tensor

from kernels.contract import Call
from kernels.math.sbm import ClusterParams, hidden, memberships

SUM_KEYS = 64
KEYS_AT_ONCE = 1024
GUIDED_AT_ONCE = 1 << 18
_LINEAR_STEPS = 2


class KeySums:
    """Memberships [H, C, length] fp32 of the first keys of one sequence, and their sums before every block of
    64 keys [H, C, blocks + 1] fp64. May be kept beside a cache (``kernels.math.kept.State``).

    ``heads``: of these query heads alone. ``uniform``: with the cluster that has every key.
    """

    def __init__(self, learned: ClusterParams, uniform: bool, heads: slice = slice(None)) -> None:
        self.learned, self._uniform = learned, uniform
        self._clusters = learned.wide[0][heads]
        self._shape = (self._clusters.shape[0], self._clusters.shape[1] + uniform)
        self._members: Tensor | None = None
        self._before: Tensor | None = None
        self._length = 0
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        return sum(0 if held is None else held.nbytes for held in (self._members, self._before))

    @property
    def length(self) -> int:
        """Keys that are known."""
        return self._length

    @property
    def members(self) -> Tensor:
        """[H, C, keys in whole blocks]; what lies beyond the keys that were told is no one's."""
        assert self._members is not None
        return self._members

    @property
    def before(self) -> Tensor:
        assert self._before is not None
        return self._before

    def truncate(self, length: int) -> None:
        with self._lock:
            self._length = min(self._length, length)

    def extend(self, k: Tensor) -> KeySums:
        """Learn of keys [Hk, M, D], of which those not yet known are read."""
        # tensors made in inference mode could not be written to outside of it
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if k.shape[1] > self._length:
                self._make_room(k)
                for a in range(self._length, k.shape[1], KEYS_AT_ONCE):
                    self._add(k[:, a : a + KEYS_AT_ONCE], a)
        return self

    def _make_room(self, k: Tensor) -> None:
        blocks, held = -(-k.shape[1] // SUM_KEYS), 0 if self._members is None else self._members.shape[-1]
        if blocks * SUM_KEYS <= held:
            return
        blocks = max(blocks, held // SUM_KEYS + held // SUM_KEYS // 4)
        members = torch.zeros(*self._shape, blocks * SUM_KEYS, dtype=torch.float32, device=k.device)
        before = torch.zeros(*self._shape, blocks + 1, dtype=torch.float64, device=k.device)
        if self._members is not None and self._before is not None:
            members[..., :held] = self._members
            before[..., : self._before.shape[-1]] = self._before
        self._members, self._before = members, before

    def _add(self, k: Tensor, first: int) -> None:
        last = first + k.shape[1]
        grouped = self._clusters.view(len(k), -1, *self._clusters.shape[1:])
        new = memberships(hidden(k, self.learned)[:, None], grouped).flatten(0, 1).mT
        self.members[:, : new.shape[1], first:last] = new
        if self._uniform:
            self.members[:, -1, first:last] = 1.0
        self._length = last
        a, b = first // SUM_KEYS, last // SUM_KEYS
        if b > a:
            sums = self._inside(slice(None), a, b)[..., -1]
            running = torch.cat([self.before[..., a : a + 1], sums], -1).cumsum(-1)
            self.before[..., a + 1 : b + 1] = running[..., 1:]

    def _inside(self, heads: slice, a: int, b: int) -> Tensor:
        """Sums [heads, C, blocks, 64] within blocks a .. b - 1."""
        some = self.members[heads, :, a * SUM_KEYS : b * SUM_KEYS]
        return some.double().view(*some.shape[:2], b - a, SUM_KEYS).cumsum(-1)

    def upto(self, num_keys: int) -> Tensor:
        """P(num_keys) [H, C]."""
        block, rest = divmod(num_keys, SUM_KEYS)
        whole = self.before[..., block]
        return whole + self._inside(slice(None), block, block + 1)[..., 0, rest - 1] if rest else whole

    def prefix(self, head: int, num_keys: int) -> Tensor:
        """P [C, num_keys + 1] of one head."""
        found = torch.zeros(self._shape[1], num_keys + 1, dtype=torch.float64, device=self.members.device)
        step = max(1, KEYS_AT_ONCE // SUM_KEYS)
        for a in range(0, -(-num_keys // SUM_KEYS), step):
            b = min(a + step, -(-num_keys // SUM_KEYS))
            sums = self._inside(slice(head, head + 1), a, b)[0] + self.before[head, :, a:b, None]
            stop = min(b * SUM_KEYS, num_keys)
            found[:, 1 + a * SUM_KEYS : 1 + stop] = sums.flatten(1)[:, : stop - a * SUM_KEYS]
        return found

    def find(self, head: Tensor, cluster: Tensor, place: Tensor, num_keys: int) -> Tensor:
        """Keys int64 [n] of points [n], 0 <= place < P(num_keys): block by bisection, then within it. For few
        points."""
        whole = num_keys // SUM_KEYS
        ends = self.before[..., 1 : whole + 1]
        block = bisect(
            lambda at: ends[head, cluster, at] > place, torch.zeros_like(head), torch.full_like(head, whole)
        )
        inside = block[:, None] * SUM_KEYS + torch.arange(SUM_KEYS, device=block.device)
        sums = self.members[head[:, None], cluster[:, None], inside].double().cumsum(-1)
        sums += self.before[head, cluster, block][:, None]
        return block * SUM_KEYS + (sums <= place[:, None]).sum(-1)


def bisect(holds: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The first number [n] in low .. high - 1 where ``holds``, a property of all numbers from some one on;
    high where it never does."""
    for _ in range(int((high - low).max()).bit_length() if len(low) else 0):
        open_ = low < high
        middle = (low + high) >> 1
        found = holds(torch.where(open_, middle, 0))
        low, high = torch.where(open_ & ~found, middle + 1, low), torch.where(open_ & found, middle, high)
    return low


def kept_sums(call: Call, learned: ClusterParams, uniform: bool) -> KeySums | None:
    """The sums of all heads that are kept beside the sequence's cache; None where nothing is."""
    if call.kept is None:
        return None
    key: Hashable = (
        "sbm",
        id(learned),
        uniform,
    )  # the state holds ``learned``: no other has its id meanwhile
    return call.kept.get(key, lambda: KeySums(learned, uniform))


class Guide:
    """Finds the keys of many points at once: [0, P_v(M)) is cut into M equal cells, and a cell knows the
    first key that a point in it may belong to.

    The cell of a number is the same monotone function of it for points and for sums, so that rounding cannot
    lead past a key.
    """

    def __init__(self, prefix: Tensor) -> None:
        """``prefix`` P [C, M + 1]."""
        C, self._num_keys = prefix.shape[0], prefix.shape[1] - 1
        self._prefix = prefix
        self._per_unit = self._num_keys / prefix[:, -1].clamp_min(1e-300)
        self._first = torch.zeros(C, self._num_keys + 1, dtype=torch.int32, device=prefix.device)
        step = max(1, GUIDED_AT_ONCE // self._num_keys)
        for a in range(0, C, step):
            self._fill(slice(a, min(a + step, C)))

    def _fill(self, some: slice) -> None:
        """first[c] = the number of keys whose sum's cell is below c."""
        M, width = self._num_keys, some.stop - some.start
        cells = (self._prefix[some, 1:] * self._per_unit[some, None]).long().clamp_(max=M - 1)
        cells += torch.arange(width, device=cells.device)[:, None] * M
        counts = torch.bincount(cells.view(-1), minlength=width * M).view(width, M)
        self._first[some, 1:] = counts.cumsum(1)

    def find(self, cluster: Tensor, place: Tensor) -> Tensor:
        """Keys int32 [n] of points [n], 0 <= place < P(M) of their cluster int32 [n]."""
        M, sums = self._num_keys, self._prefix.view(-1)
        cell = (place * self._per_unit.index_select(0, cluster)).int().clamp_(max=M - 1)
        line = cluster * (M + 1)
        cell += line
        first = self._first.view(-1)
        key = first.index_select(0, cell)
        ends = line.add_(1)  # where P_v(1) is
        for _ in range(_LINEAR_STEPS):
            key += sums.index_select(0, ends + key) <= place
        late = (sums.index_select(0, ends + key) <= place).nonzero()[:, 0].int()
        if len(late):
            high = first.index_select(0, cell[late] + 1)
            ends, place = ends[late], place[late]
            key[late] = bisect(lambda at: sums.index_select(0, ends + at) > place, key[late] + 1, high)
        return key
