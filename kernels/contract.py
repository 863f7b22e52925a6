"""What an attention backend is, what it takes and what it returns.

Letters used in every file of this package:
    B batch · H query heads · Hk key/value heads (H a multiple of Hk) · G = H / Hk query heads per key head
    N query positions · M key positions · D head_dim · Dv value head_dim
    L block_size · K blocks kept per query tile · F features · R rank · C clusters

Keys are the positions 0 .. M-1 of one sequence. Queries are N consecutive positions beginning at ``start``
(default M - N: the last N), so prefill (N = M), chunked prefill (1 < N < M) and decode (N = 1) are one
contract. A causal row at position i sees keys j <= i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.math.block_lists import BlockLists
    from kernels.math.kept import KeptStates
    from kernels.math.summaries import BlockSummaries

Selection = Literal["none", "row", "tile", "prompt"]
"""On what a causal row's choice of keys depends: nothing (fixed pattern), positions <= its own, its whole
query tile (at absolute tile boundaries), or the whole prompt."""

Impl = Literal["auto", "reference", "torch", "triton"]
"""How a backend is executed. Every impl of a backend gives the same answer within rounding."""


class Unsupported(ValueError):
    """A backend cannot do what was asked; ``reasons`` holds every reason, one sentence each."""

    def __init__(self, backend: str, reasons: Sequence[str]) -> None:
        self.backend = backend
        self.reasons = tuple(reasons)
        super().__init__(f"attention backend {backend!r} cannot serve this: " + "; ".join(self.reasons))


class Params(BaseModel):
    """Base of every backend's knobs: frozen, typed, bounded, nothing unknown accepted.

    Defaults are fixed numbers, never functions of N: a default that moved with the length would make a decode
    step disagree with the prefill before it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def chunk_multiple(self) -> int:
        """Rows of the query tile that a selection looks at (``selection`` tile): a prefill whose chunks end
        at absolute multiples of it equals the whole prefill. 1 where any chunk does."""
        return 1

    def reads_whole(self) -> bool:
        """Whether what a row gets depends on every row of the call, its queries too: cut in two, the rows of
        both parts would be others."""
        return False

    def size_problems(self, num_layers: int, num_kv_heads: int) -> list[str]:
        """Why these params do not fit a model with so many layers to which the choice applies and so many key
        heads in each (a budget per layer or per head of another length); [] where they do."""
        return []


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do, as served by ``GET /v1/attention/backends``."""

    causal: bool
    bidirectional: bool
    decode: bool
    exact: bool
    selection: Selection
    random: bool = False
    """True where the result depends on the request's seed."""
    learned: bool = False
    """True where a model must carry the backend's own parameters (``Call.learned``)."""
    approximates: bool = False
    """True where pairs that are not kept exactly are approximated instead of dropped: the result is no
    softmax over the kept pairs, and has no log-sum-exp."""
    complexity: str = "O(N^2)"
    exponent: float = 1.0
    """Documented growth of a prefill's time with N at fixed params: time ~ N ** exponent for large N."""
    impls: tuple[str, ...] = ("reference", "torch")


@dataclass(frozen=True)
class Stats:
    """What one call computed. Pairs are (query, key) pairs summed over query heads.

    ``pairs_kept`` pairs of the pattern, each counted once; ``pairs_exact`` pairs that ``exact`` would
    compute; ``pairs_computed`` score elements really computed, masked ones included; ``pairs_dense`` those of
    them for which a dense panel over contiguous keys ran because gathering the listed blocks would have
    cost more; ``pairs_scored`` logits computed to choose, in products of D numbers, summed over heads (the
    rest of the selection is not counted). ``dropped_mass`` is the mean over rows and heads of the estimated
    softmax mass that the selection left out: 0 for ``exact``, None where a backend has no estimate.

    ``other_flops`` counts the floating-point operations (a multiplication and an addition are two) that are
    neither a score element's nor a scored logit's: features and what is summed over them, hashes, clusters.
    ``kept_per_head`` [H] splits ``pairs_kept`` by query head where heads choose apart; None elsewhere.

    ``density_computed`` is the attention's own: without what was scored to choose.
    """

    pairs_kept: int
    pairs_exact: int
    pairs_computed: int
    selection_ms: float
    compute_ms: float
    impl: str
    pairs_dense: int = 0
    pairs_scored: int = 0
    dropped_mass: float | None = None
    other_flops: int = 0
    kept_per_head: tuple[int, ...] | None = None

    @property
    def density(self) -> float:
        return self.pairs_kept / self.pairs_exact if self.pairs_exact else 1.0

    @property
    def density_computed(self) -> float:
        return self.pairs_computed / self.pairs_exact if self.pairs_exact else 1.0

    @property
    def dense_share(self) -> float:
        """Share of the computed elements that ran densely beyond the crossover."""
        return self.pairs_dense / self.pairs_computed if self.pairs_computed else 0.0


