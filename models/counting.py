"""What one attention call did, counted as its sequence's work."""

from __future__ import annotations

from kernels.contract import Stats
from models.contract import Work
from models.seam import LayerPlan


def count(work: Work, stats: Stats, layer: LayerPlan, num_rows: int) -> None:
    """Add a call over ``num_rows`` rows of one layer to its sequence's ``work``."""
    work.flops += layer.flops_per_pair * stats.pairs_computed + 2 * layer.shape.key_dim * stats.pairs_scored
    work.flops += stats.other_flops
    if layer.window is not None:  # what the network itself declares local costs the same under every choice
        work.flops_exact += layer.flops_per_pair * stats.pairs_computed
        return
    # A choice that keeps every pair and does nothing else is exact: what it computes beyond them is exact's
    # own cost. One that hashes or sums features as well has masked pairs of its own.
    as_exact = stats.pairs_kept == stats.pairs_exact and not stats.other_flops
    work.flops_exact += layer.flops_per_pair * (stats.pairs_computed if as_exact else stats.pairs_exact)
    work.pairs_kept += stats.pairs_kept
    work.pairs_exact += stats.pairs_exact
    work.pairs_computed += stats.pairs_computed
    work.pairs_dense += stats.pairs_dense
    if stats.dropped_mass is None:
        work.unmeasured_rows += num_rows
    else:  # a mean over the call's rows, or over some that stand for the others
        work.dropped_mass += stats.dropped_mass * num_rows
        work.dropped_rows += num_rows
    if stats.kept_per_head is not None:
        work.count_heads(layer.ordinal, stats.kept_per_head, stats.pairs_exact // layer.num_heads)
    work.selection_ms += stats.selection_ms
    work.attention_ms += stats.selection_ms + stats.compute_ms
    work.ran_by(stats.impl)
