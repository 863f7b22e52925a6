"""What every backend should answer, written a second time in numpy fp64.

Backends of which a set of keys per row and a softmax over it is the whole definition are answered here, from
``kernel_oracle`` and ``selection_oracle``. Each of the others has a module of its own name in this package
with a function ``expected``, and shares no code with the package under test.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from tests.kernels.kernel_oracle import kept_pairs, softmax_attention


@dataclass(frozen=True)
class Expected:
    """``out`` [B, H, N, Dv]; ``lse`` [B, H, N], -inf for a row without any key, None where the backend has
    none; ``kept`` bool [B, H, N, M], the pairs that count as kept, None where none are."""

    out: np.ndarray
    lse: np.ndarray | None
    kept: np.ndarray | None

    @property
    def pairs_kept(self) -> int:
        return 0 if self.kept is None else int(self.kept.sum())


def expected(
    backend: str,
    params: dict[str, Any],
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    start: int,
    causal: bool,
    scale: float,
    layer: int = 0,
    seed: int = 0,
    learned: Any = None,
) -> Expected:
    """The answer of ``attend(q, k, v, backend=backend, params=params, ...)`` in fp64.

    q [B, H, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv]: any float dtype, widened to fp64 here. ``params``: as a
    request gives them, so without those that stay at their defaults. A backend's own module has the same
    function without ``backend``; ``learned`` is what the call was given.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    own = f"{__name__}.{backend}"
    if find_spec(own) is not None:
        where: dict[str, Any] = {"start": start, "causal": causal, "scale": scale}
        told: Expected = import_module(own).expected(
            params, q, k, v, **where, layer=layer, seed=seed, learned=learned
        )
        return told
    kept = kept_pairs(backend, params, q, k, start=start, causal=causal, scale=scale, layer=layer, seed=seed)
    out, lse = softmax_attention(q, k, v, kept, scale)
    return Expected(out, lse, kept)