@dataclass(frozen=True)
class AttentionResult:
    """``out`` [B, H, N, Dv] in q's dtype; ``lse`` [B, H, N] fp32 (natural log) or None; ``stats``.

    ``dropped`` [B, H, N] fp32: each row's own estimate, 0 .. 1, of the softmax mass that its selection left
    out; None where a backend has no estimate. Measured errors draw their rows by it.
    """

    out: Tensor
    lse: Tensor | None
    stats: Stats
    dropped: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """One validated ``attend`` call as a backend's impl receives it."""

    causal: bool
    scale: float
    seed: int
    layer: int
    """Ordinal among the layers to which the choice applies."""
    start: int
    """Absolute position of the first query."""
    summaries: BlockSummaries | None = None
    """What is already known about the blocks of these keys (bounds and means), kept beside a sequence's cache
    from call to call; None: computed for this call alone. A result never depends on it."""
    kept: KeptStates | None = None
    """What backends keep beside a sequence's cache from call to call (running sums of features, hash codes);
    None: computed for this call alone. A result never depends on it."""
    learned: object | None = None
    """The layer's own parameters for this backend, which the model carries; None where it has none."""
    impl: str = "torch"
    """By what the computations below a backend are carried out: ``torch`` or ``triton``. The drivers are the
    same; what they call in ``kernels.math`` looks here."""


class Select(Protocol):
    """The key blocks that a block-selecting backend would list for one sequence (B = 1), beyond what its rows
    always keep: the bench hands the same mask to other libraries."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, params: Any, call: Call) -> BlockLists: ...


class Execute(Protocol):
    """An impl: q [B, H, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv] -> AttentionResult."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, params: Any, call: Call) -> AttentionResult: ...


class DecodeRows(Protocol):
    """Every one-row segment of a causal packed call at once: q [1, H, S, D], whose row s belongs to
    segments[s] (their own ``rows`` say nothing here) -> out [1, H, S, Dv] and what each segment's call would
    have said. Segments have equally many key heads, and keys and values with a dense last dimension. None
    where these params need one call for each."""

    def __call__(
        self, q: Tensor, segments: Sequence[Segment], params: Any, call: Call
    ) -> PackedResult | None: ...


class PrefillRows(Protocol):
    """Segments of a packed call at once, whatever their lengths: q [1, H, T, D], whose rows belong to the
    segments as ``Segment.rows`` says -> out [1, H, T, Dv] and what each segment's call would have said; rows
    of no segment are left unwritten. None where these params need one call for each."""

    def __call__(
        self, q: Tensor, segments: Sequence[Segment], params: Any, call: Call
    ) -> PackedResult | None: ...


@dataclass(frozen=True)
class CallShape:
    """The sizes of one ``attend`` call before it runs: ``num_rows`` queries, the last of ``num_keys``
    positions (bidirectional: all of them), of one sequence."""

    num_rows: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int
    causal: bool
    on_cpu: bool = True


def dense_flops(params: Any, shape: CallShape) -> float:
    """Operations of exact attention: 2 (D + Dv) for every pair of a row and a key that it may see, rows and
    keys of the triangle at the end counted as its half."""
    pairs = shape.num_rows * shape.num_keys
    if shape.causal:
        pairs -= shape.num_rows * (shape.num_rows - 1) // 2
    return 2.0 * (shape.key_dim + shape.value_dim) * shape.num_heads * pairs


@dataclass(frozen=True)
class Workspace:
    """Bytes that a call takes beyond q, k, v and what it returns."""

    live_bytes: int
    """At once while the call runs, free again afterwards."""
    kept_bytes: int = 0
    """Left in the selection caches by every layer: drawn keys."""
    shared_bytes: int = 0
    """Left in the selection caches once for all layers: masks."""
    cache_bytes: int = 0
    """Left beside the sequence's cache by every layer, for as long as the sequence lives: block summaries."""


@dataclass(frozen=True)
class Backend:
    """One attention method: the object every file in ``kernels/attention`` ends with."""

    name: str
    summary: str
    """One sentence for tables and menus."""
    paper: str
    params: type[Params]
    capabilities: Capabilities
    impls: dict[str, Execute]
    """At least ``reference`` and ``torch``."""
    workspace: Callable[[Any, CallShape], Workspace]
    """What impl ``torch`` takes for these params and sizes: what ``models.memory`` predicts requests with."""
    flops: Callable[[Any, CallShape], float] = dense_flops
    """Operations of impl ``torch`` on a call of these sizes, predicted without touching a tensor: score
    elements computed (2 (D + Dv) each), logits scored to choose (2 D each), and the rest as
    ``Stats.other_flops`` counts it. What the scheduler prices a request with."""
    conditions: str = ""
    """What the paper's theory does and does not promise here, in a sentence or two."""
    unsupported: Callable[[Params, bool], list[str]] = field(default=lambda params, causal: [])
    """Reasons why these params cannot serve a causal (True) or bidirectional (False) model; [] where they
    can."""
    select: Select | None = None
    """Only block-selecting backends have it."""
    decode: DecodeRows | None = None
    """All one-row segments of a causal packed call, for what a call for each would cost beyond its
    arithmetic; equal to those calls within rounding. None: one call for each."""
    prefill: PrefillRows | None = None
    """Impl ``triton`` on the other segments of a packed call in one launch; equal to one call for each within
    rounding. None: one call for each."""


@dataclass(frozen=True)
class Segment:
    """One sequence of a packed call: its rows of the packed query axis and its own keys.

    ``rows`` is a slice of the packed axis T; k [1, Hk, M, D] and v [1, Hk, M, Dv] are views of its cache.
    """

    rows: slice
    k: Tensor
    v: Tensor
    start: int
    seed: int = 0
    summaries: BlockSummaries | None = None
    kept: KeptStates | None = None


@dataclass(frozen=True)
class PackedResult:
    """``out`` [1, H, T, Dv]; per segment, in order, one ``Stats``, and ``dropped`` [1, H, rows] or None."""

    out: Tensor
    stats: tuple[Stats, ...]
    dropped: tuple[Tensor | None, ...] = ()
