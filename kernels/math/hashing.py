"""Buckets by random projections: Reformer's rotations, and SMYRF's sorted, asymmetric ones.

    reformer   h_r(x) = argmax [x R_r ; -x R_r],   R_r normal [D, num_buckets / 2],   round r, per key head
               keys lose their centre first, queries are hashed as they are (times sign(scale))
    smyrf      F(q) = [q ; 0 ; sqrt(MQ^2 + MK^2 - |q|^2)],   G(k) = [k ; sqrt(MQ^2 + MK^2 - |k|^2) ; 0]
               queries and keys are sorted apart by <w_r, F(q)>, <w_r, G(k)>, both cut into ceil(M /
               cluster_size) nearly equal clusters; cluster a of queries sees cluster a of keys

Andoni et al., "Practical and optimal LSH for angular distance" (arXiv 1509.02897); Kitaev et al., "Reformer"
(arXiv 2001.04451), which shares queries and keys: a served model does not, so keys are centred, which a
softmax does not see and without which they would share a few buckets. Daras et al., "SMYRF" (arXiv
2010.05315). MQ, MK: largest norms of the queries of a group and of the centred keys of a head.

Projections are fp64, so a code does not depend on how a product was blocked: chunks and decode steps agree. A
vector with a number that is not finite counts as the zero vector for its code, and for the centre.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kernels.contract import Call, CallShape, Params
from kernels.math.bucket_states import code_state
from kernels.math.buckets import Codes, Reach
from kernels.math.cache import DRAWS
from kernels.math.features import normals
from kernels.math.rng import fold
from kernels.parallel import side_by_side

STREAM = 3
HASHED_AT_ONCE = 4096


class LshParams(Params):
    """How queries and keys are hashed, and which keys every row sees besides those of its buckets."""

    variant: Literal["reformer", "smyrf"] = Field(
        default="reformer",
        description="reformer: fixed rotations, row by row; smyrf: sorted projections (bidirectional only).",
    )
    num_hash_rounds: int = Field(
        default=2, ge=1, le=8, description="Independent hashes; what they find is joined."
    )
    num_buckets: int = Field(
        default=64, ge=1, le=1024, description="Buckets of a reformer hash: 1, or an even number."
    )
    cluster_size: int = Field(
        default=128, ge=16, le=4096, multiple_of=16, description="Keys per row and hash round."
    )
    window: int = Field(
        default=64,
        ge=1,
        le=65536,
        description="Keys on each side; look-back including the row itself when causal.",
    )
    sinks: int = Field(default=4, ge=0, le=4096, description="First tokens that every row sees.")
    centre_keys: int = Field(
        default=64,
        ge=0,
        le=4096,
        description=(
            "Keys lose the mean of the first so many (bidirectional: of all keys) before they are hashed; "
            "causal rows among the first attend exactly. 0: off."
        ),
    )

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.num_buckets > 1 and self.num_buckets % 2:
            raise ValueError(f"num_buckets must be 1 or even, got {self.num_buckets}")
        return self

    def reads_whole(self) -> bool:
        return self.variant == "smyrf"


def lsh_reach(params: LshParams) -> Reach:
    """How far the rows of these params look."""
    exact_rows = params.centre_keys
    return Reach(
        params.cluster_size, params.window, params.sinks, exact_rows, whole=params.variant == "smyrf"
    )


def lsh_codes(params: LshParams, q: Tensor, k: Tensor, call: Call) -> Codes:
    """The buckets of one sequence: q [Hk, G, N, D], k [Hk, M, D], causal without keys after the last row.

    Causal codes of keys are kept in ``call.kept`` and computed for new keys only.
    """
    if params.variant == "smyrf":
        return _smyrf_codes(params, q, k, call)
    rows = _reformer_rows(params, q, call)
    keys, num_coded = reformer_keys(params, k, call)
    tables = tuple(range(params.num_hash_rounds))
    return Codes(keys, rows, tables, params.num_buckets, _flops(params, q, num_coded))


def _reformer_rows(params: LshParams, q: Tensor, call: Call) -> Tensor:
    """int16 [Hk, G, rounds, N]."""
    weights = rotations(params, call, q.shape[0], q.shape[-1])
    rows = _hashed(q.flatten(1, 2), weights, None, sign=-1.0 if call.scale < 0 else 1.0)
    return torch.unflatten(rows, 2, (q.shape[1], q.shape[2])).transpose(1, 2)


def reformer_keys(params: LshParams, k: Tensor, call: Call) -> tuple[Tensor, int]:
    """int16 [Hk, rounds, M] of keys [Hk, M, D]; and how many of each head were hashed for it."""
    weights = rotations(params, call, k.shape[0], k.shape[-1])
    if not call.causal:
        return _hashed(k, weights, key_mean(k) if params.centre_keys else None), k.shape[1]
    key = ("lsh", params.num_hash_rounds, params.num_buckets, params.centre_keys, call.seed, call.layer)
    state = code_state(call, key, params.centre_keys, k.shape[1])
    coded = state.codes(k, key_mean, lambda new, centre: _hashed(new, weights, centre))
    return coded.codes, coded.num_coded


def rotations(params: LshParams, call: Call, num_heads: int, head_dim: int) -> Tensor:
    """R fp64 [Hk, D, num_hash_rounds, num_buckets / 2] of a layer, drawn from (seed, layer, key head)."""
    rounds, half = params.num_hash_rounds, params.num_buckets // 2
    drawn = (call.seed, call.layer, num_heads, head_dim, rounds, half)
    return DRAWS.get(("rotations", *drawn), lambda: _rotations(*drawn))


def rotations_bytes(params: LshParams, shape: CallShape) -> int:
    """What ``rotations`` takes, for as long as the cache of draws keeps it."""
    columns = params.num_hash_rounds * (params.num_buckets // 2)
    return shape.num_kv_heads * shape.key_dim * columns * 8


def _rotations(seed: int, layer: int, num_heads: int, dim: int, rounds: int, half: int) -> Tensor:
    heads = [normals(fold(seed, layer, STREAM, head), rounds * dim, half) for head in range(num_heads)]
    return torch.stack(heads).view(num_heads, rounds, dim, half).transpose(1, 2).contiguous()


def _hashed(x: Tensor, weights: Tensor, centre: Tensor | None, sign: float = 1.0) -> Tensor:
    """h(sign * (x - centre)): x [Hk, n, D], weights [Hk, D, rounds, half] -> int16 [Hk, rounds, n]."""
    heads, _, rounds, half = weights.shape
    codes = torch.zeros(heads, rounds, x.shape[1], dtype=torch.int16, device=x.device)
    if half == 0:
        return codes
    weights = weights.to(x.device)

    def hash_some(some: slice) -> None:
        for a in range(0, x.shape[1], HASHED_AT_ONCE):
            wide = finite_rows(x[some, a : a + HASHED_AT_ONCE])
            if centre is not None:
                wide = wide - centre[some]
            projected = torch.bmm(wide, weights[some].flatten(2)).mul_(sign)
            codes[some, :, a : a + HASHED_AT_ONCE] = _first_largest(
                torch.unflatten(projected, 2, (rounds, half))
            )

    few = heads * x.shape[1] <= HASHED_AT_ONCE
    turns = [slice(0, heads)] if few else [slice(head, head + 1) for head in range(heads)]
    side_by_side([partial(hash_some, turn) for turn in turns], x.device)
    return codes


def _first_largest(projected: Tensor) -> Tensor:
    """argmax [y ; -y] over the last dimension of y [h, n, rounds, half] -> [h, rounds, n]."""
    absolute = projected.abs()
    if absolute.device.type == "cpu":  # numpy's argmax is several times faster on a CPU
        at = torch.from_numpy(absolute.numpy().argmax(-1))
    else:
        at = absolute.argmax(-1)
    negative = projected.gather(-1, at.unsqueeze(-1)).squeeze(-1) < 0
    return (at + negative * projected.shape[-1]).to(torch.int16).transpose(1, 2)


def finite_rows(x: Tensor) -> Tensor:
    """x [..., D] in fp64, rows with a number that is not finite as zeros."""
    wide = x.double()
    if x.device.type == "cpu" and math.isfinite(float(wide.sum())):  # elsewhere nothing is read back
        return wide
    return wide.masked_fill(~torch.isfinite(wide).all(-1, keepdim=True), 0.0)


def key_mean(k: Tensor) -> Tensor:
    """fp64 [Hk, 1, D] of keys [Hk, M, D]."""
    return torch.stack([finite_rows(head).mean(0, keepdim=True) for head in k])


def _smyrf_codes(params: LshParams, q: Tensor, k: Tensor, call: Call) -> Codes:
    """Every row's and every key's cluster of each round."""
    clusters = -(-k.shape[1] // params.cluster_size)
    keys, rows = zip(
        *(_smyrf_head(params, q[h], k[h], h, clusters, call) for h in range(len(k))), strict=True
    )
    tables, flops = tuple(range(params.num_hash_rounds)), _flops(params, q, k.shape[1])
    return Codes(torch.stack(keys), torch.stack(rows), tables, clusters, flops)


def _smyrf_head(
    params: LshParams, q: Tensor, k: Tensor, head: int, clusters: int, call: Call
) -> tuple[Tensor, Tensor]:
    """One key head: q [G, N, D], k [M, D] -> clusters of keys [rounds, M] and of rows [G, rounds, N]."""
    rounds, D = params.num_hash_rounds, k.shape[-1]
    weights = normals(fold(call.seed, call.layer, STREAM, head), rounds, D + 2).to(k.device)
    rows, keys = finite_rows(q), finite_rows(k)
    rows = -rows if call.scale < 0 else rows
    if params.centre_keys:
        keys = keys - keys.mean(0)
    row_norms, key_norms = rows.square().sum(-1), keys.square().sum(-1)
    bound = row_norms.max() + key_norms.max()
    key_extra = (bound - key_norms).clamp_(min=0).sqrt_()[:, None] * weights[:, D]
    row_extra = (bound - row_norms).clamp_(min=0).sqrt_()[..., None] * weights[:, D + 1]
    projected_keys, projected_rows = (
        keys @ weights[:, :D].mT + key_extra,
        rows @ weights[:, :D].mT + row_extra,
    )
    return _ranked(projected_keys.mT, clusters), _ranked(projected_rows.mT, clusters)


def _ranked(projected: Tensor, clusters: int) -> Tensor:
    """Cluster [..., n] of every place: the order of the last dimension cut into nearly equal parts, the
    middle of place p deciding; fewer places than clusters are spread over them."""
    n = projected.shape[-1]
    cluster = (2 * torch.arange(n, device=projected.device) + 1) * clusters // (2 * n)
    order = torch.sort(projected, dim=-1, stable=True).indices
    return torch.empty_like(order).scatter_(-1, order, cluster.expand_as(order)).to(torch.int32)


def _flops(params: LshParams, q: Tensor, num_keys: int) -> int:
    """Of all heads: rows q [Hk, G, N, D] and so many keys of each head."""
    heads, G, N, D = q.shape
    return heads * lsh_flops(params, G * N, num_keys, D)


def lsh_flops(params: LshParams, num_rows: int, num_keys: int, head_dim: int) -> int:
    """What hashing that many rows and keys of one head takes: products with the projections."""
    per_round = params.num_buckets // 2 if params.variant == "reformer" else 1
    return 2 * head_dim * params.num_hash_rounds * per_round * (num_rows + num_keys)
