"""Bucket codes of a sequence's keys, kept from call to call: a decode step codes its new keys alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from kernels.contract import Call

Fit = Callable[[Tensor], Tensor]
"""The first ``basis_keys`` keys [Hk, basis_keys, D] -> what codes are made with (a centre, centroids)."""
Encode = Callable[[Tensor, Tensor | None], Tensor]
"""(keys [Hk, n, D], basis) -> codes [Hk, tables, n]; a key's code depends on it and the basis alone."""


@dataclass(frozen=True)
class Coded:
    """``codes`` [Hk, tables, M] and the ``basis`` they are made with; of each head's keys, ``num_coded`` were
    coded for this answer and ``num_fitted`` read for the basis: 0 where the state knew."""

    codes: Tensor
    basis: Tensor | None
    num_coded: int
    num_fitted: int


class CodeState:
    """Codes [Hk, tables, length] of the first keys, and the basis that ``basis_keys`` of them have fixed
    (none where that is 0)."""

    def __init__(self, basis_keys: int) -> None:
        self._basis_keys = basis_keys
        self._basis: Tensor | None = None
        self._codes: Tensor | None = None
        self._length = 0
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        return sum(0 if held is None else held.nbytes for held in (self._basis, self._codes))

    def truncate(self, length: int) -> None:
        with self._lock:
            self._length = min(self._length, length)
            if length < self._basis_keys:
                self._basis, self._length = None, 0

    def codes(self, k: Tensor, fit: Fit, encode: Encode) -> Coded:
        """Codes of keys [Hk, M, D]: those known, and the others, which are kept. A view."""
        with self._lock, torch.inference_mode(False), torch.no_grad():  # what is kept outlives either mode
            num_fitted = 0
            if self._basis is None and self._basis_keys:
                num_fitted = min(self._basis_keys, k.shape[1])
                self._basis = fit(k[:, :num_fitted])
            num_coded = max(0, k.shape[1] - self._length)
            if num_coded:
                self._append(encode(k[:, self._length :], self._basis), k.shape[1])
            assert self._codes is not None
            return Coded(self._codes[..., : k.shape[1]], self._basis, num_coded, num_fitted)

    def _append(self, new: Tensor, length: int) -> None:
        room = 0 if self._codes is None else self._codes.shape[-1]
        if length > room:
            grown = new.new_empty(*new.shape[:-1], length if room == 0 else max(length, room + room // 4))
            if self._codes is not None:
                grown[..., : self._length] = self._codes[..., : self._length]
            self._codes = grown
        assert self._codes is not None
        self._codes[..., self._length : length] = new
        self._length = length


def code_state(call: Call, key: Hashable, basis_keys: int, num_keys: int) -> CodeState:
    """The kept state of that key, or one for this call alone where nothing is kept, or where the keys are too
    few to fix a basis yet."""
    if call.kept is None or num_keys < basis_keys:
        return CodeState(basis_keys)
    return call.kept.get(key, lambda: CodeState(basis_keys))
