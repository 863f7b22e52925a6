"""One document of a calibration: the error and time of every rung in every layer, and where exact's time goes
while the model reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

from kernels.api import parse_params
from models.calibrate_ladders import Sample, Timing
from models.contract import Choice, Slice, Want, Work
from models.profile import EXACT
from models.quality_contenders import Contender
from models.quality_error import ErrorRow, measure_errors
from models.quality_record import LayerRecord, chunks, record_layers
from models.runner import Model

MAX_RECORDED_BYTES = 1 << 30
"""Queries, keys and values recorded at once; more layers take another reading."""


def measure_document(
    model: Model,
    document: int,
    token_ids: Sequence[int],
    rungs: Sequence[Contender],
    chunk_tokens: int,
    seed: int,
    progress: Callable[[str], object],
) -> list[Sample]:
    """Every rung in every layer, on the layer's inputs along exact's trajectory. ``chunk_tokens`` 0: read at
    once."""
    samples = []
    for record in _records(model, token_ids, chunk_tokens):
        rows = measure_errors([record], rungs, chunk_tokens=chunk_tokens, seed=seed)
        samples += [_sample(document, record.index, place, row) for place, row in enumerate(rows)]
        progress(f"layer {record.index}")
    return samples


def _records(model: Model, token_ids: Sequence[int], chunk_tokens: int) -> Iterator[LayerRecord]:
    """Layer by layer, as many recorded in one reading as fit; what was handed out is let go of."""
    layers = model.info.applied_layers
    at_once = max(1, MAX_RECORDED_BYTES // max(_bytes(model, layer, len(token_ids)) for layer in layers))
    for first in range(0, len(layers), at_once):
        records = record_layers(model._network, token_ids, layers[first : first + at_once], chunk_tokens)
        while records:
            yield records.pop(0)


def _bytes(model: Model, layer: int, tokens: int) -> int:
    plan, itemsize = model._network.plan.layers[layer], model._network.body.dtype.itemsize
    keys_and_values = plan.shape.num_kv_heads * (plan.shape.key_dim + plan.shape.value_dim)
    return tokens * (plan.num_heads * plan.shape.key_dim + keys_and_values) * int(itemsize)


def _sample(document: int, layer: int, rung: int, row: ErrorRow) -> Sample:
    return Sample(
        document,
        row.tokens,
        layer,
        rung,
        row.layer_errors[0],
        row.attention_s,
        row.selection_s,
        row.exact_attention_s,
        row.density,
    )


def time_exact(model: Model, token_ids: Sequence[int], chunk_tokens: int) -> Timing:
    """Read once as served, a decoder's last logits or an encoder's hidden states wanted at the end."""
    tokens, choice, work = len(token_ids), Choice(EXACT, parse_params(EXACT)), Work()
    sequence = model.open(tokens)
    began = perf_counter()
    for rows in chunks(tokens, chunk_tokens):
        at_end: Want = "logits" if "generate" in model.info.tasks else "hidden"
        want = at_end if rows.stop == tokens else "nothing"
        step = model.step([Slice(sequence, token_ids[rows], choice, want, tokens)])
        work.then(step.results[0].work)
    total_ms = 1e3 * (perf_counter() - began)
    sequence.close()
    return Timing(tokens, work.attention_ms, max(total_ms - work.attention_ms, 0.0))
