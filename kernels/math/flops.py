"""How many operations a call takes, predicted from its sizes alone: what ``Stats`` will count.

    flops = 2 (D + Dv) computed + 2 D scored + other
    stairs(a, b, T)  = sum over rows i in a .. b-1 of min(T (floor(i / T) + 1), b)   keys up to the tile's end
    begins(a, b, T)  = sum over rows i in a .. b-1 of T floor(i / T)                 keys before the tile
    ramp(a, b, c)    = sum over x in a .. b-1 of min(max(x, 0), c)

``computed``: score elements, ``scored``: logits computed to choose, ``other``: ``Stats.other_flops``. All are
closed forms: microseconds per call, however long it is. Rows a .. b-1 of a causal call are the last of b
positions. Sums run over rows, whose terms grow with the number of rows, and a call counts at least what its
last row alone would: so no chunk is predicted cheaper than a part of it.

Where the data decide (a share of the mass, buckets, learned clusters) a typical case is assumed, which the
function says. A causal call is assumed to follow the one before it, whose states (running sums, codes,
summaries) are kept beside the cache; a bidirectional one has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from kernels.contract import CallShape
from kernels.math.block_sparse import VIEW_ELEMENTS, crossover
from kernels.math.bucket_plan import WIDTH_STEP, panel_rows
from kernels.math.buckets import Reach
from kernels.math.clusters import KMeansParams, kmeans_reach
from kernels.math.dense import FLASH_KEYS
from kernels.math.hashing import LshParams, lsh_reach
from kernels.math.mean_query import SCORE_BYTES
from kernels.math.per_layer import Forms
from kernels.math.probe_rows import PROBE_EVERY, ROWS_AT_ONCE
from kernels.math.selection import SelectParams, TileParams
from kernels.math.window import tile_height

_JOINED_ROWS = 256
"""Rows of the tiles where a window does not slide, and of those over the first columns."""
_FP32 = 4
_MASS_CONCENTRATION = 9.0
"""Of candidate keys the largest x hold the share 1 - (1 - x)^9 of the mass: 22 % of them hold 0.9, which is
what xattention and pooled kept at mass 0.9 on real queries and keys of 4,096 and 8,192 tokens."""
_BUCKET_SKEW = 1.5
"""Keys of a row's bucket, over those of the average one: rows and keys both meet large buckets more often."""
_MET = 0.85
"""Buckets that the rows of a chunk look into, over those that as many rows by chance would."""
_DISTINCT = 0.85
"""r rounds of hashes find as many keys as r^0.85 that have none in common."""


def rows_of(shape: CallShape) -> tuple[int, int]:
    """First and last + 1 position of the call's rows."""
    return shape.num_keys - shape.num_rows, shape.num_keys


def attention_flops(shape: CallShape, computed: float, scored: float = 0.0) -> float:
    """``computed`` and ``scored`` elements of one query head, the mean over heads."""
    D, Dv = shape.key_dim, shape.value_dim
    return shape.num_heads * (2.0 * (D + Dv) * computed + 2.0 * D * scored)


def stairs(first: int, stop: int, step: int) -> int:
    a, b = first // step, (stop - 1) // step
    if a == b:
        return (stop - first) * stop
    middle = (b - a - 1) * (a + b + 2) // 2
    return ((a + 1) * step - first) * (a + 1) * step + step * step * middle + (stop - b * step) * stop


def begins(first: int, stop: int, step: int) -> int:
    return _begins(stop, step) - _begins(first, step)


def _begins(stop: int, step: int) -> int:
    tiles = stop // step
    return step * step * tiles * (tiles - 1) // 2 + (stop - tiles * step) * tiles * step


def ramp(first: float, stop: float, cap: float) -> float:
    low, high = max(first, 0.0), max(stop, 0.0)
    turn = min(max(cap, low), high)
    return (turn - low) * (turn + low - 1) / 2 + (high - turn) * cap


def halves(shape: CallShape, step: float) -> float:
    """Rows times the keys up to the end of their stretch of ``step`` rows, stretches counted from the call's
    first row: what is scored run by run."""
    N, M = shape.num_rows, shape.num_keys
    if not shape.causal:
        return float(N * M)
    return N * (M - N) + (N * N + N * min(step, N)) / 2


def tile_ends(first: int, stop: int, step: int) -> int:
    """Sum over the tiles of rows first .. stop - 1 of where each ends."""
    a, b = first // step, (stop - 1) // step
    return step * (b - a) * (a + b + 1) // 2 + stop


