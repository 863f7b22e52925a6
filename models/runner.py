"""A loaded network as the service sees it: ``models.contract.ServedModel`` on transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch

from kernels.api import why_no_impl
from kernels.registry import BACKENDS, UnknownBackend
from kernels.registry import load as load_backend
from models.contract import (
    CacheUse,
    Choice,
    Flops,
    ModelInfo,
    Prompt,
    SequenceState,
    Slice,
    StepResult,
    Tokenizer,
    Verify,
    Want,
    WarmUp,
)
from models.flops import predict_flops
from models.forward import LeavableForward, Ownership
from models.guard import guard_of
from models.heap import border_for, set_border
from models.learned import missing
from models.memory import estimate_bytes
from models.meter import SequenceMeter
from models.network import Network
from models.packed import step
from models.planned import WHOLE, Planned, stratum_of
from models.refusals import BEGUN, check
from models.sequence import OpenSequence, Sequences
from models.warm_ups import warm_ups_of

PRICES_KEPT = 2048


class Model:
    """ServedModel on a transformers network. ``step`` from one thread only, the rest from any."""

    def __init__(self, network: Network, info: ModelInfo, tokenizer: Tokenizer | None) -> None:
        self._network = network
        self._info = info
        self._tokenizer = tokenizer
        self._sequences = Sequences(network)
        self._begun = Ownership()
        self._flops = lru_cache(PRICES_KEPT)(partial(predict_flops, network))

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, "a model under self-test has no tokenizer"
        return self._tokenizer

    def unsupported(self, choice: Choice) -> list[str]:
        """Every reason why this model cannot run this choice; [] where it can."""
        if isinstance(choice, Planned):
            return self._planned_problems(choice)
        try:
            backend = load_backend(choice.backend)
        except UnknownBackend as error:
            return [str(error)]
        if not isinstance(choice.params, backend.params):
            wanted, given = backend.params.__name__, type(choice.params).__name__
            return [f"backend {choice.backend!r} takes {wanted}, got {given}"]
        kind = "causal" if self._info.causal else "bidirectional"
        reasons = list(backend.unsupported(choice.params, self._info.causal))
        if not getattr(backend.capabilities, kind):
            reasons.append(f"backend {choice.backend!r} has no {kind} form and {self._info.name!r} is {kind}")
        if self._info.causal and not backend.capabilities.decode:
            reasons.append(f"backend {choice.backend!r} has no decode step, which {self._info.name!r} needs")
        if backend.capabilities.learned and choice.backend not in self._network.learned:
            reasons.append(missing(choice.backend, self._info.name))
        return reasons + self._impl_problems(choice) + self._size_problems(choice)

    def warm_ups(self) -> Sequence[WarmUp]:
        """One for each backend that would run by impl triton, over the different layers of the network."""
        choices = [Choice(name, load_backend(name).params()) for name in BACKENDS]
        can = [choice.backend for choice in choices if not self.unsupported(choice)]
        return warm_ups_of(self._network, self._info, can)

    def _impl_problems(self, choice: Choice) -> list[str]:
        """Why the impl that was asked for cannot run on this model's device and sizes."""
        if choice.impl == "auto":
            return []
        place, dtype = torch.device(self._info.device), getattr(torch, self._info.dtype)
        shapes = [layer.shape for layer in self._network.plan.layers]
        widest = max(max(shape.key_dim, shape.value_dim) for shape in shapes)
        return why_no_impl(choice.backend, choice.impl, place, dtype, widest)

    def _planned_problems(self, choice: Planned) -> list[str]:
        applied = self._info.applied_layers
        if len(choice.layers) != len(applied):
            return [f"the plan has {len(choice.layers)} layers, {self._info.name!r} has {len(applied)}"]
        found = [reason for part in choice.parts for reason in self.unsupported(part)]
        borders = zip(choice.exact_from, map(stratum_of, choice.layers), strict=True)
        askew = sorted({(row, stratum) for row, stratum in borders if row is not None and row % stratum})
        found += [_told_border(row, unit) for row, unit in askew]
        if choice.guarded and not found:
            try:
                guard_of(choice, 1, self._network.plan, self._network.places)
            except ValueError as error:
                found.append(str(error))
        return found

    def _size_problems(self, choice: Choice) -> list[str]:
        """Params given layer by layer or head by head that are too long or too short for this network."""
        applied = [layer for layer in self._network.plan.layers if layer.window is None]
        heads = sorted({layer.shape.num_kv_heads for layer in applied})
        found = [choice.params.size_problems(len(applied), num_kv_heads) for num_kv_heads in heads]
        return list(dict.fromkeys(problem for problems in found for problem in problems))

    def with_max_tokens(self, max_tokens: int) -> Model:
        """The same network under another limit: what a longer document costs, whatever its quality."""
        return Model(self._network, replace(self._info, max_tokens=max_tokens), self._tokenizer)

    def open(self, capacity: int, prompt: Prompt | None = None) -> OpenSequence:
        """A new sequence with room for ``capacity`` tokens, beginning after what the cache holds of
        ``prompt``. ValueError beyond the model's limit."""
        if not 1 <= capacity <= self._info.max_tokens:
            raise ValueError(
                f"capacity is {capacity} tokens; {self._info.name!r} reads 1 to {self._info.max_tokens}. "
                "Shorten the input or ask for fewer new tokens"
            )
        return self._sequences.open(capacity, prompt)

    def cached_tokens(self, prompt: Prompt) -> int:
        """How many tokens ``open`` would spare now. From any thread."""
        return self._sequences.cached_tokens(prompt)

    def fork(self, sequence: SequenceState, capacity: int) -> OpenSequence:
        """A new sequence that has read what ``sequence`` has read, and goes its own way from there."""
        assert isinstance(sequence, OpenSequence), "a sequence opened by another model. This is a bug."
        if sequence in self._begun:
            raise ValueError(f"{BEGUN}: fork it when that is over")
        return self._sequences.fork(sequence, capacity)

    def limit_cached(self, max_bytes: int) -> None:
        """Keep no more than so many bytes of pages that no sequence holds (0: none)."""
        self._sequences.limit_cached(max_bytes)

    def cache_use(self) -> CacheUse:
        """From any thread."""
        return self._sequences.use()

    def close(self) -> None:
        """The model leaves service: cached pages are freed, no sequence is opened any more."""
        self._sequences.close()

    def meter(self, verify: Verify, choice: Choice, total: int, *, decode: bool = False) -> SequenceMeter:
        """A meter for one sequence: of its prompt of ``total`` tokens, or of what is generated after it.
        ValueError naming the field. From any thread."""
        plan = self._network.plan
        layers = plan.applied_layers if verify.layers is None else tuple(sorted(set(verify.layers)))
        unknown = [layer for layer in layers if layer not in plan.applied_layers]
        if unknown or not layers:
            given = f"{unknown} are not" if unknown else "none is given: name some"
            raise ValueError(f"layers: {given} among the layers {_told(plan.applied_layers)} of this model")
        plans = {layer: plan.layers[layer] for layer in layers}
        return SequenceMeter(choice, verify, total, decode, plans, self._network.places)

    def step(self, slices: Sequence[Slice]) -> StepResult:
        """One packed forward over the next tokens of many sequences.

        Raises ValueError (a slice that cannot be run, named by its index), NonFiniteOutput, or what the
        kernels raise. On any exception no sequence has advanced, and no meter has measured.
        """
        check(slices, self._network, self._info.max_tokens, self._begun)
        self._set_border(slices)
        with torch.inference_mode():
            return step(self._network, slices)

    def begin(self, slices: Sequence[Slice]) -> LeavableForward:
        """As ``step``, in pieces: ``advance`` runs it until it is asked to stop between layers, matrix
        products, stretches of query tiles or rows of the head.

        A layer's attention is one piece where its backend summarises all keys (selection ``prompt``, or
        ``approximates`` without a cache to go on from).

        ValueError as ``step``, at once. Its sequences belong to it until it is over.
        """
        check(slices, self._network, self._info.max_tokens, self._begun)
        over = self._begun.take([s.sequence for s in slices])
        run, resume = partial(step, self._network, tuple(slices)), partial(self._set_border, slices)
        return LeavableForward(run, over, resume)

    def _set_border(self, slices: Sequence[Slice]) -> None:
        """A step's memory comes from where its size wants it, whatever other steps ran in between."""
        sizes = self._network.sizes
        if sizes.on_cpu:
            set_border(border_for(sizes.hidden_bytes(sum(len(s.token_ids) for s in slices))))

    def flops(self, rows: int, start: int, choice: Choice, want: Want) -> Flops:
        """Operations of a slice of ``rows`` tokens from position ``start``, predicted. From any thread."""
        return self._flops(rows, start, choice, want)

    def estimate_bytes(self, tokens: int, new_tokens: int, choice: Choice, chunk_tokens: int) -> int:
        """Peak bytes of one request without the weights: its cache, and the activations of its largest
        step under this attention."""
        return estimate_bytes(self._network.sizes, tokens, new_tokens, choice, chunk_tokens)


def _told_border(row: int, stratum: int) -> str:
    if stratum == WHOLE:
        return f"exact_from is {row}: an attention that looks at all rows together is exact from 0 or nowhere"
    return f"exact_from is {row}: exact rows begin at multiples of {stratum}"


def _told(numbers: Sequence[int]) -> str:
    """In a row: their ends; else each."""
    if not numbers:
        return "(none)"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} .. {numbers[-1]}"
    return ", ".join(map(str, numbers))
