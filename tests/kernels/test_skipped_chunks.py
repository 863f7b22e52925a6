"""Chunks of a text that is read in part: what is kept from chunk to chunk must not depend on whether every
one was asked for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels.api import backend_names, parse_params
from kernels.contract import Call
from kernels.math.kept import KeptStates
from kernels.math.summaries import BlockSummaries
from kernels.registry import load

TOKENS, CHUNK, DIM = 1280, 256, 16
CAUSAL = [
    name for name in backend_names() if load(name).capabilities.causal and name != "sbm"
]  # sbm needs clusters of the model's own, and keeps nothing of earlier chunks


def read(name: str, chunks: Sequence[int]) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, heads, TOKENS, DIM, generator=generator) for heads in (4, 2, 2))
    summaries, kept, outputs = BlockSummaries(TOKENS), KeptStates(), {}
    for start in chunks:
        call = Call(causal=True, scale=0.25, seed=0, layer=0, start=start, summaries=summaries, kept=kept)
        stop = start + CHUNK
        run = load(name).impls["torch"]
        outputs[start] = run(
            q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], parse_params(name), call
        ).out
    return outputs


@pytest.mark.parametrize("name", CAUSAL)
def test_a_chunk_is_the_same_whether_those_before_it_were_read_or_not(name: str) -> None:
    every, some = (read(name, chunks) for chunks in (range(0, TOKENS, CHUNK), (CHUNK, 4 * CHUNK)))
    for start, out in some.items():
        torch.testing.assert_close(out, every[start], rtol=1e-5, atol=1e-5)
