"""k-means buckets: a row keeps the keys of the clusters whose centroids it likes best, and its neighbourhood.

    A_i = window(i)  ∪  first ``sinks`` keys  ∪  near(i, c_1)  ∪ ... ∪  near(i, c_probes)
    c_1, c_2, ... = the clusters of largest sign(scale) <q_i, centroid>
    near(i, c)    = the cluster_size most recent (causal) or nearest (bidirectional) keys of cluster c

Nothing is learned in training: centroids are fitted on the call's own keys, causal ones on the first
``train_keys`` of them, whose rows keep all their keys; ``kernels.math.clusters`` has the fit. The idea is
that of routing attention (Roy et al., arXiv 2003.05997), whose centroids are trained and whose queries are
clustered with the keys. Cost O(N D (num_clusters + num_probes cluster_size)) time, O(N) memory. Accumulates
in fp32, fits and chooses in fp64, returns q's dtype.

When not to use it: where a text changes so much after its first ``train_keys`` tokens that their clusters say
little of later keys; below some thousands of keys, where exact attention costs no more.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kernels.contract import AttentionResult, Backend, Call, CallShape, Capabilities, Workspace
from kernels.math.bucket_attention import Bucketing, bucket_attention, bucket_reference
from kernels.math.bucket_workspace import bucket_workspace
from kernels.math.clusters import MAX_TRAIN_KEYS, KMeansParams, kmeans_codes, kmeans_flops, kmeans_reach
from kernels.math.flops import bucket_flops, coded_keys, kmeans_buckets


def reference(q: Tensor, k: Tensor, v: Tensor, params: KMeansParams, call: Call) -> AttentionResult:
    return bucket_reference(q, k, v, _bucketing(params), call)


def attend(q: Tensor, k: Tensor, v: Tensor, params: KMeansParams, call: Call) -> AttentionResult:
    return bucket_attention(q, k, v, _bucketing(params), call)


def _bucketing(params: KMeansParams) -> Bucketing:
    return Bucketing(partial(kmeans_codes, params), kmeans_reach(params))


def workspace(params: KMeansParams, shape: CallShape) -> Workspace:
    return bucket_workspace(
        shape,
        kmeans_reach(params),
        tables=1,
        rounds=params.num_probes,
        columns=params.num_clusters,
        basis=params.num_clusters,
    )


def flops(params: KMeansParams, shape: CallShape) -> float:
    """Assumes the keys of a row's clusters that ``bucket_pairs`` names."""
    rows, keys = shape.num_rows * shape.num_heads // shape.num_kv_heads, shape.num_keys
    coded = coded_keys(shape, kmeans_reach(params))
    fitted = min(keys, params.train_keys if shape.causal else MAX_TRAIN_KEYS) if coded == keys else 0
    coding = kmeans_flops(params, rows, coded, shape.key_dim, fitted)
    return bucket_flops(shape, kmeans_buckets(params), coding * shape.num_kv_heads)


BACKEND = Backend(
    name="kmeans",
    summary="Keys of the clusters that a row likes best, beside a window and the first tokens; not trained.",
    paper="after Roy et al., Routing Transformers (arXiv 2003.05997), with clusters fitted on the call",
    params=KMeansParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="row",
        random=True,
        complexity="O(N (num_clusters + num_probes cluster_size) + N (window + train_keys))",
        exponent=1.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend},
    workspace=workspace,
    flops=flops,
    conditions=(
        "A cluster is as good as its centroid speaks for its keys, and no more than its cluster_size most "
        "recent or nearest keys are kept: no bound on what is missed holds; dropped_mass measures it on "
        "every 256th row. Bidirectional centroids depend on all keys of the call, not on its rows."
    ),
)
