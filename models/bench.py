"""Time and peak memory of reading one long document with every backend, on a real model.

    python -m models.bench --model smollm2-135m --lengths 4096 8192 16384

Each figure comes from a fresh process: the weights are loaded, then the document is read (decoders in chunks,
encoders in one step). Peak memory is the cache plus the high-water mark of the largest step, without the
weights. Lengths beyond what the model was made for are allowed: they measure cost, not quality. ``growth`` is
the exponent of peak memory over the lengths: 1 is linear, 2 would be an N x N tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter

import torch

from kernels.api import backend_names, parse_params
from models.contract import Choice, Slice, Want, Work
from models.loader import load_model
from models.runner import Model


@dataclass(frozen=True)
class Reading:
    """One document read once."""

    backend: str
    tokens: int
    seconds: float
    peak_bytes: int | None
    estimated_bytes: int
    density: float


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    if options.one is not None:
        print(json.dumps(asdict(read_once(options.model, options.one, options.lengths[0], options.chunk))))
        return 0
    print(
        f"{options.model}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"chunks of {options.chunk}\n"
    )
    print("| backend | tokens | seconds | tokens/s | density | peak MB | estimated MB | growth |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for backend in options.backends:
        readings = [_in_fresh_process(options, backend, tokens) for tokens in options.lengths]
        for reading in readings:
            print(_line(reading, growth(readings) if reading is readings[-1] else None), flush=True)
    return 0


def read_once(model: str, backend: str, tokens: int, chunk_tokens: int) -> Reading:
    """Load, read ``tokens`` random tokens with the backend's defaults, measure."""
    loaded = load_model(model, model, progress=lambda line: print(line, file=sys.stderr))
    assert isinstance(loaded, Model)
    loaded = loaded.with_max_tokens(max(tokens, loaded.info.max_tokens))
    choice = Choice(backend, parse_params(backend))
    torch.manual_seed(0)
    token_ids = torch.randint(5, loaded.tokenizer.vocab_size - 5, (tokens,)).tolist()
    sequence = loaded.open(tokens)
    chunk = chunk_tokens if loaded.info.causal else tokens
    began, peaks, total = perf_counter(), [], Work()
    for first in range(0, tokens, chunk):
        last = first + chunk >= tokens
        want: Want = "hidden" if not loaded.info.causal else "logits" if last else "nothing"
        held = sequence.held_bytes
        step = loaded.step([Slice(sequence, token_ids[first : first + chunk], choice, want, tokens)])
        peaks.append(None if step.peak_bytes is None else held + step.peak_bytes)
        total.add(step.results[0].work)
    seconds = perf_counter() - began
    measured = [peak for peak in peaks if peak is not None]
    estimated = loaded.estimate_bytes(tokens, int(loaded.info.causal), choice, chunk)
    density = total.pairs_kept / total.pairs_exact
    return Reading(backend, tokens, seconds, max(measured, default=None), estimated, density)


def growth(readings: Sequence[Reading]) -> float | None:
    """Exponent b of peak ~ tokens^b between the first and the last reading."""
    first, last = readings[0], readings[-1]
    if not first.peak_bytes or not last.peak_bytes or first.tokens == last.tokens:
        return None
    return math.log(last.peak_bytes / first.peak_bytes) / math.log(last.tokens / first.tokens)


def _in_fresh_process(options: argparse.Namespace, backend: str, tokens: int) -> Reading:
    command = [sys.executable, "-m", "models.bench", "--model", options.model, "--one", backend]
    command += ["--lengths", str(tokens), "--chunk", str(options.chunk)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return Reading(**json.loads(done.stdout.splitlines()[-1]))


def _line(r: Reading, exponent: float | None) -> str:
    peak = "-" if r.peak_bytes is None else f"{r.peak_bytes / 1e6:.0f}"
    grown = "" if exponent is None else f"{exponent:.2f}"
    return (
        f"| {r.backend} | {r.tokens:,} | {r.seconds:.1f} | {r.tokens / r.seconds:.0f} | {r.density:.4f} "
        f"| {peak} | {r.estimated_bytes / 1e6:.0f} | {grown} |"
    )


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.bench", description="Time and memory of long reads."
    )
    parser.add_argument("--model", default="smollm2-135m", help="demo model, directory, hub id or GGUF file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], metavar="TOKENS")
    parser.add_argument("--backends", nargs="+", default=list(backend_names()), choices=backend_names())
    parser.add_argument("--chunk", type=int, default=512, metavar="TOKENS", help="decoders: tokens per step")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
