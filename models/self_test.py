"""Does the packed stream compute what the network computes? Asked in numbers before a model is served.

Two random sequences of different length, longer than any window, run packed through the seam with ``exact``;
each must equal transformers' own ``eager`` on it alone, called without position ids. A decoder must also give
the same rows in chunks and token by token through the cache. Where the model is too large (or its windows and
rotary thresholds too long) for that to take about a second, it runs on a shrunken copy: same class, fewer
layers, random weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.registry import load as load_backend
from models.contract import Choice, ModelError, ModelInfo, Slice
from models.network import Network, build_network
from models.plan import refuse_class, refuse_config
from models.rotary import is_length_dependent, replace_rotary
from models.runner import Model
from models.seam import NAME
from models.shrink import SHRUNKEN_LENGTH, largest_window, shrink

TOLERANCE = 5e-4  # of the largest value; fp32 rounding reaches about 1e-5, a window wrong by one key 1e-2
DIRECT_FLOPS = 5e10


@dataclass(frozen=True)
class Reference:
    """One sequence alone under transformers' eager attention: hidden [n, E], logits [n, V] of a causal
    model."""

    token_ids: list[int]
    hidden: Tensor
    logits: Tensor | None


def self_test(network: Any, max_tokens: int) -> int:
    """Test a loaded transformers network (attention set to the seam). Returns its position offset.
    ModelError.

    ``network`` is left as it was.
    """
    refuse_config(network.config)
    refuse_class(type(network))
    if _runs_directly(network):
        return _run(network, max_tokens)
    try:
        small = shrink(network)
    except Exception as error:
        raise ModelError(
            f"{type(network).__name__} cannot be checked: a small copy could not be made ({error})"
        ) from error
    return _run(small, min(max_tokens, 4 * SHRUNKEN_LENGTH))


def _run(network: Any, max_tokens: int) -> int:
    name = type(network).__name__
    beyond = max(largest_window(network.config), SHRUNKEN_LENGTH - 4 if is_length_dependent(network) else 0)
    longest = min(max_tokens, beyond + 13)
    lengths = (max(2, longest - 10), longest)
    try:
        with _eager(network):
            references = [_reference(network, ids) for ids in _random_ids(network, lengths)]
        replace_rotary(network)
        built = build_network(network, max_tokens)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{name} failed its self-test: {error}") from error
    worst = float("inf")
    for offset in _offsets(network.config):
        candidate = built.at_offset(offset)
        worst = min(worst, _packed_error(candidate, references))
        if worst <= TOLERANCE:
            _refuse_if_chunks_differ(name, candidate, references[-1])
            return offset
    raise ModelError(
        f"{name} failed its self-test: two packed sequences differ from each alone by {worst:.1e} of the "
        "largest value. It mixes tokens outside attention, or its positions or masks are not as declared"
    )


def _reference(network: Any, ids: list[int]) -> Reference:
    token_ids = torch.tensor([ids], device=network.device)
    with torch.inference_mode():
        if network.get_output_embeddings() is not None:
            output = network(input_ids=token_ids, use_cache=False)
            hidden = network.base_model(input_ids=token_ids, use_cache=False)[0]
            return Reference(ids, hidden[0].float(), output.logits[0].float())
        return Reference(ids, network(input_ids=token_ids)[0][0].float(), None)


def _exact() -> Choice:
    return Choice("exact", load_backend("exact").params())


def _packed_error(network: Network, references: Sequence[Reference]) -> float:
    """Largest difference from the references over their largest value, packed into one step."""
    model = _serve(network)
    slices = [
        Slice(model.open(len(r.token_ids)), r.token_ids, _exact(), "hidden", len(r.token_ids))
        for r in references
    ]
    try:
        results = model.step(slices).results
    except (ValueError, IndexError):
        return float("inf")
    errors = [_relative(result.hidden, r.hidden) for result, r in zip(results, references, strict=True)]
    if network.head is not None:
        errors += [_relative(network.head(r.hidden.to(network.body.dtype)), r.logits) for r in references]
    return max(errors)


def _refuse_if_chunks_differ(name: str, network: Network, reference: Reference) -> None:
    """Decoders: three prefill chunks, then token by token, must give the rows of the whole."""
    if not network.plan.causal:
        return
    model, ids = _serve(network), reference.token_ids
    state = model.open(len(ids))
    cuts = [0, len(ids) // 3, 2 * len(ids) // 3, len(ids) - 2, len(ids) - 1, len(ids)]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        if stop <= start:
            continue
        result = model.step([Slice(state, ids[start:stop], _exact(), "hidden", len(ids))]).results[0]
        if _relative(result.hidden, reference.hidden[start:stop]) > TOLERANCE:
            raise ModelError(
                f"{name} failed its self-test: read in chunks it differs from being read at once "
                f"(positions {start} to {stop - 1})"
            )


def _relative(got: Tensor | None, wanted: Tensor | None) -> float:
    assert got is not None and wanted is not None
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))


def _serve(network: Network) -> Model:
    """The network under test as a model, without a tokenizer."""
    longest = 1 << 30
    info = ModelInfo("self-test", "", None, "", (), longest, "", "", network.plan.causal, 0, (), {}, 0, 0)
    return Model(network, info, tokenizer=None)


@contextmanager
def _eager(network: Any) -> Iterator[None]:
    """transformers' own attention for the reference. Only here, before the model serves anybody."""
    network.set_attn_implementation("eager")
    try:
        yield
    finally:
        network.set_attn_implementation(NAME)


def _offsets(config: Any) -> list[int]:
    """Where positions may begin: at 0, or (RoBERTa and its kin) behind the padding index."""
    pad = getattr(config, "pad_token_id", None)
    return [0] if pad is None else [0, pad + 1]


def _random_ids(network: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Sequences of ordinary tokens: special ones change how some networks count positions."""
    config = network.config
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "mask_token_id")
    special = {v for name in names for v in _as_list(getattr(config, name, None))}
    rows = network.get_input_embeddings().num_embeddings
    ordinary = torch.tensor([t for t in range(min(rows, 4096)) if t not in special])
    generator = torch.Generator().manual_seed(0)
    return [ordinary[torch.randint(len(ordinary), (n,), generator=generator)].tolist() for n in lengths]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _runs_directly(network: Any) -> bool:
    """Small enough, in fp32, and without thresholds that only long sequences cross."""
    rows = 6 * (largest_window(network.config) + 13)
    params = sum(p.numel() for p in network.parameters())
    return (
        network.dtype == torch.float32
        and 2 * params * rows <= DIRECT_FLOPS
        and not is_length_dependent(network)
    )
