"""What the service asks of a loaded model, in plain words and types. ``models.runner`` implements it on
transformers; the HTTP tests implement it on a byte tokenizer and no weights at all.

E model width · V vocabulary · T tokens of one packed step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kernels.contract import Impl, Params
from models.measured_error import LayerError as LayerError
from models.measured_error import MeasuredError as MeasuredError
from models.measured_error import Meter as Meter
from models.measured_error import Verify as Verify

if TYPE_CHECKING:
    from torch import Tensor

Task = Literal["encode", "generate", "score"]
Want = Literal["nothing", "logits", "scores", "hidden"]
"""What a step returns for a slice: nothing (a prefill chunk), the logits of its last row, the log-likelihood
of ``targets`` row by row, or the hidden states of all its rows."""


@dataclass(frozen=True)
class Choice:
    """One attention, chosen: a backend, its validated params, the seed of its random draws, and the impl that
    it must run by (``auto``: what suits the device)."""

    backend: str
    params: Params
    seed: int = 0
    impl: Impl = "auto"

    @cached_property
    def method(self) -> tuple[str, str]:
        """Backend, params and impl as one value to sort and group by. Params may hold mappings, which have no
        hash: what stands for them is their JSON, its keys in order."""
        name = self.backend if self.impl == "auto" else f"{self.backend} by {self.impl}"
        return name, json.dumps(self.params.model_dump(mode="json"), sort_keys=True)

    def at(self, ordinal: int) -> Choice:
        """What runs in a layer, counted among those to which a choice applies."""
        return self

    @property
    def parts(self) -> tuple[Choice, ...]:
        """Every attention that may run in some layer."""
        return (self,)

    def __hash__(self) -> int:
        return hash((self.method, self.seed))


class ModelError(Exception):
    """A model cannot be fetched or served; the message says why and what to do."""


@dataclass
class Work:
    """What attention did for one sequence, summed over steps. Pairs as in ``kernels.contract.Stats``, over
    the layers to which the choice applies; FLOPs over the whole forward (linear layers, every attention
    layer).

    ``dropped_mass`` sums the mean over heads of the softmax mass left out, over the ``dropped_rows`` pairs of
    a layer and a row that have an estimate. A backend may measure some rows of a call only: they stand for
    the call's others. ``unmeasured_rows`` are those of calls that measured none (most decode steps); the next
    of the same sequence that measures stands for them too (``then``).

    ``kept_per_head`` has, by ordinal of a layer whose heads choose apart, the pairs kept by each head;
    ``exact_per_head`` the pairs that ``exact`` would compute in each, in the same calls.
    """

    pairs_kept: int = 0
    pairs_exact: int = 0
    pairs_computed: int = 0
    pairs_dense: int = 0
    dropped_mass: float = 0.0
    dropped_rows: int = 0
    unmeasured_rows: int = 0
    flops: float = 0.0
    flops_exact: float = 0.0
    selection_ms: float = 0.0
    attention_ms: float = 0.0
    impl: str = ""
    kept_per_head: dict[int, list[int]] = field(default_factory=dict)
    exact_per_head: dict[int, int] = field(default_factory=dict)

    def then(self, step: Work) -> None:
        """Add the next step of the same sequence."""
        if step.dropped_rows:
            share = self.unmeasured_rows / step.dropped_rows
            self.dropped_mass += share * step.dropped_mass
            self.dropped_rows += self.unmeasured_rows
            self.unmeasured_rows = 0
        self.unmeasured_rows += step.unmeasured_rows
        self.add(step)

    def add(self, other: Work) -> None:
        """Add the work done for another sequence, or in another phase."""
        self.pairs_kept += other.pairs_kept
        self.pairs_exact += other.pairs_exact
        self.pairs_computed += other.pairs_computed
        self.pairs_dense += other.pairs_dense
        self.dropped_mass += other.dropped_mass
        self.dropped_rows += other.dropped_rows
        self.flops += other.flops
        self.flops_exact += other.flops_exact
        self.selection_ms += other.selection_ms
        self.attention_ms += other.attention_ms
        self.ran_by(other.impl)
        for layer, kept in other.kept_per_head.items():
            self.count_heads(layer, kept, other.exact_per_head[layer])

    def ran_by(self, impl: str) -> None:
        """Another call by ``impl``. A request may run by several: under a plan, or in its steps of one
        token."""
        if impl and impl != self.impl:
            self.impl = ", ".join(sorted({*self.impl.split(", "), *impl.split(", ")} - {""}))

    def count_heads(self, layer: int, kept: Sequence[int], exact: int) -> None:
        """``kept`` pairs of each head of one layer, of ``exact`` in each."""
        before = self.kept_per_head.get(layer, [0] * len(kept))
        self.kept_per_head[layer] = [a + b for a, b in zip(before, kept, strict=True)]
        self.exact_per_head[layer] = self.exact_per_head.get(layer, 0) + exact


@dataclass(frozen=True)
class Kept:
    """What a guard saw of one layer while it read a prompt under ``auto``.

    ``estimate``: of the layer's error over the rows read so far, repairs included, from ``rows`` of them that
    were computed exactly too (0 rows: the layer is exact by plan). ``exact_from``: the row from which on it
    ran exactly after all, so as to stay within the budget; None where it did not have to.
    """

    layer: int
    estimate: float
    rows: int
    exact_from: int | None


class SequenceState(Protocol):
    """A sequence's place in a model: how far it has been read, and its cached keys and values."""

    @property
    def kept(self) -> tuple[Kept, ...]:
        """By layer, where its prompt was read under a guard; () elsewhere. Readable after ``close``."""

    @property
    def length(self) -> int:
        """Tokens read so far: the absolute position of the next token."""

    @property
    def held_bytes(self) -> int:
        """Bytes of cache held now."""

    def close(self) -> None:
        """Free what it holds. Idempotent."""


