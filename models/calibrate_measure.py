"""One document of a calibration: the error and time of every rung in every layer, and where exact's time goes
while the model reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from time import perf_counter

import torch

from kernels.api import parse_params
from models.calibrate_ladders import Sample, Timing
from models.call import AttentionClock, wait_for
from models.contract import Choice, Slice, Want, Work
from models.forward import offer_to_pause
from models.profile import EXACT
from models.quality_contenders import Contender
from models.quality_error import ErrorRow, measure_errors
from models.quality_record import LayerRecord, chunks, record_layers
from models.runner import Model

MEASURED_TOKENS = 4096
"""Rows that every rung runs on in a layer. Of longer documents these are chunks evenly spaced, others in
every layer: docs/auto.md says what that does to the errors."""

Clock = Callable[[], float]

MAX_RECORDED_BYTES = 2 << 30
"""Queries, keys and values recorded at once; more layers take another reading."""


def measure_document(
    model: Model,
    document: int,
    token_ids: Sequence[int],
    rungs: Sequence[Contender],
    chunk_tokens: int,
    seed: int,
    progress: Callable[[str], object],
    recorded_bytes: int | None = None,
) -> list[Sample]:
    """Every rung in every layer, on the layer's inputs along exact's trajectory. ``chunk_tokens`` 0: read at
    once. ``recorded_bytes``: of inputs held at once, ``MAX_RECORDED_BYTES`` by default."""
    samples: list[Sample] = []
    layers = model.info.applied_layers
    at_once = recorded_layers(model, len(token_ids), recorded_bytes)
    for number, record in enumerate(_records(model, token_ids, layers, at_once, chunk_tokens), 1):
        rows = measure_layer(record, rungs, chunk_tokens, seed, first=document)
        samples += [_sample(document, record.index, place, row) for place, row in enumerate(rows)]
        progress(f"layer {number} of {len(layers)}")
    return samples


def measure_layer(
    record: LayerRecord, rungs: Sequence[Contender], chunk_tokens: int, seed: int, first: int = 0
) -> list[ErrorRow]:
    """Every rung in turns with exact. Each call is timed by itself, with a yield point before it: where it is
    left, no time of it is running. ``first``: another choice of chunks for every number."""
    return measure_errors(
        [record],
        rungs,
        chunk_tokens=chunk_tokens,
        seed=seed,
        pieces=measured_chunks(record.q.shape[2], chunk_tokens, first + record.index),
        before_call=offer_to_pause,
    )


def measured_chunks(tokens: int, chunk_tokens: int, first: int) -> list[slice]:
    """One chunk of every stratum of equally many, about ``MEASURED_TOKENS`` rows in all: the first of the
    first stratum, the second of the second and so on round, ``first`` places further on."""
    everything = list(chunks(tokens, chunk_tokens))
    most = max(1, tokens // MEASURED_TOKENS)
    every = max(n for n in range(1, most + 1) if len(everything) % n == 0)
    strata = [everything[begin : begin + every] for begin in range(0, len(everything), every)]
    return [stratum[(first + number) % every] for number, stratum in enumerate(strata)]


def recorded_layers(model: Model, tokens: int, recorded_bytes: int | None = None) -> int:
    """Layers whose inputs are recorded in one reading: as many as fit, 1 at least."""
    layers = model.info.applied_layers
    limit = MAX_RECORDED_BYTES if recorded_bytes is None else recorded_bytes
    return min(max(1, limit // max(layer_bytes(model, layer, tokens) for layer in layers)), len(layers))


def layer_bytes(model: Model, layer: int, tokens: int) -> int:
    """Queries, keys and values of one layer."""
    plan, itemsize = model._network.plan.layers[layer], model._network.body.dtype.itemsize
    keys_and_values = plan.shape.num_kv_heads * (plan.shape.key_dim + plan.shape.value_dim)
    return tokens * (plan.num_heads * plan.shape.key_dim + keys_and_values) * int(itemsize)


def _records(
    model: Model, token_ids: Sequence[int], layers: Sequence[int], at_once: int, chunk_tokens: int
) -> Iterator[LayerRecord]:
    """Layer by layer; what was handed out is let go of."""
    for first in range(0, len(layers), at_once):
        records = record_layers(model._network, token_ids, layers[first : first + at_once], chunk_tokens)
        while records:
            yield records.pop(0)


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


def time_exact(
    model: Model, token_ids: Sequence[int], chunk_tokens: int, clock: Clock = perf_counter
) -> Timing:
    """Read once as served, a decoder's last logits or an encoder's hidden states wanted at the end.
    ``clock``: seconds, without those for which the reading was left."""
    tokens, choice, work = len(token_ids), Choice(EXACT, parse_params(EXACT)), Work()
    at_end: Want = "logits" if "generate" in model.info.tasks else "hidden"
    waited, device = AttentionClock(), torch.device(model.info.device)
    sequence = model.open(tokens)
    try:
        with waited.running() if device.type == "cuda" else nullcontext():
            began = clock()
            for rows in chunks(tokens, chunk_tokens):
                want = at_end if rows.stop == tokens else "nothing"
                step = model.step([Slice(sequence, token_ids[rows], choice, want, tokens)])
                work.then(step.results[0].work)
            wait_for(device)
            total_ms = 1e3 * (clock() - began)
    finally:
        sequence.close()
    attention_ms = 1e3 * waited.seconds if device.type == "cuda" else work.attention_ms
    return Timing(tokens, attention_ms, max(total_ms - attention_ms, 0.0))
