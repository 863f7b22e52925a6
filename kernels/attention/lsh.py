"""Locality-sensitive hashing: a row keeps the keys that share a bucket with it, and its neighbourhood.

    A_i = window(i)  ∪  first ``sinks`` keys  ∪  near_1(i)  ∪ ... ∪  near_rounds(i)
    reformer   h(x) = argmax [x R ; -x R]: row i keeps the cluster_size keys of bucket h(q_i) that are most
               recent (causal) or nearest on both sides (bidirectional), per round
    smyrf      queries and keys sorted apart by an asymmetric projection and cut into clusters of
               cluster_size keys: cluster a of queries keeps cluster a of keys, per round

Kitaev et al., "Reformer" (arXiv 2001.04451); Daras et al., "SMYRF" (arXiv 2010.05315);
``kernels.math.hashing`` has the maps. Unlike both papers a pair found twice counts once, and unlike Reformer
rows do not share one vector for query and key, do not depend on how a call was cut into chunks, and find
their keys by fixed rotations: a decode step keeps what the prefill would. Keys are centred before they are
hashed; causal rows before ``centre_keys`` keep all their keys. Cost O(N D num_hash_rounds (num_buckets +
cluster_size)) time, O(N) memory. Accumulates in fp32, hashes in fp64, returns q's dtype.

When not to use it: where queries and keys of a model point in unrelated directions (a hash finds pairs of
small angle, and large logits need not have one); below some thousands of keys, where exact attention costs no
more.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kernels.contract import AttentionResult, Backend, Call, CallShape, Capabilities, Params, Workspace
from kernels.math.bucket_attention import Bucketing, bucket_attention, bucket_reference
from kernels.math.bucket_workspace import bucket_workspace
from kernels.math.flops import bucket_flops, coded_keys, lsh_buckets
from kernels.math.hashing import LshParams, lsh_codes, lsh_flops, lsh_reach, rotations_bytes


def reference(q: Tensor, k: Tensor, v: Tensor, params: LshParams, call: Call) -> AttentionResult:
    return bucket_reference(q, k, v, _bucketing(params), call)


def attend(q: Tensor, k: Tensor, v: Tensor, params: LshParams, call: Call) -> AttentionResult:
    return bucket_attention(q, k, v, _bucketing(params), call)


def _bucketing(params: LshParams) -> Bucketing:
    return Bucketing(partial(lsh_codes, params), lsh_reach(params))


def unsupported(params: Params, causal: bool) -> list[str]:
    assert isinstance(params, LshParams)
    if causal and params.variant == "smyrf":
        return [
            "variant smyrf sorts all tokens to choose, so a row would depend on later ones; variant reformer "
            "has a causal form"
        ]
    return []


def workspace(params: LshParams, shape: CallShape) -> Workspace:
    return bucket_workspace(
        shape,
        lsh_reach(params),
        tables=params.num_hash_rounds,
        rounds=params.num_hash_rounds,
        columns=params.num_hash_rounds * (params.num_buckets // 2),
        basis=1,
        drawn=rotations_bytes(params, shape) if params.variant == "reformer" else 0,
    )


def flops(params: LshParams, shape: CallShape) -> float:
    """Assumes the keys of a row's buckets that ``bucket_pairs`` names; smyrf's clusters are of equal size."""
    rows = shape.num_rows * shape.num_heads // shape.num_kv_heads
    hashing = lsh_flops(params, rows, coded_keys(shape, lsh_reach(params)), shape.key_dim)
    return bucket_flops(shape, lsh_buckets(params, shape), hashing * shape.num_kv_heads)


BACKEND = Backend(
    name="lsh",
    summary="Keys that hash into a row's buckets, beside a window and the first tokens (Reformer, SMYRF).",
    paper="Kitaev et al., Reformer (arXiv 2001.04451); Daras et al., SMYRF (arXiv 2010.05315)",
    params=LshParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="row",
        random=True,
        complexity="O(N num_hash_rounds (num_buckets + cluster_size) + N window)",
        exponent=1.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend},
    workspace=workspace,
    flops=flops,
    conditions=(
        "Which keys a hash finds depends on angles, not on logits: no bound on what is missed holds for "
        "given data; dropped_mass measures it on every 256th row. Variant "
        "smyrf chooses by the whole call: it is "
        "bidirectional only, and its chunks are calls of their own."
    ),
    unsupported=unsupported,
)