@dataclass(frozen=True)
class Prompt:
    """What a new sequence will read first, and under which attention: where pages of the cache already hold a
    beginning of it, they are taken over instead of read again. Only prompts of the same ``salt`` share."""

    token_ids: Sequence[int]
    choice: Choice
    salt: str = ""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations predicted for a slice: of linear layers and head, and of attention."""

    linear: float
    attention: float


@dataclass(frozen=True)
class CacheUse:
    """Bytes of a model's pages now: ``held`` by sequences (a shared page counts once), ``cached`` for prompts
    that begin alike (nobody holds them), ``free`` (allocated and empty). Then counts since the model was
    loaded: prompt tokens looked up, those found, pages evicted."""

    held_bytes: int = 0
    cached_bytes: int = 0
    free_bytes: int = 0
    looked_up_tokens: int = 0
    found_tokens: int = 0
    evicted_pages: int = 0


@dataclass(frozen=True)
class Slice:
    """The next ``token_ids`` of one sequence in one step, and what is wanted of them.

    ``total`` is the prompt's whole length (a chunk of a prompt knows how long the prompt is: length-dependent
    rotary embeddings need it). ``targets`` (with ``want="scores"``) is as long as ``token_ids``.
    ``meter`` measures its attention's error: made by the same model for the same choice and total, for this
    sequence alone. ``logit_rows``: rows of the slice whose logits are wanted beside ``want`` (causal language
    models only).
    """

    sequence: SequenceState
    token_ids: Sequence[int]
    choice: Choice
    want: Want
    total: int
    targets: Sequence[int] = ()
    meter: Meter | None = None
    logit_rows: Sequence[int] = ()


@dataclass(frozen=True)
class SliceResult:
    """logits [V] fp32 | scores [n] fp32 (natural log) | hidden [n, E] fp32, as wanted; and the work done.
    ``row_logits`` [len(logit_rows), V] fp32 where ``logit_rows`` were named."""

    work: Work
    logits: Tensor | None = None
    scores: Tensor | None = None
    hidden: Tensor | None = None
    row_logits: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """One packed forward. ``peak_bytes`` is what the step itself took at its high-water mark, beyond the
    caches that were held before it; None where the device cannot say."""

    results: tuple[SliceResult, ...]
    peak_bytes: int | None


class Forward(Protocol):
    """A packed forward that can be left between layers, linear maps and query tiles, and gone on with
    later, while other steps of the same model run in between. One thread calls everything."""

    def advance(self, pause: Callable[[], bool]) -> StepResult | None:
        """Run on until ``pause``, asked at every place where it may stop, says so (None), or to the end.
        Raises what ``ServedModel.step`` raises; then, too, no sequence has advanced and it is over.
        ``peak_bytes`` is None where it was ever left."""

    def close(self) -> None:
        """Give up: what it holds is freed, no sequence has advanced. Idempotent."""


@dataclass(frozen=True)
class Encoding:
    """Token ids of one text, with special tokens as the model wants them, and each token's character span
    (``(0, 0)`` for special tokens)."""

    token_ids: list[int]
    char_spans: list[tuple[int, int]] = field(default_factory=list)


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, *, special_tokens: bool = True) -> Encoding: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_text(self, token_id: int) -> str:
        """One token as text, for log-probability tables."""

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The model's own chat template applied, generation prompt added. ModelError where it has none,
        ValueError where the template refuses the messages."""


