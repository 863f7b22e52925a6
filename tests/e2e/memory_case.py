"""``python -m tests.e2e.memory_case '[MODEL, BACKEND, TOKENS, NEW_TOKENS]'``: peak bytes of one request in a
process of its own, measured and estimated, as JSON. Run as the engine runs it: a decoder's prompt in chunks,
an encoder's as a whole, then a token a step.
"""

from __future__ import annotations

import json
import sys

import torch

from kernels.api import parse_params
from kernels.peak import PeakBytes
from models.contract import Choice, Slice, Want
from models.loader import load_model
from models.runner import Model

CHUNK_TOKENS = 512
WARM_UP_TOKENS = 16


def main(name: str, backend: str, tokens: int, new_tokens: int) -> None:
    loaded = load_model(name, name, progress=lambda line: print(line, file=sys.stderr))
    assert isinstance(loaded, Model)
    choice = Choice(backend, parse_params(backend))
    torch.manual_seed(0)
    token_ids = torch.randint(5, loaded.tokenizer.vocab_size - 5, (tokens + new_tokens,)).tolist()
    peak_of(loaded, choice, token_ids[:WARM_UP_TOKENS], WARM_UP_TOKENS)
    measured = peak_of(loaded, choice, token_ids, tokens)
    estimated = loaded.estimate_bytes(tokens, new_tokens, choice, CHUNK_TOKENS)
    print(json.dumps({"measured": measured, "estimated": estimated}))


def peak_of(model: Model, choice: Choice, token_ids: list[int], tokens: int) -> int | None:
    """Bytes beyond those held before, at the request's highest moment. Every step resets the mark, so it is
    read after each."""
    peak = PeakBytes(torch.device("cpu"))
    sequence = model.open(len(token_ids))
    stops = range(CHUNK_TOKENS, tokens, CHUNK_TOKENS) if model.info.causal else ()
    borders = [0, *stops, *range(tokens, len(token_ids) + 1)]
    highest: list[int] = []
    for begin, stop in zip(borders, borders[1:], strict=False):
        want: Want = "hidden" if not model.info.causal else "logits" if stop >= tokens else "nothing"
        model.step([Slice(sequence, token_ids[begin:stop], choice, want, tokens)])
        read = peak.read()
        highest += [] if read is None else [read]
    sequence.close()
    return max(highest, default=None)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