def residue_pairs(shape: CallShape, stride: int) -> float:
    """``kernels.math.residues``: every class of rows over its earlier keys, and a triangle of its own."""
    N, start = shape.num_rows, shape.num_keys - shape.num_rows
    each, more = divmod(N, stride)
    if not shape.causal:
        keys = -(-shape.num_keys // stride)
        return float(N * keys)
    own = more * stairs(0, each + 1, FLASH_KEYS)
    if each:
        own += (stride - more) * stairs(0, each, FLASH_KEYS)
    return own + N * start / stride


def exact_pairs(shape: CallShape) -> float:
    """``kernels.attention.exact``: a rectangle, and a triangle in whole chunks of the kernel's keys."""
    N, M = shape.num_rows, shape.num_keys
    return float(N * (M - N) + stairs(0, N, FLASH_KEYS) if shape.causal else N * M)


def window_pairs(shape: CallShape, window: int, columns: int = 0, full_rows: int = 0) -> float:
    """``kernels.math.window``: tiles of rows over all keys that some row of them keeps."""
    if not shape.causal:
        return _two_sided_pairs(shape, window, columns, full_rows)
    start, stop = rows_of(shape)
    alone = _row_window(stop - 1, window, columns, full_rows)
    if shape.num_rows == 1:
        return alone
    tile = min(_tile(shape, window), shape.num_rows)
    bend = max(window, full_rows)
    early, late = min(stop, bend), max(start, bend)
    pairs = float(stairs(start, early, _end_tile(tile, bend)) if early > start else 0)
    if stop > late:
        pairs += (stop - late) * min(window + tile - 1, stop)
        ahead = min(_JOINED_ROWS, shape.num_rows) // 2 + 1 - window
        first = late if full_rows else max(start, bend // _JOINED_ROWS * _JOINED_ROWS)
        pairs += ramp(first + ahead, stop + ahead, columns) if columns else 0.0
    return max(pairs, alone)


def _tile(shape: CallShape, width: int) -> int:
    return tile_height(width, shape.num_heads // shape.num_kv_heads)


def _end_tile(tile: int, rows: int) -> int:
    """Rows of a tile among the first ``rows``, whose window does not slide: such tiles are joined."""
    return max(tile, min(_JOINED_ROWS, -(-rows // tile) * tile))


def _row_window(i: int, window: int, columns: int, full_rows: int) -> float:
    near = i + 1 if i < full_rows else min(i + 1, window)
    return float(near + min(columns, i + 1 - near))


def _two_sided_pairs(shape: CallShape, window: int, columns: int, full_rows: int) -> float:
    M, full = shape.num_keys, min(full_rows, shape.num_keys)
    joined, tile = min(_JOINED_ROWS, M), min(_tile(shape, 2 * window), M)
    ahead = window + 1 + (tile - 1) / 2
    band = 2 * ramp(ahead, M + ahead, M) - M * M
    band += min(window, max(0, M - window)) * max(0, min(_end_tile(tile, window), M) - tile)
    before = ramp(joined / 2 - window, M + joined / 2 - window, columns) if columns else 0.0
    after = 0.0 if full else joined * max(0.0, min(columns, M) - window - 1.0)
    others = max(band, M) * (M - full) / M + before * (M - full) / M + after
    return min(full * M + others, 2.0 * M * M) * shape.num_rows / M


def own_pairs(shape: CallShape, tile: int, block: int) -> float:
    """``QueryTiles.own_keys``: every row over its tile's keys, bidirectional also over the last M mod L."""
    start, stop = rows_of(shape)
    if shape.causal:
        return float(stairs(start, stop, tile) - begins(start, stop, tile))
    M, last = shape.num_keys, shape.num_keys % tile
    return ((M - last) * (tile + M % block) + last * last) * shape.num_rows / M


def chosen_pairs(shape: CallShape, tile: int, block: int, keys: float) -> float:
    """``keys`` chosen of every tile's candidates, or all where there are no more; those of a list beyond the
    crossover are computed with its gaps."""
    least = _dense_from(shape, tile, keys)
    if not shape.causal:
        return _by_tile(shape, tile, block, lambda most: most if keys >= least * most else keys)
    start, stop = rows_of(shape)
    bend = (int(keys / least) // tile + 1) * tile
    early, late = min(stop, bend), max(start, bend)
    pairs = float(begins(start, early, tile)) if early > start else 0.0
    return pairs + max(0, stop - late) * keys


def _dense_from(shape: CallShape, tile: int, keys: float) -> float:
    """Share of a tile's candidates from which all of them are computed, lists of whole tiles given."""
    rows = shape.num_heads // shape.num_kv_heads * tile
    share = min(1.0, crossover(rows))
    slices = shape.num_rows > 1 and rows * keys >= share * VIEW_ELEMENTS
    return share if slices else 1.0


def share_pairs(shape: CallShape, tile: int, block: int, share: float) -> float:
    """A ``share`` of every tile's candidates, at least a block."""
    start, stop = rows_of(shape)
    if not shape.causal:
        return _by_tile(shape, tile, block, lambda most: min(most, max(block, share * most)))
    late = max(0, stop - max(start, tile))
    return max(share * begins(start, stop, tile), float(late * block))


def candidates(shape: CallShape, tile: int, block: int) -> int:
    """Keys that a tile may choose, the most of any tile of the call."""
    if shape.causal:
        return (shape.num_keys - 1) // tile * tile
    whole = shape.num_keys // block * block
    last = shape.num_keys % tile
    return whole - last // block * block if last else max(0, whole - tile)


def _by_tile(shape: CallShape, tile: int, block: int, chosen: Callable[[int], float]) -> float:
    """Bidirectional: whole tiles, and a last one that leaves more candidates; ``chosen`` of so many."""
    M, last = shape.num_keys, shape.num_keys % tile
    whole = M // block * block
    pairs = (M - last) * chosen(max(0, whole - tile)) + last * chosen(whole - last // block * block)
    return pairs * shape.num_rows / M


def selected_flops(
    params: TileParams, shape: CallShape, scored: float, *, every_logit: bool = False
) -> float:
    """A backend that chooses key blocks per query tile; ``scored`` logits per head where it has to choose.

    Under ``mass`` a typical concentration of the softmax is assumed (``_MASS_CONCENTRATION``); with ``skip``
    that no block is skipped, which is the most that it can cost.
    """
    tile, block = params.query_tile, params.block_size
    own, most = own_pairs(shape, tile, block), candidates(shape, tile, block)
    budget, share = amount(params)
    if share is None:
        chosen, covered = chosen_pairs(shape, tile, block, budget), budget >= most
    else:
        chosen, covered = share_pairs(shape, tile, block, share), share >= 1.0 or most == 0
    skipping = params.skip > 0 and most > 0
    if skipping:  # every logit of the lists and own keys is computed first
        chosen, own = 2 * chosen, 2 * own
    must_score = not covered or (skipping and every_logit)
    return attention_flops(shape, own + chosen, scored if must_score and most else 0.0)


def amount(params: TileParams) -> tuple[float, float | None]:
    """Keys chosen per tile, or the share of candidates that holds the wanted mass; the mean over layers and
    heads."""
    mass = params.mass if isinstance(params, SelectParams) else None
    if mass is not None:
        return 0.0, 1.0 - (1.0 - mean_of(mass)) ** (1.0 / _MASS_CONCENTRATION)
    return mean_of(params.budget), None  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def mean_of(value: Forms[int] | Forms[float]) -> float:
    """Of a knob that may differ by layer and head."""
    if not isinstance(value, tuple):
        return float(value)
    each = [mean_of(x) if not isinstance(x, tuple) else sum(x) / len(x) for x in value]
    return sum(each) / len(each)


def groups_at_once(shape: CallShape, columns: float, most: int) -> int:
    """Row groups whose scores over so many columns fill ``SCORE_BYTES``, at most ``most``."""
    row = shape.num_heads // shape.num_kv_heads * max(columns, 1.0) * _FP32
    return max(1, min(int(SCORE_BYTES / row), most))


def drawn_pairs(shape: CallShape, num_random: int, block: int, covered: float = 0.0) -> float:
    """``kernels.math.random_blocks`` over whole blocks: of n draws from b blocks n b / (b + (n - 1) / 2)
    differ, and those that the base has whole, ``covered`` of a row's blocks, are not computed. A single row
    reads what it drew."""
    n, spread = num_random / block, (num_random / block - 1) / 2
    if shape.num_rows == 1:
        return float(num_random)
    if not shape.causal:
        b = math.ceil(shape.num_keys / block)
        pairs = shape.num_rows * block * n * max(0.0, b - covered) / (b + spread)
        return max(pairs, float(num_random))
    start, stop = (max(x / block - 0.5, covered) for x in rows_of(shape))
    ratio = (stop + spread + 0.5) / (start + spread + 0.5)
    rows = (stop - start) - (covered + spread + 0.5) * math.log(ratio)
    return max(block * block * n * max(0.0, rows), float(num_random))


def probe_flops(shape: CallShape) -> float:
    """``kernels.math.probe_rows``: exact logits of one row in 256, and of the last."""
    start, stop = rows_of(shape)
    first, end = start // PROBE_EVERY, stop // PROBE_EVERY
    last_too = shape.num_rows > 1 and stop % PROBE_EVERY > 0
    if shape.causal:
        keys = stop * last_too
        if end > first:
            keys += PROBE_EVERY * stairs(first, end, ROWS_AT_ONCE)
    else:
        keys = shape.num_keys * (end - first + last_too)
    return 2.0 * shape.key_dim * shape.num_heads * keys


def looks_into_buckets(shape: CallShape, reach: Reach, num_keys: int | None = None) -> bool:
    """Whether window, sinks and exact rows leave anything to find, where there are so many keys."""
    last = (shape.num_keys if num_keys is None else num_keys) - 1
    if shape.causal:
        return last >= reach.exact_rows and last - reach.window >= reach.sinks
    return last > reach.window


def coded_keys(shape: CallShape, reach: Reach) -> int:
    """Keys of a head that a call codes: all, until rows look into buckets for the first time."""
    known = shape.causal and looks_into_buckets(shape, reach, shape.num_keys - shape.num_rows)
    return shape.num_rows if known else shape.num_keys


@dataclass(frozen=True)
class Buckets:
    """Of a backend that looks into ``rounds`` of ``number`` buckets each. ``distinct`` rounds would find as
    many keys if none were found twice."""

    reach: Reach
    rounds: int
    number: int
    distinct: float


def bucket_pairs(shape: CallShape, buckets: Buckets) -> float:
    """``kernels.math.bucket_part``, or of a single row ``bucket_row``: per head, beyond window and sinks.

    Assumes that a row's bucket has ``_BUCKET_SKEW`` times the keys of the average one.
    """
    reach, c = buckets.reach, buckets.reach.cluster_size
    if not looks_into_buckets(shape, reach):
        return 0.0
    filled = max(1.0, buckets.number / _BUCKET_SKEW)
    last = float(c) if reach.whole else min(c, shape.num_keys / filled)
    alone = min(buckets.distinct * last, float(shape.num_keys))
    if shape.num_rows == 1:
        return alone
    start, stop = rows_of(shape)
    first = max(start, reach.exact_rows, reach.window + reach.sinks) if shape.causal else start
    rows, group = max(1, stop - first), shape.num_heads // shape.num_kv_heads
    pairs = _panel_pairs(rows, (first + stop) / 2 if shape.causal else stop, last, filled, group, reach)
    return max(buckets.rounds * pairs, alone)


def _panel_pairs(rows: int, position: float, last: float, filled: float, group: int, reach: Reach) -> float:
    """One round: panels full of rows, as wide as a bucket at the rows' mean ``position``, and one that is not
    full for every bucket that rows look into, as far as no neighbour goes into it."""
    c, height = reach.cluster_size, panel_rows(reach.cluster_size)
    step = height / group
    if reach.whole:
        return rows * (max(c, step) + min(c, step) / 4 + WIDTH_STEP / 4)
    most, more = -(-(c + height) // WIDTH_STEP) * WIDTH_STEP, step + WIDTH_STEP / 2
    full = rows * min(most, min(c, position / filled) + more)
    used = _MET * filled * -math.expm1(-rows * group / filled)
    return full + used * min(1.0, last / (c + height)) * step * min(most, last + more)


def bucket_flops(shape: CallShape, buckets: Buckets, coding: float) -> float:
    """Window, sinks and exact rows, what buckets add, and the probe of what was left out. ``coding``: what
    codes take where rows look into buckets."""
    reach = buckets.reach
    near = window_pairs(shape, reach.window, reach.sinks, reach.exact_rows if shape.causal else 0)
    attention = attention_flops(shape, near + bucket_pairs(shape, buckets))
    return attention + probe_flops(shape) + (coding if looks_into_buckets(shape, reach) else 0.0)


def lsh_buckets(params: LshParams, shape: CallShape) -> Buckets:
    """Rounds of hashes meet again what earlier ones have found, the more the clearer the keys' structure."""
    rounds, number = params.num_hash_rounds, params.num_buckets
    if params.variant == "smyrf":
        number = -(-shape.num_keys // params.cluster_size)
    return Buckets(lsh_reach(params), rounds, number, rounds**_DISTINCT)


def kmeans_buckets(params: KMeansParams) -> Buckets:
    """A key lies in one cluster."""
    return Buckets(kmeans_reach(params), params.num_probes, params.num_clusters, params.num_probes)