@dataclass(frozen=True)
class ModelInfo:
    """What ``GET /v1/models`` tells, and what requests are checked against."""

    name: str
    source: str
    """Path or hub id as given."""
    revision: str | None
    architecture: str
    tasks: tuple[Task, ...]
    max_tokens: int
    dtype: str
    device: str
    causal: bool
    num_layers: int
    applied_layers: tuple[int, ...]
    """Attention layers to which a request's choice applies."""
    local_layers: dict[int, int]
    """Layers that the model itself declares local -> their window."""
    embedding_dim: int
    num_parameters: int
    pooling: Literal["mean", "cls", "last"] | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    """input_type -> prefix, added only where a request asks for it."""
    special_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    license: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WarmUp:
    """Something to run once before requests come: ``run`` compiles what the backend ``name`` needs."""

    name: str
    run: Callable[[], None]


class ServedModel(Protocol):
    """A model ready to serve. ``step`` is called from one thread only; everything else from any."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def unsupported(self, choice: Choice) -> list[str]:
        """Every reason why this model cannot run this choice; [] where it can."""

    def warm_ups(self) -> Sequence[WarmUp]:
        """Kernels that its backends would otherwise compile while a request waits; () where nothing is
        compiled, as on a CPU."""

    def open(self, capacity: int, prompt: Prompt | None = None) -> SequenceState:
        """A new sequence with room for ``capacity`` tokens (prompt plus new ones). Where the cache holds a
        beginning of ``prompt``, it starts after it: its ``length`` says how many tokens it was spared, at
        most all but the last. What it reads under the prompt's choice is then found by later prompts."""

    def cached_tokens(self, prompt: Prompt) -> int:
        """How many tokens ``open`` would spare now. From any thread."""

    def fork(self, sequence: SequenceState, capacity: int) -> SequenceState:
        """A new sequence that has read what ``sequence`` has read, and goes its own way from there."""

    def meter(self, verify: Verify, choice: Choice, total: int, *, decode: bool = False) -> Meter:
        """A meter for one sequence under this choice: of its prompt of ``total`` tokens, or of the tokens
        generated after it (``decode``). ValueError naming the field where ``verify.layers`` are not layers to
        which a choice applies, ``verify.rows`` is below 1, or the model's output projection is not known.
        From any thread."""

    def step(self, slices: Sequence[Slice]) -> StepResult:
        """One packed forward over the next tokens of many sequences. On an exception no sequence has
        advanced, and no meter has measured."""

    def begin(self, slices: Sequence[Slice]) -> Forward:
        """As ``step``, in pieces. Refuses bad slices at once; nothing runs yet. The sequences belong to it
        until it is over."""

    def estimate_bytes(self, tokens: int, new_tokens: int, choice: Choice, chunk_tokens: int) -> int:
        """Peak bytes that a request holds at once: cache and activations, without the weights."""

    def flops(self, rows: int, start: int, choice: Choice, want: Want) -> Flops:
        """Operations of a slice of ``rows`` tokens that begins at position ``start``, predicted in
        microseconds: what the scheduler prices steps with. From any thread."""

    def limit_cached(self, max_bytes: int) -> None:
        """Keep no more than so many bytes of pages that no sequence holds (0: none)."""

    def cache_use(self) -> CacheUse:
        """From any thread."""

    def close(self) -> None:
        """The model leaves service: cached pages are freed, no sequence is opened any more."""


def as_json(info: ModelInfo) -> dict[str, Any]:
    """The public half of ``info`` as plain JSON values."""
    return {
        "id": info.name,
        "object": "model",
        "owned_by": "longreach",
        "tasks": list(info.tasks),
        "max_tokens": info.max_tokens,
        "architecture": info.architecture,
        "dtype": info.dtype,
        "device": info.device,
        "source": info.source,
        "revision": info.revision,
        "license": info.license,
        "causal": info.causal,
        "num_layers": info.num_layers,
        "applied_layers": list(info.applied_layers),
        "local_layers": {str(layer): window for layer, window in info.local_layers.items()},
        "embedding_dim": info.embedding_dim,
        "num_parameters": info.num_parameters,
        "pooling": info.pooling,
        "input_types": sorted(info.prompts),
        "notes": list(info.notes),
    }
