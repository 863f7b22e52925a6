"""Nyström: attention through the means of a few segments, the landmarks.

    F = softmax(scale Q K~^T)   A = softmax(scale Q~ K~^T)   B = softmax(scale Q~ K^T)       out = F A^+ (B V)
    Q~, K~: means of num_landmarks nearly equal segments of the call's queries and of the keys; segment a of M
    positions begins at floor(a M / num_landmarks)

Xiong et al., "Nyströmformer: a Nyström-based algorithm for approximating self-attention" (arXiv 2102.03902),
section 3. Where there are fewer rows or keys than landmarks, each is its own; with no more rows than
landmarks and the exact A^+ the answer is exact attention, provided that A has full row rank. The paper adds a
depthwise convolution of V with learned weights: it belongs to a model trained with it, is no function of q,
k, v, and is left out. ``pinv`` is the paper's iteration, whose limits stand in ``kernels.math.pinv``, or the
pseudo-inverse by singular values; that one is computed in fp64 throughout, since an ill-conditioned A
magnifies the rounding of F and B.
Cost O((N + M) m D + m^3) per head for m landmarks, O(m D + m^2) memory beside the answer. Accumulates in
fp32, what is between landmarks in fp64; returns q's dtype. Under impl ``triton`` the exact A^+ leaves its
products to torch, in fp64.

When not to use it: in a decoder (a landmark is a mean over later tokens too); where a row attends to few
single keys, which no mean of a segment resembles. Weights may be negative and nothing bounds the error: where
segments are alike, A is nearly singular and the exact A^+ makes the answer many times too large; six steps do
not.
"""

from __future__ import annotations

from time import perf_counter

import torch
from pydantic import Field
from torch import Tensor

from kernels.contract import AttentionResult, Backend, Call, CallShape, Capabilities, Params, Stats, Workspace
from kernels.math.accumulate import pairs_exact
from kernels.math.dense import KEY_CHUNK, accumulator_dtype, dense_part, grouped
from kernels.math.merge import merge_into
from kernels.math.pinv import Method, pseudo_inverse

_ROWS = 4096
"""Query rows and keys at once: what is widened or scored exists for so many."""
_MATRIX = 1 << 18
"""Numbers of A at once, over heads."""
_SVD_FLOPS = 22
"""Of a singular value decomposition with both sides, times m^3 (Golub and Van Loan, Matrix Computations)."""
_MATRICES = {"iterative": 7, "exact": 5}
"""Of m x m numbers that exist at once while one is inverted."""


class NystromParams(Params):
    num_landmarks: int = Field(
        default=64,
        ge=1,
        le=1024,
        description="Segments whose means stand for queries and for keys; a shorter sequence has fewer.",
    )
    pinv: Method = Field(
        default="iterative",
        description="Pseudo-inverse of the attention between landmarks: the paper's iteration, or exact by "
        "singular values (slower, all in fp64).",
    )
    num_iterations: int = Field(
        default=6,
        ge=1,
        le=12,
        description="Steps of the iteration; six invert singular values above some 3 % of the largest.",
    )

    def reads_whole(self) -> bool:
        return True


def reference(q: Tensor, k: Tensor, v: Tensor, params: NystromParams, call: Call) -> AttentionResult:
    """Head by head, in fp64."""
    began = perf_counter()
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=torch.float64, device=q.device)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            one = (q[b, h].double(), k[b, h // group].double(), v[b, h // group].double())
            out[b, h] = _one_head(*one, params, call.scale)
    return AttentionResult(out.to(q.dtype), None, _stats(q, k, v, params, call, began, "reference"))


def _one_head(q: Tensor, k: Tensor, v: Tensor, params: NystromParams, scale: float) -> Tensor:
    """q [N, D], k [M, D], v [M, Dv] -> [N, Dv]."""
    near_q, near_k = (torch.stack([x[a:b].mean(0) for a, b in _segments(len(x), params)]) for x in (q, k))
    left, right = torch.softmax(scale * q @ near_k.T, -1), torch.softmax(scale * near_q @ k.T, -1)
    middle = torch.softmax(scale * near_q @ near_k.T, -1)
    if params.pinv == "exact":
        return left @ (pseudo_inverse(middle, "exact", 0) @ (right @ v))
    start = middle.T / (middle.sum(0).max() * middle.sum(1).max())
    inverse = start
    for _ in range(params.num_iterations):
        x = middle @ inverse
        inverse = (13 * inverse - 15 * inverse @ x + 7 * inverse @ x @ x - inverse @ x @ x @ x) / 4
    return left @ (inverse @ (right @ v))


def attend(q: Tensor, k: Tensor, v: Tensor, params: NystromParams, call: Call) -> AttentionResult:
    began = perf_counter()
    if call.impl == "triton" and params.pinv == "iterative":
        out = _attend_by_triton(q, k, v, params, call)
        return AttentionResult(out, None, _stats(q, k, v, params, call, began, "triton"))
    dtype = torch.float64 if params.pinv == "exact" else accumulator_dtype(q.dtype)
    near_q = _landmarks(q, params, dtype)
    near_k = _landmarks(k, params, dtype)
    values = _over_landmarks(near_q, near_k, _over_keys(near_q, k, v, call.scale), params, call.scale)
    out = _over_rows(q, near_k, values, call.scale)
    return AttentionResult(out, None, _stats(q, k, v, params, call, began, call.impl))


def _attend_by_triton(q: Tensor, k: Tensor, v: Tensor, params: NystromParams, call: Call) -> Tensor:
    """The same with the long products by kernels. They accumulate in fp32: an exact A^+ wants fp64."""
    from kernels._triton.linear_landmarks import attend_keys, attend_landmarks, landmarks

    near_q, near_k = (landmarks(x, min(params.num_landmarks, x.shape[2])) for x in (q, k))
    over_keys = attend_keys(near_q, k, v, call.scale)
    values = _over_landmarks(near_q, near_k, over_keys, params, call.scale)
    return attend_landmarks(q, near_k, values, call.scale)


def _segments(length: int, params: NystromParams) -> list[tuple[int, int]]:
    """Begin and end of each landmark's positions."""
    count = min(params.num_landmarks, length)
    return [(a * length // count, (a + 1) * length // count) for a in range(count)]


def _landmarks(x: Tensor, params: NystromParams, dtype: torch.dtype) -> Tensor:
    """x [B, H, N, D] -> the segments' means [B, H, m, D]."""
    return torch.stack([x[:, :, a:b].mean(2, dtype=dtype) for a, b in _segments(x.shape[2], params)], 2)


def _over_keys(near_q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """B V [B, H, m, Dv]: the query landmarks' softmax attention over every key."""
    rows = grouped(near_q, k.shape[1])
    out, lse = dense_part(rows, k[:, :, :_ROWS], v[:, :, :_ROWS], scale)
    for a in range(_ROWS, k.shape[2], _ROWS):
        merge_into(out, lse, *dense_part(rows, k[:, :, a : a + _ROWS], v[:, :, a : a + _ROWS], scale))
    return out.flatten(1, 2)


def _over_landmarks(
    near_q: Tensor, near_k: Tensor, values: Tensor, params: NystromParams, scale: float
) -> Tensor:
    """A^+ (B V) [B, H, m, Dv], a few heads at a time."""
    group = near_q.shape[1] // near_k.shape[1]
    queries, keys = near_q.flatten(0, 1), near_k.repeat_interleave(group, 1).flatten(0, 1)
    at_once = max(1, _MATRIX // (queries.shape[1] * keys.shape[1]))
    parts = []
    for some_q, some_k, some_v in zip(
        *(torch.split(x, at_once) for x in (queries, keys, values.flatten(0, 1))), strict=True
    ):
        middle = torch.softmax(scale * some_q.double() @ some_k.double().mT, -1)
        inverse = pseudo_inverse(middle, params.pinv, params.num_iterations)
        parts.append((inverse @ some_v.double()).to(values.dtype))
    return torch.unflatten(torch.cat(parts), 0, near_q.shape[:2])


def _over_rows(q: Tensor, near_k: Tensor, values: Tensor, scale: float) -> Tensor:
    """F (A^+ B V) [B, H, N, Dv]: softmax attention over the key landmarks, with values that each query
    head has of its own."""
    keys = near_k.repeat_interleave(q.shape[1] // near_k.shape[1], 1)
    out = q.new_empty(*q.shape[:-1], values.shape[-1])
    for a in range(0, q.shape[2], _ROWS):
        rows = q[:, :, a : a + _ROWS].unsqueeze(2).to(values.dtype)
        out[:, :, a : a + _ROWS] = dense_part(rows, keys, values, scale)[0][:, :, 0]
    return out


def _stats(
    q: Tensor, k: Tensor, v: Tensor, params: NystromParams, call: Call, began: float, impl: str
) -> Stats:
    return Stats(
        pairs_kept=0,
        pairs_exact=pairs_exact(q, k.shape[2], call),
        pairs_computed=0,
        selection_ms=0.0,
        compute_ms=(perf_counter() - began) * 1e3,
        impl=impl,
        other_flops=_flops(q, k, v, params),
    )


def _flops(q: Tensor, k: Tensor, v: Tensor, params: NystromParams) -> int:
    (B, H, N, D), (_, Hk, M, Dv) = q.shape, v.shape
    return B * flops(params, CallShape(N, M, H, Hk, D, Dv, q.element_size(), causal=False))


def flops(params: NystromParams, shape: CallShape) -> int:
    """Of one sequence: nothing here depends on the data."""
    N, M, H, Hk = shape.num_rows, shape.num_keys, shape.num_heads, shape.num_kv_heads
    D, Dv = shape.key_dim, shape.value_dim
    m, n = min(params.num_landmarks, N), min(params.num_landmarks, M)
    means = H * N * D + Hk * M * D
    softmaxes = 2 * (N * n + m * M) * (D + Dv) + 2 * m * n * D
    steps = params.num_iterations * (6 * m * m * m + 2 * m * m * (m + n)) if params.pinv == "iterative" else 0
    inverse = steps or _SVD_FLOPS * max(m, n) * min(m, n) ** 2
    return means + H * (softmaxes + inverse + 2 * n * m * Dv)


def workspace(params: NystromParams, shape: CallShape) -> Workspace:
    """Over all keys, between landmarks and over all rows: three moments that follow each other, but what one
    frees in small pieces the next does not always get, so they add up."""
    H, D, Dv = shape.num_heads, shape.key_dim, shape.value_dim
    m, n = (min(params.num_landmarks, length) for length in (shape.num_rows, shape.num_keys))
    wide = 8 if params.pinv == "exact" else max(4, shape.itemsize)
    known = (H * (m * (D + 2 * Dv) + n * D) + shape.num_kv_heads * n * D) * wide
    keys, rows = min(_ROWS, shape.num_keys), min(_ROWS, shape.num_rows)
    widened = shape.itemsize < wide
    over_keys = _attended(shape, m, keys, wide) + widened * shape.num_kv_heads * keys * (D + Dv) * wide
    over_rows = _attended(shape, rows, n, wide) + widened * rows * H * D * wide
    heads = min(H, max(1, _MATRIX // (m * n)))
    between = heads * 8 * (_MATRICES[params.pinv] * max(m, n) ** 2 + (m + n) * (D + Dv))
    answer = shape.num_rows * H * Dv * (shape.itemsize if shape.itemsize >= 4 else 4 + shape.itemsize)
    return Workspace(known + answer + between + max(over_keys, over_rows))


def _attended(shape: CallShape, rows: int, keys: int, wide: int) -> int:
    """``kernels.math.dense.dense_part`` of so many rows of every head; where no flash kernel runs, its scores
    and a part to merge."""
    outputs, scores = rows * (shape.value_dim + 1), 0
    if not shape.on_cpu or shape.key_dim != shape.value_dim:
        scores = rows * (3 * min(keys, KEY_CHUNK) + shape.key_dim + shape.value_dim)
    return shape.num_heads * (outputs + scores) * wide


BACKEND = Backend(
    name="nystrom",
    summary="Attention through the means of a few segments of queries and keys.",
    paper="Xiong et al., Nyströmformer (arXiv 2102.03902)",
    params=NystromParams,
    capabilities=Capabilities(
        causal=False,
        bidirectional=True,
        decode=False,
        exact=False,
        selection="prompt",
        approximates=True,
        complexity="O(N num_landmarks)",
        exponent=1.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend},
    workspace=workspace,
    flops=flops,
    conditions=(
        "Encoders only: a landmark is a mean over the whole call. The paper's learned convolution is left "
        "out. Nothing bounds the error: it is small where attention varies slowly along the sequence, and "
        "large where rows look for single keys. The default pseudo-inverse is the paper's six steps, which "
        "leave small singular values out; exact inverts them too, and makes answers far too large where "
        "segments are alike."
    ),
)
